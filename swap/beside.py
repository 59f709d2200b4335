"""A thread that steps what has been read while the training thread is inside a kernel.

[Note: beside kernels] In backward the training thread comes by between two kernels only. A kernel
of a large layer takes longer than the tiles in flight take to be read, and then the drive waits for
the training thread. So a thread of ours steps tiles as soon as they have been read, and has them
written and others read. It does no more: what is told to the rest of the run (weights, gradients,
the store) is told by the training thread when it comes by.

torch keeps for each thread how many compute with it: here none does, and kernels of the training
thread keep theirs. Whether denormal numbers are flushed to zero is a thread's own setting, too. A
thread has it from the one that starts it, so the training thread does, anew in each backward.
"""

import threading
from collections.abc import Callable

import torch

from offload.tiers.pages import OWN_THREAD


class Beside:
    """Calls ``work`` on a thread of its own, once or more after each ``ring``.

    Args:
        work: must not raise.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._bell = threading.Event()
        self._thread: threading.Thread | None = None
        self._ends = False

    def start(self) -> None:
        """Begin to hear; does nothing if it does already."""
        if self._thread is not None:
            return
        threads, ready = torch.get_num_threads(), threading.Event()
        self._ends = False
        self._bell.clear()
        self._thread = threading.Thread(
            target=self._run, args=(ready,), name=f"{OWN_THREAD}beside kernels", daemon=True
        )
        self._thread.start()
        ready.wait()
        torch.set_num_threads(threads)  # of threads that begin from now on

    def ring(self) -> None:
        """There may be work; from any thread, at any time."""
        self._bell.set()

    def stop(self) -> None:
        """Return when ``work`` is not being called, and will not be."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._ends = True
        self._bell.set()
        thread.join()

    def _run(self, ready: threading.Event) -> None:
        torch.set_num_threads(1)
        ready.set()
        while True:
            self._bell.wait()
            self._bell.clear()
            if self._ends:
                return
            self._work()
