"""Lanes: the ordered queue of one directed link, and the transfers that travel on it.

[Note: errors cross threads] A job that raises ends its transfer with that error. The error is
raised again by ``Transfer.wait`` on the thread that needs the data, and a lane that has failed
keeps serving: nothing is swallowed, nothing is turned into zeros. A transfer nobody waits for
is kept in ``Lane.failed`` until ``Lane.drain`` raises it at the step edge.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeAlias

from offload.tiers.journal import Journal, Label

Job: TypeAlias = Callable[[], None]


class Transfer:
    """A move in flight: done when all of its jobs have ended.

    ``owner`` is kept alive until then: the memory that the jobs know by its address only.
    """

    __slots__ = (
        "_event",
        "_left",
        "_lock",
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
        self._left = jobs
        self._lock = threading.Lock()
        self._event = threading.Event()
        if jobs == 0:
            self._event.set()

    def done(self) -> bool:
        """Whether every job has ended, well or not; never blocks, never raises."""
        return self._event.is_set()

    def settle(self) -> None:
        """Block until done, well or not."""
        self._event.wait()

    def wait(self) -> None:
        """Block until done.

        Raises:
            BaseException: what the first failing job raised, on this thread.
        """
        self._event.wait()
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
        self._event.set()


class Lane:
    """Worker threads that run the jobs of one directed link, first come first served.

    Args:
        name: the link, such as ``file→host``.
        workers: jobs in flight at once.
        journal: takes a ``Move`` for each finished transfer.
    """

    def __init__(self, name: str, workers: int, journal: Journal) -> None:
        self.name = name
        self.journal = journal
        self.failed: list[Transfer] = []
        self._jobs: deque[tuple[Transfer, Job]] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._busy = 0
        self._threads = [
            threading.Thread(target=self._work, name=f"offload {name} {index}", daemon=True)
            for index in range(workers)
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
    ) -> Transfer:
        """Queue ``jobs`` as one transfer of ``nbytes``; never blocks.

        ``urgent`` goes to the head of the queue: somebody is already waiting for it. ``owner``
        is kept alive until the last job has ended.
        """
        transfer = Transfer(label, nbytes, len(jobs), owner)
        entries = [(transfer, job) for job in jobs]
        with self._wake:
            if self._closed:
                raise RuntimeError(f"lane {self.name} is closed")
            if urgent:
                self._jobs.extendleft(reversed(entries))
            else:
                self._jobs.extend(entries)
            self._wake.notify(len(jobs))
        return transfer

    def expedite(self, transfer: Transfer) -> None:
        """Move what is still queued of ``transfer`` to the head of the queue."""
        with self._wake:
            waiting = [entry for entry in self._jobs if entry[0] is transfer]
            if waiting and len(waiting) < len(self._jobs):
                others = [entry for entry in self._jobs if entry[0] is not transfer]
                self._jobs = deque(waiting + others)

    def settle(self) -> None:
        """Wait until the lane is idle; errors stay with their transfers, and for ``drain``."""
        with self._wake:
            self._wake.wait_for(lambda: not self._jobs and self._busy == 0)

    def drain(self) -> None:
        """Wait until the lane is idle.

        Raises:
            BaseException: the first error of a transfer that nobody waited for.
        """
        with self._wake:
            self._wake.wait_for(lambda: not self._jobs and self._busy == 0)
            failed, self.failed = self.failed, []
        for transfer in failed:
            if not transfer.observed:
                transfer.wait()

    def close(self) -> None:
        """Finish what is queued and end the workers; safe to call twice."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._jobs or self._closed)
                if not self._jobs:
                    return
                transfer, job = self._jobs.popleft()
                self._busy += 1
            self._run(transfer, job)
            # Release before sleeping: a job may own the last reference to a big tensor.
            del transfer, job
            with self._wake:
                self._busy -= 1
                self._wake.notify_all()

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
