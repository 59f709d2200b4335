"""Float32 masters of bfloat16 weights: the weight is the master's upper half, a state the lower.

[Note: split masters] A bfloat16 number is the upper 16 bits of a float32 one. So a bfloat16 weight
is its master, cut off: what the master has beside it are 16 bits more, which the store keeps as
one further state of the parameter, ``MASTER_LOW``. A step puts both halves together, runs the
optimizer's own code on float32 weights, gradients and states, and takes the result apart again:
bit operations, so nothing is rounded anywhere. The weight that forward computes with is the master
truncated, not rounded to the nearest: only then are the lower bits the same in both.

[Note: written weights] Where the user's code gives an element of a weight another value, that value
is the new master: its lower half becomes zero. An element that it writes the old value to keeps
its lower half, for that can't always be noticed.
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from offload.allocator.errors import UnsupportedError
from offload.swap.rounding import BLOCK_NUMEL, take_upper_halves, widen
from offload.swap.staged_states import rounded_staging_nbytes
from offload.tiers.memory import HostBuffer

MASTER_LOW = "master_low"  # in ``optimizer.state[parameter]``; int16 of the parameter's shape


def combine(
    high: torch.Tensor,  # 1-D bfloat16
    low: torch.Tensor | None,  # 1-D int16, as many elements; None: zeros
    values: torch.Tensor,  # 1-D float32, as many elements
) -> None:
    """Fill ``values`` with what has these halves.

    ``low`` may share memory with ``values`` if it begins at the middle of it or behind: what is
    written never overtakes what is still to be read.
    """
    if low is None:
        values.copy_(high)
        return
    upper = high.view(torch.int16).numpy().view(np.uint16)
    lower = low.numpy().view(np.uint16)
    bits = values.view(torch.int32).numpy().view(np.uint32)
    scratch = np.empty(min(BLOCK_NUMEL, values.numel()), dtype=np.uint32)
    for begin in range(0, values.numel(), BLOCK_NUMEL):
        part = slice(begin, min(begin + BLOCK_NUMEL, values.numel()))
        found = scratch[: part.stop - begin]
        np.copyto(found, upper[part])
        np.left_shift(found, np.uint32(16), out=found)
        np.bitwise_or(found, lower[part], out=bits[part])


def split(
    values: torch.Tensor,  # 1-D float32
    high: torch.Tensor,  # 1-D bfloat16, as many elements
    low: torch.Tensor,  # 1-D int16, as many elements
) -> None:
    """Fill ``high`` and ``low`` with the halves of ``values``.

    ``low`` may share memory with ``values`` if it begins at the same address; they are destroyed.
    """
    bits = values.view(torch.int32).numpy().view(np.uint32)
    upper = high.view(torch.int16).numpy().view(np.uint16)
    lower = low.numpy().view(np.uint16)
    scratch = np.empty(min(BLOCK_NUMEL, values.numel()), dtype=np.uint32)
    for begin in range(0, values.numel(), BLOCK_NUMEL):
        part = slice(begin, min(begin + BLOCK_NUMEL, values.numel()))
        found = scratch[: part.stop - begin]
        take_upper_halves(bits[part], upper[part])
        np.copyto(found, bits[part])
        np.copyto(lower[part], found, casting="unsafe")


def check_low(name: str, parameter: torch.Tensor, low: Any) -> None:
    """Raise unless ``low`` can be the lower half of the master of ``parameter``.

    Raises:
        UnsupportedError: saying why it can't, naming the weight ``name``.
    """
    expected = torch.int16, parameter.shape
    found = (low.dtype, low.shape) if isinstance(low, torch.Tensor) else (type(low), None)
    if found != expected:
        raise UnsupportedError(
            f"the optimizer's state {MASTER_LOW} of {name} is {found[0]}, {found[1]}, not "
            f"{expected[0]}, {expected[1]}, so no step was taken. Where torch loads a state_dict "
            "without Offload it changes the types of states: call optimizer.load_state_dict after "
            "offload.attach"
        )


def master_of(weight: torch.Tensor, low: torch.Tensor | None) -> torch.Tensor:
    """The float32 tensor with the halves ``weight`` and ``low``, of the same shape."""
    values = torch.empty(weight.shape)
    combine(weight.detach().view(-1), None if low is None else low.view(-1), values.view(-1))
    return values


@dataclass(frozen=True, slots=True)
class StagedMaster:
    """A piece of a master: its lower half as read, float32, its lower half to be written, in turn.

    All three in the same memory, as in ``staged_states.StagedRounded``.

    Attributes:
        high: 1-D bfloat16: the weight, in staging of its own or where it stays in memory.
        values: 1-D float32.
        read: 1-D int16, page-aligned.
        written: 1-D int16, page-aligned.
    """

    high: torch.Tensor
    values: torch.Tensor
    read: torch.Tensor
    written: torch.Tensor

    @classmethod
    def place(cls, high: torch.Tensor, buffer: HostBuffer, offset: int) -> Self:
        """Lay it out in ``buffer`` from ``offset`` on, on ``rounded_staging_nbytes``."""
        numel = high.numel()
        middle = offset + rounded_staging_nbytes(numel) // 2
        return cls(
            high,
            buffer.tensor(torch.float32, (numel,), offset=offset),
            buffer.tensor(torch.int16, (numel,), offset=middle),
            buffer.tensor(torch.int16, (numel,), offset=offset),
        )

    def combine(self, *, has_low: bool) -> None:
        """``values`` become the master; its lower half is zero unless it was read."""
        combine(self.high, self.read if has_low else None, self.values)

    def split(self) -> None:
        """``values`` go: ``high`` and ``written`` become the new master's halves."""
        split(self.values, self.high, self.written)


@dataclass(frozen=True, slots=True)
class StagedGradient:
    """A piece of a bfloat16 gradient, and the same in float32.

    Attributes:
        values: 1-D float32.
        source: 1-D bfloat16: elsewhere in memory, or where it is read to, behind the middle.
    """

    values: torch.Tensor
    source: torch.Tensor

    @classmethod
    def place(
        cls, source: torch.Tensor | None, buffer: HostBuffer, offset: int, numel: int
    ) -> Self:
        """Lay it out in ``buffer`` from ``offset`` on, on ``rounded_staging_nbytes``.

        ``source`` None: it is read from a file first.
        """
        if source is None:
            middle = offset + rounded_staging_nbytes(numel) // 2
            source = buffer.tensor(torch.bfloat16, (numel,), offset=middle)
        return cls(buffer.tensor(torch.float32, (numel,), offset=offset), source)

    def widen(self) -> None:
        """``values`` become the gradient."""
        widen(self.source, self.values)
