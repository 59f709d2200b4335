"""What a run tells about itself: frozen records, and the recorders that take them.

A real run and a simulated one emit the same records, so report, what-if and test share
one vocabulary. Times are seconds on the run's own clock (``t_s`` counts from its start and
marks the *end* of what the record describes), sizes are bytes.
"""

import contextlib
import dataclasses
import json
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO, TypeAlias

FORMAT_VERSION = 1
_LONGEST_LINE_NBYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted:
    """The first record of a run: what ran, where, under which budget."""

    t_s: float
    command: str
    versions: Mapping[str, str]
    host: Mapping[str, Any]
    budget: Mapping[str, int]
    format: int = FORMAT_VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A transfer that ended: ``nbytes`` of ``key`` went from ``src`` to ``dst`` on ``lane``."""

    t_s: float
    key: str
    role: str  # weight | gradient | state | activation
    src: str
    dst: str
    nbytes: int
    duration_s: float
    lane: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """The training thread waited for ``key``; ``reason`` says why the data was late."""

    t_s: float
    key: str
    role: str  # as a move's, or buffer: room in a pool
    lane: str
    reason: str  # late | cold | full | drain
    duration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidencyChange:
    """``key`` went from residency ``old`` to ``new`` (names of ``swap.residency.Residency``)."""

    t_s: float
    key: str
    role: str
    old: str
    new: str
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """Something the user should know: a fallback taken, a tensor left alone, and why."""

    t_s: float
    subject: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFinished:
    """Totals of one optimizer step. ``compute_s = step_s - stall_s - optimizer_s``."""

    t_s: float
    step: int
    step_s: float
    compute_s: float
    stall_s: float
    optimizer_s: float
    commit_s: float
    read_nbytes: int
    written_nbytes: int
    peak_nbytes: int  # kernel's peak resident set so far
    resident_nbytes: Mapping[str, int] = field(default_factory=dict)  # by role
    bucket: str = ""  # of the step's largest batch: the shape of its largest tensor, rounded up


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFinished:
    """The last record of a run that ended in good order."""

    t_s: float
    steps: int
    peak_nbytes: int
    budget_nbytes: int
    status: str  # done | stopped | interrupted | failed | ended


Event: TypeAlias = RunStarted | Move | Stall | ResidencyChange | Notice | StepFinished | RunFinished

_TYPES: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (RunStarted, Move, Stall, ResidencyChange, Notice, StepFinished, RunFinished)
}


def to_json(event: Event) -> str:
    """One line of JSON, without the newline; ``kind`` names the record."""
    return json.dumps({"kind": type(event).__name__, **dataclasses.asdict(event)})


def from_json(line: str) -> Event:
    """The record that ``to_json`` wrote.

    Raises:
        ValueError: the line is not JSON, names no known record, or holds what that has not.
    """
    fields = json.loads(line)
    kind = fields.pop("kind", None) if isinstance(fields, dict) else None
    if not isinstance(kind, str) or kind not in _TYPES:
        raise ValueError(f"unknown event kind {kind!r}")
    for name, value in fields.items():
        if not _FITS[kind].get(name, _fits_nothing)(value):
            raise ValueError(f"{kind} can't have {name}={value!r}")
    try:
        event: Event = _TYPES[kind](**fields)
    except TypeError as error:
        raise ValueError(str(error)) from error
    return event


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _is_mapping_of_sizes(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(size, int) for size in value.values())


def _fits_nothing(_value: Any) -> bool:
    return False


_CHECKS: dict[Any, Callable[[Any], bool]] = {
    float: _is_number,
    int: _is_count,
    str: _is_text,
    Mapping[str, int]: _is_mapping_of_sizes,
    Mapping[str, str]: _is_mapping,
    Mapping[str, Any]: _is_mapping,
}
_FITS = {
    name: {field.name: _CHECKS[field.type] for field in dataclasses.fields(kind)}
    for name, kind in _TYPES.items()
}


class Recorder(Protocol):
    """Takes events from any thread; must be quick, for the training thread calls it.

    Attributes:
        failure: why nothing is taken any more; None while all is well.
    """

    failure: OSError | None

    def record(self, event: Event) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class NullRecorder:
    """Takes nothing: the recorder of a run that is not recorded."""

    failure: OSError | None = None

    def record(self, event: Event) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


class ListRecorder(NullRecorder):
    """Keeps events in ``events``, in the order of their arrival."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def record(self, event: Event) -> None:
        self.events.append(event)  # list.append is atomic under the GIL


def _drop_cut_line(path: Path) -> None:
    """End the record of a run that was killed with its last whole line, so that it can go on."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - _LONGEST_LINE_NBYTES, 0))
        start, tail = file.tell(), file.read()
        if not tail.endswith(b"\n") and (start == 0 or b"\n" in tail):
            file.truncate(start + tail.rfind(b"\n") + 1)


class JsonlRecorder:
    """Writes one JSON line per event to ``path``; buffered until ``flush`` (each step edge).

    A disk that is full ends the record, not the run: ``failure`` tells.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.failure: OSError | None = None
        _drop_cut_line(path)
        self._file: TextIO = path.open("a", encoding="utf-8")
        self._pending: deque[Event] = deque()
        self._lock = threading.Lock()

    def record(self, event: Event) -> None:
        if self.failure is None:
            self._pending.append(event)

    def flush(self) -> None:
        with self._lock:
            try:
                # Other threads record meanwhile: take what is there, one by one.
                while self._pending and not self._file.closed:
                    self._file.write(to_json(self._pending.popleft()) + "\n")
                if not self._file.closed:
                    self._file.flush()
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.failure = error
        self._pending.clear()
        with contextlib.suppress(OSError):  # it tries to write what it holds, and closes then
            self._file.close()

    def close(self) -> None:
        self.flush()
        try:
            self._file.close()
        except OSError as error:  # some file systems tell only now
            self.failure = self.failure or error
