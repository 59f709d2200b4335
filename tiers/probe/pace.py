"""How a link is measured: repeats that fit their share of a fixed time.

[Note: time budget] Nothing here is interrupted; the time is kept by never starting what would
not end in time. The first request of a link is small. Every later measurement is sized by the
slowest rate seen so far, so that the repeats still wanted fit the share of this case, and is
left out where even its fewest blocks would not fit. What a case leaves over is shared among
those that follow. So a probe overruns its time at most by the first request of each link, or by
a link that suddenly becomes slower. Clocks are passed in: tests use virtual ones.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from offload.tiers.hostmem import PAGE
from offload.tiers.machine import Link

Clock: TypeAlias = Callable[[], float]  # seconds, never going back

_LATENCY_REPEATS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """What a probe may spend.

    Attributes:
        seconds: for all links together, and for the facts that are read before.
        blocks: request sizes in bytes, for links to files.
        in_flight: requests at once, for links to files.
        repeats: measurements whose median is told.
        repeat_nbytes: bytes that one measurement moves at most.
        file_nbytes: the largest file that is written, in each directory.
        memory_nbytes: of buffers, in all.
    """

    seconds: float = 16.0
    blocks: tuple[int, ...] = (1 << 20, 8 << 20, 32 << 20)
    in_flight: int = 4
    repeats: int = 5
    repeat_nbytes: int = 256 << 20
    file_nbytes: int = 1 << 30
    memory_nbytes: int = 256 << 20


QUICK = Effort(
    seconds=4.0, repeats=3, repeat_nbytes=128 << 20, file_nbytes=128 << 20, memory_nbytes=256 << 20
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A link that can be measured.

    Attributes:
        blocks: request sizes in bytes, rising.
        move: moves ``count`` requests of ``block_nbytes`` and returns when all have ended.
        prepare: runs before each measurement and is not timed.
    """

    source: str
    target: str
    blocks: tuple[int, ...]
    in_flight: int
    move: Callable[[int, int], None]  # (block_nbytes, count)
    prepare: Callable[[], None] = lambda: None

    @property
    def cases(self) -> int:
        """Shares of the time that ``measure_route`` takes: each block size, and the latency."""
        return len(self.blocks) + 1


class Pace:
    """Divides what is left of the time among the cases that are left ([Note: time budget])."""

    def __init__(self, *, seconds: float, clock: Clock) -> None:
        self.clock = clock
        self.cases = 0  # that have not had their share
        self._end_s = clock() + seconds

    def share(self) -> float:
        """The time at which the next case should have ended."""
        now_s = self.clock()
        share_s = max(self._end_s - now_s, 0.0) / max(self.cases, 1)
        self.cases -= 1
        return now_s + share_s


def measure_route(route: Route, effort: Effort, pace: Pace) -> tuple[Link, ...]:
    """One ``Link`` for each block size that could be measured in time; at least the smallest."""
    latency_s = _latency(route, pace)
    links: list[Link] = []
    slowest: float | None = None
    for block_nbytes in route.blocks:
        rates = _rates(route, block_nbytes, effort, pace, slowest)
        if rates:
            slowest = min(rates)
            links.append(_link(route, block_nbytes, rates, latency_s))
    return tuple(links)


def timed(clock: Clock, call: Callable[[], None]) -> float:
    """Seconds that ``call`` took; at least a nanosecond, for clocks that are coarser."""
    began_s = clock()
    call()
    return max(clock() - began_s, 1e-9)


def _latency(route: Route, pace: Pace) -> float:
    """Median seconds of one page on an idle link."""
    until_s = pace.share()
    took: list[float] = []
    while len(took) < _LATENCY_REPEATS:
        route.prepare()
        took.append(timed(pace.clock, lambda: route.move(PAGE, 1)))
        if pace.clock() + max(took) > until_s:
            break
    return statistics.median(took)


def _rates(
    route: Route, block_nbytes: int, effort: Effort, pace: Pace, slowest: float | None
) -> list[float]:
    """Bytes per second of each repeat; ``slowest`` is what smaller blocks have shown."""
    until_s = pace.share()
    fewest = route.in_flight
    most = max(effort.repeat_nbytes // block_nbytes, fewest)

    def measure(count: int) -> float:
        route.prepare()
        return count * block_nbytes / timed(pace.clock, lambda: route.move(block_nbytes, count))

    rates: list[float] = []
    first = None
    if slowest is None:
        slowest = first = measure(fewest)  # a warm-up, and what later repeats are sized by
    while (wanted := effort.repeats - len(rates)) > 0:
        affordable = int((until_s - pace.clock()) * slowest / block_nbytes)
        if affordable < fewest:
            break
        rates.append(measure(min(max(affordable // wanted, fewest), most)))
        slowest = min(slowest, rates[-1])
    return rates or ([first] if first is not None else [])


def _link(route: Route, block_nbytes: int, rates: list[float], latency_s: float) -> Link:
    return Link(
        source=route.source,
        target=route.target,
        block_nbytes=block_nbytes,
        in_flight=route.in_flight,
        bytes_per_s=statistics.median(rates),
        low_bytes_per_s=min(rates),
        high_bytes_per_s=max(rates),
        latency_s=latency_s,
        repeats=len(rates),
    )
