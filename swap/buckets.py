"""Batches of like size share a plan: which sizes are alike, and what is known of them. Pure.

[Note: buckets] What a step needs beside weights, gradients and states depends on its batch alone:
saved activations, logits, attention's scores. Its size is known before its forward, by the shapes
that the outermost module is called with. Sizes are rounded up to four significant bits: eight
buckets an octave, each at most an eighth wider than the one before. Numbers up to 16, such as most
batch sizes, are buckets of their own, powers of two stay what they are, and lengths from 64 to 4096
fall into 49 buckets, so that few steps are spent on learning (FlexSP, Hetu-Galvatron's, plans by
buckets of lengths; ByteScale offloads only what the computing of long sequences hides). Each
dimension is rounded by itself: eight sequences of 512 and one of 4096 have as many tokens, but not
the same scores.

[Note: bounds] From what batches took, two bounds for a larger one follow. Nothing in attention
grows faster than by the square of a length: from one batch, with all but the baseline taken for its
own, that is the most. Nothing that depends on the batch grows slower than in proportion to the
bytes of its inputs, and what does not depend on it drops out of the difference of two batches: from
two, one of them at least twice as large, that is the least. (A square between them has up to 3/2 of
the slope that it has beyond in proportion, if it is the number of sequences that grows there.) A
batch whose least is beyond the budget is refused before its forward; the plan gives way to the
most.
"""

from bisect import bisect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

_SIGNIFICANT_BITS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """The shapes of the tensors that a batch is made of; no shapes: they are unknown.

    Attributes:
        shapes: in the order in which the model is called with them.
        itemsizes: bytes of an element, for each.
        trains: whether what backward needs is saved.
    """

    shapes: tuple[tuple[int, ...], ...] = ()
    itemsizes: tuple[int, ...] = ()
    trains: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(map(_nbytes, self.shapes, self.itemsizes))

    @property
    def largest(self) -> tuple[int, ...]:
        """The shape of the tensor of most bytes."""
        sizes = list(map(_nbytes, self.shapes, self.itemsizes))
        return self.shapes[sizes.index(max(sizes))] if sizes else ()

    def rounded(self) -> "Form":
        """The bucket: every dimension rounded up."""
        shapes = tuple(tuple(map(round_up, shape)) for shape in self.shapes)
        return Form(shapes=shapes, itemsizes=self.itemsizes, trains=self.trains)

    def covers(self, other: "Form") -> bool:
        """Whether no dimension of ``other`` is larger, so that it needs no more."""
        return self.is_like(other) and all(
            mine >= theirs
            for ours, others in zip(self.shapes, other.shapes, strict=True)
            for mine, theirs in zip(ours, others, strict=True)
        )

    def resized(self, size: int, other: int) -> "Form":
        """With ``other`` wherever a dimension is ``size``."""
        shapes = tuple(
            tuple(other if one == size else one for one in shape) for shape in self.shapes
        )
        return Form(shapes=shapes, itemsizes=self.itemsizes, trains=self.trains)

    def is_like(self, other: "Form") -> bool:
        """Whether they differ in sizes alone, and no more is saved of ``other``."""
        ranks = [tuple(map(len, form.shapes)) for form in (self, other)]
        return (
            self.trains >= other.trains
            and self.itemsizes == other.itemsizes
            and ranks[0] == ranks[1]
        )

    def joined(self, other: "Form") -> "Form":
        """What covers both, which are alike."""
        shapes = tuple(
            tuple(map(max, mine, theirs))
            for mine, theirs in zip(self.shapes, other.shapes, strict=True)
        )
        return Form(shapes=shapes, itemsizes=self.itemsizes, trains=self.trains)

    def growth_over(self, smaller: "Form") -> float:
        """By which factor what depends on the batch grows at most; see [Note: bounds]."""
        if not (0 < smaller.nbytes <= self.nbytes):
            return 1.0
        longest = max(
            mine / theirs if theirs else 1.0
            for ours, others in zip(self.shapes, smaller.shapes, strict=True)
            for mine, theirs in zip(ours, others, strict=True)
        )
        return self.nbytes / smaller.nbytes * longest

    def __str__(self) -> str:
        shape = "x".join(map(str, self.largest)) or "unknown"
        return shape if self.trains else f"{shape} without backward"


def form_of(inputs: object, *, trains: bool) -> Form:
    """The form of a batch: of the tensors in ``inputs``, wherever in it they are."""
    tensors = list(_tensors(inputs))
    return Form(
        shapes=tuple(map(_shape, tensors)),
        itemsizes=tuple(tensor.dtype.itemsize for tensor in tensors),
        trains=trains,
    )


def round_up(size: int) -> int:
    """``size`` rounded up to four significant bits; see [Note: buckets]."""
    unit = 1 << max(size.bit_length() - _SIGNIFICANT_BITS, 0)
    return -(-size // unit) * unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What the passes of one bucket took of host memory, in bytes.

    Attributes:
        form: of the largest batch.
        nbytes: at most, beside the weights and states that the plan keeps.
        least_nbytes: with nothing on its way, and no saved activations kept; the least of all
            passes, for whatever else the process did meanwhile is measured, too.
        passes: how many were measured.
        is_exact: the kernel measured one, rather than the governor's glances.
    """

    form: Form
    nbytes: int
    least_nbytes: int
    passes: int = 1
    is_exact: bool = False

    def joined(self, other: "Taken") -> "Taken":
        """What is known with ``other``, of the same bucket."""
        return Taken(
            form=max(self.form, other.form, key=lambda form: form.nbytes),
            nbytes=max(self.nbytes, other.nbytes),
            least_nbytes=min(self.least_nbytes, other.least_nbytes),
            passes=self.passes + other.passes,
            is_exact=self.is_exact or other.is_exact,
        )


def least_nbytes(smaller: Taken, taken: Taken, form: Form) -> int:
    """Bytes without which a batch of ``form`` does not fit; see [Note: bounds].

    Args:
        smaller: at most half as large as ``taken``, which ``form`` covers.
    """
    apart, beyond = (
        taken.form.nbytes - smaller.form.nbytes,
        form.nbytes - taken.form.nbytes,
    )
    more = max(taken.least_nbytes - smaller.nbytes, 0)
    return taken.least_nbytes + 2 * more * beyond // (3 * apart)


def most_nbytes(taken: Taken, form: Form, baseline_nbytes: int) -> int:
    """Bytes beyond which a batch of ``form``, which is like that of ``taken``, takes nothing.

    Args:
        baseline_nbytes: resident before training.
    """
    most = taken.form.joined(form).growth_over(taken.form)
    return taken.nbytes + int((most - 1) * max(taken.nbytes - baseline_nbytes, 0))


def fitting_form(taken: Taken, form: Form, baseline_nbytes: int, budget_nbytes: int) -> Form:
    """The largest form between ``taken`` and ``form`` that fits in any case.

    Of ``form`` the size that has grown most is cut.
    """
    pairs = [
        (mine / max(theirs, 1), mine, theirs)
        for ours, others in zip(form.shapes, taken.form.shapes, strict=True)
        for mine, theirs in zip(ours, others, strict=True)
    ]
    _, size, least = max(pairs, default=(1.0, 0, 0))

    def fits(cut: int) -> bool:
        return most_nbytes(taken, form.resized(size, cut), baseline_nbytes) <= budget_nbytes

    fitting = bisect(range(least, size + 1), False, key=lambda cut: not fits(cut)) - 1
    return form.resized(size, least + fitting) if fitting >= 0 else taken.form


def _nbytes(shape: tuple[int, ...], itemsize: int) -> int:
    return prod(shape) * itemsize


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple((tensor.values() if tensor.is_nested else tensor).shape)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Tensors in mappings and sequences: those of libraries, too, that torch's trees know not."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
