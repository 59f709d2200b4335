"""An arena that learns a step: planned addresses, deviations from them, and what it tells."""

import pytest

from offload.allocator.adaptors import LimitAdaptor, StatisticsAdaptor
from offload.allocator.errors import CapacityError, StaleBlockError
from offload.allocator.extent import Extent
from offload.allocator.planned import PlannedArena, PlanningStats, StepUse
from offload.allocator.tlsf import TLSF

KIB = 1 << 10


def run_step(arena: PlannedArena, *, extra: int = 0) -> list[Extent]:
    """Three buffers that TLSF scatters over 7 KiB and a plan puts into 5; what they got."""
    first = arena.allocate(KIB, align=KIB)
    second = arena.allocate(2 * KIB, align=KIB)
    if extra:
        arena.free(arena.allocate(extra, align=KIB))
    arena.free(first)
    third = arena.allocate(3 * KIB, align=KIB)
    arena.free(second)
    arena.free(third)
    return [first, second, third]


def make(capacity: int = 64 * KIB) -> PlannedArena:
    return PlannedArena(TLSF(capacity))


def test_without_steps_it_is_the_arena_beneath() -> None:
    arena = make()
    assert run_step(arena) == run_step(PlannedArena(TLSF(64 * KIB)))
    assert arena.stats() == PlanningStats()


def test_a_repeated_step_is_served_at_planned_addresses() -> None:
    arena = make()
    arena.next_step()
    scattered = run_step(arena)
    assert max(extent.end for extent in scattered) == 6 * KIB
    arena.next_step()
    planned = run_step(arena)
    assert max(extent.end for extent in planned) == 5 * KIB
    arena.next_step()
    assert run_step(arena) == planned
    arena.next_step()
    assert arena.stats() == PlanningStats(
        steps=3,
        planned_steps=2,
        deviations=0,
        before=StepUse(live_nbytes=5 * KIB, span_nbytes=6 * KIB),
        after=StepUse(live_nbytes=5 * KIB, span_nbytes=5 * KIB),
    )
    assert arena.stats().before.fragmentation == pytest.approx(1 / 6)
    assert arena.stats().after.fragmentation == 0


def test_a_deviation_goes_on_beneath_and_the_new_step_is_planned() -> None:
    arena = make()
    for extra in (0, 0, 4 * KIB, 4 * KIB, 4 * KIB):
        arena.next_step()
        extents = run_step(arena, extra=extra)
        assert arena.current_nbytes == 0
    arena.next_step()
    stats = arena.stats()
    assert (stats.steps, stats.planned_steps, stats.deviations) == (5, 3, 1)
    assert not any(
        one.overlaps(other) for one, other in [(extents[0], extents[1]), (extents[1], extents[2])]
    )
    assert stats.after == StepUse(live_nbytes=7 * KIB, span_nbytes=7 * KIB)


def test_fewer_requests_than_planned_are_a_deviation() -> None:
    arena = make()
    for _ in range(2):
        arena.next_step()
        run_step(arena)
    arena.next_step()
    arena.free(arena.allocate(KIB, align=KIB))
    arena.next_step()
    assert (arena.stats().planned_steps, arena.stats().deviations) == (1, 1)


def test_a_buffer_that_is_still_there_where_another_is_planned_is_never_overwritten() -> None:
    arena = make()
    for _ in range(2):
        arena.next_step()
        run_step(arena)
    arena.next_step()
    first, second = arena.allocate(KIB, align=KIB), arena.allocate(2 * KIB, align=KIB)
    third = arena.allocate(3 * KIB, align=KIB)  # the first one was freed before, in other steps
    assert not any(
        one.overlaps(other) for one, other in [(first, second), (first, third), (second, third)]
    )
    for extent in (first, second, third):
        arena.free(extent)
    assert arena.current_nbytes == 0
    arena.next_step()
    assert arena.stats().deviations == 1


def test_what_deviates_may_have_the_holes_of_the_region() -> None:
    arena = make(8 * KIB)
    for _ in range(2):
        arena.next_step()
        run_step(arena)
    arena.next_step()
    first = arena.allocate(KIB, align=KIB)
    rest = arena.allocate(4 * KIB, align=KIB)  # more than is left outside of the region
    assert not first.overlaps(rest)
    assert arena.current_nbytes == 5 * KIB
    arena.free(first)
    arena.free(rest)
    assert arena.largest_free_nbytes == 8 * KIB


def test_what_outlives_its_step_is_left_beneath_and_the_rest_is_planned() -> None:
    arena = make()
    kept: Extent | None = None
    for _ in range(4):
        arena.next_step()
        before, kept = kept, arena.allocate(KIB, align=KIB)
        if before is not None:
            arena.free(before)
        run_step(arena)
    arena.next_step()
    assert arena.stats().planned_steps == 3
    assert arena.stats().after == StepUse(live_nbytes=5 * KIB, span_nbytes=5 * KIB)


def test_without_room_in_one_piece_there_is_no_plan_until_there_is() -> None:
    arena = make(12 * KIB)
    blocks = [arena.allocate(4 * KIB, align=KIB) for _ in range(3)]
    arena.free(blocks[0])
    arena.free(blocks[2])  # 4 KiB on both sides: the step fits, its region of 5 KiB does not
    for _ in range(2):
        arena.next_step()
        small = [arena.allocate(KIB, align=KIB) for _ in range(5)]
        for extent in small:
            arena.free(extent)
    assert arena.stats().planned_steps == 0
    arena.free(blocks[1])
    for _ in range(2):
        arena.next_step()
        for extent in [arena.allocate(KIB, align=KIB) for _ in range(5)]:
            arena.free(extent)
    arena.next_step()
    assert (arena.stats().steps, arena.stats().planned_steps) == (4, 2)


def test_unplanned_requests_get_the_region_when_nothing_else_is_left() -> None:
    arena = make(8 * KIB)
    for _ in range(3):
        arena.next_step()
        kept = arena.allocate(KIB, align=KIB)
        run_step(arena)
        arena.free(kept)
    held = arena.allocate(2 * KIB, align=KIB)
    arena.next_step()
    assert arena.current_nbytes == 2 * KIB
    arena.free(held)


def test_counts_and_limits_stand_around_it() -> None:
    inner = PlannedArena(TLSF(64 * KIB))
    counted = StatisticsAdaptor(inner)
    arena = LimitAdaptor(counted, 5 * KIB)
    for _ in range(3):
        inner.next_step()
        run_step(arena)
    assert counted.stats().peak_nbytes == 5 * KIB
    assert counted.stats().current_count == 0
    with pytest.raises(CapacityError, match=r"6\.00 KiB"):
        arena.allocate(6 * KIB)


@pytest.mark.parametrize(("nbytes", "align"), [(0, 512), (-1, 512), (5, 0), (5, 24)])
def test_bad_requests_are_refused_and_change_no_plan(nbytes: int, align: int) -> None:
    arena = make()
    for _ in range(2):
        arena.next_step()
        run_step(arena)
    arena.next_step()
    with pytest.raises(ValueError, match=f"can't allocate {nbytes} bytes aligned to {align}"):
        arena.allocate(nbytes, align=align)
    run_step(arena)
    arena.next_step()
    assert arena.stats().planned_steps == 2


def test_a_second_free_is_refused_in_the_region_too() -> None:
    arena = make()
    for _ in range(2):
        arena.next_step()
        run_step(arena)
    arena.next_step()
    extent = arena.allocate(KIB, align=KIB)
    arena.free(extent)
    with pytest.raises(StaleBlockError, match="not in use"):
        arena.free(extent)


def test_reserving_a_given_range_goes_before_any_plan() -> None:
    arena = make()
    for _ in range(2):
        arena.next_step()
        run_step(arena)
    arena.next_step()
    arena.reserve(Extent(0, KIB))
    assert arena.current_nbytes == KIB
