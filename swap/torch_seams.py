"""Where torch's own functions on gradients are led through ``streamed_calls`` while attached.

[Note: whoever holds the function] A script has often imported ``clip_grad_norm_`` by name before
anything is attached, so that another function under that name in torch's modules would not be seen.
torch makes these functions by a decorator (``no_grad``), whose result holds the undecorated
function in a closure cell. It is the content of that cell that is replaced, so every holder of the
function is served. Where an installed torch has no such cell, its function stays as it is:
gradients are then read through their mappings, slower and as right.

``GradScaler`` unscales by a method, which is looked up in the class at each call.

[Note: a scale on a device] ``GradScaler`` has its scale where the loss is, and copies it, and the
flag for infinities, to where gradients are. To host memory it copies ``non_blocking``: such a copy
out of a device goes to pinned memory and has not come when the call returns. Kernels of the host
wait for nothing and would take what was in that memory before, so whoever has gradients in host
memory and losses on a device has to wait for both. Fused optimizers copy them once more, from the
attributes ``grad_scale`` and ``found_inf`` (``scale_on_host``).
"""

import threading
import weakref
from collections.abc import Callable
from functools import wraps
from types import CellType
from typing import Any

import torch
from torch.nn.utils import clip_grad
from torch.optim import Optimizer

from offload.swap.gradient_stream import GradientStream
from offload.swap.streamed_calls import StreamedCalls

_FUNCTIONS = ("_get_total_norm", "_clip_grads_with_norm_", "clip_grad_norm_", "clip_grad_value_")

_streams: weakref.WeakSet[GradientStream] = weakref.WeakSet()
_restore: list[Callable[[], None]] = []
_active = threading.local()  # .call: one of the functions runs, and calls others of them


def lead(stream: GradientStream) -> None:
    """Lead torch's functions on gradients through ``stream``, too, from now on."""
    if not _restore:
        for name in _FUNCTIONS:
            if (cell := cell_of(getattr(clip_grad, name, None))) is not None:
                _replace_in(cell)
        _replace_unscaling()
    _streams.add(stream)


def leave(stream: GradientStream) -> None:
    """Undo ``lead``; torch is as it was when nobody needs it any more."""
    _streams.discard(stream)
    if not _streams:
        while _restore:
            _restore.pop()()


def cell_of(function: Any) -> CellType | None:
    """The closure cell that holds what ``function`` decorates."""
    original = getattr(function, "__wrapped__", None)
    cells: tuple[CellType, ...] = getattr(function, "__closure__", None) or ()
    return next((cell for cell in cells if cell.cell_contents is original), None)


def _replace_in(cell: CellType) -> None:
    original = cell.cell_contents
    cell.cell_contents = _streamed(original)

    def restore() -> None:
        cell.cell_contents = original

    _restore.append(restore)


def _replace_unscaling() -> None:
    scaler: Any = torch.amp.GradScaler
    original = scaler._unscale_grads_
    scaler._unscale_grads_ = _scaled_on_host(_streamed(original))

    def restore() -> None:
        scaler._unscale_grads_ = original

    _restore.append(restore)


def _streamed(original: Callable[..., Any]) -> Callable[..., Any]:
    """``original``, with what it does to gradients in scratch done as a stream."""

    @wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or getattr(_active, "call", False):
            return original(*args, **kwargs)
        calls = StreamedCalls(list(_streams))
        if not calls.is_needed:
            return original(*args, **kwargs)
        _active.call = True
        try:
            with calls:
                result = original(*args, **kwargs)
        finally:
            _active.call = False
            calls.finish()
        return result

    return call


def _scaled_on_host(original: Callable[..., Any]) -> Callable[..., Any]:
    """``original``, with the scale and the flag in host memory, where gradients are there."""

    @wraps(original)
    def call(
        scaler: Any, optimizer: Optimizer, inv_scale: torch.Tensor, found_inf: torch.Tensor,
        *others: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        if not inv_scale.is_cpu and _has_host_gradients(optimizer):
            inv_scale, found_inf = inv_scale.cpu(), found_inf.cpu()
        return original(scaler, optimizer, inv_scale, found_inf, *others, **kwargs)

    return call


def _has_host_gradients(optimizer: Optimizer) -> bool:
    return any(
        parameter.grad is not None and parameter.grad.is_cpu
        for group in optimizer.param_groups
        for parameter in group["params"]
    )


def scale_on_host(optimizer: Optimizer) -> None:
    """Bring what ``GradScaler`` has told a fused ``optimizer`` to host memory, where it steps.

    See [Note: a scale on a device].
    """
    for name in ("grad_scale", "found_inf"):
        value = getattr(optimizer, name, None)
        if isinstance(value, torch.Tensor) and not value.is_cpu:
            setattr(optimizer, name, value.cpu())  # GradScaler deletes it behind the step
