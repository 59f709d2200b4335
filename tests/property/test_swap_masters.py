"""Masters and their halves: every bit comes back, in staging as in memory of its own."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload.swap.masters import StagedGradient, StagedMaster, combine, master_of, split
from offload.swap.rounding import BLOCK_NUMEL
from offload.swap.staged_states import rounded_staging_nbytes
from offload.tiers.hostmem import PAGE
from offload.tiers.memory import HostBuffer

BITS = st.lists(st.integers(0, (1 << 32) - 1), min_size=1, max_size=200)
NUMELS = st.integers(1, 3 * BLOCK_NUMEL) | st.integers(1, 3 * PAGE)


def from_bits(bits):
    return torch.from_numpy(np.array(bits, dtype=np.uint32).view(np.float32).copy())


def bits_of(tensor):
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def halves(values):
    high = torch.empty(values.numel(), dtype=torch.bfloat16)
    low = torch.empty(values.numel(), dtype=torch.int16)
    split(values, high, low)
    return high, low


def random_values(numel):
    made = torch.randint(-(1 << 31), 1 << 31, (numel,), generator=torch.Generator().manual_seed(1))
    return made.to(torch.int32).view(torch.float32)


@given(bits=BITS)
def test_halves_put_together_are_the_whole_whatever_the_bits(bits):
    """NaN with its payload, infinities, zeros with their signs, denormals."""
    values = from_bits(bits)
    high, low = halves(values)
    assert [one & 0xFFFF for one in bits_of(high).tolist()] == [one >> 16 for one in bits]
    assert [one & 0xFFFF for one in low.tolist()] == [one & 0xFFFF for one in bits]
    again = torch.empty_like(values)
    combine(high, low, again)
    assert torch.equal(bits_of(again), bits_of(values))


@given(bits=BITS)
def test_without_a_lower_half_the_master_is_the_weight(bits):
    high, _ = halves(from_bits(bits))
    number = ~high.isnan()
    assert torch.equal(master_of(high, None)[number], high.float()[number])
    zeros = torch.zeros(len(bits), dtype=torch.int16)
    assert torch.equal(bits_of(master_of(high, zeros))[number], bits_of(high.float())[number])


@pytest.mark.parametrize("apart", [False, True])
@given(numel=NUMELS, before=st.integers(0, 3))
def test_a_tile_is_stepped_in_one_place(apart, numel, before):
    """The weight is where the gradient is widened to, or it stays where it is in memory."""
    offset, nbytes = before * PAGE, rounded_staging_nbytes(numel)
    buffer = HostBuffer(offset + 2 * nbytes + PAGE)
    try:
        around = [buffer.view(0, offset), buffer.view(offset + 2 * nbytes, PAGE)]
        for edge in around:
            edge[:] = b"\xa5" * len(edge)
        weight = torch.empty(numel, dtype=torch.bfloat16)
        if not apart:
            weight = buffer.tensor(torch.bfloat16, (numel,), offset=offset)
        gradient = StagedGradient.place(None, buffer, offset, numel)
        master = StagedMaster.place(weight, buffer, offset + nbytes)
        values = random_values(numel)
        high, low = halves(values)
        sent = torch.randn(numel).bfloat16()
        for place, read in ((weight, high), (master.read, low), (gradient.source, sent)):
            assert apart or place.data_ptr() % PAGE == 0
            place.copy_(read)
        master.combine(has_low=True)
        gradient.widen()
        assert torch.equal(bits_of(master.values), bits_of(values))
        assert torch.equal(gradient.values, sent.float())
        new = random_values(numel).roll(1)
        bits_of(master.values).copy_(bits_of(new))
        master.split()
        for found, expected in zip((weight, master.written), halves(new), strict=True):
            assert torch.equal(bits_of(found), bits_of(expected))
        assert all(bytes(edge) == b"\xa5" * len(edge) for edge in around)
    finally:
        buffer.release()
