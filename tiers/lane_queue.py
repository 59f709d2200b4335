"""The queue of one path of a lane, and the bells that wake its workers.

[Note: who wakes whom] To wake a thread is a system call, and the kernel may give the woken thread
the processor of the one that called, which is the training thread, in the middle of its work. So
``Lane.submit`` wakes one worker at most for each queue, none while one is still waking up, and
after it has given up the lock, which the woken one wants first of all. A worker that takes a job
and leaves others behind wakes the next worker. Ctrl-C may come before the call was made: so it is
made again by the next ``submit`` after a while, and by whoever waits for the lane or closes it.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Generic, TypeVar

Entry = TypeVar("Entry")

_LOST_S = 0.1  # a worker that was called and has not come for so long may not have been called


def ring(bells: Sequence[threading.Lock]) -> None:
    """Wake the workers that wait for ``bells``; never under the lane's lock."""
    for bell in bells:
        with contextlib.suppress(RuntimeError):  # it has been rung, and nobody has come yet
            bell.release()


class LaneQueue(Generic[Entry]):
    """The jobs of one path that wait, and the workers that wait for them ([Note: who wakes whom]).

    Everything here is done under the lane's lock.
    """

    __slots__ = ("_asleep", "_called_s", "jobs")

    def __init__(self) -> None:
        self.jobs: deque[Entry] = deque()
        self._asleep: list[threading.Lock] = []  # of each worker its own, which it waits for
        self._called_s: float | None = None  # when one was called that has not come yet

    def sleep(self, bell: threading.Lock) -> None:
        """A worker goes to wait for ``bell``, which it holds."""
        self._asleep.append(bell)

    def come(self, bell: threading.Lock) -> None:
        """The worker that waited for ``bell`` has come."""
        self._asleep.remove(bell)
        self._called_s = None

    def call(self) -> "threading.Lock | None":
        """What is to be rung to wake a worker; None if none need be."""
        if not self.jobs or not self._asleep:
            return None
        now_s = time.monotonic()
        if self._called_s is not None and now_s - self._called_s < _LOST_S:
            return None
        self._called_s = now_s
        return self._asleep[-1]

    def call_all(self) -> list[threading.Lock]:
        """What is to be rung to wake every worker."""
        return list(self._asleep)
