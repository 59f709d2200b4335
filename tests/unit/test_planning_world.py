"""The simulated world: lanes share the drive, no byte is lost, and memory's books balance."""

import math
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.swap.governor import LEAST_WORTH_NBYTES, WORTH_NBYTES
from offload.swap.planning.sim_memory import Memory, Role
from offload.swap.planning.world import World, read_lane, write_lane


def world(together: float = 0.5) -> World:
    rate = 1e6
    lanes = (
        read_lane(lambda nbytes: nbytes / rate, 0.0),
        write_lane(lambda nbytes: nbytes / rate, 0.0),
    )
    return World(*lanes, together=together, memory=Memory(1 << 40, 1 << 40))


def test_lanes_that_work_at_once_share_the_drive() -> None:
    for together, end_s in ((0.5, 2.0), (1.0, 1.0)):
        both = world(together)
        reading = both.submit(both.reads, "a", "weight", 1_000_000)
        writing = both.submit(both.writes, "b", "state", 1_000_000)
        both.wait(both.reads, reading, "late")
        both.wait(both.writes, writing, "full")
        assert both.now_s == pytest.approx(end_s)
        assert both.journal.totals.stall_s == pytest.approx(end_s)


def test_time_that_is_computed_away_is_no_stall() -> None:
    one = world()
    flight = one.submit(one.reads, "a", "weight", 1_000_000)
    one.compute(0.4)
    assert flight.ended_s > one.now_s
    one.wait(one.reads, flight, "late")
    assert one.now_s == pytest.approx(1.0)
    assert one.journal.totals.stall_s == pytest.approx(0.6)
    assert one.drive_busy_s == pytest.approx(1.0)


def test_what_is_waited_for_overtakes_what_is_not_served_yet() -> None:
    one = world()
    first, second, third = (one.submit(one.reads, key, "weight", 1_000_000) for key in "abc")
    one.compute(0.1)
    one.wait(one.reads, third, "late")
    assert one.now_s == pytest.approx(2.0)
    assert first.ended_s <= one.now_s
    assert second.ended_s > one.now_s


@given(st.lists(st.tuples(st.booleans(), st.integers(4096, 10**7)), max_size=20), st.floats(0.5, 1))
def test_no_byte_is_lost_and_none_is_faster_than_the_drive(
    transfers: list[tuple[bool, int]], together: float
) -> None:
    one = world(together)
    for reading, nbytes in transfers:
        lane = one.reads if reading else one.writes
        one.submit(lane, "x", "state", nbytes)
    one.drain()
    sums = [sum(n for r, n in transfers if r is way) for way in (True, False)]
    assert one.journal.totals.read_nbytes == sums[0]
    assert one.journal.totals.written_nbytes == sums[1]
    alone_s = max(sums) / 1e6
    assert alone_s - 1e-6 <= one.now_s <= sum(sums) / 1e6 + 1e-6


def ends_of(arrivals: list[tuple[float, bool, int]], together: float) -> tuple[list[float], float]:
    """When each of ``arrivals`` (gap, reading, nbytes) ends at 1 MB/s, and the seconds of work."""
    queues: dict[bool, list[list[float]]] = {True: [], False: []}  # (which, work that is left)
    ends, now_s, busy_s = [0.0] * len(arrivals), 0.0, 0.0

    def go_on(until_s: float) -> None:
        nonlocal now_s, busy_s
        while any(queues.values()):
            firsts = [queue[0] for queue in queues.values() if queue]
            speed = together if len(firsts) == 2 else 1.0
            span_s = min(min(first[1] for first in firsts) / speed, until_s - now_s)
            now_s, busy_s = now_s + span_s, busy_s + span_s
            for first in firsts:
                first[1] -= span_s * speed
            for queue in queues.values():
                if queue and queue[0][1] <= 1e-9:
                    ends[int(queue.pop(0)[0])] = now_s
            if now_s >= until_s:
                break
        now_s = max(now_s, until_s) if until_s < math.inf else now_s

    for which, (gap_s, reading, nbytes) in enumerate(arrivals):
        go_on(now_s + gap_s)
        queues[reading].append([which, nbytes / 1e6])
    go_on(math.inf)
    return ends, busy_s


@given(
    st.lists(
        st.tuples(st.floats(0, 5), st.booleans(), st.integers(4096, 10**7)), min_size=1, max_size=20
    ),
    st.floats(0.25, 1),
)
def test_lanes_go_on_as_their_work_that_is_left_tells(
    arrivals: list[tuple[float, bool, int]], together: float
) -> None:
    one = world(together)
    flights = []
    for gap_s, reading, nbytes in arrivals:
        one.compute(gap_s)
        lane = one.reads if reading else one.writes
        flights.append(one.submit(lane, "x", "state", nbytes))
    one.drain()
    expected, busy_s = ends_of(arrivals, together)
    assert [flight.ended_s for flight in flights] == pytest.approx(expected, abs=1e-6)
    assert one.drive_busy_s == pytest.approx(busy_s, abs=1e-6)


MOVES = st.lists(
    st.tuples(st.booleans(), st.integers(1, 10**7), st.floats(0, 3), st.booleans()), max_size=30
)


@given(MOVES, st.floats(0.5, 1))
def test_what_moves_on_an_idle_drive_takes_what_a_queued_transfer_takes(
    moves: list[tuple[bool, int, float, bool]], together: float
) -> None:
    at_once, queued = world(together), world(together)
    for reading, nbytes, gap_s, waits in moves:
        for one in (at_once, queued):
            lane = one.reads if reading else one.writes
            if not waits:
                one.submit(lane, "x", "weight", nbytes)
            elif one is at_once:
                one.move(lane, "x", "weight", nbytes, "cold")
            else:
                one.wait(lane, one.submit(lane, "x", "weight", nbytes), "cold")
            one.compute(gap_s)
    for one in (at_once, queued):
        one.drain()
    assert at_once.reading() == queued.reading()  # to the bit


def test_clean_pages_give_way_to_what_is_needed_but_for_few() -> None:
    memory = Memory(5 * WORTH_NBYTES, 10 * WORTH_NBYTES)
    memory.add_pages(3 * WORTH_NBYTES)
    memory.add("weights", 3 * WORTH_NBYTES)
    assert memory.resident_nbytes == 5 * WORTH_NBYTES
    assert memory.room() == 0
    memory.add("weights", 2 * WORTH_NBYTES)
    assert memory.resident_nbytes == memory.peak_nbytes == 6 * WORTH_NBYTES
    memory.add_pages(-2 * WORTH_NBYTES - 1)
    assert memory.resident_nbytes == 6 * WORTH_NBYTES - 1  # none of so few is taken back


def test_few_clean_pages_stay_while_twice_as_many_more_have_room() -> None:
    limit = 5 * WORTH_NBYTES
    memory = Memory(limit, limit + 3 * WORTH_NBYTES)
    memory.add_pages(2 * WORTH_NBYTES)
    memory.add("weights", limit)
    assert memory.resident_nbytes == limit + WORTH_NBYTES
    memory.add("weights", 3 * WORTH_NBYTES // 2)
    assert memory.resident_nbytes == limit + 2 * WORTH_NBYTES
    memory.add("weights", 3 * WORTH_NBYTES // 2)
    assert memory.resident_nbytes == limit + 3 * WORTH_NBYTES + LEAST_WORTH_NBYTES


def test_transients_are_what_is_there_beside_all_else() -> None:
    memory = Memory(1000, 1000)
    memory.add("weights", 100)
    memory.nbytes += 30
    memory.keep("saved", 20)
    assert {role: nbytes for role, nbytes in memory.now.items() if nbytes} == {
        "weights": 100, "saved": 20, "transients": 10
    }  # fmt: skip
    memory.pass_through([5, 40])
    assert memory.peak_nbytes == 170
    assert memory.peak_roles["transients"] == 50
    assert list(memory.peak_roles) == list(get_args(Role))
    assert memory.nbytes == sum(memory.now.values()) == 130
