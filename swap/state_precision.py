"""In which precision the store keeps optimizer states, and of which optimizers they may be rounded.

``exact`` keeps them as the optimizer makes them. ``bf16`` keeps float32 states with an element for
each of their parameter's as bfloat16, rounded stochastically (``rounding``); the optimizer itself
computes in float32. Small states, which stay in memory, are exact with either.

[Note: what may be rounded] Rounding is right on average, so a state may be rounded if the step
takes it as it is: an average of gradients or of their squares. Where a step subtracts one state
from another (a centered RMSprop: the square root of the variance), errors can turn a sign. ASGD's
average is of weights, whose last bits are what counts. Of optimizers that we don't know we know no
state.
"""

from dataclasses import dataclass
from typing import Literal, Self

import torch
import xxhash
from torch.optim import Optimizer

from offload.allocator.errors import UnsupportedError
from offload.swap.rounding import round_to_bf16, widen
from offload.tiers.hostmem import page_ceil
from offload.tiers.memory import HostBuffer

StatePrecision = Literal["exact", "bf16"]
_ROUNDABLE = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.RMSprop,
)


def check_precision(precision: StatePrecision, optimizer: Optimizer) -> None:
    """Raise unless the states of ``optimizer`` may be kept in ``precision``.

    Raises:
        UnsupportedError: they may not ([Note: what may be rounded]), with the reason.
    """
    if precision == "exact":
        return
    if type(optimizer) not in _ROUNDABLE:
        known = ", ".join(kind.__name__ for kind in _ROUNDABLE)
        raise UnsupportedError(
            f"state_precision={precision!r} rounds states that are averages of gradients, as those "
            f"of {known} are; it is not known that those of {type(optimizer).__name__} may be "
            "rounded: set state_precision='exact'"
        )
    if any(group.get("centered") for group in optimizer.param_groups):
        raise UnsupportedError(
            "a centered RMSprop takes the root of a difference of two states, which rounding can "
            f"make negative: set centered=False, or state_precision='exact' for {precision!r}"
        )


def stored_dtype(
    precision: StatePrecision, parameter: torch.Tensor, dtype: torch.dtype
) -> torch.dtype:
    """In which type the store keeps a state that the optimizer makes in ``dtype``."""
    both = torch.float32
    rounds = precision == "bf16" and parameter.dtype == both and dtype == both
    return torch.bfloat16 if rounds else dtype


def is_rounded(precision: StatePrecision, parameter: torch.Tensor, stored: torch.dtype) -> bool:
    """Whether a state that the store keeps in ``stored`` is computed in float32."""
    widest = torch.float32
    return stored == torch.bfloat16 == stored_dtype(precision, parameter, widest)


def rounding_key(step: int, name: str, occasion: Literal["step", "absorb"]) -> int:
    """Names the random bits with which the state ``name`` is rounded, once in each step."""
    return xxhash.xxh3_64_intdigest(f"{occasion} {step} {name}".encode())


def rounded_staging_nbytes(numel: int) -> int:
    """What ``StagedRounded`` takes of staging: what float32 does, to a page."""
    return 2 * page_ceil(numel * torch.bfloat16.itemsize)


@dataclass(frozen=True, slots=True)
class StagedRounded:
    """A piece of a state in staging: bfloat16 as read, float32, bfloat16 to be written, in turn.

    All three in the same memory, for it is the budget's: read behind the middle, widened to the
    front, rounded to the front.

    Attributes:
        values: 1-D float32.
        read: 1-D bfloat16, page-aligned.
        written: 1-D bfloat16, page-aligned.
    """

    values: torch.Tensor
    read: torch.Tensor
    written: torch.Tensor

    @classmethod
    def place(cls, buffer: HostBuffer, offset: int, numel: int) -> Self:
        """Lay it out in ``buffer`` from ``offset`` on."""
        middle = offset + rounded_staging_nbytes(numel) // 2
        return cls(
            buffer.tensor(torch.float32, (numel,), offset=offset),
            buffer.tensor(torch.bfloat16, (numel,), offset=middle),
            buffer.tensor(torch.bfloat16, (numel,), offset=offset),
        )

    def widen(self) -> None:
        """``values`` become what was read."""
        widen(self.read, self.values)

    def round(self, key: int, start: int) -> None:
        """``values`` go, ``written`` becomes what is to be written."""
        round_to_bf16(self.values, self.written, key=key, start=start)
