"""Autograd on an accelerator without hardware: what torch computes becomes kernels of its streams.

    with Deferred(device):
        loss = model(batch)      # any eager code; its tensors hold bytes of ``device``
        loss.backward()

On the simulated device every operation then takes effect late, and code that moves saved tensors
must declare each edge, as on a real one. What must know a value (``item``), and what draws random
numbers, whose order belongs to the host, waits for all work first.
"""

from collections.abc import Callable, Container
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from offload.tiers.accelerator import Accelerator

_METADATA = {
    "set_", "resize_", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
}  # fmt: skip
_ALIASES = {"detach", "_unsafe_view"}  # views that their schemas don't tell of
_VALUES = {"_local_scalar_dense", "equal", "is_nonzero"}
_MOST_SHAPES = 1 << 12
_known_shapes: dict[Any, Any] = {}  # what an operation returns, by it and its arguments


class Deferred(TorchDispatchMode):
    """See the module.

    Args:
        on_launch: called before each kernel; the moment for other things to happen.
        beside_host: what gets no tensor of the device is done by the host, at once, as torch does
            it; otherwise all tensors are of the device.
        apart: keys of storages in host memory (``_cdata``) that may not meet tensors of the device
            in one operation: those that torch would tell from the device's.

    Attributes:
        is_device: without this mode nothing computes, so nobody may leave it out.
    """

    is_device = True

    def __init__(
        self,
        device: Accelerator,
        on_launch: Callable[[], None] | None = None,
        *,
        beside_host: bool = False,
        apart: Callable[[], Container[int]] = frozenset,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._beside_host = beside_host
        self._apart = apart
        self._device = device
        self._on_launch = on_launch

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        call = partial(func, *args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        in_place = name in _METADATA and name.endswith("_")
        if func.is_view or name in _ALIASES or in_place or func.namespace == "profiler":
            return call()
        if self._beside_host and not self._is_of_device(func, args, kwargs):
            return call()
        if self._on_launch is not None:
            self._on_launch()
        seeded = torch.Tag.nondeterministic_seeded in func.tags
        if seeded or name in _VALUES:
            self._device.synchronize()
        if name in _VALUES:
            return call()
        if func._schema.is_mutable:
            call() if seeded else self._launch(call)
            return _mutated(func, args, kwargs or {})
        if seeded or name in _METADATA:
            return self._stored(call())
        results = _shapes(func, args, kwargs or {})
        stored = self._stored(results)
        self._launch(lambda: _fill(stored, call()))
        return stored

    def _is_of_device(self, func: Any, args: Any, kwargs: Any) -> bool:
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if not any(map(self._device.owns, tensors)):
            return False
        apart = self._apart()
        if func.overloadpacket is not torch.ops.aten.copy_ and any(
            tensor.dim() and tensor.untyped_storage()._cdata in apart for tensor in tensors
        ):
            raise RuntimeError(f"{func} got tensors of the host and of {self._device.name}")
        return True

    def _launch(self, call: Callable[[], object]) -> None:
        def kernel() -> None:
            # As in this dispatch: below autograd, whose version counters have counted already.
            with (
                torch._C._AutoDispatchBelowAutograd(),
                torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, True),
            ):
                call()

        self._device.launch(kernel)

    def _stored(self, results: Any) -> Any:
        """``results`` with their bytes on the device; undefined ones if they are shapes."""
        return tree_map_only(torch.Tensor, self._store, results)

    def _store(self, result: torch.Tensor) -> torch.Tensor:
        if result.numel() == 0:
            return torch.empty_strided(result.size(), result.stride(), dtype=result.dtype)
        memory = self._device.allocate(result.untyped_storage().nbytes())
        self._device.current_stream().wait(memory.ready)
        stored = torch.empty(0, dtype=result.dtype).set_(
            memory.tensor.untyped_storage(), 0, result.size(), result.stride()
        )
        if not result.is_meta:
            stored.copy_(result)
        return stored


def _shapes(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What ``func`` returns, without bytes; torch takes long to tell, so it is remembered."""
    key = func, _described(args), _described(kwargs)
    try:
        found = _known_shapes.get(key)
    except TypeError:  # an argument that can't be hashed
        return _computed_shapes(func, args, kwargs)
    if found is None:
        if len(_known_shapes) == _MOST_SHAPES:
            _known_shapes.clear()
        found = _known_shapes[key] = _computed_shapes(func, args, kwargs)
    return found


def _described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.size(), value.stride(), value.dtype
    if isinstance(value, dict):
        return tuple((name, _described(value[name])) for name in sorted(value))
    if isinstance(value, list | tuple):
        return tuple(map(_described, value))
    return type(value), value


def _computed_shapes(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    args, kwargs = tree_map_only(torch.Tensor, _shape, (args, kwargs))
    if "device" in kwargs:
        kwargs["device"] = torch.device("meta")
    return func(*args, **kwargs)


def _shape(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


def _fill(stored: Any, results: Any) -> None:
    for target, result in zip(tree_leaves(stored), tree_leaves(results), strict=True):
        # What nobody needs (statistics of a norm in evaluation) is left out without being told.
        if isinstance(target, torch.Tensor) and result is not None and result.numel():
            target.copy_(result)


def _mutated(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What ``func`` gives back: the tensors that it writes to."""
    written = [
        kwargs[argument.name] if argument.kwarg_only else args[at]
        for at, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    count = len(func._schema.returns)
    return None if count == 0 else written[0] if count == 1 else tuple(written)
