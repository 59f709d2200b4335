"""Holds the resident set to the budget against page faults that nobody scheduled.

User code that reads swapped weights, gradients or states faults their pages in. Those pages are
clean copies of files (or shared mappings of them), so they can be given back at any moment: a
watching thread does so while the process is near its budget. A few pages soon come back and would
be read again and again: they stay for as long as the budget has room for twice as many more.
"""

import threading
import weakref

from offload.tiers import hostmem
from offload.tiers.mapped import MappedTensor

_PERIOD_S = 0.01
WORTH_NBYTES = 8 << 20  # fewer pages are not shed, while there is room for them
LEAST_WORTH_NBYTES = 1 << 20  # so few never: code is paged in, too


def worth_nbytes(room_nbytes: int) -> int:
    """Fewer pages are not shed where the budget has so much room left.

    Half of the room, for the thread looks now and then, and a pass may take some of it meanwhile.
    """
    return max(min(WORTH_NBYTES, room_nbytes // 2), LEAST_WORTH_NBYTES)


class Governor:
    """Watches the resident set and sheds faulted-in pages above ``limit_nbytes``.

    Args:
        limit_nbytes: where moves wait, and pages are shed.
        budget_nbytes: what the resident set must stay below.
    """

    def __init__(self, limit_nbytes: int, budget_nbytes: int) -> None:
        self.limit_nbytes = limit_nbytes
        self._budget_nbytes = budget_nbytes
        self.seen_nbytes = 0  # the peak since ``restart_peak``, as often as the thread has looked
        self._known_nbytes = hostmem.peak_resident_nbytes()  # the kernel's peak at that time
        self._mapped: weakref.WeakSet[MappedTensor] = weakref.WeakSet()
        self._lock = threading.Lock()  # a set must not grow while it is listed
        self._fixed_nbytes = 0  # file pages that shedding can't give back: the libraries' own code
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="offload governor", daemon=True)
        self._thread.start()

    def watch(self, mapped: MappedTensor) -> None:
        """Shed the pages of ``mapped`` too, for as long as it lives."""
        with self._lock:
            self._mapped.add(mapped)

    def room(self) -> int:
        """Bytes left below the limit; negative above it."""
        return self.limit_nbytes - hostmem.resident_nbytes()[0]

    def is_tight(self) -> bool:
        """Whether half of what is between the limit and the budget is taken."""
        return -2 * self.room() > self._budget_nbytes - self.limit_nbytes

    def restart_peak(self) -> None:
        """Begin a new measurement of the peak.

        If the last one was above the limit, the heap's free pages are given back first: each step
        leaves holes at other places, which would add up.
        """
        if self.peak_nbytes > self.limit_nbytes:
            hostmem.trim_heap()
        self.seen_nbytes = hostmem.resident_nbytes()[0]
        self._known_nbytes = hostmem.peak_resident_nbytes()

    @property
    def peak_nbytes(self) -> int:
        """The peak since ``restart_peak``: the kernel's, if it is above all before that.

        Otherwise what the thread has seen, which may have missed a short one.
        """
        return self.peak()[0]

    def peak(self) -> tuple[int, bool]:
        """``peak_nbytes``, and whether the kernel has measured it."""
        kernel = hostmem.peak_resident_nbytes()
        is_exact = kernel > self._known_nbytes
        return max(self.seen_nbytes, kernel if is_exact else 0), is_exact

    def expect(self, nbytes: int) -> None:
        """So many bytes will soon be taken, maybe faster than the thread looks: shed for them."""
        resident, from_files = hostmem.resident_nbytes()
        self._shed_above(resident + nbytes, from_files)

    def _watch(self) -> None:
        while not self._stop.wait(_PERIOD_S):
            resident, from_files = hostmem.resident_nbytes()
            self.seen_nbytes = max(self.seen_nbytes, resident)
            self._shed_above(resident, from_files)

    def _shed_above(self, resident_nbytes: int, from_files_nbytes: int) -> None:
        """Shed if the resident set is above the limit, and pages are worth it."""
        # What was faulted in while the last ones went is none that can't be given back.
        self._fixed_nbytes = min(self._fixed_nbytes, from_files_nbytes)
        if resident_nbytes <= self.limit_nbytes:
            return
        worth = worth_nbytes(self._budget_nbytes - resident_nbytes)
        if from_files_nbytes > self._fixed_nbytes + worth:
            self.shed()
            self._fixed_nbytes = hostmem.resident_nbytes()[1]

    def shed(self) -> None:
        """Give back every page that was faulted in."""
        with self._lock:
            watched = list(self._mapped)
        for mapped in watched:
            mapped.shed()

    def close(self) -> None:
        """End the thread; safe to call twice."""
        self._stop.set()
        self._thread.join()
