"""The run's clock, its counters and the recorder behind them.

Every part that moves bytes or waits holds the one journal of the run. The counters are exact
whether or not anything is recorded, so step totals never depend on the recorder.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from offload.tiers.events import (
    Event,
    Move,
    Notice,
    NullRecorder,
    Recorder,
    ResidencyChange,
    Stall,
)


@dataclass(frozen=True, slots=True)
class Label:
    """What a transfer moves, for the record: a tensor's name, its role and the two ends."""

    key: str
    role: str
    src: str
    dst: str


@dataclass(slots=True)
class Totals:
    """Counters since the run began."""

    read_nbytes: int = 0
    written_nbytes: int = 0
    stall_s: float = 0.0


class Journal:
    """Clock, counters and recorder of one run; safe to use from any thread.

    ``clock`` tells seconds: of this machine, or of a simulated device's virtual time.
    """

    def __init__(
        self, recorder: Recorder | None = None, *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.recorder: Recorder = recorder or NullRecorder()
        self.totals = Totals()
        self._lock = threading.Lock()
        self._clock = clock
        self._start = clock()
        self.notices: list[str] = []

    def now(self) -> float:
        """Seconds since the run began."""
        return self._clock() - self._start

    def record(self, event: Event) -> None:
        """Hand an event to the recorder."""
        self.recorder.record(event)

    def moved(
        self,
        label: Label,
        nbytes: int,
        duration_s: float,
        lane: str,
        *,
        ended_s: float | None = None,
    ) -> None:
        """A transfer ended: now, or when the clock told ``ended_s``."""
        with self._lock:
            if label.src.startswith("file"):
                self.totals.read_nbytes += nbytes
            if label.dst.startswith("file"):
                self.totals.written_nbytes += nbytes
        self.record(
            Move(
                t_s=self.now() if ended_s is None else ended_s - self._start,
                key=label.key,
                role=label.role,
                src=label.src,
                dst=label.dst,
                nbytes=nbytes,
                duration_s=duration_s,
                lane=lane,
            )
        )

    @contextmanager
    def stall(self, key: str, role: str, lane: str, reason: str) -> Iterator[None]:
        """Times a wait of the training thread."""
        began = self.now()
        try:
            yield
        finally:
            ended = self.now()
            self.totals.stall_s += ended - began
            self.record(
                Stall(
                    t_s=ended,
                    key=key,
                    role=role,
                    lane=lane,
                    reason=reason,
                    duration_s=ended - began,
                )
            )

    def residency(self, key: str, role: str, old: str, new: str, nbytes: int) -> None:
        """A tensor changed its residency."""
        self.record(
            ResidencyChange(t_s=self.now(), key=key, role=role, old=old, new=new, nbytes=nbytes)
        )

    def notice(self, subject: str, message: str) -> None:
        """Something the user should know; the same notice is recorded once."""
        if (text := f"{subject}: {message}") not in self.notices:
            self.notices.append(text)
            self.record(Notice(t_s=self.now(), subject=subject, message=message))
