"""An arena that learns steps, against the list of what lives in it."""

import itertools

from hypothesis import example, given, settings
from hypothesis import strategies as st

from offload.allocator.errors import CapacityError
from offload.allocator.extent import Extent
from offload.allocator.planned import PlannedArena
from offload.allocator.tlsf import TLSF

CAPACITY = 1 << 15
actions = st.lists(
    st.one_of(
        st.tuples(st.just("allocate"), st.integers(1, 4000)),
        st.tuples(st.just("free"), st.integers(0, 20)),
    ),
    max_size=25,
)


def play(arena: PlannedArena, living: list[Extent], step: list[tuple[str, int]]) -> list[Extent]:
    """What the step was given, with every promise checked on the way."""
    given_out = []
    for verb, number in step:
        if verb == "free":
            if living:
                arena.free(living.pop(number % len(living)))
        else:
            try:
                living.append(arena.allocate(number, align=64))
            except CapacityError:
                assert arena.largest_free_nbytes < number + 64
                continue
            given_out.append(living[-1])
            assert living[-1].offset % 64 == 0
        ordered = sorted(living)
        assert all(one.end <= other.offset for one, other in itertools.pairwise(ordered))
        assert not ordered or ordered[-1].end <= CAPACITY
        assert arena.current_nbytes == sum(extent.nbytes for extent in living)
        assert arena.current_count == len(living)
    return given_out


@given(st.lists(actions, min_size=1, max_size=3), st.lists(st.integers(0, 2), max_size=8))
@settings(deadline=None)
def test_no_two_living_extents_overlap_whatever_the_steps(
    steps: list[list[tuple[str, int]]], order: list[int]
) -> None:
    arena, living = PlannedArena(TLSF(CAPACITY)), []
    for number in order:
        arena.next_step()
        play(arena, living, steps[number % len(steps)])
    arena.next_step()
    stats = arena.stats()
    assert stats.planned_steps + stats.deviations <= stats.steps == len(order)
    for extent in living:
        arena.free(extent)
    assert arena.current_nbytes == 0
    assert arena.largest_free_nbytes <= CAPACITY


@given(actions)
@example([("allocate", 129), ("allocate", 1), ("free", 0), ("allocate", 257), ("allocate", 130)])
@settings(deadline=None)
def test_a_step_that_repeats_is_planned_and_repeats_its_addresses(
    step: list[tuple[str, int]],
) -> None:
    arena = PlannedArena(TLSF(CAPACITY))
    seen = []
    for _ in range(4):
        arena.next_step()
        living: list[Extent] = []
        seen.append(play(arena, living, step))
        for extent in living:
            arena.free(extent)
    arena.next_step()
    stats = arena.stats()
    asked = sum(verb == "allocate" for verb, _ in step)
    if asked and all(len(given_out) == asked for given_out in seen):  # nothing was refused
        assert stats.planned_steps == 3
        assert seen[1] == seen[2] == seen[3]
        assert stats.after.span_nbytes <= stats.before.span_nbytes
    assert arena.current_nbytes == 0
