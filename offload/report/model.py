"""The figures of a report: computed once, rendered many ways. Sizes in bytes, times in s."""

import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from offload.report.reader import RunEvents
from offload.tiers.events import (
    Event,
    Move,
    Notice,
    RunFinished,
    RunStarted,
    Stall,
    StepFinished,
)

_TOP = 8
_E = TypeVar("_E", bound=Event)


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """Totals of the run; seconds and bytes per step are medians over its steps."""

    command: str
    status: str
    starts: int
    steps: int
    step_s: float
    compute_s: float
    stall_s: float
    optimizer_s: float
    commit_s: float
    read_nbytes: int
    written_nbytes: int
    peak_nbytes: int
    budget_nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Drive:
    """What the run wrote to files in one step, and how long the drive lasts at that.

    ``life_steps`` is endurance over bytes per step; None where the endurance was not given.
    """

    written_nbytes: int
    activation_nbytes: int
    budget_nbytes: int | None
    endurance_nbytes: int | None
    life_steps: int | None
    life_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneRow:
    """One role on one lane: what moved and how fast while it moved."""

    lane: str
    role: str
    transfers: int
    nbytes: int
    busy_s: float

    @property
    def bytes_per_s(self) -> float:
        """Rate of a transfer while it is under way."""
        return self.nbytes / self.busy_s if self.busy_s else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StallRow:
    """Waits of the training thread for one role, by reason."""

    role: str
    reason: str
    count: int
    duration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketRow:
    """The steps with batches of like size; seconds and bytes are medians over them."""

    bucket: str
    steps: int
    step_s: float
    stall_s: float
    read_nbytes: int
    kept_nbytes: int  # weights and states in memory at their ends


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRow:
    """One of the tensors that moved most."""

    key: str
    role: str
    transfers: int
    nbytes: int
    stall_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything a reporter shows."""

    headline: Headline
    drive: Drive
    lanes: tuple[LaneRow, ...]
    stalls: tuple[StallRow, ...]
    tensors: tuple[TensorRow, ...]
    buckets: tuple[BucketRow, ...]
    notices: tuple[str, ...]
    truncated: bool


def summarise(run: RunEvents) -> Report:
    """The report of a run; medians over the steps of all its segments."""
    events = [event for segment in run.segments for event in segment]
    headline = _headline(run, events)
    return Report(
        headline=headline,
        drive=_drive(headline, events),
        lanes=_lanes(events),
        stalls=_stalls(events),
        tensors=_tensors(events),
        buckets=_buckets(events),
        notices=tuple(f"{e.subject}: {e.message}" for e in _of(events, Notice)),
        truncated=run.truncated,
    )


def _of(events: Iterable[Event], kind: type[_E]) -> list[_E]:
    return [event for event in events if isinstance(event, kind)]


def _headline(run: RunEvents, events: list[Event]) -> Headline:
    steps, started = _of(events, StepFinished), _of(events, RunStarted)
    finished = _of(run.segments[-1], RunFinished)

    def median(name: str) -> float:
        return statistics.median(getattr(step, name) for step in steps) if steps else 0.0

    peaks = [step.peak_nbytes for step in steps] + [end.peak_nbytes for end in finished]
    return Headline(
        command=started[-1].command if started else "unknown",
        status=finished[-1].status if finished else "cut off (killed, or still running)",
        starts=len(run.segments),
        steps=len(steps),
        step_s=median("step_s"),
        compute_s=median("compute_s"),
        stall_s=median("stall_s"),
        optimizer_s=median("optimizer_s"),
        commit_s=median("commit_s"),
        read_nbytes=int(median("read_nbytes")),
        written_nbytes=int(median("written_nbytes")),
        peak_nbytes=max(peaks, default=0),
        budget_nbytes=started[-1].budget.get("host", 0) if started else 0,
    )


def _drive(headline: Headline, events: list[Event]) -> Drive:
    started = _of(events, RunStarted)
    budget = started[-1].budget if started else {}
    activations = sum(
        move.nbytes
        for move in _of(events, Move)
        if move.role == "activation" and move.dst.startswith("file")
    )
    endurance, written = budget.get("nvme_endurance"), headline.written_nbytes
    life_steps = endurance // written if endurance and written else None
    return Drive(
        written_nbytes=written,
        activation_nbytes=activations // max(headline.steps, 1),
        budget_nbytes=budget.get("nvme_write"),
        endurance_nbytes=endurance,
        life_steps=life_steps,
        life_s=None if life_steps is None else life_steps * headline.step_s,
    )


def _lanes(events: list[Event]) -> tuple[LaneRow, ...]:
    groups: defaultdict[tuple[str, str], list[Move]] = defaultdict(list)
    for move in _of(events, Move):
        groups[move.lane, move.role].append(move)
    return tuple(
        LaneRow(
            lane=lane,
            role=role,
            transfers=len(moves),
            nbytes=sum(move.nbytes for move in moves),
            busy_s=sum(move.duration_s for move in moves),
        )
        for (lane, role), moves in sorted(groups.items())
    )


def _stalls(events: list[Event]) -> tuple[StallRow, ...]:
    groups: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for stall in _of(events, Stall):
        groups[stall.role, stall.reason].append(stall.duration_s)
    rows = (
        StallRow(role=role, reason=reason, count=len(waits), duration_s=sum(waits))
        for (role, reason), waits in groups.items()
    )
    return tuple(sorted(rows, key=lambda row: -row.duration_s))


def _tensors(events: list[Event]) -> tuple[TensorRow, ...]:
    moved: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    waited: defaultdict[tuple[str, str], float] = defaultdict(float)
    for move in _of(events, Move):
        moved[move.key, move.role].append(move.nbytes)
    for stall in _of(events, Stall):
        waited[stall.key, stall.role] += stall.duration_s
    rows = (
        TensorRow(
            key=key,
            role=role,
            transfers=len(sizes),
            nbytes=sum(sizes),
            stall_s=waited[key, role],
        )
        for (key, role), sizes in moved.items()
    )
    return tuple(sorted(rows, key=lambda row: (-row.nbytes, row.key))[:_TOP])


def _buckets(events: list[Event]) -> tuple[BucketRow, ...]:
    """In the order of first appearance; none where the batches' sizes are not known."""
    found: dict[str, list[StepFinished]] = defaultdict(list)
    for step in _of(events, StepFinished):
        if step.bucket:
            found[step.bucket].append(step)
    return tuple(_bucket_row(bucket, steps) for bucket, steps in found.items())


def _bucket_row(bucket: str, steps: list[StepFinished]) -> BucketRow:
    kept = [
        step.resident_nbytes.get("weight", 0) + step.resident_nbytes.get("state", 0)
        for step in steps
    ]
    return BucketRow(
        bucket=bucket,
        steps=len(steps),
        step_s=statistics.median(step.step_s for step in steps),
        stall_s=statistics.median(step.stall_s for step in steps),
        read_nbytes=int(statistics.median(step.read_nbytes for step in steps)),
        kept_nbytes=int(statistics.median(kept)),
    )
