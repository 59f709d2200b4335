"""Holds the resident set to the budget against page faults that nobody scheduled.

User code that reads swapped weights, gradients or states faults their pages in. Those pages are
clean copies of files (or shared mappings of them), so they can be given back at any moment: a
watching thread does so while the process is near its budget.
"""

import threading
import weakref

from offload.tiers import hostmem
from offload.tiers.mapped import MappedTensor

_PERIOD_S = 0.01
WORTH_NBYTES = 8 << 20  # fewer pages are not shed


class Governor:
    """Watches the resident set and sheds faulted-in pages above ``limit_nbytes``."""

    def __init__(self, limit_nbytes: int) -> None:
        self.limit_nbytes = limit_nbytes
        self.seen_nbytes = 0  # the peak since ``restart_peak``, as often as the thread has looked
        self._known_nbytes = hostmem.peak_resident_nbytes()  # the kernel's peak at that time
        self._mapped: weakref.WeakSet[MappedTensor] = weakref.WeakSet()
        self._lock = threading.Lock()  # a set must not grow while it is listed
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

    def restart_peak(self) -> None:
        """Begin a new measurement of the peak."""
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

    def _watch(self) -> None:
        # File pages that shedding can't give back: the libraries' own code.
        fixed_nbytes = 0
        while not self._stop.wait(_PERIOD_S):
            resident, from_files = hostmem.resident_nbytes()
            self.seen_nbytes = max(self.seen_nbytes, resident)
            if resident > self.limit_nbytes and from_files > fixed_nbytes + WORTH_NBYTES:
                self.shed()
                fixed_nbytes = hostmem.resident_nbytes()[1]

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
