"""Selective checkpoints whose policy says ``MUST_CPU_OFFLOAD`` (or ``PREFER``) really offload.

PyTorch 2.13 takes that policy for ``RECOMPUTE`` in eager mode: its caching mode stores the results
of ``SAVE`` only. While a cache's hooks are on, such a result is stored as a handle of the cache
instead, and taken from there when the region is run again in backward.
"""

import threading
from typing import Any, Protocol

import torch
from torch.utils import checkpoint
from torch.utils._pytree import tree_map

from offload.swap.activations import ActivationCache
from offload.swap.saved import View

_OFFLOADED = (
    checkpoint.CheckpointPolicy.MUST_CPU_OFFLOAD,
    checkpoint.CheckpointPolicy.PREFER_CPU_OFFLOAD,
)
_CACHING: Any = getattr(checkpoint, "_CachingTorchDispatchMode", None)  # private: may go
_lock = threading.Lock()


class _Active(threading.local):
    def __init__(self) -> None:
        self.caches: list[ActivationCache] = []


_active = _Active()


class SavedTensors(Protocol):
    """Takes what autograd saves, and gives it back."""

    def pack(self, tensor: torch.Tensor) -> Any:
        """Called for each tensor that is saved; what is returned stands for it in the graph."""

    def unpack(self, packed: Any) -> torch.Tensor:
        """The tensor again; any number of times."""


def put_on(cache: ActivationCache, saved: SavedTensors | None = None) -> None:
    """The saved-tensor hooks of ``cache``, or of ``saved`` on top of it, come into force here.

    That is on this thread, and for the results that selective checkpoints keep.
    """
    _teach()
    if _CACHING is None:
        cache.journal.notice(
            "activations", "this PyTorch's selective checkpoints can't be taught MUST_CPU_OFFLOAD"
        )
    hooks = saved or cache
    torch._C._autograd._push_saved_tensors_default_hooks(hooks.pack, hooks.unpack)
    _active.caches.append(cache)


def take_off() -> None:
    """The hooks that were put on last end."""
    _active.caches.pop()
    torch._C._autograd._pop_saved_tensors_default_hooks()


class _Offloaded:
    """Stands in the place of checkpoint's own wrapper of a stored result."""

    __slots__ = ("cache", "saved")

    def __init__(self, cache: ActivationCache, tensor: torch.Tensor) -> None:
        self.cache = cache
        # Below autograd a detached tensor shares its version counter only if told so, as
        # checkpoint's own wrapper does.
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
            self.saved = cache.pack(tensor)

    def get_val(self, allow_cache_entry_mutation: bool) -> torch.Tensor:
        saved = self.saved
        if isinstance(saved, View) and saved.is_modified():
            if not allow_cache_entry_mutation:
                raise RuntimeError(
                    "Tensor cached during selective activation checkpoint has been mutated"
                )
            saved.version = saved.tensor._version
        return self.cache.unpack(saved)


def _teach() -> None:
    """Teach the caching mode once; without active hooks it does what it did before."""
    with _lock:
        if _CACHING is None or getattr(_CACHING.__torch_dispatch__, "offload", False):
            return
        original = _CACHING.__torch_dispatch__

        def dispatch(mode: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not _active.caches or torch.compiler.is_compiling():
                return original(mode, func, types, args, kwargs)
            return _dispatch(original, mode, func, types, args, kwargs)

        dispatch.offload = True  # type: ignore[attr-defined]
        _CACHING.__torch_dispatch__ = dispatch


def _dispatch(original: Any, mode: Any, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """Run ``original`` with ``OFFLOAD`` told as ``SAVE``; then offload what it saved."""
    policy_fn, offloaded = mode.policy_fn, False

    def policy(*policy_args: Any, **policy_kwargs: Any) -> Any:
        nonlocal offloaded
        chosen = policy_fn(*policy_args, **policy_kwargs)
        offloaded = chosen in _OFFLOADED
        return checkpoint.CheckpointPolicy.MUST_SAVE if offloaded else chosen

    mode.policy_fn = policy
    try:
        result = original(mode, func, types, args, kwargs)
    finally:
        mode.policy_fn = policy_fn
    if offloaded:
        key = checkpoint._sac_storage_key(func, args)
        entries, last = mode.storage[key], mode.func_counter[key] - 1
        cache = _active.caches[-1]
        entries[last] = tree_map(
            lambda kept: kept if kept.version is None else _Offloaded(cache, kept.val),
            entries[last],
        )
    return result
