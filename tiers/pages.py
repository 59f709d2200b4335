"""Pages that go from one held tensor to the next without passing through the kernel's zeroing.

[Note: recycled pages] Fresh anonymous pages are zeroed by the kernel, on a core that the training
step wants: on two cores that alone can double the time of a matrix product beside it. Pages of
an evicted tensor are therefore moved aside (``mremap``) and used for the next fetch. Between
that move and the mapping of the tensor's file, its range reads as zeros for some microseconds.
The training thread is inside the eviction then; any other thread could see them. So pages are
recycled only while no thread lives that could be running the user's code, and are given back to
the kernel (atomically, see ``mapped`` [Note: stable addresses]) while one does.

Tensors have many sizes. A range that none of its size waits for is cut from a larger one, between
huge pages, which stay whole.
"""

import threading
from collections import defaultdict

from offload.tiers import hostmem

OWN_THREAD = "offload "  # how the names of Offload's own threads begin
_HARMLESS_MODULES = ("tqdm",)  # threads of progress bars never touch a tensor


def alone() -> bool:
    """Whether no other thread can be running the user's code."""
    here = threading.current_thread()
    return all(
        thread is here
        or thread.name.startswith(OWN_THREAD)
        or type(thread).__module__.startswith(_HARMLESS_MODULES)
        for thread in threading.enumerate()
    )


class PagePool:
    """Private ranges by their size; safe to use from any thread."""

    def __init__(self) -> None:
        self.nbytes = 0  # that wait for use
        self._free: defaultdict[int, list[int]] = defaultdict(list)
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> int | None:
        """The address of a private range of ``nbytes`` with undefined content, if one waits."""
        with self._lock:
            if not self._free[nbytes] and not self._cut(nbytes):
                return None
            self.nbytes -= nbytes
            return self._free[nbytes].pop()

    def _cut(self, nbytes: int) -> bool:
        """Make a range of ``nbytes`` of the smallest that is larger, if there is one."""
        if nbytes % hostmem.HUGE_PAGE:
            return False
        sizes = (size for size, free in self._free.items() if free and size > nbytes)
        larger = min(sizes, default=0)
        if not larger:
            return False
        address = self._free[larger].pop()
        self._free[nbytes].append(address)
        self._free[larger - nbytes].append(address + nbytes)
        return True

    def move_from(self, address: int, nbytes: int) -> None:
        """Take the private pages at ``address``, which then reads as zeros."""
        kept = hostmem.map_anonymous(nbytes)
        try:
            hostmem.move_leaving_zeros(address, kept, nbytes)
        except OSError:  # kernels before 5.7: leave the pages to be given back
            hostmem.unmap(kept, nbytes)
            return
        with self._lock:
            self._free[nbytes].append(kept)
            self.nbytes += nbytes

    def trim(self, limit_nbytes: int = 0) -> None:
        """Give pages back to the kernel until at most ``limit_nbytes`` wait."""
        with self._lock:
            for nbytes, free in self._free.items():
                while free and self.nbytes > limit_nbytes:
                    hostmem.unmap(free.pop(), nbytes)
                    self.nbytes -= nbytes
