"""In which precision the store keeps what a step changes, and what may be rounded.

Of optimizer states, ``exact`` keeps them as the optimizer makes them. ``bf16`` keeps float32 states
with an element for each of their parameter's as bfloat16, rounded stochastically (``rounding``);
the optimizer itself computes in float32. Small states, which stay in memory, are exact with either.
Of bfloat16 weights it keeps float32 masters, if these are asked for (``masters``).

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
MasterWeights = Literal["none", "fp32"]
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """What the store keeps of the parameters that are stepped, and how.

    Attributes:
        states: of float32 states with an element for each of their parameter's.
        masters: ``fp32``: bfloat16 parameters are stepped in float32 (``masters``).
    """

    states: StatePrecision = "exact"
    masters: MasterWeights = "none"

    def check(self, optimizer: Optimizer) -> None:
        """Raise unless what ``optimizer`` steps may be kept so.

        Raises:
            UnsupportedError: it may not, with the reason ([Note: what may be rounded]).
        """
        _check_states(self.states, optimizer)
        if self.masters != "none":
            _check_masters(optimizer)

    def has_master(self, parameter: torch.Tensor) -> bool:
        """Whether ``parameter`` is stepped in float32 though it is none."""
        return self.masters == "fp32" and parameter.dtype == torch.bfloat16

    def step_dtype(self, parameter: torch.Tensor) -> torch.dtype:
        """The type in which the optimizer sees ``parameter``, and makes its states."""
        return torch.float32 if self.has_master(parameter) else parameter.dtype

    def stored_dtype(self, parameter: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
        """In which type the store keeps a per-element state that comes in ``dtype``."""
        if dtype == torch.bfloat16 and self.has_master(parameter):
            dtype = torch.float32  # of a run without masters
        rounds = self.states == "bf16" and self.step_dtype(parameter) == dtype == torch.float32
        return torch.bfloat16 if rounds else dtype

    def rounds(self, parameter: torch.Tensor, stored: torch.dtype) -> bool:
        """Whether a state that the store keeps in ``stored`` is computed in float32."""
        return stored == torch.bfloat16 == self.stored_dtype(parameter, torch.float32)

    def keeps_in_memory(self, parameter: torch.Tensor) -> bool:
        """Whether ``parameter`` may be stepped in memory, in place.

        Memory rounds no states, and does not tell the user's writes to a weight from a step's: the
        bits would depend on the budget.
        """
        return not self.has_master(parameter) and not self.rounds(parameter, torch.bfloat16)


EXACT = Precision()


def _check_states(precision: StatePrecision, optimizer: Optimizer) -> None:
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


def _check_masters(optimizer: Optimizer) -> None:
    half = [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.dtype == torch.float16 and parameter.requires_grad
    ]
    if half:
        raise UnsupportedError(
            f"master_weights='fp32' keeps the bits that a bfloat16 weight lacks of a float32 one; "
            f"{len(half)} parameters of the optimizer, the first of shape {tuple(half[0].shape)}, "
            "are float16, whose exponent is another: load the model in torch.bfloat16, or set "
            "master_weights='none'"
        )


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
