"""Lanes: the ordered queue of one directed link, and the transfers that travel on it.

[Note: errors cross threads] A job that raises ends its transfer with that error. The error is
raised again by ``Transfer.wait`` on the thread that needs the data, and a lane that has failed
keeps serving: nothing is swallowed, nothing is turned into zeros. A transfer nobody waits for
is kept in ``Lane.failed`` until ``Lane.drain`` raises it at the step edge.

[Note: a queue for each path] Where files are striped over several paths, a lane keeps one queue
with workers of its own for each: a slow path never holds up the requests of the others. Jobs of
one transfer may be in several queues; it is done when the last of them has ended.

[Note: one after the other] A transfer may begin when another has ended, on whichever lane: a read
into memory that is still being written from. The thread that ends the other one queues it, so
nobody has to come by.

[Note: forked processes] A process that is forked has the lanes, and not their threads: whoever
waited for a transfer there would wait for ever. It is told so.

A worker that finds nothing to do waits for its bell (``lane_queue``).
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from offload.allocator.errors import ForkedProcessError
from offload.tiers.journal import Journal, Label
from offload.tiers.lane_queue import LaneQueue, ring

Job: TypeAlias = Callable[[], None]


@dataclass(frozen=True, slots=True)
class QueuedJob:
    """A job for one queue of a lane; a plain callable goes to the first."""

    queue: int
    call: Job

    def __call__(self) -> None:
        self.call()


class Transfer:
    """A move in flight: done when all of its jobs have ended.

    ``owner`` is kept alive until then: the memory that the jobs know by its address only.
    """

    __slots__ = (
        "_event",
        "_followers",
        "_left",
        "_lock",
        "_process",
        "ended_s",
        "error",
        "label",
        "nbytes",
        "observed",
        "owner",
        "started_s",
    )

    def __init__(self, label: Label, nbytes: int, jobs: int, owner: object = None) -> None:
        self.owner = owner if jobs else None
        self.label = label
        self.nbytes = nbytes
        self.error: BaseException | None = None
        self.observed = False  # somebody has been told of the error
        self.started_s: float | None = None
        self.ended_s: float | None = None
        self._process = os.getpid()
        self._left = jobs
        self._followers: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._event = threading.Event()
        if jobs == 0:
            self._event.set()

    @property
    def duration_s(self) -> float | None:
        """Seconds on its lane, from the start of its first job on; None before it has ended."""
        if self.started_s is None or self.ended_s is None:
            return None
        return self.ended_s - self.started_s

    def done(self) -> bool:
        """Whether every job has ended, well or not; never blocks, never raises."""
        return self._event.is_set()

    def settle(self) -> None:
        """Block until done, well or not.

        Raises:
            ForkedProcessError: it isn't done, and this process was forked meanwhile.
        """
        if not self._event.is_set():
            check_process(self._process)
            self._event.wait()

    def wait(self) -> None:
        """Block until done.

        Raises:
            BaseException: what the first failing job raised, on this thread.
            ForkedProcessError: as ``settle``.
        """
        self.settle()
        if self.error is not None:
            self.observed = True
            raise self.error

    def _finish_job(self, error: BaseException | None) -> bool:
        """Count one job as ended; True when it was the last."""
        with self._lock:
            self.error = self.error or error
            self._left -= 1
            return self._left == 0

    def _complete(self) -> None:
        self.owner = None
        with self._lock:
            self._event.set()
        while self._followers:  # nobody adds any more
            self._followers.pop(0)()

    def then(self, call: Callable[[], None]) -> None:
        """``call`` when done, well or not: now, or on the thread of the last job."""
        with self._lock:
            if not self._event.is_set():
                self._followers.append(call)
                return
        call()


def check_process(pid: int) -> None:
    """Raise unless this is the process ``pid``; see [Note: forked processes].

    Raises:
        ForkedProcessError: it is a child of it.
    """
    if os.getpid() != pid:
        raise ForkedProcessError(
            f"process {os.getpid()} was forked from process {pid}, where Offload keeps this model: "
            "bytes that are not in memory can only be moved there. Make copies for the child "
            "before it is forked, or start it with multiprocessing's 'spawn'"
        )


def _no_job() -> None:
    """Nothing has to move, but not before another transfer has ended."""


def wait_for_all(transfers: Sequence[Transfer]) -> None:
    """Block until all of them are done.

    Raises:
        BaseException: the first error, when the last one has ended; the others count as told.
    """
    for transfer in transfers:
        transfer.settle()
    failed = [transfer for transfer in transfers if transfer.error is not None]
    for transfer in failed:
        transfer.observed = True
    if failed:
        failed[0].wait()


_Queue: TypeAlias = LaneQueue[tuple[Transfer, Job]]


class Lane:
    """Worker threads that run the jobs of one directed link, first come first served.

    Args:
        name: the link, such as ``file→host``.
        workers: jobs in flight at once, for each queue.
        journal: takes a ``Move`` for each finished transfer.
        queues: how many queues of their own ``QueuedJob`` may name.
    """

    def __init__(self, name: str, workers: int, journal: Journal, queues: int = 1) -> None:
        self.name = name
        self.journal = journal
        self.failed: list[Transfer] = []
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._queues = [_Queue() for _ in range(queues)]
        self._idle = threading.Condition(self._lock)
        self._closed = False
        self._pending = 0  # jobs that wait or run
        self._following = 0  # transfers that wait for the end of another
        self._threads = [
            threading.Thread(
                target=self._work, args=(queue,), name=f"offload {name} {index}", daemon=True
            )
            for index, queue in enumerate(self._queues * workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        jobs: Sequence[Job],
        label: Label,
        nbytes: int,
        *,
        urgent: bool = False,
        owner: object = None,
        after: Transfer | None = None,
    ) -> Transfer:
        """Queue ``jobs`` as one transfer of ``nbytes``; never blocks.

        ``urgent`` goes to the head of its queues: somebody is already waiting for it. ``owner``
        is kept alive until the last job has ended. None of the jobs begins, and the transfer is
        not done, before ``after`` is ([Note: one after the other]).

        Raises:
            ForkedProcessError: its threads are in the process that this one was forked from.
        """
        check_process(self._process)
        if after is not None:
            jobs = jobs or [_no_job]
        transfer = Transfer(label, nbytes, len(jobs), owner)
        bells: list[threading.Lock] = []
        with self._lock:
            if self._closed:
                raise RuntimeError(f"lane {self.name} is closed")
            if after is None:
                bells = self._enqueue(transfer, jobs, urgent=urgent)
            else:
                self._following += 1
            self._pending += len(jobs)
        ring(bells)
        if after is not None:
            after.then(lambda: self._follow(transfer, jobs))
        return transfer

    def _follow(self, transfer: Transfer, jobs: Sequence[Job]) -> None:
        with self._lock:
            self._following -= 1
            bells = self._enqueue(transfer, jobs)
            if self._closed:
                bells += self._all_bells()
        ring(bells)

    def _enqueue(
        self, transfer: Transfer, jobs: Sequence[Job], *, urgent: bool = False
    ) -> list[threading.Lock]:
        """Queue them; what is to be released when the lock is given up."""
        for job in reversed(jobs) if urgent else jobs:
            queue = self._queues[job.queue if isinstance(job, QueuedJob) else 0]
            if urgent:
                queue.jobs.appendleft((transfer, job))
            else:
                queue.jobs.append((transfer, job))
        return [bell for queue in self._queues if (bell := queue.call()) is not None]

    def expedite(self, transfer: Transfer) -> None:
        """Move what is still queued of ``transfer`` to the head of its queues."""
        with self._lock:
            for queue in self._queues:
                waiting = [entry for entry in queue.jobs if entry[0] is transfer]
                if waiting and len(waiting) < len(queue.jobs):
                    others = [entry for entry in queue.jobs if entry[0] is not transfer]
                    queue.jobs = deque(waiting + others)

    def settle(self) -> None:
        """Wait until the lane is idle; errors stay with their transfers, and for ``drain``."""
        self._wait_until_idle()

    def drain(self) -> None:
        """Wait until the lane is idle.

        Raises:
            BaseException: the first error of a transfer that nobody waited for.
        """
        self._wait_until_idle()
        with self._lock:
            failed, self.failed = self.failed, []
        for transfer in failed:
            if not transfer.observed:
                transfer.wait()

    def _wait_until_idle(self) -> None:
        check_process(self._process)
        with self._lock:
            bells = self._all_bells() if self._pending else []
        ring(bells)
        with self._idle:
            self._idle.wait_for(lambda: self._pending == 0)

    def close(self) -> None:
        """Finish what is queued and end the workers; safe to call twice."""
        with self._lock:
            self._closed = True
            bells = self._all_bells()
        ring(bells)
        for thread in self._threads:
            thread.join()

    def _all_bells(self) -> list[threading.Lock]:
        return [bell for queue in self._queues for bell in queue.call_all()]

    def _take(self, queue: _Queue, bell: threading.Lock) -> tuple[Transfer, Job] | None:
        """The next job, as soon as there is one; None when there will be no more."""
        is_called = False
        while True:
            with self._lock:
                if is_called:
                    queue.come(bell)
                if queue.jobs:
                    taken = queue.jobs.popleft()
                    other = queue.call()
                    break
                if self._closed and not self._following:
                    return None
                queue.sleep(bell)
            bell.acquire()
            is_called = True
        ring([] if other is None else [other])
        return taken

    def _work(self, queue: _Queue) -> None:
        bell = threading.Lock()
        bell.acquire()
        while (taken := self._take(queue, bell)) is not None:
            transfer, job = taken
            del taken
            self._run(transfer, job)
            # Release before sleeping: a job may own the last reference to a big tensor.
            del transfer, job
            with self._idle:
                self._pending -= 1
                if self._pending == 0:
                    self._idle.notify_all()

    def _run(self, transfer: Transfer, job: Job) -> None:
        if transfer.started_s is None:
            transfer.started_s = time.perf_counter()
        error: BaseException | None = None
        try:
            job()
        except BaseException as caught:  # noqa: BLE001  [Note: errors cross threads]
            error = caught
        if not transfer._finish_job(error):
            return
        transfer.ended_s = time.perf_counter()
        if transfer.error is None:
            duration_s = transfer.ended_s - transfer.started_s
            self.journal.moved(transfer.label, transfer.nbytes, duration_s, self.name)
        else:
            self.failed.append(transfer)
        transfer._complete()
