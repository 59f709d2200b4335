"""States whose form in the store is another than the optimizer computes with, in staging memory.

They take turns in the same memory, for it is the budget's: what was read, then float32 for the
optimizer, then what is to be written.
"""

from dataclasses import dataclass
from typing import Literal, Self

import torch
import xxhash

from offload.swap.eightbit import SHARING, pack, packed_nbytes, unpack
from offload.swap.rounding import round_to_bf16, widen
from offload.swap.state_precision import Form
from offload.tiers.hostmem import page_ceil
from offload.tiers.memory import HostBuffer


def rounding_key(step: int, name: str, occasion: Literal["step", "absorb"]) -> int:
    """Names the random bits with which the state ``name`` is rounded, once in each step."""
    return xxhash.xxh3_64_intdigest(f"{occasion} {step} {name}".encode())


def rounded_staging_nbytes(numel: int) -> int:
    """What ``StagedRounded`` takes of staging: what float32 does, to a page."""
    return 2 * page_ceil(numel * torch.bfloat16.itemsize)


@dataclass(frozen=True, slots=True)
class StagedRounded:
    """A piece of a state in bfloat16: read behind the middle, widened and rounded to the front.

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


def packed_staging_nbytes(numel: int) -> int:
    """What ``StagedPacked`` takes of staging: little more than float32 does."""
    return page_ceil(3 * numel) + page_ceil(packed_nbytes(numel))


@dataclass(frozen=True, slots=True)
class StagedPacked:
    """A piece of a state in 8 bits: read behind three quarters, unpacked and packed to the front.

    Attributes:
        values: 1-D float32.
        read: 1-D uint8, page-aligned.
        written: 1-D uint8, page-aligned.
    """

    values: torch.Tensor
    read: torch.Tensor
    written: torch.Tensor
    signed: bool

    @classmethod
    def place(cls, buffer: HostBuffer, offset: int, numel: int, *, signed: bool) -> Self:
        """Lay it out in ``buffer`` from ``offset`` on."""
        nbytes = packed_nbytes(numel)
        return cls(
            buffer.tensor(torch.float32, (numel,), offset=offset),
            buffer.tensor(torch.uint8, (nbytes,), offset=offset + page_ceil(3 * numel)),
            buffer.tensor(torch.uint8, (nbytes,), offset=offset),
            signed,
        )

    def widen(self) -> None:
        """``values`` become what was read."""
        unpack(self.read, self.values, signed=self.signed)

    def round(self, key: int, start: int) -> None:
        """``values`` go, ``written`` becomes what is to be written."""
        pack(self.values, self.written, signed=self.signed, key=key, start=start)


@dataclass(frozen=True, slots=True)
class Rounding:
    """How one state is rounded in the present step.

    Attributes:
        form: in the store; not as the optimizer computes with it.
        key: of the random bits.
    """

    form: Form
    key: int

    def staging_nbytes(self, numel: int) -> int:
        """What a piece of so many elements takes of staging."""
        return (
            rounded_staging_nbytes(numel) if self.form == "bf16" else packed_staging_nbytes(numel)
        )

    def place(self, buffer: HostBuffer, offset: int, numel: int) -> StagedRounded | StagedPacked:
        """Lay a piece out in ``buffer`` from ``offset`` on."""
        if self.form == "bf16":
            return StagedRounded.place(buffer, offset, numel)
        return StagedPacked.place(buffer, offset, numel, signed=self.form == "signed")

    def stored_nbytes(self, numel: int) -> int:
        """Bytes of the first ``numel`` elements in the store; these are whole blocks."""
        return 2 * numel if self.form == "bf16" else numel + numel // SHARING
