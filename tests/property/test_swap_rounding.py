"""Stochastic rounding: one of two neighbours, right on average, the same bits in any pieces."""

import itertools
import math
import sys

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from offload.swap.rounding import (
    BLOCK_NUMEL,
    round_and_destroy,
    round_to_bf16,
    take_upper_halves,
    widen,
)
from offload.swap.staged_states import StagedRounded, rounded_staging_nbytes, rounding_key
from offload.tiers.hostmem import PAGE, page_ceil
from offload.tiers.memory import HostBuffer

pytestmark = pytest.mark.usefixtures("several_threads")

KEYS = st.integers(0, (1 << 64) - 1)
BITS = st.lists(st.integers(0, (1 << 32) - 1), min_size=1, max_size=200)


def rounded_of(values, key, start=0):
    out = torch.empty(values.numel(), dtype=torch.bfloat16)
    round_to_bf16(values.clone(), out, key=key, start=start)
    return out


def from_bits(bits):
    return torch.from_numpy(np.array(bits, dtype=np.uint32).view(np.float32).copy())


def magnitude(rounded):
    """Place of a bfloat16 among those of its sign; neighbours differ by one."""
    return rounded.view(torch.int16).int() & 0x7FFF


@given(bits=BITS, key=KEYS, start=st.integers(0, 1 << 40))
def test_any_float_becomes_one_of_its_two_neighbours(bits, key, start):
    values = from_bits(bits)
    found = rounded_of(values, key, start)
    ordinary = ~values.isnan()
    below = from_bits([one & 0xFFFF0000 for one in bits])  # towards zero
    holds = (values == below) & ordinary
    up = magnitude(found) - magnitude(below.to(torch.bfloat16))
    assert ((up == 0) | (up == 1))[ordinary].all()
    assert torch.equal(found[holds].view(torch.int16), below[holds].bfloat16().view(torch.int16))
    assert torch.equal(found.signbit()[ordinary], values.signbit()[ordinary])
    assert torch.equal(found.isnan(), values.isnan())


@given(bits=BITS, key=KEYS, start=st.integers(0, 2 * BLOCK_NUMEL))
def test_the_same_bits_in_memory_that_may_be_destroyed(bits, key, start):
    values = from_bits(bits).repeat(400)
    found = torch.empty(values.numel(), dtype=torch.bfloat16)
    expected = rounded_of(values, key, start)
    round_and_destroy(values, found, key=key, start=start)
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("byteorder", ["little", "other"])
@given(bits=BITS | st.just([]), after=st.integers(0, (1 << 16) - 1))
def test_upper_halves_are_the_upper_halves_and_nothing_beside_them(byteorder, bits, after):
    numbers = np.array(bits, dtype=np.uint32)
    found = np.full(numbers.size + 1, after, dtype=np.uint16)
    with pytest.MonkeyPatch.context() as patch:
        if byteorder != "little":  # another way there; its result depends on values alone
            patch.setattr(sys, "byteorder", byteorder)
        take_upper_halves(numbers, found[:-1])
    assert found.tolist() == [*(one >> 16 for one in bits), after]
    assert numbers.tolist() == bits


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf, 0.0, -0.0, 2.0**-133])
def test_special_values_do_not_touch_those_beside_them(special):
    values = torch.full((300,), 1.001)
    values[::3] = special
    for key in range(50):
        found = rounded_of(values, key)
        # torch's own bits of NaN depend on where in a vector it is.
        nan = math.isnan(special)
        expected = 0x7FC0 if nan else torch.tensor(special).bfloat16().view(torch.int16)
        assert (found[::3].view(torch.int16) == expected).all()
        assert set(torch.cat([found[1::3], found[2::3]]).tolist()) == {1.0, 1.0078125}


def test_what_is_small_but_normal_is_never_rounded_to_nothing():
    """Of a second moment, zero would mean that the step divides by epsilon."""
    smallest = torch.finfo(torch.float32).tiny
    values = torch.logspace(-37.9, 0, 5000).clamp(min=smallest)
    assert all((rounded_of(values, key) > 0).all() for key in range(20))


def test_the_mean_over_keys_is_the_value():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(256, generator=generator) * torch.logspace(-20, 20, 256)
    keys, steps = 4000, 2.0 ** torch.floor(torch.log2(values.abs()).double()) / 128
    total = torch.zeros(256, dtype=torch.float64)
    for key in range(keys):
        total += rounded_of(values, key).double()
    apart = (total / keys - values.double()) / steps  # in bfloat16 steps
    assert apart.abs().max() < 5 * 0.5 / keys**0.5
    assert apart.mean().abs() < 5 * 0.5 / (keys * 256) ** 0.5


def test_errors_of_neighbours_and_of_successive_steps_have_nothing_in_common():
    values = torch.full((1 << 16,), 1 + 1 / 256)  # half way: up or down with equal chance
    draws = [
        (rounded_of(values, rounding_key(step, "w#v", "step")).float() - 1) * 256 - 1
        for step in range(24)
    ]
    signs = torch.stack(draws)
    assert set(signs.flatten().tolist()) == {-1.0, 1.0}
    noise = 1 / values.numel() ** 0.5
    together = signs @ signs.T / values.numel() - torch.eye(24)
    assert together.abs().max() < 6 * noise
    for distance in (1, 2, 64, 512, 4096):
        product = (signs[:, distance:] * signs[:, :-distance]).mean(dim=1)
        assert product.abs().mean() < 3 / (values.numel() - distance) ** 0.5


@given(
    start=st.integers(0, 3 * BLOCK_NUMEL),
    numel=st.integers(1, 2 * BLOCK_NUMEL + 100),
    cuts=st.lists(st.integers(0, 2 * BLOCK_NUMEL), max_size=5),
    key=KEYS,
)
def test_pieces_give_the_bits_of_the_whole(start, numel, cuts, key):
    values = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    whole = rounded_of(values, key, start)
    edges = sorted({0, numel, *(cut for cut in cuts if cut < numel)})
    pieces = [
        rounded_of(values[begin:end], key, start + begin)
        for begin, end in itertools.pairwise(edges)
    ]
    assert torch.equal(torch.cat(pieces), whole)


def test_the_bits_are_those_of_earlier_releases():
    """A run that is continued must go on as it would have."""
    values = torch.arange(1, 100_001, dtype=torch.float32) / 7
    found = rounded_of(values, rounding_key(3, "0.weight#exp_avg", "step"), start=64)
    assert xxhash.xxh3_64_hexdigest(found.view(torch.uint8).numpy()) == "0917806a3b1ae1c9"
    assert rounding_key(3, "0.weight#exp_avg", "absorb") == 6169800052310363714


@given(numel=st.integers(1, 3 * BLOCK_NUMEL) | st.integers(1, 3 * PAGE), before=st.integers(0, 3))
def test_a_state_is_widened_and_rounded_in_one_place(numel, before):
    nbytes, offset = rounded_staging_nbytes(numel), before * PAGE
    assert page_ceil(4 * numel) <= nbytes <= page_ceil(4 * numel) + PAGE
    buffer = HostBuffer(offset + nbytes + PAGE)
    try:
        around = [buffer.view(0, offset), buffer.view(offset + nbytes, PAGE)]
        for edge in around:
            edge[:] = b"\xa5" * len(edge)
        stored = torch.randn(numel, generator=torch.Generator().manual_seed(numel)).bfloat16()
        staged = StagedRounded.place(buffer, offset, numel)
        assert staged.read.data_ptr() % PAGE == staged.written.data_ptr() % PAGE == 0
        staged.read.copy_(stored)
        staged.widen()
        assert torch.equal(staged.values, stored.float())
        staged.values.mul_(1.001)
        expected = rounded_of(stored.float().mul_(1.001), 5, start=64)
        staged.round(5, 64)
        assert torch.equal(staged.written, expected)
        assert all(bytes(edge) == b"\xa5" * len(edge) for edge in around)
    finally:
        buffer.release()


def test_widening_is_exact_for_every_bfloat16():
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(torch.bfloat16)
    values = torch.empty(every.numel())
    widen(every, values)
    assert torch.equal(values.isnan(), every.isnan())
    assert torch.equal(values.nan_to_num(), every.float().nan_to_num())


def test_a_second_moment_decays_when_its_gradient_stops():
    """Rounded to the nearest it would never move: beta2 = 0.999 takes less than half a step."""
    steps, beta2 = 2000, 0.999
    exact, nearest, stochastic = (torch.ones(4096, dtype=d) for d in (None, torch.bfloat16, None))
    for step in range(steps):
        exact.mul_(beta2)
        nearest = nearest.float().mul_(beta2).bfloat16()
        stochastic = rounded_of(stochastic * beta2, rounding_key(step, "w#v", "step")).float()
    assert (nearest == 1).all()
    assert stochastic.mean().item() == pytest.approx(exact[0].item(), rel=0.01)
    assert (stochastic / exact - 1).abs().mean() < 0.15
