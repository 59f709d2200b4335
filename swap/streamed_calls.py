"""torch's clipping and unscaling, with what they do to gradients in scratch done as a stream.

The code of torch itself runs: which gradients, in which groups and order, what is multiplied with
what, which errors are raised, is decided there, in whatever version is installed. Only the
operations that it calls meanwhile on gradients in scratch go to ``gradient_stream``. What is not
known here, or is not in scratch, goes on to torch as it is.

Between two operations of such a call no code of the user runs. So changes wait, one call long: a
gradient is read and written once for all of them, and not at all where they change no bit.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from offload.swap.gradient_stream import Change, Filed, GradientStream
from offload.swap.known_norms import NormCall


def _foreach_norm(gradient: torch.Tensor, order: float) -> torch.Tensor:
    return torch._foreach_norm([gradient], order)[0]


_NORMS: Mapping[Any, Callable[[torch.Tensor, float], torch.Tensor]] = {
    torch._foreach_norm: _foreach_norm,
    torch.linalg.vector_norm: torch.linalg.vector_norm,
}
_UNSCALE: Any = torch._amp_foreach_non_finite_check_and_unscale_
_PRODUCTS = frozenset({torch._foreach_mul_, torch.Tensor.mul_, _UNSCALE})
_CHANGES = _PRODUCTS | {torch._foreach_clamp_min_, torch._foreach_clamp_max_, torch.Tensor.clamp_}


@dataclass(slots=True, eq=False)
class _Found:
    """A gradient in scratch that the call has met.

    Attributes:
        changes: those that wait.
        is_finite: the call has found no NaN and no infinity in it.
    """

    stream: GradientStream
    filed: Filed
    changes: list[Change] = field(default_factory=list)
    is_finite: bool = False

    def holds_finite(self) -> bool:
        """Whether it is known to have no NaN and no infinity."""
        norms = self.stream.gradients.norms
        return self.is_finite or (not self.changes and norms.holds_finite(self.filed.home))


class StreamedCalls(TorchFunctionMode):
    """Active while one of torch's functions runs; ``finish`` follows it.

    Args:
        streams: of every engine that is attached.
    """

    def __init__(self, streams: Iterable[GradientStream]) -> None:
        self._found = {
            filed.home.address: _Found(stream, filed)
            for stream in streams
            for filed in stream.filed()
        }
        self._waiting: dict[_Found, None] = {}  # those with changes, in order

    @property
    def is_needed(self) -> bool:
        """Whether any gradient is in scratch."""
        return bool(self._found)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Stream what can be; everything else sees all changes that were asked for before."""
        others = (*args[1:], *(kwargs or {}).values())
        if args and func in _CHANGES and all(map(_is_scalar, others)):
            return self._change(func, args, kwargs or {})
        self.finish()
        if func in _NORMS and len(args) == 2 and not kwargs:
            return self._norm(func, *args)
        return func(*args, **(kwargs or {}))

    def finish(self) -> None:
        """Do what waits.

        Raises:
            TierIOError: a read or write failed.
        """
        by_stream: dict[GradientStream, list[tuple[Filed, Sequence[Change]]]] = {}
        for found in self._waiting:
            by_stream.setdefault(found.stream, []).append((found.filed, found.changes))
            found.changes = []
        self._waiting.clear()
        for stream, changes in by_stream.items():
            stream.change(changes)

    def _find(self, tensor: Any) -> _Found | None:
        """The gradient in scratch that ``tensor`` is all of, if it is one."""
        if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided:
            return None
        found = self._found.get(tensor.data_ptr())
        if found is None:
            return None
        home = found.filed.home.tensor
        same = (tensor.dtype, tensor.shape) == (home.dtype, home.shape) and tensor.is_contiguous()
        return found if same and not tensor.requires_grad else None

    def _change(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """Note a change of gradients in scratch; do it to the others."""
        target, *others = args
        is_list = not isinstance(target, torch.Tensor)
        tensors = list(target) if is_list else [target]
        found = [self._find(tensor) for tensor in tensors]
        if not any(found):
            return func(*args, **kwargs)
        here = [tensor for tensor, one in zip(tensors, found, strict=True) if one is None]
        if here:  # first: torch refuses what it does not take
            func(here, *others, **kwargs)
        call = partial(_changed, func, others, kwargs, is_list)
        for tensor, one in zip(tensors, found, strict=True):
            if one is None:
                continue
            torch.autograd.graph.increment_version(tensor)
            same = func in _PRODUCTS and not kwargs and _is_one(others[-1], tensor)
            if same and one.holds_finite():
                continue
            if same and func is _UNSCALE:
                one.changes.append(Change(partial(_looked_at, call, others[0]), writes=False))
            else:
                one.changes.append(Change(call))
            one.is_finite = False
            self._waiting[one] = None
        return None if is_list else target

    def _norm(self, func: Callable[..., Any], target: Any, order: float) -> Any:
        """The norms of gradients in scratch and of the others, in torch's order."""
        is_list = not isinstance(target, torch.Tensor)
        tensors = list(target) if is_list else [target]
        found = [self._find(tensor) for tensor in tensors]
        if not any(found):
            return func(target, order)
        here = [tensor for tensor, one in zip(tensors, found, strict=True) if one is None]
        norms_here = iter(func(here, order) if here else ())
        call = NormCall(_NORMS[func], order)
        norms = self._norms([one for one in found if one is not None], call)
        for one, norm in norms.items():
            one.is_finite = order > 0 and bool(norm.isfinite())
        merged = [next(norms_here) if one is None else norms[one] for one in found]
        return merged if is_list else merged[0]

    def _norms(self, found: Sequence[_Found], call: NormCall) -> dict[_Found, torch.Tensor]:
        """The norms that are known, and those that must be measured."""
        norms: dict[_Found, torch.Tensor] = {}
        by_stream: dict[GradientStream, list[_Found]] = {}
        for one in dict.fromkeys(found):
            by_stream.setdefault(one.stream, []).append(one)
        for stream, ones in by_stream.items():
            known = stream.gradients.norms
            missing = []
            for one in ones:
                norm = known.known(one.filed.home, call)
                if norm is None:
                    missing.append(one)
                else:
                    norms[one] = norm
            measured = stream.measure([one.filed for one in missing], call)
            norms.update(zip(missing, measured, strict=True))
            if 2 * len(ones) > len(stream.gradients.homes):
                known.ask(call, answered=len(ones) - len(missing))
        return norms


def _changed(
    func: Callable[..., Any],
    others: Sequence[Any],
    kwargs: Mapping[str, Any],
    is_list: bool,
    values: torch.Tensor,
) -> None:
    func([values] if is_list else values, *others, **kwargs)


def _looked_at(
    call: Callable[[torch.Tensor], object], found: torch.Tensor, values: torch.Tensor
) -> bool:
    """Unscale by one; whether that may have changed bits: those of a NaN, which has many."""
    call(values)
    return bool(found)


def _is_scalar(value: Any) -> bool:
    """Whether an argument is the same for each element."""
    if isinstance(value, torch.Tensor):
        return value.numel() == 1
    return not isinstance(value, list | tuple)


def _is_one(factor: Any, tensor: torch.Tensor) -> bool:
    """Whether the product of finite numbers and ``factor`` has the bits of these numbers.

    Of a complex number it may have zeros of another sign, and there is a mode of the processor
    that makes the smallest numbers zeros.
    """
    return (
        float(factor) == 1.0
        and tensor.is_floating_point()
        and bool(torch.full((), _SMALL).mul_(1.0))
    )


_SMALL = 1e-40  # not a normal number in float32
