"""What is done to saved tensors is no operation of the model: no dispatch mode sees it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)


def unwatched() -> AbstractContextManager[object]:
    """No mode sees what happens inside but one that is the device itself, by ``is_device``.

    Such a one is ``offload.tiers.simulated.deferred``: without it nothing would be computed.
    """
    devices = [
        mode for mode in _get_current_dispatch_mode_stack() if getattr(mode, "is_device", False)
    ]
    return _only(devices) if devices else torch._C._DisableTorchDispatch()


def takes_saved(pack: Callable[[torch.Tensor], Any]) -> bool:
    """Whether autograd hands what it saves to the hook ``pack``, outside of backward.

    In a region of ``torch.utils.checkpoint``, say, it does not.
    """
    top: Any = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return (
        torch.is_grad_enabled()
        and torch._C._current_graph_task_id() == -1
        and top is not None
        and bool(top[0] == pack)
    )


@contextmanager
def _only(modes: list[TorchDispatchMode]) -> Iterator[None]:
    with _disable_current_modes():
        for mode in modes:
            mode.__enter__()
        try:
            yield
        finally:
            for mode in reversed(modes):
                mode.__exit__(None, None, None)
