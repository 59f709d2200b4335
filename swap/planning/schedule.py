"""A schedule: what each tick computes, what it needs, what it leaves, and when each move is issued.

Plain records. A planner writes them, ``lanes_sim`` runs them on a virtual clock. Nothing here knows
a model or a tier's implementation: a tier is a name, a lane a rate from one name to another.

[Note: order of issue] Ticks are what the thread of training does, in the order of the list. A
fetch of tick ``i`` is issued when the thread reaches tick ``i - ahead``, an eviction when its tick
has ended. A lane serves its moves in the order in which they were issued, and room in a pool is
handed out in that order too: nothing overtakes. So one schedule has one course.

[Note: room] Where a tier has a pool, bytes need room there. A fetch takes it as the move into that
tier begins, and gives it back when the tick ``until`` ends (its own tick by default). What a tick
leaves to be evicted takes room as the tick begins, until it has left. A staged move holds room in
the tier between until it has gone on. Bytes evicted into a pool stay there until they are fetched.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

from offload.allocator.errors import BudgetError, ConfigError
from offload.allocator.units import format_nbytes

Doing: TypeAlias = Literal["compute", "optimizer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Medium:
    """What several lanes share: a drive, a bus, the memory of a node.

    Attributes:
        width: how many lanes it bears at their full rates. 1: it does one thing at a time, so
            that two busy lanes go at half their rates, as a drive does.
        bytes_per_s: what it carries in all, whatever the lanes, as a bus does.
    """

    name: str
    width: float = math.inf
    bytes_per_s: float = math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """A directed link, serving one move at a time.

    Attributes:
        bytes_per_s: while nothing else uses its media.
        latency_s: that each move takes on top of its bytes.
        media: names of what it shares with other lanes.
    """

    name: str
    source: str
    target: str
    bytes_per_s: float
    latency_s: float = 0.0
    media: tuple[str, ...] = ()

    def seconds(self, nbytes: float) -> float:
        """Of a move that has the lane and its media for itself."""
        return self.latency_s + nbytes / self.bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Room of a tier for what visits it: a hard limit. What lives there is not counted."""

    tier: str
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """Bytes of one tensor class of one block, over one lane or several in a row.

    Attributes:
        key: of two moves of one key the later one needs what the earlier one brought.
        role: weight | gradient | state | activation, as in the events.
        route: names of lanes, from where the bytes are to where they go.
        ahead: ticks between the issue of a fetch and its use; 0: issued when it is needed.
        until: the tick that uses a fetch last; None: the one that it is listed at.
        room_nbytes: what it takes where it is computed with, if that is not what it moves: a
            buffer that is filled in part, the rest being rebuilt.
        in_place: of an eviction: the bytes are those that a fetch of the same key brought for this
            tick, so that one buffer serves both.
    """

    key: str
    role: str
    nbytes: int
    route: tuple[str, ...]
    ahead: int = 1
    until: int | None = None
    room_nbytes: int | None = None
    in_place: bool = False

    @property
    def room(self) -> int:
        """Bytes that it takes in the pool where it is computed with."""
        return self.nbytes if self.room_nbytes is None else self.room_nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """Bytes that a tick makes in ``tier`` and that stay there until the tick ``until`` ends."""

    tier: str
    nbytes: int
    until: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """One thing that is computed: a block's forward, its backward, a tile of the optimizer.

    Attributes:
        seconds: without waits.
        processor: ticks of one processor run one after the other.
        doing: what the seconds count as.
        fetches: needed before it begins.
        evicts: made by it, or stepped in place; they leave when it has ended.
        after: positions of ticks that must have ended; None: the tick before it in the list.
    """

    name: str
    seconds: float
    processor: str = "device"
    doing: Doing = "compute"
    fetches: tuple[Move, ...] = ()
    evicts: tuple[Move, ...] = ()
    holds: tuple[Hold, ...] = ()
    after: tuple[int, ...] | None = None

    def needs(self, position: int) -> tuple[int, ...]:
        """Ticks that must have ended before the tick at ``position`` is reached."""
        if self.after is not None:
            return self.after
        return (position - 1,) if position else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Ticks, the lanes that serve them, and the room that there is.

    Raises:
        ConfigError: names that do not exist or come twice, routes with a gap, ticks that come too
            late, figures below 0; every fault at once.
        BudgetError: a tick or a move that is larger than the whole pool.
    """

    lanes: tuple[Lane, ...]
    ticks: tuple[Tick, ...]
    media: tuple[Medium, ...] = ()
    pools: tuple[Pool, ...] = ()

    def __post_init__(self) -> None:
        if problems := tuple(_problems(self)):
            raise ConfigError(*problems)
        _check_pools(self)

    def processors(self) -> tuple[str, ...]:
        """In the order of their first tick."""
        return tuple(dict.fromkeys(tick.processor for tick in self.ticks))


def _problems(schedule: Schedule) -> Iterator[str]:
    yield from _repeated("lane", [lane.name for lane in schedule.lanes])
    yield from _repeated("medium", [medium.name for medium in schedule.media])
    yield from _repeated("pool of", [pool.tier for pool in schedule.pools])
    media = {medium.name for medium in schedule.media}
    for medium in schedule.media:
        if not medium.width >= 1 or not medium.bytes_per_s > 0:
            yield (
                f"medium {medium.name}: {medium.width} lanes, {medium.bytes_per_s} bytes per "
                "second; it bears one lane at least, at a rate above 0"
            )
    for pool in schedule.pools:
        if pool.nbytes < 0:
            yield f"pool of {pool.tier}: {pool.nbytes} bytes are less than none"
    for lane in schedule.lanes:
        if not lane.bytes_per_s > 0 or not lane.latency_s >= 0:
            yield (
                f"lane {lane.name}: {lane.bytes_per_s} bytes per second after {lane.latency_s} s; "
                "a rate is above 0, a latency not below"
            )
        if unknown := [name for name in lane.media if name not in media]:
            yield f"lane {lane.name}: no medium {', '.join(unknown)}"
    yield from _tick_problems(schedule)


def _repeated(what: str, names: Sequence[str]) -> Iterator[str]:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            yield f"{what} {name} comes twice: give it once"
        seen.add(name)


def _tick_problems(schedule: Schedule) -> Iterator[str]:
    lanes = {lane.name: lane for lane in schedule.lanes}
    routes: dict[tuple[str, ...], list[str]] = {}
    for position, tick in enumerate(schedule.ticks):
        if not tick.seconds >= 0:
            yield f"tick {tick.name}: takes {tick.seconds} s"
        yield from _time_problems(position, tick, len(schedule.ticks))
        brought = {move.key for move in tick.fetches}
        for move in (*tick.fetches, *tick.evicts):
            if move.route not in routes:
                routes[move.route] = list(_route_problems(move.route, lanes))
            for problem in routes[move.route]:
                yield f"tick {tick.name}, move {move.key}: {problem}"
            if min(move.nbytes, move.room, move.ahead) < 0:
                yield f"tick {tick.name}, move {move.key}: bytes and ticks ahead are not below 0"
            if move.in_place and move.key not in brought:
                yield f"tick {tick.name}, move {move.key}: in place, but no fetch brings its bytes"


def _time_problems(position: int, tick: Tick, count: int) -> Iterator[str]:
    for before in tick.after or ():
        if not 0 <= before < position:
            yield f"tick {tick.name} ({position}): waits for tick {before}, which is not before it"
    ends = [hold.until for hold in tick.holds]
    ends += [move.until for move in tick.fetches if move.until is not None]
    for until in ends:
        if not position <= until < count:
            yield f"tick {tick.name} ({position}): keeps bytes until tick {until} of {count}"


def _route_problems(route: tuple[str, ...], lanes: dict[str, Lane]) -> Iterator[str]:
    if not route:
        yield "its route has no lane"
    if unknown := [name for name in route if name not in lanes]:
        yield f"no lane {', '.join(unknown)}"
        return
    for one, next_one in pairwise(lanes[name] for name in route):
        if one.target != next_one.source:
            yield f"{one.name} ends at {one.target}, {next_one.name} begins at {next_one.source}"


def _check_pools(schedule: Schedule) -> None:
    limits = {pool.tier: pool.nbytes for pool in schedule.pools}
    if not limits:
        return
    targets = {lane.name: lane.target for lane in schedule.lanes}
    sources = {lane.name: lane.source for lane in schedule.lanes}
    for tick in schedule.ticks:
        asked = [
            (targets[name], move.nbytes, f"move {move.key} of tick {tick.name}")
            for move in (*tick.fetches, *tick.evicts)
            for name in move.route
        ]
        asked += [
            (targets[move.route[-1]], move.room, f"move {move.key} of tick {tick.name}")
            for move in tick.fetches
        ]
        asked += [
            (tier, nbytes, f"tick {tick.name}") for tier, nbytes in made_by(tick, sources).items()
        ]
        for tier, nbytes, what in asked:
            if nbytes > limits.get(tier, nbytes):
                raise BudgetError(
                    f"{what} takes {format_nbytes(nbytes)} ({nbytes} bytes) of {tier}, whose pool "
                    f"is {format_nbytes(limits[tier])}: raise it by "
                    f"{format_nbytes(nbytes - limits[tier])}, or cut the block into smaller ones",
                    needed_nbytes=nbytes,
                    budget_nbytes=limits[tier],
                )


def made_by(tick: Tick, sources: dict[str, str]) -> dict[str, int]:
    """Bytes by tier that ``tick`` needs room for as it begins, beside what it fetches."""
    made: dict[str, int] = {}
    for move in tick.evicts:
        if not move.in_place:
            tier = sources[move.route[0]]
            made[tier] = made.get(tier, 0) + move.room
    for hold in tick.holds:
        made[hold.tier] = made.get(hold.tier, 0) + hold.nbytes
    return made
