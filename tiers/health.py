"""Whether each of several paths still moves bytes as fast as when the layout was chosen.

Bytes are spread in proportion to the rates at the start, so healthy paths are busy for equally
long. A path's *speed* is the time that its bytes should have taken, by the rates at the start,
over the time it was busy with them. A busy processor slows all paths alike and blames none:
a path is slow while its speed is below half of the fastest one's, and it is reported when it has
been so for ``STRIKES`` windows in a row.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WINDOW_S = 2.0  # of a path's busy time: the longest pause of a healthy drive is far shorter
STRIKES = 3
SLOW_SHARE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class PathRates:
    """What a path moves in each direction, in bytes per second."""

    read_bytes_per_s: float
    write_bytes_per_s: float

    def duration_s(self, read_nbytes: float, written_nbytes: float) -> float:
        """What moving so many bytes should take."""
        return read_nbytes / self.read_bytes_per_s + written_nbytes / self.write_bytes_per_s

    @property
    def balanced_bytes_per_s(self) -> float:
        """The rate at which equal parts are read and written."""
        return 2 / self.duration_s(1, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowPath:
    """What is reported: the path's rate over the last window, and that of the start."""

    path: int
    bytes_per_s: float
    start_bytes_per_s: float  # of the same mix of reads and writes


@dataclass(slots=True)
class _Window:
    """What a path did since the window began."""

    read_nbytes: int = 0
    written_nbytes: int = 0
    busy_s: float = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes in both directions."""
        return self.read_nbytes + self.written_nbytes


class PathHealth:
    """Watches the requests of all paths; safe to use from any thread.

    Args:
        rates: of each path at the start.
        report: called once each time a path has become slow, on the thread that saw it.
        clock: seconds; a virtual one in tests.
    """

    def __init__(
        self,
        rates: Sequence[PathRates],
        report: Callable[[SlowPath], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._rates = tuple(rates)
        self._report = report
        self._clock = clock
        self._lock = threading.Lock()
        self._in_flight = [0] * len(self._rates)
        self._since_s = [0.0] * len(self._rates)  # up to where busy time is counted
        self._strikes = [0] * len(self._rates)
        self._windows = [_Window() for _ in self._rates]

    def began(self, path: int) -> None:
        """A request of ``path`` is on its way."""
        with self._lock:
            self._count_busy(path)
            self._in_flight[path] += 1

    def ended(self, path: int, *, read_nbytes: int = 0, written_nbytes: int = 0) -> None:
        """It has moved so many bytes: none if it failed."""
        with self._lock:
            self._count_busy(path)
            self._in_flight[path] -= 1
            window = self._windows[path]
            window.read_nbytes += read_nbytes
            window.written_nbytes += written_nbytes
            slow = self._close_window() if window.busy_s >= WINDOW_S else []
        for found in slow:
            self._report(found)

    def _count_busy(self, path: int) -> None:
        now_s = self._clock()
        if self._in_flight[path]:
            self._windows[path].busy_s += now_s - self._since_s[path]
        self._since_s[path] = now_s

    def _close_window(self) -> list[SlowPath]:
        """The paths that have become slow by the end of this window."""
        for path in range(len(self._rates)):
            self._count_busy(path)
        windows, self._windows = self._windows, [_Window() for _ in self._rates]
        speeds = {
            path: min(1.0, self._expected_s(path, window) / max(window.busy_s, 1e-9))
            for path, window in enumerate(windows)
            if window.nbytes or window.busy_s >= WINDOW_S
        }
        if len(speeds) < 2:  # nothing to compare with
            return []
        fastest = max(speeds.values())
        slow: list[SlowPath] = []
        for path, speed in speeds.items():
            judged = windows[path].busy_s >= WINDOW_S / 2  # a moment tells nothing
            is_slow = judged and speed < SLOW_SHARE * fastest
            self._strikes[path] = self._strikes[path] + 1 if is_slow else 0
            if self._strikes[path] == STRIKES:
                slow.append(self._described(path, windows[path]))
        return slow

    def _expected_s(self, path: int, window: _Window) -> float:
        return self._rates[path].duration_s(window.read_nbytes, window.written_nbytes)

    def _described(self, path: int, window: _Window) -> SlowPath:
        start = self._rates[path].balanced_bytes_per_s
        if window.nbytes:
            start = window.nbytes / self._expected_s(path, window)
        return SlowPath(
            path=path, bytes_per_s=window.nbytes / window.busy_s, start_bytes_per_s=start
        )
