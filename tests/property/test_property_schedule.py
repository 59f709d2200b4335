"""Random schedules: bounds, order, room, monotony."""

import dataclasses
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from offload.allocator.errors import BudgetError
from offload.swap.planning.schedule import Lane, Medium, Move, Pool, Schedule, Tick
from offload.swap.planning.timeline import Timeline, simulate
from offload.tiers.events import ListRecorder
from offload.tiers.events import Move as MoveEvent

few = settings(max_examples=50)  # each is a whole schedule

_EPSILON = 1e-9
_ROUTES = {
    "in": [("load",), ("read", "load")],
    "out": [("store",), ("store", "write")],
}


def lanes(rates: tuple[int, ...], *, shared: bool) -> tuple[Lane, ...]:
    ends = {
        "load": ("host", "device"),
        "store": ("device", "host"),
        "read": ("file", "host"),
        "write": ("host", "file"),
    }
    return tuple(
        Lane(
            name=name,
            source=source,
            target=target,
            bytes_per_s=rate,
            media=("drive",) if shared and "file" in (source, target) else (),
        )
        for (name, (source, target)), rate in zip(ends.items(), rates, strict=True)
    )


@st.composite
def schedules(draw, *, shared: bool | None = None, pools: bool | None = None) -> Schedule:
    share = draw(st.booleans()) if shared is None else shared
    rates = draw(st.tuples(*[st.integers(1, 8)] * 4))
    count = draw(st.integers(1, 7))
    left: dict[str, tuple[str, ...]] = {}  # by key, where it went
    ticks = []
    for position in range(count):
        fetches = []
        for key in sorted(draw(st.sets(st.sampled_from([*left, f"new {position}"]), max_size=2))):
            far = len(left.pop(key, draw(st.sampled_from(_ROUTES["in"])))) - 1
            fetches.append(
                Move(
                    key=key,
                    role="weight",
                    nbytes=draw(st.integers(0, 8)),
                    route=_ROUTES["in"][far],
                    ahead=draw(st.integers(0, 3)),
                )
            )
        evicts = []
        if draw(st.booleans()):
            route = draw(st.sampled_from(_ROUTES["out"]))
            key = draw(st.sampled_from([f"made {position}", *(move.key for move in fetches)]))
            left[key] = route
            evicts.append(
                Move(
                    key=key,
                    role="state",
                    nbytes=draw(st.integers(0, 8)),
                    route=route,
                    in_place=any(move.key == key for move in fetches),
                )
            )
        after = None
        if position and draw(st.booleans()):
            after = (draw(st.integers(0, position - 1)),)
        ticks.append(
            Tick(
                name=f"{position}",
                seconds=draw(st.integers(0, 4)),
                processor=draw(st.sampled_from(["device", "cpu"])),
                doing=draw(st.sampled_from(["compute", "optimizer"])),
                fetches=tuple(sorted(fetches, key=lambda move: move.key)),
                evicts=tuple(evicts),
                after=after,
            )
        )
    rooms = ()
    if draw(st.booleans()) if pools is None else pools:
        rooms = (
            Pool(tier="device", nbytes=draw(st.integers(16, 48))),
            Pool(tier="host", nbytes=draw(st.integers(16, 48))),
        )
    media = (Medium(name="drive", width=draw(st.sampled_from([1, 1.5]))),) if share else ()
    return Schedule(lanes=lanes(rates, shared=share), ticks=tuple(ticks), media=media, pools=rooms)


def course(schedule: Schedule) -> tuple[Timeline, list[MoveEvent]]:
    recorder = ListRecorder()
    try:
        timeline = simulate(schedule, recorder)
    except BudgetError:
        assume(False)  # a pool that is too small for what is fetched ahead
        raise
    return timeline, [event for event in recorder.events if isinstance(event, MoveEvent)]


@few
@given(schedules())
def test_no_step_is_faster_than_what_it_does(schedule: Schedule) -> None:
    timeline, moves = course(schedule)
    for processor in schedule.processors():
        seconds = sum(tick.seconds for tick in schedule.ticks if tick.processor == processor)
        assert timeline.step_s >= seconds - _EPSILON
    alone = {
        lane.name: sum(lane.seconds(move.nbytes) for move in moves if move.lane == lane.name)
        for lane in schedule.lanes
    }
    assert all(timeline.step_s >= seconds - _EPSILON for seconds in alone.values())
    for medium in schedule.media:
        work = sum(alone[lane.name] for lane in schedule.lanes if medium.name in lane.media)
        assert timeline.step_s >= work / medium.width - _EPSILON


@few
@given(schedules())
def test_every_use_comes_after_its_fetch_and_every_move_after_its_cause(
    schedule: Schedule,
) -> None:
    timeline, moves = course(schedule)
    listed = [
        (position, move, brings)
        for position, tick in enumerate(schedule.ticks)
        for brings, group in ((True, tick.fetches), (False, tick.evicts))
        for move in group
    ]
    assert len(moves) == sum(len(move.route) for _, move, _ in listed)
    free = list(moves)
    ended: dict[str, float] = {}
    for position, move, brings in listed:
        begin, end = timeline.ticks[position]
        before = ended.get(move.key, 0.0) if brings else end
        for name in move.route:
            event = next(one for one in free if (one.key, one.lane) == (move.key, name))
            free.remove(event)
            assert event.t_s - event.duration_s >= before - _EPSILON
            before = event.t_s
        ended[move.key] = before
        if brings:
            assert before <= begin + _EPSILON


@few
@given(schedules())
def test_a_lane_serves_one_move_at_a_time_and_a_processor_one_tick(schedule: Schedule) -> None:
    timeline, moves = course(schedule)
    spans = {lane.name: [] for lane in schedule.lanes}
    for move in moves:
        spans[move.lane].append((move.t_s - move.duration_s, move.t_s))
    for tick, span in zip(schedule.ticks, timeline.ticks, strict=True):
        spans.setdefault(tick.processor, []).append(span)
    for taken in spans.values():
        ordered = sorted(taken)
        for (_, end), (begin, _) in pairwise(ordered):
            assert begin >= end - _EPSILON


@few
@given(schedules(pools=True))
def test_no_pool_is_ever_above_its_limit(schedule: Schedule) -> None:
    timeline, moves = course(schedule)
    for pool in schedule.pools:
        assert timeline.peaks[pool.tier] <= pool.nbytes
    # And what the device holds, worked out anew from the events.
    changes: list[tuple[float, int, int]] = []
    events = list(moves)

    def take(key: str, lane: str) -> MoveEvent:
        event = next(one for one in events if (one.key, one.lane) == (key, lane))
        events.remove(event)
        return event

    for position, tick in enumerate(schedule.ticks):
        begin, end = timeline.ticks[position]
        in_place = {move.key for move in tick.evicts if move.in_place}
        spans = []
        for move in tick.fetches:
            arrival = take(move.key, "load")
            until = end if move.key not in in_place else None
            spans.append([arrival.t_s - arrival.duration_s, until, move.nbytes, move.key])
        for move in tick.evicts:
            leaving = take(move.key, "store")
            if move.in_place:
                next(span for span in spans if span[3] == move.key)[1] = leaving.t_s
            else:
                spans.append([begin, leaving.t_s, move.nbytes, move.key])
        for begins, ends, nbytes, _ in spans:
            changes += [(begins, 1, nbytes), (ends, 0, -nbytes)]
    held = 0
    for _, _, change in sorted(
        (round(at, 6), order, change) for at, order, change in changes
    ):  # what goes at a moment goes before what comes
        held += change
        assert held <= schedule.pools[0].nbytes


@few
@given(schedules())
def test_the_same_schedule_has_the_same_course(schedule: Schedule) -> None:
    assert course(schedule) == course(schedule)


@few
@given(schedules(shared=False), st.integers(0, 3), st.integers(2, 5))
def test_a_faster_lane_never_makes_it_longer(schedule: Schedule, which: int, factor: int) -> None:
    timeline, _ = course(schedule)
    faster = [*schedule.lanes]
    faster[which] = dataclasses.replace(
        faster[which], bytes_per_s=faster[which].bytes_per_s * factor
    )
    other = simulate(dataclasses.replace(schedule, lanes=tuple(faster)))
    assert other.step_s <= timeline.step_s + _EPSILON


@few
@given(schedules(shared=False, pools=True), st.integers(1, 64))
def test_more_room_never_makes_it_longer(schedule: Schedule, more: int) -> None:
    timeline, _ = course(schedule)
    pools = tuple(dataclasses.replace(pool, nbytes=pool.nbytes + more) for pool in schedule.pools)
    assert simulate(dataclasses.replace(schedule, pools=pools)).step_s <= timeline.step_s + _EPSILON


@few
@given(schedules())
def test_times_of_one_thread_add_up(schedule: Schedule) -> None:
    ticks = tuple(
        dataclasses.replace(tick, processor="device", doing="compute", after=None)
        for tick in schedule.ticks
    )
    timeline, _ = course(dataclasses.replace(schedule, ticks=ticks))
    computed = timeline.step_s - timeline.stall_s - timeline.drain_s
    assert computed == pytest.approx(sum(tick.seconds for tick in ticks), abs=1e-9)
    assert timeline.optimizer_s == 0
