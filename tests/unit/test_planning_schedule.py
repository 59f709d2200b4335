"""Schedules on a virtual clock against courses worked out by hand."""

import dataclasses

import pytest

from offload.allocator.errors import BudgetError, ConfigError
from offload.report.model import summarise
from offload.report.reader import read_run
from offload.swap.planning.block_schedule import Block, Traffic, ticks_of
from offload.swap.planning.schedule import Hold, Lane, Medium, Move, Pool, Schedule, Tick
from offload.swap.planning.timeline import simulate
from offload.tiers.events import (
    JsonlRecorder,
    ListRecorder,
    RunFinished,
    RunStarted,
    Stall,
    StepFinished,
)
from offload.tiers.events import Move as MoveEvent

IN = Lane(name="in", source="host", target="device", bytes_per_s=10)
OUT = Lane(name="out", source="device", target="host", bytes_per_s=10)


def fetch(key: str, nbytes: int = 10, **more) -> Move:
    return Move(key=key, role="weight", nbytes=nbytes, route=("in",), **more)


def evict(key: str, nbytes: int = 10, **more) -> Move:
    return Move(key=key, role="activation", nbytes=nbytes, route=("out",), **more)


def run(*ticks: Tick, lanes=(IN, OUT), media=(), pools=(), recorder=None):
    return simulate(Schedule(lanes=lanes, ticks=ticks, media=media, pools=pools), recorder)


def test_ticks_follow_each_other() -> None:
    timeline = run(Tick(name="a", seconds=1), Tick(name="b", seconds=2))
    assert timeline.ticks == ((0, 1), (1, 3))
    assert timeline.step_s == 3


def test_a_fetch_that_is_issued_ahead_hides() -> None:
    timeline = run(Tick(name="a", seconds=2), Tick(name="b", seconds=1, fetches=(fetch("w"),)))
    assert timeline.ticks == ((0, 2), (2, 3))
    assert not timeline.waits
    assert timeline.lane("in").busy_s == 1


def test_a_fetch_that_is_issued_when_it_is_needed_stalls() -> None:
    needed = fetch("w", ahead=0)
    timeline = run(Tick(name="a", seconds=2), Tick(name="b", seconds=1, fetches=(needed,)))
    assert timeline.ticks[1] == (3, 4)
    (wait,) = timeline.waits
    assert (wait.key, wait.role, wait.lane, wait.reason) == ("w", "weight", "in", "late")
    assert (wait.ended_s, wait.duration_s) == (3, 1)
    assert timeline.stall_s == 1


def test_latency_comes_with_every_move() -> None:
    slow = dataclasses.replace(IN, latency_s=0.5)
    timeline = run(Tick(name="a", seconds=0, fetches=(fetch("v"), fetch("w"))), lanes=(slow, OUT))
    assert timeline.step_s == 3


def test_what_was_evicted_comes_back_only_when_it_has_left() -> None:
    timeline = run(
        Tick(name="a", seconds=1, evicts=(evict("x", 30),)),
        Tick(name="b", seconds=1, fetches=(fetch("x", ahead=5),)),
    )
    # Out from 1 to 4, in from 4 to 5.
    assert timeline.ticks[1] == (5, 6)


@pytest.mark.parametrize(
    ("medium", "ends_s"),
    [
        (Medium(name="drive", width=1), 3),  # both at half until 2, then 10 bytes alone
        (Medium(name="drive", width=2), 2),
        (Medium(name="drive"), 2),
        (Medium(name="drive", bytes_per_s=15), 2 / 1.5 * 1 + (20 - 2 / 1.5 * 7.5) / 10),
        (Medium(name="drive", bytes_per_s=20), 2),
    ],
)
def test_lanes_share_a_medium(medium: Medium, ends_s: float) -> None:
    lanes = tuple(dataclasses.replace(lane, media=("drive",)) for lane in (IN, OUT))
    timeline = run(
        Tick(name="a", seconds=0, evicts=(evict("x", 20),)),
        Tick(name="b", seconds=0, fetches=(fetch("w", ahead=0),)),
        lanes=lanes,
        media=(medium,),
    )
    assert timeline.step_s == pytest.approx(ends_s)


def test_the_narrowest_medium_sets_the_pace() -> None:
    both = dataclasses.replace(IN, media=("drive", "bus"))
    other = dataclasses.replace(OUT, media=("drive",))
    timeline = run(
        Tick(name="a", seconds=0, evicts=(evict("x"),)),
        Tick(name="b", seconds=0, fetches=(fetch("w", ahead=0),)),
        lanes=(both, other),
        media=(Medium(name="drive", width=1), Medium(name="bus", bytes_per_s=2.5)),
    )
    # Out: half the drive, 2 s. In: a quarter of its rate all the time, for the bus bears no more.
    assert timeline.lane("out").busy_s == 2
    assert timeline.step_s == 4


def test_a_full_pool_makes_a_tick_wait() -> None:
    slow = dataclasses.replace(OUT, bytes_per_s=5)
    timeline = run(
        *(Tick(name=name, seconds=1, evicts=(evict(name),)) for name in "abc"),
        lanes=(IN, slow),
        pools=(Pool(tier="device", nbytes=20),),
    )
    assert timeline.ticks == ((0, 1), (1, 2), (3, 4))  # a has left at 3
    (wait,) = timeline.waits
    assert (wait.key, wait.role, wait.reason) == ("device", "buffer", "full")
    assert (timeline.stall_s, timeline.drain_s, timeline.step_s) == (1, 3, 7)
    assert timeline.peaks == {"device": 20}


def test_a_fetch_waits_for_a_free_buffer() -> None:
    ticks = [Tick(name=name, seconds=2, fetches=(fetch(name, ahead=9),)) for name in "abc"]
    one, two = (run(*ticks, pools=(Pool(tier="device", nbytes=room),)) for room in (10, 20))
    assert one.ticks == ((1, 3), (4, 6), (7, 9))
    assert two.ticks == ((1, 3), (3, 5), (5, 7))


def test_a_fetch_may_be_kept_for_later_ticks() -> None:
    ticks = (
        Tick(name="a", seconds=1, fetches=(fetch("w", until=1),)),
        Tick(name="b", seconds=1),
        Tick(name="c", seconds=1, fetches=(fetch("v", ahead=2),)),
    )
    timeline = run(*ticks, pools=(Pool(tier="device", nbytes=10),))
    assert timeline.ticks == ((1, 2), (2, 3), (4, 5))


def test_staged_moves_hold_room_between_their_lanes() -> None:
    lanes = (
        Lane(name="read", source="file", target="pinned", bytes_per_s=10),
        Lane(name="load", source="pinned", target="device", bytes_per_s=20),
    )
    route = ("read", "load")
    moves = tuple(Move(key=key, role="weight", nbytes=10, route=route) for key in "vw")
    tick = Tick(name="a", seconds=0, fetches=moves)
    roomy, tight = (
        run(tick, lanes=lanes, pools=(Pool(tier="pinned", nbytes=room),)) for room in (20, 10)
    )
    assert roomy.step_s == 2.5
    assert tight.step_s == 3  # read 0-1, load 1-1.5, read 1.5-2.5, load 2.5-3


@pytest.mark.parametrize(("buffers", "step_s"), [(1, 9), (2, 6), (3, 5)])
def test_tiles_are_stepped_in_place(buffers: int, step_s: float) -> None:
    tiles = [
        Tick(
            name=f"tile {index}",
            seconds=1,
            processor="cpu",
            doing="optimizer",
            fetches=(fetch(f"s{index}", ahead=2),),
            evicts=(evict(f"s{index}", in_place=True),),
        )
        for index in range(3)
    ]
    timeline = run(*tiles, pools=(Pool(tier="device", nbytes=10 * buffers),))
    assert timeline.step_s == step_s


def test_bytes_may_stay_between_two_ticks() -> None:
    ticks = (
        Tick(name="a", seconds=1, holds=(Hold(tier="device", nbytes=10, until=1),)),
        Tick(name="b", seconds=1),
        Tick(name="c", seconds=1, fetches=(fetch("w", ahead=2),)),
    )
    timeline = run(*ticks, pools=(Pool(tier="device", nbytes=10),))
    assert timeline.ticks[2] == (3, 4)  # the fetch begins at 2


def test_evicted_bytes_take_room_where_they_go() -> None:
    ticks = (
        Tick(name="a", seconds=1, evicts=(evict("x"),)),
        Tick(name="b", seconds=1, evicts=(evict("y"),)),
        Tick(name="c", seconds=1, fetches=(fetch("x"),)),
        Tick(name="d", seconds=1, fetches=(fetch("y"),)),
    )
    roomy, tight = (run(*ticks, pools=(Pool(tier="host", nbytes=room),)) for room in (20, 10))
    assert (roomy.peaks, tight.peaks) == ({"host": 20}, {"host": 10})
    # x leaves from 1 to 2 and comes back from 2 to 3; only then there is room for y.
    assert [timeline.ticks[3] for timeline in (roomy, tight)] == [(4, 5), (5, 6)]


def test_what_comes_back_in_an_order_that_frees_no_room_is_refused() -> None:
    ticks = (
        Tick(name="a", seconds=1, evicts=(evict("x"),)),
        Tick(name="b", seconds=1, evicts=(evict("y"),)),
        Tick(name="c", seconds=1, fetches=(fetch("y"),)),
        Tick(name="d", seconds=1, fetches=(fetch("x"),)),
    )
    run(*ticks, pools=(Pool(tier="host", nbytes=20),))
    with pytest.raises(BudgetError, match="move y of tick b waits for"):
        run(*ticks, pools=(Pool(tier="host", nbytes=10),))


def test_an_optimizer_beside_backward() -> None:
    blocks = [Block(name=name, forward_s=1, backward_s=2, optimizer_s=3) for name in "ab"]
    beside = run(*ticks_of(blocks, optimizer="beside"))
    after = run(*ticks_of(blocks, optimizer="after"))
    assert (beside.step_s, beside.optimizer_s) == (10, 4)
    assert (after.step_s, after.optimizer_s) == (12, 6)
    assert beside.stall_s == after.stall_s == 0


def test_nothing_is_fetched_for_an_optimizer_that_has_not_been_called() -> None:
    state = Traffic(
        role="state",
        nbytes=10,
        fetched=("optimizer",),
        evicted=("optimizer",),
        fetch_by=("in",),
        evict_by=("out",),
        ahead=9,
    )
    blocks = [
        Block(name=name, forward_s=1, backward_s=2, optimizer_s=0.5, traffic=(state,))
        for name in "ab"
    ]
    after = run(*ticks_of(blocks, optimizer="after"))
    first, second = (run(*ticks_of(blocks, last_first=last)) for last in (False, True))
    assert after.ticks[4:] == ((7, 7.5), (8, 8.5))  # read 6-7 and 7-8
    assert [timeline.step_s for timeline in (after, first, second)] == [9.5, 9.5, 9.5]
    # Beside backward both are there in time.
    beside = run(*ticks_of(blocks, optimizer="beside"))
    assert beside.step_s == 7.5


def test_blocks_as_two_rounding_buffers() -> None:
    """MEMO, section 4.1: layer i + 2 writes where layer i has been offloaded from."""
    swapped = Traffic(
        role="activation",
        nbytes=5,
        room_nbytes=10,  # the other half is rebuilt in the same buffer
        evicted=("forward",),
        fetched=("backward",),
        evict_by=("out",),
        fetch_by=("in",),
    )
    slow = [dataclasses.replace(lane, bytes_per_s=2.5) for lane in (IN, OUT)]  # 2 s a layer
    blocks = [
        *(Block(name=f"{i}", forward_s=1, backward_s=2, traffic=(swapped,)) for i in range(2)),
        *(
            Block(name=f"{i}", forward_s=1, backward_s=2, kept=(("device", 10),))
            for i in range(2, 4)
        ),
    ]
    timeline = run(
        *ticks_of(blocks, optimizer="none"),
        lanes=slow,
        pools=(Pool(tier="device", nbytes=20), Pool(tier="host", nbytes=10)),
    )
    begins = [begin for begin, _ in timeline.ticks]
    # Forward: 0 leaves 1-3, 1 leaves 3-5, so that 2 begins at 3 and 3 at 5. Backward from 6 on: 1
    # comes from 8 to 10, when 3's buffer is free and 2 computes, 0 from 10 to 12.
    assert begins == [0, 1, 3, 5, 6, 8, 10, 12]
    assert timeline.peaks == {"device": 20, "host": 10}


def test_events_are_those_of_a_run(tmp_path) -> None:
    recorder = ListRecorder()
    timeline = run(
        Tick(name="a", seconds=2, evicts=(evict("x"),)),
        Tick(name="b", seconds=1, fetches=(fetch("w", 20, ahead=0),)),
        recorder=recorder,
    )
    moves = [event for event in recorder.events if isinstance(event, MoveEvent)]
    assert [(move.key, move.src, move.dst, move.t_s, move.duration_s) for move in moves] == [
        ("x", "device", "host", 3, 1),
        ("w", "host", "device", 4, 2),
    ]
    (stall,) = (event for event in recorder.events if isinstance(event, Stall))
    assert (stall.key, stall.t_s, stall.duration_s) == ("w", 4, 2)
    (step,) = (event for event in recorder.events if isinstance(event, StepFinished))
    assert (step.step_s, step.compute_s, step.stall_s) == (timeline.step_s, 3, 2)

    file = JsonlRecorder(tmp_path / "rank0.jsonl")
    file.record(RunStarted(t_s=0, command="simulated", versions={}, host={}, budget={"host": 1}))
    for event in recorder.events:
        file.record(event)
    file.record(RunFinished(t_s=5, steps=1, peak_nbytes=0, budget_nbytes=1, status="simulated"))
    file.close()
    report = summarise(read_run(tmp_path))
    assert {lane.lane for lane in report.lanes} == {"in", "out"}
    assert [row.reason for row in report.stalls] == ["late"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lanes": (IN, IN, OUT)}, "lane in comes twice"),
        ({"lanes": (IN,)}, "tick a, move x: no lane out"),
        ({"lanes": (IN, dataclasses.replace(OUT, bytes_per_s=0))}, "a rate is above 0"),
        ({"lanes": (IN, dataclasses.replace(OUT, media=("bus",)))}, "lane out: no medium bus"),
        ({"media": (Medium(name="bus", width=0.5),)}, "bears one lane at least"),
        ({"pools": (Pool(tier="device", nbytes=-1),)}, "-1 bytes are less than none"),
        ({"ticks": (Tick(name="a", seconds=-1),)}, "tick a: takes -1 s"),
        ({"ticks": (Tick(name="a", seconds=1, after=(0,)),)}, "waits for tick 0"),
        ({"ticks": (Tick(name="a", seconds=1, fetches=(fetch("w", until=1),)),)}, "until tick 1"),
        (
            {"ticks": (Tick(name="a", seconds=1, evicts=(evict("x", in_place=True),)),)},
            "no fetch brings its bytes",
        ),
        (
            {
                "ticks": (
                    Tick(
                        name="a",
                        seconds=1,
                        evicts=(Move(key="x", role="r", nbytes=1, route=("out", "out")),),
                    ),
                )
            },
            "out ends at host, out begins at device",
        ),
    ],
)
def test_bad_schedules_are_refused(changes: dict, message: str) -> None:
    good = {
        "lanes": (IN, OUT),
        "ticks": (Tick(name="a", seconds=1, evicts=(evict("x"),)),),
    }
    Schedule(**good)
    with pytest.raises(ConfigError, match=message):
        Schedule(**(good | changes))


def test_every_fault_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        Schedule(lanes=(IN, IN), ticks=(Tick(name="a", seconds=-1),))
    assert len(raised.value.problems) == 2


def test_a_tick_that_is_larger_than_the_pool_is_refused() -> None:
    tick = Tick(name="a", seconds=1, evicts=(evict("x", 30),))
    with pytest.raises(BudgetError, match=r"tick a takes .*raise it by 10 B") as raised:
        run(tick, pools=(Pool(tier="device", nbytes=20),))
    assert (raised.value.needed_nbytes, raised.value.budget_nbytes) == (30, 20)


def test_fetching_too_far_ahead_is_refused_with_what_would_do() -> None:
    ticks = (
        Tick(name="a", seconds=1, fetches=(fetch("v"),)),
        Tick(name="b", seconds=1, evicts=(evict("x"),)),
        Tick(name="c", seconds=1, fetches=(fetch("w", ahead=2),)),
    )
    with pytest.raises(BudgetError, match=r"tick b waits for 10 B .* fewer ticks ahead") as raised:
        run(*ticks, pools=(Pool(tier="device", nbytes=10),))
    assert raised.value.needed_nbytes == 20
    run(*ticks, pools=(Pool(tier="device", nbytes=20),))
