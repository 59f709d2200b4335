"""Packings against brute force, against the one checker, and against bounds that must hold."""

import dataclasses
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import offload.allocator.packing as packing_module
from offload.allocator.bilevel import plan_memory
from offload.allocator.exact import search
from offload.allocator.extent import Extent, align_up
from offload.allocator.lifetimes import (
    Lifetime,
    Packing,
    check,
    events,
    granule_of,
    live_peak_nbytes,
)
from offload.allocator.packing import EXACT_COUNT, pack, stacked_nbytes


def rows(max_size: int = 40, most_nbytes: int = 10_000):
    return st.lists(
        st.tuples(
            st.integers(1, most_nbytes),
            st.integers(0, 30),
            st.integers(0, 10),
            st.sampled_from([64, 64, 64, 128, 512]),
        ),
        max_size=max_size,
    ).map(
        lambda all_rows: [
            Lifetime(f"t{index}", nbytes, first, first + length, align)
            for index, (nbytes, first, length, align) in enumerate(all_rows)
        ]
    )


def smallest_peak(lives: list[Lifetime]) -> int:
    """By trying every multiple of its alignment for every buffer."""
    granule = granule_of(lives)
    sizes = [align_up(life.nbytes, granule) for life in lives]

    def fits(offsets: list[int], peak: int) -> bool:
        index = len(offsets)
        if index == len(lives):
            return True
        return any(
            fits([*offsets, offset], peak)
            for offset in range(0, peak - sizes[index] + 1, lives[index].align)
            if all(
                not lives[index].meets(other) or offset + sizes[index] <= at or at + size <= offset
                for other, at, size in zip(lives, offsets, sizes, strict=False)
            )
        )

    ticks = {life.first_tick for life in lives}
    peak = max(  # smaller ones are a long search for nothing
        sum(
            size
            for life, size in zip(lives, sizes, strict=True)
            if life.first_tick <= tick <= life.last_tick
        )
        for tick in ticks
    )
    while not fits([], peak):
        peak += granule
    return peak


def random_case(seed: int) -> list[Lifetime]:
    draw = random.Random(seed)
    starts = [draw.randint(0, 6) for _ in range(draw.randint(1, 7))]
    return [
        Lifetime(
            f"t{index}",
            draw.randint(1, 6),
            start,
            start + draw.randint(0, 4),
            draw.choice([1, 1, 1, 2, 4]),
        )
        for index, start in enumerate(starts)
    ]


def test_500_small_cases_are_packed_as_well_as_brute_force_packs_them() -> None:
    above_the_bound = 0
    for seed in range(500):
        lives = random_case(seed)
        packing = pack(lives)
        check(packing, lives)
        assert packing.peak_nbytes == smallest_peak(lives), f"seed {seed}"
        assert packing.lower_bound_nbytes == packing.peak_nbytes, f"seed {seed}"
        above_the_bound += packing.peak_nbytes > live_peak_nbytes(lives)
    assert above_the_bound > 20  # where live bytes are no proof, the search was one


def test_the_search_finds_what_best_fit_does_not(monkeypatch) -> None:
    improved = 0
    for seed in range(150):
        draw = random.Random(seed)
        starts = [draw.randint(0, EXACT_COUNT) for _ in range(EXACT_COUNT)]
        lives = [
            Lifetime(f"t{index}", draw.randint(1, 20), start, start + draw.randint(0, 8), 1)
            for index, start in enumerate(starts)
        ]
        packing = pack(lives)
        check(packing, lives)
        assert packing.peak_nbytes == packing.lower_bound_nbytes
        with monkeypatch.context() as patch:
            patch.setattr(packing_module, "_SEARCHED_COUNT", 0)
            improved += pack(lives).peak_nbytes > packing.peak_nbytes
    assert improved


def test_a_search_finds_the_same_from_any_peak_to_beat() -> None:
    for seed in range(100):
        lives = random_case(seed)
        bound, most = live_peak_nbytes(lives), sum(life.nbytes + life.align for life in lives)
        found = search(lives, beat_nbytes=most, bound_nbytes=bound, nodes=50_000)
        again = search(lives, beat_nbytes=found.peak_nbytes, bound_nbytes=bound, nodes=50_000)
        assert found.proven
        assert found.peak_nbytes == pack(lives).peak_nbytes
        assert (again.offsets, again.peak_nbytes, again.proven) == (None, found.peak_nbytes, True)


def test_a_search_without_nodes_proves_nothing() -> None:
    lives = random_case(3)
    found = search(lives, beat_nbytes=10_000, bound_nbytes=1, nodes=0)
    assert (found.offsets, found.proven) == (None, False)


@given(rows())
@settings(deadline=None)
def test_every_packing_passes_the_checker(lives: list[Lifetime]) -> None:
    packing = pack(lives)
    check(packing, lives)
    assert packing.lower_bound_nbytes >= live_peak_nbytes(lives)
    granule = granule_of(lives)
    assert packing.peak_nbytes <= stacked_nbytes(lives)
    assert packing.peak_nbytes % granule == 0
    assert pack(lives) == packing


@given(rows(most_nbytes=300), st.data())
@settings(deadline=None)
def test_what_is_taken_away_never_costs_bytes(lives: list[Lifetime], data: st.DataObject) -> None:
    """Fewer, smaller or shorter buffers: the bound falls, and of few buffers the peak too."""
    if not lives:
        return
    few = lives[:8]
    index = data.draw(st.integers(0, len(few) - 1))
    life = few[index]
    smaller = dataclasses.replace(life, nbytes=data.draw(st.integers(1, life.nbytes)))
    shorter = dataclasses.replace(
        life, last_tick=data.draw(st.integers(life.first_tick, life.last_tick))
    )
    for changed in ([smaller], [shorter], []):
        other = [*few[:index], *changed, *few[index + 1 :]]
        if granule_of(other) == granule_of(few):
            assert live_peak_nbytes(other) <= live_peak_nbytes(few)
            assert pack(other).peak_nbytes <= pack(few).peak_nbytes


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=20))
def test_buffers_that_never_meet_share_their_bytes(sizes: list[int]) -> None:
    lives = [Lifetime(f"t{tick}", nbytes, tick, tick, 1) for tick, nbytes in enumerate(sizes)]
    assert pack(lives).peak_nbytes == max(sizes)


@given(rows())
def test_events_tell_every_coming_and_going_in_order(lives: list[Lifetime]) -> None:
    seen = list(events(lives))
    assert sorted(position for position, comes in seen if comes) == list(range(len(lives)))
    assert sorted(position for position, comes in seen if not comes) == list(range(len(lives)))
    ticks = [
        (lives[position].first_tick, 0) if comes else (lives[position].last_tick, 1)
        for position, comes in seen
    ]
    assert ticks == sorted(ticks)


@st.composite
def repeating(draw: st.DrawFn) -> list[Lifetime]:
    """A step of equal blocks: local buffers, some kept from forward to backward, and a head."""
    blocks = draw(st.integers(2, 6))
    local = draw(
        st.lists(
            st.tuples(st.integers(1, 4000), st.integers(0, 8), st.integers(0, 4)),
            min_size=9,
            max_size=14,
        )
    )
    kept = draw(st.lists(st.tuples(st.integers(1, 4000), st.integers(0, 8)), max_size=4))
    head = draw(st.lists(st.tuples(st.integers(1, 30_000), st.integers(0, 5)), max_size=4))
    period = 13
    lives = []
    end = 2 * blocks * period + 6
    for block in range(2 * blocks):
        start = block * period + (6 if block >= blocks else 0)
        lives += [(nbytes, start + at, start + at + length) for nbytes, at, length in local]
        if block < blocks:
            lives += [(nbytes, start + at, end - start - at) for nbytes, at in kept]
    lives += [(nbytes, blocks * period + at, blocks * period + 5) for nbytes, at in head]
    lives.sort(key=lambda row: row[1])
    return [Lifetime(f"t{n}", *row, 16) for n, row in enumerate(lives)]


@given(repeating())
@settings(deadline=None)
def test_every_plan_in_two_levels_passes_the_checker(lives: list[Lifetime]) -> None:
    plan = plan_memory(lives)
    check(plan.packing, lives)
    assert plan.peak_nbytes >= plan.lower_bound_nbytes >= live_peak_nbytes(lives)
    assert plan_memory(lives) == plan


@given(rows())
@settings(deadline=None)
def test_a_trace_without_repeats_is_planned_too(lives: list[Lifetime]) -> None:
    plan = plan_memory(lives)
    check(plan.packing, lives)
    assert plan_memory(lives) == plan


LIFE = Lifetime("a", 10, 0, 2, 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("a", -5, 0, 1), "a has -5 bytes: a buffer has at least one"),
        (("a", 0, 0, 1), "a has 0 bytes"),
        (("a", 7, 3, 2), "a (7 bytes) lives from tick 3 to 2: it needs one tick at least, 3 to 3"),
        (("a", 7, 0, 1, 24), "a (7 bytes) is aligned to 24, no power of two: 32 is the next one"),
        (("a", 7, 0, 1, 0), "aligned to 0, no power of two: 1 is the next one"),
        (("a", 7, 0, 1, -8), "aligned to -8, no power of two"),
    ],
)
def test_a_wrong_lifetime_is_refused_where_it_is_made(row: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Lifetime(*row)


@pytest.mark.parametrize("solve", [pack, plan_memory])
def test_a_key_that_comes_twice_is_refused(solve) -> None:
    with pytest.raises(ValueError, match=r"a \(10 bytes\) comes twice"):
        solve([LIFE, LIFE])


@pytest.mark.parametrize("solve", [pack, plan_memory])
def test_nothing_needs_no_bytes(solve) -> None:
    assert (solve([]).peak_nbytes, solve([]).lower_bound_nbytes, solve([]).gap) == (0, 0, 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extents": {"a": Extent(0, 10), "b": Extent(9, 10)}}, "a and b overlap while both"),
        ({"extents": {"a": Extent(0, 10)}}, "1 extents for 2 buffers"),
        ({"extents": {"a": Extent(0, 10), "c": Extent(10, 10)}}, "b has None"),
        ({"extents": {"a": Extent(0, 9), "b": Extent(10, 10)}}, "does not hold its 10 bytes"),
        ({"extents": {"a": Extent(0, 10), "b": Extent(12, 10)}}, "does not hold its 10 bytes"),
        ({"peak_nbytes": 19}, "20 bytes are alive at once"),
        ({"lower_bound_nbytes": 19}, "20 bytes are alive at once"),
        ({"lower_bound_nbytes": 21}, "a bound of 21 and a peak of 20 can't be"),
    ],
)
def test_the_checker_finds_what_is_wrong(change: dict, message: str) -> None:
    lives = [LIFE, Lifetime("b", 10, 1, 3, 1)]
    right = Packing(
        extents={"a": Extent(0, 10), "b": Extent(10, 10)}, peak_nbytes=20, lower_bound_nbytes=20
    )
    check(right, lives)
    with pytest.raises(ValueError, match=re.escape(message)):
        check(dataclasses.replace(right, **change), lives)


def test_the_checker_finds_a_wrong_alignment() -> None:
    wrong = Packing(extents={"a": Extent(8, 8)}, peak_nbytes=16, lower_bound_nbytes=16)
    with pytest.raises(ValueError, match="a is at 8, no multiple of 16"):
        check(wrong, [Lifetime("a", 8, 0, 0, 16)])
