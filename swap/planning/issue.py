"""A schedule as one list of tasks, in the order in which they are issued.

A task is one lane's work on one move, or one processor's on one tick: what it waits for, the room
that it takes as it begins, the room that it gives back as it ends. Pure.
"""

from collections import defaultdict
from dataclasses import dataclass, field

from offload.swap.planning.schedule import Lane, Move, Schedule, Tick, made_by


@dataclass(slots=True)
class Task:
    """One lane's or processor's work.

    Attributes:
        lane: position among the schedule's lanes, and behind them its processors.
        seconds: alone and at full speed.
        after: positions of tasks that must have ended.
        takes, gives: (pool, nbytes) as it begins, and as it ends.
        move: None for a tick.
    """

    lane: int
    seconds: float
    after: list[int]
    takes: list[tuple[int, int]]
    gives: list[tuple[int, int]]
    tick: int
    move: Move | None = None
    nbytes: int = 0


@dataclass(slots=True)
class Issued:
    """All tasks, and where each tick and its last fetches are among them.

    Attributes:
        ticks: the task of each tick.
        needed: the last task of each fetch of a tick.
    """

    tasks: list[Task] = field(default_factory=list)
    ticks: list[int] = field(default_factory=list)
    needed: list[list[int]] = field(default_factory=list)


def issue(schedule: Schedule) -> Issued:
    """The tasks of ``schedule``; see ``schedule`` [Note: order of issue] and [Note: room]."""
    issuer = _Issuer(schedule)
    for position, tick in enumerate(schedule.ticks):
        issuer.issue(position, tick)
    return issuer.issued


class _Issuer:
    """Walks the ticks once; what it knows of them grows as it goes."""

    def __init__(self, schedule: Schedule) -> None:
        self.issued = Issued(needed=[[] for _ in schedule.ticks])
        self._lanes = {lane.name: (index, lane) for index, lane in enumerate(schedule.lanes)}
        self._sources = {lane.name: lane.source for lane in schedule.lanes}
        self._pools = {pool.tier: index for index, pool in enumerate(schedule.pools)}
        self._processors = {
            name: len(schedule.lanes) + index for index, name in enumerate(schedule.processors())
        }
        self._last: dict[str, int] = {}  # the last task of each processor
        self._left: dict[str, int] = {}  # by key, the task that evicted it
        self._stored: dict[str, tuple[int, int]] = {}  # room that evicted bytes take where they are
        self._back: dict[int, list[tuple[int, int]]] = defaultdict(list)  # room, by its last tick
        self._stepped: dict[str, tuple[int, int]] = {}  # room that an eviction in place gives back
        self._due, self._steps_in_place = _due(schedule)

    def issue(self, position: int, tick: Tick) -> None:
        """What happens when the thread reaches ``tick``, and as it ends."""
        processor = self._processors[tick.processor]
        reached = [self.issued.ticks[before] for before in tick.needs(position)]
        if tick.processor in self._last and self._last[tick.processor] not in reached:
            reached.append(self._last[tick.processor])
        due = self._due.pop(position, [])
        for user, move in due:
            if user == position:
                self._fetch(user, move, reached)
        task = Task(
            lane=processor,
            seconds=tick.seconds,
            after=[*reached, *self.issued.needed[position]],
            takes=self._takes(tick),
            gives=self._back.pop(position, []),
            tick=position,
        )
        self._last[tick.processor] = self._add(task)
        self.issued.ticks.append(self._last[tick.processor])
        for hold in tick.holds:
            self._give_back(hold.tier, hold.nbytes, hold.until, task)
        for user, move in due:
            if user != position:
                self._fetch(user, move, reached)
        for move in tick.evicts:
            self._evict(position, move)

    def _takes(self, tick: Tick) -> list[tuple[int, int]]:
        made = made_by(tick, self._sources)
        return [(self._pools[tier], size) for tier, size in made.items() if tier in self._pools]

    def _give_back(self, tier: str, nbytes: int, until: int, task: Task) -> None:
        if tier in self._pools:
            room = (self._pools[tier], nbytes)
            (task.gives if until == task.tick else self._back[until]).append(room)

    def _fetch(self, position: int, move: Move, reached: list[int]) -> None:
        first = [*reached]
        if move.key in self._left:
            first.append(self._left[move.key])
        tasks = self._hops(position, move, first, brings=True)
        if move.key in self._stored:
            tasks[0].gives.append(self._stored.pop(move.key))
        if tasks[-1].takes:
            room = tasks[-1].takes[0]
            if (position, move.key) in self._steps_in_place:
                self._stepped[move.key] = room
            else:
                self._back[position if move.until is None else move.until].append(room)
        self.issued.needed[position].append(len(self.issued.tasks) - 1)

    def _evict(self, position: int, move: Move) -> None:
        tasks = self._hops(position, move, [self.issued.ticks[position]], brings=False)
        source = self._sources[move.route[0]]
        if move.in_place:
            if move.key in self._stepped:
                tasks[0].gives.append(self._stepped.pop(move.key))
        elif source in self._pools:
            tasks[0].gives.append((self._pools[source], move.room))
        self._left[move.key] = len(self.issued.tasks) - 1
        if tasks[-1].takes:
            self._stored[move.key] = tasks[-1].takes[0]

    def _hops(self, position: int, move: Move, after: list[int], *, brings: bool) -> list[Task]:
        """A task for each lane of the route, each holding its room until the next one has ended."""
        tasks: list[Task] = []
        for name in move.route:
            index, lane = self._lanes[name]
            task = Task(
                lane=index,
                seconds=lane.seconds(move.nbytes),
                after=after,
                takes=self._room(
                    lane, move.room if brings and name == move.route[-1] else move.nbytes
                ),
                gives=[],
                tick=position,
                move=move,
                nbytes=move.nbytes,
            )
            if tasks:
                task.gives.extend(tasks[-1].takes)
            tasks.append(task)
            after = [self._add(task)]
        return tasks

    def _room(self, lane: Lane, nbytes: int) -> list[tuple[int, int]]:
        pool = self._pools.get(lane.target)
        return [] if pool is None else [(pool, nbytes)]

    def _add(self, task: Task) -> int:
        self.issued.tasks.append(task)
        return len(self.issued.tasks) - 1


def _due(
    schedule: Schedule,
) -> tuple[dict[int, list[tuple[int, Move]]], set[tuple[int, str]]]:
    """Fetches by the tick at which they are issued, as (tick that needs it, move).

    Never before the tick that evicts the same key has ended. And (tick, key) of what is evicted in
    place.
    """
    due: dict[int, list[tuple[int, Move]]] = {}
    in_place: set[tuple[int, str]] = set()
    left: dict[str, int] = {}
    for position, tick in enumerate(schedule.ticks):
        for move in tick.fetches:
            at = max(position - move.ahead, left.get(move.key, -1) + 1, 0)
            due.setdefault(at, []).append((position, move))
        for move in tick.evicts:
            left[move.key] = position
            if move.in_place:
                in_place.add((position, move.key))
    return due, in_place
