"""The course of one step on a virtual clock, and the events of a real run that it emits."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from offload.swap.planning.issue import Issued, issue
from offload.swap.planning.lanes_sim import Course
from offload.swap.planning.schedule import Schedule
from offload.tiers.events import Recorder, Stall, StepFinished
from offload.tiers.journal import Journal, Label

_RESOLUTION_S = 1e-12

Reason: TypeAlias = Literal["late", "full"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """A tick that could not begin when it was reached.

    Attributes:
        key, lane: of the fetch that came last; of a full pool its tier, twice.
    """

    tick: int
    key: str
    role: str
    lane: str
    reason: Reason
    ended_s: float
    duration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneUse:
    """What a lane or a processor did."""

    name: str
    nbytes: int
    busy_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """The course of one step.

    Attributes:
        step_s: until the last tick and the last move have ended.
        ticks: (begin, end) of each tick.
        optimizer_s: how long ticks of the optimizer ran on after all other ticks, without waits.
        stall_s: waits of all other ticks, and of those of the optimizer from then on.
        drain_s: how long moves ran on after the last tick.
        peaks: the most bytes that each pool held.
    """

    step_s: float
    ticks: tuple[tuple[float, float], ...]
    lanes: tuple[LaneUse, ...]
    waits: tuple[Wait, ...]
    optimizer_s: float
    stall_s: float
    drain_s: float
    peaks: dict[str, int]

    def lane(self, name: str) -> LaneUse:
        """The lane or processor of that name.

        Raises:
            KeyError: there is none.
        """
        for lane in self.lanes:
            if lane.name == name:
                return lane
        raise KeyError(name)


def simulate(
    schedule: Schedule, recorder: Recorder | None = None, *, step: int = 0, began_s: float = 0.0
) -> Timeline:
    """Run ``schedule`` once, as step ``step`` that begins at ``began_s`` of the recorder's run.

    Raises:
        BudgetError: moves fill a pool that a tick needs room in, so that nothing can go on.
    """
    issued = issue(schedule)
    run = Course(schedule, issued.tasks)
    run.go()
    timeline = _timeline(schedule, issued, run)
    if recorder is not None:
        _tell(schedule, issued, run, timeline, recorder, step, began_s)
    return timeline


def _timeline(schedule: Schedule, issued: Issued, run: Course) -> Timeline:
    waits = tuple(_waits(schedule, issued, run))
    ends = [run.ends[task] for task in issued.ticks]
    ticks_end_s = max(ends, default=0.0)
    others_end_s = max(
        (end for tick, end in zip(schedule.ticks, ends, strict=True) if tick.doing == "compute"),
        default=0.0,
    )
    stall_s = exposed_s = 0.0
    for wait in waits:
        if schedule.ticks[wait.tick].doing == "compute":
            stall_s += wait.duration_s
        else:
            exposed_s += max(wait.ended_s - max(wait.ended_s - wait.duration_s, others_end_s), 0.0)
    step_s = max(run.ends, default=0.0)
    return Timeline(
        step_s=step_s,
        ticks=tuple((run.begins[task], run.ends[task]) for task in issued.ticks),
        lanes=_uses(schedule, run),
        waits=waits,
        optimizer_s=ticks_end_s - others_end_s - exposed_s,
        stall_s=stall_s + exposed_s,
        drain_s=step_s - ticks_end_s,
        peaks={pool.tier: peak for pool, peak in zip(schedule.pools, run.peaks, strict=True)},
    )


def _waits(schedule: Schedule, issued: Issued, run: Course) -> Iterator[Wait]:
    for position, index in enumerate(issued.ticks):
        needed = issued.needed[position]
        after = run.tasks[index].after
        others = after[: len(after) - len(needed)]  # fetches stand last
        reached_s = max((run.ends[before] for before in others), default=0.0)
        waited_s = run.begins[index] - reached_s
        if waited_s > _RESOLUTION_S:
            yield _wait(schedule, run, position, index, needed, waited_s)


def _wait(
    schedule: Schedule, run: Course, tick: int, index: int, needed: list[int], waited_s: float
) -> Wait:
    """Why a tick began late: its last fetch, or a full pool once all fetches were there."""
    last = max(needed, key=lambda fetch: run.ends[fetch], default=None)
    task = run.tasks[index]
    if last is not None and run.begins[index] - run.ends[last] <= _RESOLUTION_S:
        move = run.tasks[last].move
        assert move is not None
        key, role, lane = move.key, move.role, schedule.lanes[run.tasks[last].lane].name
        reason: Reason = "late"
    else:
        key = lane = schedule.pools[task.takes[0][0]].tier
        role, reason = "buffer", "full"
    return Wait(
        tick=tick,
        key=key,
        role=role,
        lane=lane,
        reason=reason,
        ended_s=run.begins[index],
        duration_s=waited_s,
    )


def _uses(schedule: Schedule, run: Course) -> tuple[LaneUse, ...]:
    names = [*(lane.name for lane in schedule.lanes), *schedule.processors()]
    nbytes, busy_s = [0] * len(names), [0.0] * len(names)
    for index, task in enumerate(run.tasks):
        nbytes[task.lane] += task.nbytes
        busy_s[task.lane] += run.ends[index] - run.begins[index]
    return tuple(
        LaneUse(name=name, nbytes=moved, busy_s=busy)
        for name, moved, busy in zip(names, nbytes, busy_s, strict=True)
    )


def _tell(
    schedule: Schedule,
    issued: Issued,
    run: Course,
    timeline: Timeline,
    recorder: Recorder,
    step: int,
    began_s: float,
) -> None:
    """The events of the step, in the order of their ends."""
    journal = Journal(recorder, clock=lambda: 0.0)
    waits = {wait.tick: wait for wait in timeline.waits}
    begun = {index: position for position, index in enumerate(issued.ticks)}
    for index in sorted(
        range(len(run.tasks)),
        key=lambda index: (run.begins[index] if index in begun else run.ends[index], index),
    ):
        task = run.tasks[index]
        if task.move is not None:
            lane = schedule.lanes[task.lane]
            journal.moved(
                Label(task.move.key, task.move.role, lane.source, lane.target),
                task.nbytes,
                run.ends[index] - run.begins[index],
                lane.name,
                ended_s=began_s + run.ends[index],
            )
        elif (wait := waits.get(begun[index])) is not None:
            journal.record(
                Stall(
                    t_s=began_s + wait.ended_s,
                    key=wait.key,
                    role=wait.role,
                    lane=wait.lane,
                    reason=wait.reason,
                    duration_s=wait.duration_s,
                )
            )
    journal.record(
        StepFinished(
            t_s=began_s + timeline.step_s,
            step=step,
            step_s=timeline.step_s,
            compute_s=timeline.step_s - timeline.stall_s - timeline.optimizer_s - timeline.drain_s,
            stall_s=timeline.stall_s + timeline.drain_s,
            optimizer_s=timeline.optimizer_s,
            commit_s=0.0,
            read_nbytes=journal.totals.read_nbytes,
            written_nbytes=journal.totals.written_nbytes,
            peak_nbytes=timeline.peaks.get("host", 0),
            resident_nbytes={},
        )
    )
