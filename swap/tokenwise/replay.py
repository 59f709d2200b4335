"""Executes the operations of a chain once more, on the tail of the rows only."""

import functools
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from offload.swap.tokenwise.analyse import Chain
from offload.swap.tokenwise.program import Node, Ref, Value
from offload.swap.tokenwise.rows import Axis, base_name, resized_args

GRID_ROWS = 64
"""Cuts are multiples of this, with as many rows on each side: where linear layers give the same
bits for fewer rows (measured; one remaining row, for one, takes another kernel)."""


def cuts(rows: int) -> tuple[int, ...]:
    """Where sequences of ``rows`` tokens may be cut: 0 rebuilds all rows, ``rows`` none."""
    inner = range(GRID_ROWS, rows - GRID_ROWS + 1, GRID_ROWS)
    return (0, *inner, rows) if rows >= GRID_ROWS else (rows,)


def rows_of(tensor: torch.Tensor, axis: Axis, start: int, stop: int) -> torch.Tensor:
    """A view of some rows of each sequence; the dimension of the rows is split if it must be."""
    if axis.outer == 1:
        return tensor.narrow(axis.dim, start, stop - start)
    per_sequence = tensor.shape[axis.dim] // axis.outer
    split: torch.Tensor = tensor.unflatten(axis.dim, (axis.outer, per_sequence))
    return split.narrow(axis.dim + 1, start, stop - start)


def sliced(tensor: torch.Tensor, axis: Axis, start: int, stop: int) -> torch.Tensor:
    """Some rows of each sequence in the tensor's own shape and order of dimensions, dense."""
    view = rows_of(tensor, axis, start, stop)
    shape = list(tensor.shape)
    shape[axis.dim] = axis.outer * (stop - start)
    stride = _dense_stride(tuple(shape), tensor.stride())
    if axis.outer == 1 and _same_stride(shape, view.stride(), stride):
        return view
    result = torch.empty_strided(shape, stride, dtype=tensor.dtype, device=tensor.device)
    rows_of(result, axis, 0, stop - start).copy_(view)
    return result


def _same_stride(shape: list[int], one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return all(
        size == 1 or mine == theirs for size, mine, theirs in zip(shape, one, other, strict=True)
    )


def _dense_stride(shape: tuple[int, ...], like: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a dense tensor whose dimensions lie in the order that ``like`` tells.

    A dimension of stride 0 (expanded) stays expanded.
    """
    stride = [0] * len(shape)
    passed = 1
    order = sorted(range(len(shape)), key=lambda dim: (like[dim], -dim))
    for dim in order:
        if like[dim] == 0 and shape[dim] > 1:
            continue
        stride[dim] = passed
        passed *= shape[dim]
    return tuple(stride)


@dataclass(frozen=True, slots=True)
class _Step:
    """One operation with the arguments for fewer rows."""

    node: Node
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    func: Any
    dtype: torch.dtype  # of the first result, which an operation in place keeps
    used_up: tuple[int, ...]  # values that nothing needs after it


class Replay:
    """A chain compiled for one cut: rows ``cut:`` of each sequence are rebuilt.

    Attributes:
        weights: names of the parameters and buffers that it reads.
    """

    def __init__(self, chain: Chain, cut: int) -> None:
        program = chain.program
        self.chain = chain
        self.cut = cut
        self._values = program.values
        self._rows = program.rows
        self._steps: list[_Step] = []
        last_use: dict[int, int] = {}
        for position, index in enumerate(chain.nodes):
            for value in program.nodes[index].refs():
                last_use[value] = position
        for position, index in enumerate(chain.nodes):
            node = program.nodes[index]
            axes = tuple(chain.axes[out] for out in node.outs)
            self._steps.append(
                _Step(
                    node,
                    resized_args(node, axes, self._rows, self._rows - cut),
                    dict(node.kwargs),
                    _functional(node.op),
                    program.values[node.outs[0]].dtype,
                    (
                        *(value for value, last in last_use.items() if last == position),
                        *(out for out in node.outs if out not in last_use),
                    ),
                )
            )
        self.weights = tuple(
            dict.fromkeys(
                name
                for index in chain.nodes
                for value in program.nodes[index].refs()
                if (name := program.values[value].name) is not None
            )
        )

    def _steps_of(self, roots: Collection[int]) -> tuple[list[_Step], list[int]]:
        """The steps behind some of the targets, and the sources that they start from."""
        needed = set(roots)
        steps: list[_Step] = []
        for step in reversed(self._steps):
            if needed.intersection(step.node.outs):
                steps.append(step)
                needed.update(step.node.refs())
        steps.reverse()
        return steps, [value for value in self.chain.sources if value in needed]

    def sources_of(self, roots: Collection[int]) -> list[int]:
        """The sources that rebuilding these targets starts from."""
        return self._steps_of(roots)[1]

    def run(
        self,
        sources: Mapping[int, torch.Tensor],
        weights: Mapping[str, torch.Tensor],
        tails: Mapping[int, torch.Tensor],
    ) -> None:
        """Rebuild the tail rows of all targets.

        Args:
            sources: whole tensors by value.
            weights: the block's parameters and buffers by name.
            tails: by value: where the rows of each target go, shaped as ``rows_of`` gives them.
        """
        with torch.no_grad(), torch.autocast("cpu", enabled=False), _disable_current_modes():
            env: dict[int, torch.Tensor] = {}
            for value, tensor in sources.items():
                axis = self.chain.axes[value]
                env[value] = (
                    tensor.detach()
                    if axis is None
                    else sliced(tensor.detach(), axis, self.cut, self._rows)
                )
            for step in self._steps_of(tails)[0]:
                self._execute(step, env, weights)
                for out in step.node.outs:
                    tail = tails.get(out)
                    if tail is not None:
                        tail.copy_(env[out].reshape(tail.shape))
                for value in step.used_up:
                    env.pop(value, None)

    def _execute(
        self, step: _Step, env: dict[int, torch.Tensor], weights: Mapping[str, torch.Tensor]
    ) -> None:
        resolve = functools.partial(self._resolve, env, weights)
        result = step.func(
            *map(resolve, step.args), **{name: resolve(arg) for name, arg in step.kwargs.items()}
        )
        results = [result] if isinstance(result, torch.Tensor) else list(result)
        if step.node.mutated:
            results[0] = results[0].to(step.dtype)
        env.update(zip(step.node.outs, results, strict=False))

    def _resolve(
        self, env: dict[int, torch.Tensor], weights: Mapping[str, torch.Tensor], arg: Any
    ) -> Any:
        if isinstance(arg, Ref):
            value = self._values[arg.value]
            if value.name is not None:
                return _viewed(weights[value.name].detach(), value)
            return env[arg.value]
        if isinstance(arg, tuple):
            return [self._resolve(env, weights, item) for item in arg]
        return arg


def _viewed(weight: torch.Tensor, value: Value) -> torch.Tensor:
    if tuple(weight.shape) == value.shape and weight.stride() == value.stride:
        return weight
    return weight.as_strided(value.shape, value.stride, value.offset)


@functools.cache
def _functional(op: str) -> Any:
    """The operation by name, the one that makes a new tensor where it writes in place."""
    _, name, overload = op.split(".")
    if name in ("view", "_unsafe_view"):
        return torch.ops.aten.reshape.default
    plain = base_name(op)
    packet = getattr(torch.ops.aten, plain)
    return getattr(packet, overload)


def identical(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same bits; equal NaNs are equal here, 0 and -0 are not."""
    if one.is_complex() or one.itemsize not in _BITS:
        return torch.equal(one, other)
    bits = _BITS[one.itemsize]
    return torch.equal(one.contiguous().view(bits), other.contiguous().view(bits))


def relative_error(rebuilt: torch.Tensor, saved: torch.Tensor) -> float:
    """Largest difference over the largest magnitude; infinite where either is not finite."""
    wide = torch.float64
    difference = (rebuilt.to(wide) - saved.to(wide)).abs().max().item()
    scale = saved.to(wide).abs().max().item()
    error = difference / scale if scale else difference
    return error if math.isfinite(error) else math.inf


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
