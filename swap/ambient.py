"""What surrounds a computation beside its tensors: settings of the thread and of the process.

[Note: settings] torch keeps some settings for each thread (grad mode, autocast, modes, hooks on
saved tensors): a function that goes on on another thread must find them there. Others belong to
the process (default dtype, which attention kernels, determinism): of functions that run in turns
each must find what it left, or ``with torch.nn.attention.sdpa_kernel(…)`` around a model would
reach into the others, and its end would set what another one had found.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import attention
from torch.overrides import _get_current_function_mode_stack
from torch.overrides import _pop_mode as _pop_function_mode
from torch.overrides import _push_mode as _push_function_mode
from torch.utils import _python_dispatch as dispatch

_AUTOCAST_TYPES = ("cpu", "cuda")


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadSettings:
    """The settings of one thread; ``applied`` has them on another one."""

    threads: int
    grad: bool
    autocast: dict[str, tuple[bool, torch.dtype]]
    autocast_cache: bool
    function_modes: tuple[Any, ...]
    dispatch_modes: tuple[Any, ...]
    saved_tensor_hooks: tuple[Any, Any] | None

    @classmethod
    def here(cls) -> "ThreadSettings":
        """Those of the calling thread."""
        return cls(
            threads=torch.get_num_threads(),
            grad=torch.is_grad_enabled(),
            autocast={
                kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
                for kind in _AUTOCAST_TYPES
            },
            autocast_cache=torch.is_autocast_cache_enabled(),
            function_modes=tuple(_get_current_function_mode_stack()),
            dispatch_modes=tuple(dispatch._get_current_dispatch_mode_stack()),
            saved_tensor_hooks=torch._C._autograd._top_saved_tensors_default_hooks(False),
        )

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Have them on the calling thread, which is a new one."""
        with ExitStack() as undo:
            torch.set_num_threads(self.threads)  # OpenMP keeps it for each thread, too
            undo.enter_context(torch.set_grad_enabled(self.grad))
            self._autocast(undo)
            for mode in self.function_modes:
                _push_function_mode(mode)
                undo.callback(_pop_function_mode)
            for mode in self.dispatch_modes:
                dispatch._push_mode(mode)
                undo.callback(dispatch._pop_mode)
            if self.saved_tensor_hooks is not None:
                torch._C._autograd._push_saved_tensors_default_hooks(*self.saved_tensor_hooks)
                undo.callback(torch._C._autograd._pop_saved_tensors_default_hooks)
            yield

    def _autocast(self, undo: ExitStack) -> None:
        torch.set_autocast_cache_enabled(self.autocast_cache)
        for kind, (enabled, dtype) in self.autocast.items():
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        if any(enabled for enabled, _ in self.autocast.values()):
            # As inside the region: what is entered and left in it must not drop its casts.
            torch.autocast_increment_nesting()
            undo.callback(torch.autocast_decrement_nesting)


def _set_deterministic(setting: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(setting[0], warn_only=setting[1])


def _attention_kernels() -> Any:
    return attention._cur_sdpa_kernel_backends(with_priority=True)


def _set_attention_kernels(kernels: Any) -> None:
    attention._sdpa_kernel(kernels, set_priority=True)


_SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], None]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (
        lambda: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        _set_deterministic,
    ),
    (_attention_kernels, _set_attention_kernels),
)


def process_settings() -> tuple[Any, ...]:
    """The settings of the process that decide what bits come out."""
    return tuple(get() for get, _ in _SETTINGS)


def set_process_settings(settings: tuple[Any, ...]) -> None:
    """Make ``settings`` the present ones."""
    for (get, put), value in zip(_SETTINGS, settings, strict=True):
        if get() != value:
            put(value)
