"""``model.to(device)`` for a model that computes there already: its parameters stay where they are.

[Note: calls that move a model] Scripts, Hugging Face's Trainer and Accelerate call ``to`` or
``cuda`` with the device that they compute on, whenever they get hold of a model. One that is
attached computes there, but its parameters are host tensors for good (``stand_ins`` [Note:
stand-ins]): torch would bring all of them to the device at once, and away from the store. So such a
call brings back the buffers that have left the device, and is over; what else it asks for (another
type, another device) is torch's, as ever. Both methods are looked up in ``Module`` at each call,
by classes that override them too.
"""

import weakref
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn

_MoveBuffers = Callable[[], None]
_staying: weakref.WeakKeyDictionary[nn.Module, tuple[torch.device, _MoveBuffers]] = (
    weakref.WeakKeyDictionary()
)
_restore: list[Callable[[], None]] = []


def stay(model: nn.Module, device: torch.device, move_buffers: _MoveBuffers) -> None:
    """From now on the parameters of ``model`` stay where they are when it is moved to ``device``.

    Args:
        move_buffers: brings all of its buffers there.
    """
    if not _restore:
        _replace("to", _to)
        _replace("cuda", _cuda)
    for module in model.modules():
        _staying[module] = device, move_buffers


def move_freely(model: nn.Module) -> None:
    """Undo ``stay``; torch is as it was when nobody needs it any more."""
    for module in model.modules():
        _staying.pop(module, None)
    if not _staying:
        while _restore:
            _restore.pop()()


def _replace(name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = getattr(nn.Module, name)
    setattr(nn.Module, name, make(original))
    _restore.append(lambda: setattr(nn.Module, name, original))


def _to(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def to(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if module not in _staying:
            return original(module, *args, **kwargs)
        parsed: tuple[Any, ...] = torch._C._nn._parse_to(*args, **kwargs)
        device, dtype, _non_blocking, form = parsed
        if device is None or not _settled(module, device):
            return original(module, *args, **kwargs)
        if dtype is not None:
            module = original(module, dtype)
        if form is not None:
            module = original(module, memory_format=form)
        return module

    return to


def _cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def cuda(module: nn.Module, device: Any = None) -> Any:
        if module in _staying and _settled(module, _cuda_device(device)):
            return module
        return original(module, device)

    return cuda


def _cuda_device(given: Any) -> torch.device:
    """What ``Module.cuda`` takes ``given`` for."""
    if given is None:
        return torch.device("cuda")
    return torch.device("cuda", given) if isinstance(given, int) else torch.device(given)


def _settled(module: nn.Module, wanted: torch.device) -> bool:
    """Whether ``module`` is to go where it computes; its buffers are there then."""
    device, move_buffers = _staying[module]
    if wanted.type != device.type or wanted.index not in (None, device.index):
        return False
    move_buffers()
    return True
