"""The solved alpha against brute force over the same model."""

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from offload.swap.tokenwise.replay import cuts
from offload.swap.tokenwise.solve import (
    BlockCost,
    Link,
    carried_nbytes,
    carry_s,
    less_room,
    solve,
    step_s,
    thriftiest,
)

seconds = st.floats(1e-4, 10.0)
costs = st.builds(
    BlockCost,
    forward_s=seconds,
    backward_s=seconds,
    rebuild_s=st.floats(0, 10.0),
    heads_s=st.floats(0, 3.0),
    overhead_s=st.floats(0, 1.0),
    whole_nbytes=st.integers(0, 10**9),
    target_nbytes=st.integers(0, 10**10),
)
some_links = st.lists(
    st.builds(
        Link,
        name=st.just("link"),
        bytes_per_s=st.one_of(st.just(math.inf), st.floats(1e6, 1e11)),
        free_nbytes=st.one_of(st.just(0.0), st.floats(1, 2e10)),
    ),
    min_size=1,
    max_size=4,
)
grids = st.integers(1, 3000).map(cuts)
ROUNDING = 1e-9


def link(bytes_per_s=1e9, free_nbytes=1e12):
    return Link(name="link", bytes_per_s=bytes_per_s, free_nbytes=free_nbytes)


def block(**changes):
    values = {
        "forward_s": 1.0,
        "backward_s": 2.0,
        "rebuild_s": 1.0,
        "heads_s": 0.0,
        "overhead_s": 0.0,
        "whole_nbytes": 10**8,
        "target_nbytes": 10**9,
    }
    return BlockCost(**{**values, **changes})


GRID = cuts(6400)


@given(cost=costs, links=some_links, grid=grids)
def test_no_cut_of_the_grid_is_better(cost, links, grid):
    found = solve(cost, links, grid)
    times = {cut: step_s(cost, links, cut / grid[-1]) for cut in grid}
    best = min(times.values())
    assert found.fits == math.isfinite(best)
    if found.fits:
        assert found.step_s <= best * (1 + ROUNDING)
        assert times[found.cut] == found.step_s
        # Of equal ones the one that rebuilds least, but for rounding where a piece ends.
        equal = [cut for cut, time_s in times.items() if time_s == found.step_s]
        assert grid.index(found.cut) >= grid.index(max(equal)) - 1
    else:
        assert found.cut == grid[0]


@given(cost=costs, links=some_links, grid=grids)
def test_never_slower_than_full_swap_and_full_recompute(cost, links, grid):
    found = solve(cost, links, grid)
    assert found.step_s <= step_s(cost, links, grid[0] / grid[-1])
    assert found.step_s <= step_s(cost, links, 1.0)


@given(cost=costs, links=some_links, grid=grids, within=st.floats(1, 1.5))
def test_the_thriftiest_moves_least_of_those_that_are_fast_enough(cost, links, grid, within):
    best, found = solve(cost, links, grid), thriftiest(cost, links, grid, within=within)
    times = {cut: step_s(cost, links, cut / grid[-1]) for cut in grid}
    assert found.fits == best.fits
    if not found.fits:
        assert found.cut == grid[0]
        return
    assert times[found.cut] == found.step_s <= within * best.step_s * (1 + ROUNDING)
    enough = [cut for cut, time_s in times.items() if time_s <= within * best.step_s]
    # Where a piece ends, the least value that was found may be off by a cut and by rounding.
    assert found.cut <= min(enough) or times[min(enough)] > within * best.step_s * (1 - ROUNDING)


@given(links=some_links, nbytes=st.floats(0, 1e11), asked=st.floats(0, 1e11))
def test_others_take_the_room_of_the_fastest_links(links, nbytes, asked):
    left = less_room(links, nbytes)
    room = sum(one.free_nbytes for one in links)
    assert sum(one.free_nbytes for one in left) == pytest.approx(max(room - nbytes, 0), abs=1)
    # Rates are summed in another order, and rounded.
    assert carry_s(asked, left) >= carry_s(asked, links) * (1 - ROUNDING)
    touched = [one.bytes_per_s for one, now in zip(_fastest_first(links), left, strict=True)
               if now.free_nbytes < one.free_nbytes]  # fmt: skip
    whole = [one.bytes_per_s for one in left if one.free_nbytes and one.bytes_per_s not in touched]
    assert not touched or not whole or min(touched) >= max(whole)


def _fastest_first(links):
    return sorted(links, key=lambda one: -one.bytes_per_s)


@given(cost=costs, links=some_links, factor=st.floats(1, 100), which=st.integers(0, 3))
def test_more_bandwidth_is_never_slower_and_never_rebuilds_more(cost, links, factor, which):
    which %= len(links)
    old = links[which]
    faster = [*links]
    faster[which] = Link(
        name="link", bytes_per_s=old.bytes_per_s * factor, free_nbytes=old.free_nbytes
    )
    before, after = solve(cost, links, GRID), solve(cost, faster, GRID)
    assume(before.fits)
    assert after.step_s <= before.step_s * (1 + ROUNDING)
    assert _swaps_as_much(cost, faster, before, after)


@given(cost=costs, links=some_links, more=st.floats(0, 1e10), which=st.integers(0, 3))
def test_more_room_is_never_slower_and_never_rebuilds_more(cost, links, more, which):
    which %= len(links)
    old = links[which]
    roomier = [*links]
    roomier[which] = Link(
        name="link", bytes_per_s=old.bytes_per_s, free_nbytes=old.free_nbytes + more
    )
    before, after = solve(cost, links, GRID), solve(cost, roomier, GRID)
    assume(before.fits)
    assert after.step_s <= before.step_s * (1 + ROUNDING)
    assert _swaps_as_much(cost, roomier, before, after)


def _swaps_as_much(cost, links, before, after):
    """At least as many rows, unless both cuts are equally good but for rounding."""
    if after.cut >= before.cut:
        return True
    same = step_s(cost, links, before.alpha)
    return after.step_s <= same <= after.step_s * (1 + ROUNDING) or same == after.step_s


def test_what_just_fits_is_carried_whatever_the_rates():
    slow = Link(name="link", bytes_per_s=1e6, free_nbytes=1.0)
    for factor in (1, 3, 7, 10, 1000):
        fast = Link(name="link", bytes_per_s=1e6 * factor, free_nbytes=1.0)
        assert carry_s(2.0, [fast, slow]) == pytest.approx(1e-6)
        assert carry_s(2.0 + 1e-9, [fast, slow]) == math.inf


@given(links=some_links, nbytes=st.floats(1, 1e11))
def test_carrying_and_its_inverse(links, nbytes):
    time_s = carry_s(nbytes, links)
    if math.isfinite(time_s):
        assert carried_nbytes(time_s, links) >= nbytes * (1 - 1e-6) - 1
        assert time_s == 0 or carried_nbytes(time_s * 0.99, links) <= nbytes * (1 + 1e-6)
    else:
        assert sum(one.free_nbytes for one in links) < nbytes * (1 + 1e-9)


# Cases that the research works out by hand.


def test_one_link_gives_the_closed_form():
    """alpha = (B T - sources) / others, where the forward is what hides the transfer."""
    cost = block(forward_s=0.5, backward_s=0.5, rebuild_s=1e3)
    # Rebuilding is so dear that all is swapped; so cheap that only what is hidden is.
    assert solve(cost, [link()], GRID).alpha == 1.0
    cheap = block(forward_s=0.5, backward_s=0.5, rebuild_s=1e-6)
    assert solve(cheap, [link()], GRID).alpha == pytest.approx(
        (1e9 * 0.5 - 1e8) / 1e9, abs=64 / 6400
    )


def test_memory_of_the_host_bounds_alpha():
    """MEMO's 7B case at a million tokens: 2 TiB shared by 30 layers hold 0.47 of the rows."""
    unit = 2 * 2**20 * 4096  # one tensor of the layer's width in 16 bit, bytes
    cost = block(
        forward_s=1000.0, backward_s=2000.0, whole_nbytes=2 * unit, target_nbytes=14 * unit
    )
    found = solve(cost, [link(25e9, 2**41 / 30)], cuts(2**20))
    assert found.alpha == pytest.approx(0.47, abs=0.01)


def test_a_fast_link_swaps_everything_and_rebuilds_nothing():
    assert solve(block(), [link(1e10)], GRID).cut == 6400


def test_what_a_link_hides_anyway_is_not_worth_its_traffic():
    """Rebuilding costs a hundredth of the step: no rows travel for that."""
    cost = block(rebuild_s=0.03)
    assert solve(cost, [link(1e10)], GRID).cut == 6400
    assert thriftiest(cost, [link(1e10)], GRID, within=1.02).cut == 0
    assert thriftiest(cost, [link(1e10)], GRID, within=1.001).cut > 0


def test_sources_that_come_late_are_told():
    found = solve(block(), [link(5e7)], GRID)
    assert found.late_s == pytest.approx(1.0)
    assert found.cut == 0


def test_a_second_link_takes_what_the_first_has_no_room_for():
    alone = solve(block(), [link(1e9, 3e8)], GRID)
    both = solve(block(), [link(1e9, 3e8), link(2e8)], GRID)
    assert alone.alpha == pytest.approx(0.2, abs=0.011)
    assert both.alpha > alone.alpha


def test_memory_where_the_bytes_already_are_costs_nothing():
    links = [link(math.inf, 1.1e9), link(1e3)]
    found = solve(block(), links, GRID)
    assert (found.cut, found.step_s) == (6400, 3.0)


def test_without_room_for_the_sources_nothing_fits():
    found = solve(block(), [link(1e9, 5e7)], GRID)
    assert not found.fits
    assert found.cut == 0
    assert math.isinf(found.late_s)


def test_no_cut_to_choose_from():
    with pytest.raises(ValueError, match="no cut"):
        solve(block(), [link()], ())


def test_an_overhead_is_worth_it_or_all_is_swapped():
    slow = [link(5e8)]  # 2.2 seconds for everything
    assert solve(block(overhead_s=0.1), slow, GRID).cut < 6400
    assert solve(block(overhead_s=10.0), slow, GRID).cut == 6400


def test_copying_heads_counts_against_every_row_that_is_swapped_but_not_against_all():
    cost = block(rebuild_s=0.5, heads_s=2.0, forward_s=3.0, backward_s=3.0)
    assert solve(cost, [link(1e12)], GRID).cut == 6400
    assert solve(cost, [link(1.5e8)], GRID).cut < 6400
