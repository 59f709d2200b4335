"""What tells of its use before it is used, for as long as its bytes are old.

[Note: guarded tensors] Bytes that are to become others later would be read too early by code that
nobody has planned. So a tensor over such bytes is, for that time, of a class of its own, which
torch asks before any of its functions, methods and attributes comes near the tensor
(``__torch_function__``). What asks for no bytes, such as its shape, passes. The class is exchanged
in place, so the tensor stays the object that everybody holds. Who reads past torch, by an address
taken earlier, is not seen: see ``ForwardStep`` for what is done about that.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import local
from types import new_class
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

_ATTRIBUTES = """
    shape dtype device layout requires_grad is_leaf grad ndim nbytes itemsize is_cuda is_cpu is_meta
    is_sparse is_quantized is_nested grad_fn retains_grad _version output_nr
"""
_METHODS = """
    size dim ndimension numel nelement element_size stride is_contiguous is_floating_point
    is_complex storage_offset get_device
"""
_STATE_METHODS = """
    __getitem__ __setitem__ __delitem__ __iter__ __reversed__ __contains__ __len__ __eq__ __ne__
    __repr__ __ior__ get keys values items pop popitem setdefault update clear
"""


def _harmless() -> frozenset[Any]:
    """Functions that need no bytes of their tensors; to drop a gradient is one."""
    readers = {getattr(torch.Tensor, name).__get__ for name in _ATTRIBUTES.split()}
    methods = {getattr(torch.Tensor, name) for name in _METHODS.split()}
    functions = {torch.numel, torch.is_floating_point, torch.is_complex}
    grad: Any = torch.Tensor.grad
    return frozenset({*readers, *methods, *functions, grad.__set__})


_HARMLESS = _harmless()


class _Here(local):
    """How many of our own calls this thread is in, before which nobody is told."""

    depth = 0


class Guards:
    """Puts tensors and dictionaries on guard, and takes them off.

    Args:
        before_use: called before a use; takes everything off whose bytes it makes new.
    """

    def __init__(self, before_use: Callable[[], None]) -> None:
        self._before_use = before_use
        self._here = _Here()
        self._classes = {plain: self._guarded(plain) for plain in (torch.Tensor, nn.Parameter)}
        self._plain = {guarded: plain for plain, guarded in self._classes.items()}

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Uses inside are our own."""
        self._here.depth += 1
        try:
            yield
        finally:
            self._here.depth -= 1

    def tell(self) -> None:
        """Something is about to be used."""
        if not self._here.depth:
            self._before_use()

    def put_on(self, tensor: torch.Tensor) -> None:
        """Be told of uses of ``tensor``, whose class is torch's own."""
        tensor.__class__ = self._classes[type(tensor)]

    def take_off(self, tensor: torch.Tensor) -> None:
        """Let ``tensor`` be as it was."""
        plain = self._plain.get(type(tensor))
        if plain is not None:
            tensor.__class__ = plain

    def _guarded(self, plain: type[torch.Tensor]) -> type[torch.Tensor]:
        def ask(
            _cls: type,
            func: Callable[..., Any],
            _types: Sequence[type],
            args: Sequence[Any] = (),
            kwargs: Mapping[str, Any] | None = None,
        ) -> Any:
            if func in _HARMLESS or self._here.depth:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **(kwargs or {}))
            self._before_use()
            for leaf in tree_leaves((args, kwargs)):
                self.take_off(leaf)  # one that outlived its guard, too
            return func(*args, **(kwargs or {}))

        def duplicate(tensor: torch.Tensor, memo: dict[int, Any]) -> Any:
            self.tell()
            self.take_off(tensor)
            return copy.deepcopy(tensor, memo)

        methods = {
            "__torch_function__": classmethod(ask),
            "__deepcopy__": duplicate,
            "__module__": plain.__module__,
            "__qualname__": plain.__qualname__,
        }
        return new_class(plain.__name__, (plain,), exec_body=lambda body: body.update(methods))


class GuardedState(defaultdict[Any, Any]):
    """``optimizer.state`` that tells of each use.

    Args:
        guards: are told; it is an ordinary dictionary where nothing is on guard.
    """

    def __init__(self, content: Mapping[Any, Any], guards: Guards) -> None:
        self._guards = guards
        super().__init__(dict, content)

    def __reduce__(self) -> Any:
        self._guards.tell()
        return defaultdict, (dict, dict(self))

    def copy(self) -> Any:
        """An ordinary one."""
        return defaultdict(dict, self)

    __copy__ = copy

    def __or__(self, other: Mapping[Any, Any]) -> Any:
        return self.copy() | dict(other)

    def __ror__(self, other: Mapping[Any, Any]) -> Any:
        return dict(other) | self.copy()


def _telling(name: str) -> Callable[..., Any]:
    plain = getattr(defaultdict, name)

    def call(state: GuardedState, *args: Any, **kwargs: Any) -> Any:
        state._guards.tell()
        return plain(state, *args, **kwargs)

    return call


for _name in _STATE_METHODS.split():
    setattr(GuardedState, _name, _telling(_name))
