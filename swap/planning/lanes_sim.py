"""The event loop: tasks on lanes and processors, on a virtual clock.

A discrete-event simulation: the clock jumps from one end of a task to the next. The same schedule
gives the same course, always.

[Note: shared media] A lane whose media bear all that is busy goes at its own rate. Where ``n``
lanes are busy on a medium of width ``w < n``, each goes at ``w / n`` of its rate; where their rates
add up to more than it carries, all are slowed down alike; and a lane on several media goes at the
least of those shares. That is processor sharing, as a drive or a bus does it.

[Note: anomalies] Without shared media every course is monotone: a faster lane, a shorter tick or
more room never makes the step longer, for everything happens in an order that is fixed, and each
beginning is the latest of some ends. With shared media that need not be so: what begins earlier
may slow down what matters more.
"""

from collections import deque
from heapq import heappop, heappush

from offload.allocator.errors import BudgetError
from offload.allocator.units import format_nbytes
from offload.swap.planning.issue import Task
from offload.swap.planning.schedule import Schedule


class Course:
    """When each task begins and ends. Lanes and processors alike serve their tasks in order.

    Attributes:
        begins, ends: seconds, by task; known once it has gone.
        peaks: the most bytes that each pool held.
    """

    def __init__(self, schedule: Schedule, tasks: list[Task]) -> None:
        self._schedule = schedule
        self.tasks = tasks
        count = len(schedule.lanes) + len(schedule.processors())
        self.begins = [0.0] * len(self.tasks)
        self.ends = [0.0] * len(self.tasks)
        self.peaks = [0] * len(schedule.pools)
        self._now = 0.0
        self._ended = 0
        self._queues: list[deque[int]] = [deque() for _ in range(count)]
        self._pending = [len(task.after) for task in self.tasks]
        self._dependents: list[list[int]] = [[] for _ in self.tasks]
        # Pools: room is handed out in the order of the tasks (``schedule`` [Note: order of issue]).
        self._free = [pool.nbytes for pool in schedule.pools]
        self._turns: list[deque[int]] = [deque() for _ in schedule.pools]
        self._waiting: list[list[int]] = [[] for _ in schedule.pools]
        for index, task in enumerate(self.tasks):
            self._queues[task.lane].append(index)
            for before in task.after:
                self._dependents[before].append(index)
            for pool, _ in task.takes:
                self._turns[pool].append(index)
        # Lanes: what is left of the task that they serve, and how fast they are at it.
        self._serving: list[int | None] = [None] * count
        self._rest_s = [0.0] * count
        self._speed = [1.0] * count
        self._since_s = [0.0] * count
        self._version = [0] * count
        self._media = _media_of(schedule, count)
        self._busy: list[list[int]] = [[] for _ in schedule.media]
        self._events: list[tuple[float, int, int]] = []  # end, lane, version
        self._ready = deque(range(count))

    def go(self) -> None:
        """Until every task has ended.

        Raises:
            BudgetError: a full pool that nothing would empty.
        """
        while True:
            while self._ready:
                self._try(self._ready.popleft())
            if not self._events:
                break
            at, lane, version = heappop(self._events)
            if version == self._version[lane]:
                self._now = at
                self._finish(lane)
        if self._ended < len(self.tasks):
            raise self._stuck()

    def _try(self, lane: int) -> None:
        """Begin the lane's next task if nothing is in its way."""
        queue = self._queues[lane]
        if self._serving[lane] is not None or not queue or self._pending[queue[0]]:
            return
        index = queue[0]
        task = self.tasks[index]
        for pool, nbytes in task.takes:
            if self._turns[pool][0] != index or self._free[pool] < nbytes:
                self._waiting[pool].append(lane)
                return
        for pool, nbytes in task.takes:
            self._turns[pool].popleft()
            self._free[pool] -= nbytes
            used = self._schedule.pools[pool].nbytes - self._free[pool]
            self.peaks[pool] = max(self.peaks[pool], used)
            self._wake(pool)
        queue.popleft()
        self.begins[index] = self._now
        self._serving[lane] = index
        if not self._media[lane]:
            heappush(self._events, (self._now + task.seconds, lane, self._version[lane]))
            return
        self._rest_s[lane], self._since_s[lane] = task.seconds, self._now
        self._speed[lane] = 1.0
        for medium in self._media[lane]:
            self._busy[medium].append(lane)
        self._set_pace(lane)

    def _finish(self, lane: int) -> None:
        index = self._serving[lane]
        assert index is not None
        self.ends[index] = self._now
        self._ended += 1
        self._serving[lane] = None
        for medium in self._media[lane]:
            self._busy[medium].remove(lane)
        if self._media[lane]:
            self._set_pace(lane)
        for pool, nbytes in self.tasks[index].gives:
            self._free[pool] += nbytes
            self._wake(pool)
        for dependent in self._dependents[index]:
            self._pending[dependent] -= 1
            if not self._pending[dependent]:
                self._ready.append(self.tasks[dependent].lane)
        self._ready.append(lane)

    def _wake(self, pool: int) -> None:
        self._ready.extend(self._waiting[pool])
        self._waiting[pool].clear()

    def _set_pace(self, lane: int) -> None:
        """The lane has begun or ended: all on its media go at another pace from now on."""
        affected = {other for medium in self._media[lane] for other in self._busy[medium]}
        for other in sorted(affected):
            self._rest_s[other] -= (self._now - self._since_s[other]) * self._speed[other]
            self._since_s[other] = self._now
            self._speed[other] = min(self._share(medium) for medium in self._media[other])
            self._version[other] += 1
            rest_s = max(self._rest_s[other], 0.0)
            ends_s = self._now + rest_s / self._speed[other]
            heappush(self._events, (ends_s, other, self._version[other]))

    def _share(self, medium: int) -> float:
        """Of its own rate, at which each lane that is busy on ``medium`` goes."""
        given, busy = self._schedule.media[medium], self._busy[medium]
        rates = sum(self._schedule.lanes[lane].bytes_per_s for lane in busy)
        return min(1.0, given.width / len(busy), given.bytes_per_s / rates)

    def _stuck(self) -> BudgetError:
        """Nothing runs, but tasks are left: the first of them waits for room that never comes."""
        stuck = min(queue[0] for queue in self._queues if queue and not self._pending[queue[0]])
        task = self.tasks[stuck]
        pool, nbytes = next(
            (pool, nbytes) for pool, nbytes in task.takes if self._free[pool] < nbytes
        )
        given, free = self._schedule.pools[pool], self._free[pool]
        tick = self._schedule.ticks[task.tick].name
        what = f"tick {tick}" if task.move is None else f"move {task.move.key} of tick {tick}"
        return BudgetError(
            f"{what} waits for {format_nbytes(nbytes)} ({nbytes} bytes) of {given.tier}, of whose "
            f"{format_nbytes(given.nbytes)} {format_nbytes(free)} are free, and nothing is left "
            f"that would free more: raise the pool by {format_nbytes(nbytes - free)}, or fetch "
            "fewer ticks ahead",
            needed_nbytes=given.nbytes + nbytes - free,
            budget_nbytes=given.nbytes,
        )


def _media_of(schedule: Schedule, count: int) -> list[tuple[int, ...]]:
    """By lane, positions of its media; processors have none."""
    positions = {medium.name: index for index, medium in enumerate(schedule.media)}
    media = [tuple(positions[name] for name in lane.media) for lane in schedule.lanes]
    return media + [()] * (count - len(media))
