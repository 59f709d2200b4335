"""The segment of a step: a plain model of best fit within it never leaves it, and it is tight."""

from hypothesis import given
from hypothesis import strategies as st

from offload.allocator.caching import replay
from offload.allocator.extent import align_up
from offload.allocator.lifetimes import live_peak_nbytes
from offload.allocator.segment import StepRequests, plan_segment, requests_of, serves

KIB, MIB = 1 << 10, 1 << 20


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[int, int | None]]:
    """Addresses are used again; some go that never came, some stay."""
    changes: list[tuple[int, int | None]] = []
    free, living = list(range(12)), [100]
    for _ in range(draw(st.integers(1, 40))):
        if free and (not living or draw(st.booleans())):
            address = free.pop(draw(st.integers(0, len(free) - 1)))
            living.append(address)
            changes.append((address, draw(st.integers(1, 24)) * draw(st.sampled_from([KIB, MIB]))))
        elif living:
            address = living.pop(draw(st.integers(0, len(living) - 1)))
            free.append(address)
            changes.append((address, None))
    return changes


class PlainBestFit:
    """Holes of one segment in a list: the smallest that is large enough is cut."""

    def __init__(self, nbytes: int) -> None:
        self.holes = [(0, nbytes)]

    def allocate(self, nbytes: int) -> tuple[int, int]:
        size = align_up(nbytes, 512)
        fitting = [(end - start, start, end) for start, end in self.holes if end - start >= size]
        assert fitting, "another segment would be needed"
        _, start, end = min(fitting)
        self.holes.remove((start, end))
        if end - start - size > MIB:
            self.holes.append((start + size, end))
            end = start + size
        return start, end

    def free(self, extent: tuple[int, int]) -> None:
        merged = []
        for start, end in sorted([*self.holes, extent]):
            if merged and merged[-1][1] == start:
                merged[-1] = merged[-1][0], end
            else:
                assert not merged or merged[-1][1] < start
                merged.append((start, end))
        self.holes = merged


def run_plainly(step: StepRequests, nbytes: int, steps: int) -> None:
    """Raise if a request finds no room, or gets bytes that another one has."""
    arena = PlainBestFit(20 * MIB if nbytes < 10 * MIB else nbytes)
    left: list[tuple[int, int]] = []
    for _ in range(steps):
        living: dict[int, tuple[int, int]] = {}
        for tick in range(len(step.lifetimes)):
            got = arena.allocate(step.lifetimes[tick].nbytes)
            for other in (*living.values(), *left):
                assert got[1] <= other[0] or other[1] <= got[0]
            living[tick] = got
            for number, life in enumerate(step.lifetimes):
                if number in living and life.last_tick == tick and number not in step.kept:
                    arena.free(living.pop(number))
        for extent in left:
            arena.free(extent)
        left = list(living.values())


def by_ticks_of_their_own(step: StepRequests) -> StepRequests:
    """The large requests, numbered anew."""
    changes: list[tuple[int, int, int | None]] = []
    for number, life in enumerate(step.large().lifetimes):
        changes.append((2 * life.first_tick, number, life.nbytes))
        if number not in step.large().kept:
            changes.append((2 * life.last_tick + 1, number, None))
    changes.sort(key=lambda change: change[0])
    return requests_of((number, nbytes) for _, number, nbytes in changes)


@given(histories())
def test_the_segment_serves_the_step_again_and_again(history: list[tuple[int, int | None]]) -> None:
    step = requests_of(history)
    plan = plan_segment(step)
    assert plan == plan_segment(step)
    large = by_ticks_of_their_own(step)
    if not large.lifetimes:
        assert plan.nbytes == plan.live_nbytes == plan.packed_nbytes == 0
        return
    assert plan.live_nbytes == live_peak_nbytes(large.lifetimes)
    assert plan.live_nbytes <= plan.packed_nbytes
    assert plan.live_nbytes <= plan.nbytes
    assert plan.nbytes % (2 * MIB) == 0
    run_plainly(large, plan.nbytes, steps=3)


@given(histories())
def test_a_little_less_would_not_do(history: list[tuple[int, int | None]]) -> None:
    step = requests_of(history)
    plan = plan_segment(step)
    little = max(2 * MIB, plan.live_nbytes // 128)
    smaller = range(plan.nbytes - little, plan.nbytes, 2 * MIB)
    large = by_ticks_of_their_own(step)
    assert not large.lifetimes or any(
        nbytes < plan.live_nbytes or not serves(large, nbytes) for nbytes in smaller
    )


def test_a_history_tells_who_lives_when() -> None:
    step = requests_of([(7, None), (1, 5 * MIB), (2, KIB), (1, None), (1, 3 * MIB), (2, None)])
    assert [(life.nbytes, life.first_tick, life.last_tick) for life in step.lifetimes] == [
        (5 * MIB, 0, 1),
        (KIB, 1, 2),
        (3 * MIB, 2, 2),
    ]
    assert step.kept == {2}
    assert step.live_nbytes == 5 * MIB + KIB
    assert [life.nbytes for life in step.large().lifetimes] == [5 * MIB, 3 * MIB]
    assert step.large().kept == {1}


def test_a_segment_holds_what_segments_of_their_own_do_not() -> None:
    """40, then 20 + 20, then 40 again: the allocator by itself takes twice of what lives."""
    changes: list[tuple[int, int | None]] = []
    for sizes in ((40,), (26, 14), (34, 6)):
        for place, size in enumerate(sizes):
            changes.append((place, size * MIB))
        changes.extend((place, None) for place in range(len(sizes)))
    step = requests_of(changes)
    plan = plan_segment(step)
    assert plan.nbytes == plan.live_nbytes == plan.packed_nbytes == 40 * MIB
    assert plan.gap == 0
    growing = requests_of(
        [(0, 30 * MIB), (0, None), (1, 34 * MIB), (1, None), (2, 40 * MIB), (2, None)]
    )
    assert replay(growing.lifetimes).reserved_nbytes == 104 * MIB
    assert plan_segment(growing).nbytes == 40 * MIB


def test_what_outlives_the_step_is_in_the_way_of_the_next() -> None:
    step = requests_of([(0, 30 * MIB)])
    assert plan_segment(step).nbytes == 60 * MIB
    assert not serves(step, 58 * MIB)
