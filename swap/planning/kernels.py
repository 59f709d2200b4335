"""What one kernel call computes and moves, told from its arguments without running it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from offload.swap.planning.program import Operation, OperationKind, Product

# Exponentials, or several passes over each row.
_HEAVY = frozenset(
    {
        "gelu", "gelu_backward", "silu", "silu_backward", "sigmoid", "tanh", "tanh_backward", "exp",
        "log", "erf", "pow", "rsqrt", "sin", "cos", "_softmax", "_softmax_backward_data",
        "_log_softmax", "_log_softmax_backward_data", "native_layer_norm",
        "native_layer_norm_backward", "native_group_norm", "native_group_norm_backward",
        "native_batch_norm", "native_batch_norm_backward", "_fused_rms_norm",
        "_fused_rms_norm_backward", "native_dropout", "bernoulli_", "mean", "var",
    }
)  # fmt: skip
# These read no more than they write.
_LOOKUPS = frozenset({"embedding", "index_select", "gather", "index", "nll_loss_forward"})
_ATTENTION = "scaled_dot_product"
_FIRST_FACTOR = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}  # its place among the arguments


def describe(
    func: Any, arguments: Sequence[Any], options: Mapping[str, Any], output: Any
) -> Operation:
    """The record of one call of the operator ``func``."""
    name = func._schema.name.partition("::")[2]
    read, written = tensors_of([arguments, dict(options)]), tensors_of([output])
    dtype = str((written or read)[0].dtype).removeprefix("torch.") if written or read else "none"
    flops, rows = _flops(func, name, arguments, options, output, read)
    kind: OperationKind = "heavy" if name in _HEAVY else "pointwise"
    causal_keys = 0
    if _ATTENTION in name:
        kind = "attention"
        causal_keys = _causal_keys(name, [*arguments, *options.values()], read)
    elif flops:
        kind = "matmul"
    elif _is_view(func, read, written):
        return Operation(name=name, kind="view", flops=0, nbytes=0, rows=0, dtype=dtype)
    moved = 2 * _nbytes(written) if name in _LOOKUPS else _nbytes(read) + _nbytes(written)
    return Operation(
        name=name,
        kind=kind,
        flops=flops,
        nbytes=moved,
        rows=rows,
        dtype=dtype,
        causal_keys=causal_keys,
        product=_product(name, arguments),
    )


def tensors_of(values: Iterable[Any]) -> list[torch.Tensor]:
    """The tensors among nested arguments."""
    return [leaf for leaf in tree_leaves(list(values)) if isinstance(leaf, torch.Tensor)]


def _is_view(func: Any, read: Sequence[torch.Tensor], written: Sequence[torch.Tensor]) -> bool:
    if func._schema.is_mutable or not written:
        return not written and not func._schema.is_mutable
    storages = {tensor.untyped_storage()._cdata for tensor in read}
    return all(tensor.untyped_storage()._cdata in storages for tensor in written)


def _nbytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the elements; an expanded tensor has only those of its storage."""
    return sum(
        min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())
        for tensor in tensors
    )


def _flops(
    func: Any,
    name: str,
    arguments: Sequence[Any],
    options: Mapping[str, Any],
    output: Any,
    read: Sequence[torch.Tensor],
) -> tuple[int, int]:
    """Floating-point operations, and the smallest dimension of the matrices."""
    if _ATTENTION in name:
        return _attention_flops(name, [*arguments, *options.values()], read), 0
    counter = flop_registry.get(func.overloadpacket)
    if counter is None:
        return 0, 0
    flops = int(counter(*arguments, **options, out_val=output))
    matrices = [tensor for tensor in read if tensor.dim() >= 2]
    rows = min((size for tensor in matrices for size in tensor.shape[-2:]), default=0)
    return flops, rows


def _product(name: str, arguments: Sequence[Any]) -> Product | None:
    place = _FIRST_FACTOR.get(name)
    if place is None:
        return None
    first, second = arguments[place : place + 2]
    return Product(
        rows=int(first.shape[-2]),
        inner=int(first.shape[-1]),
        columns=int(second.shape[-1]),
        first_turned=first.stride(-1) != 1,
        second_turned=second.stride(-1) != 1,
        dtype=str(first.dtype).removeprefix("torch."),
    )


def _attention_flops(name: str, arguments: Sequence[Any], read: Sequence[torch.Tensor]) -> int:
    """Two products forward; backward makes them again and four more. Causal: half of each."""
    backward = "backward" in name
    query, key, value = read[1:4] if backward else read[:3]
    batch = math.prod(query.shape[:-2])
    one = 2 * batch * query.shape[-2] * key.shape[-2] * query.shape[-1]
    two = 2 * batch * query.shape[-2] * key.shape[-2] * value.shape[-1]
    products = 3 * one + 2 * two if backward else one + two
    return products // 2 if _is_causal(arguments) else products


def _causal_keys(name: str, arguments: Sequence[Any], read: Sequence[torch.Tensor]) -> int:
    key = read[2] if "backward" in name else read[1]
    return key.shape[-2] if _is_causal(arguments) else 0


def _is_causal(arguments: Sequence[Any]) -> bool:
    return any(argument is True for argument in arguments)
