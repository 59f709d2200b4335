"""Tensors at stable addresses: a fixed range of memory whose pages come and go.

[Note: stable addresses] A mapped tensor never moves, so views that autograd saved and pointers
that kernels hold stay valid while its bytes travel. Its pages are in one of two states:

* *filed*: a mapping of the tensor's block. Any access, from Python, a kernel or a debugger,
  faults the right bytes in through the page cache: slow, never wrong.
* *held*: private anonymous huge pages, filled by direct reads beside it and moved over the address
  by ``mremap``: full speed, counted against the budget.

Both changes of state replace page-table entries atomically, piece by piece, so a reader at any
moment sees the same bytes before and after, also while some pieces are in one state and some in
the other. In a striped file *filed* is several mappings side by side. (Reserving addresses once
and mapping pages on demand is vAttention's idea, arXiv 2405.04437, section 4, applied to
training state.)

[Note: landing] While a tensor is being read, the user's code may write to it: to private copies of
its file's pages, which the pages that were read would replace. So the thread that runs the user's
code moves them (``land``), and copies what was written meanwhile into them first. What was read
before the tensor was filed anew, if only at the same block, is old: it does not land.

[Note: private writes] A *filed* private mapping (``shared=False``) keeps writes in copies of
its pages, which the kernel's page map tells apart; the block is never changed behind the
store's back. A shared mapping (gradients) writes through to its scratch block.
"""

import ctypes
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch

from offload.tiers import hostmem
from offload.tiers.base import Block
from offload.tiers.lanes import Job, QueuedJob
from offload.tiers.memory import tensor_at
from offload.tiers.pages import PagePool, alone
from offload.tiers.pieces import PIECE_NBYTES, BlockFile, Piece

FETCH_NBYTES = PIECE_NBYTES


class MappedTensor:
    """A contiguous tensor at a stable address.

    Args:
        file: where its blocks live.
        shared: whether writes while *filed* reach the file.
    """

    __slots__ = (
        "__weakref__",
        "_lands",
        "_staged",
        "address",
        "block",
        "file",
        "held",
        "nbytes",
        "padded_nbytes",
        "shared",
        "tensor",
    )

    def __init__(
        self,
        file: BlockFile,
        dtype: torch.dtype,
        shape: Sequence[int],
        *,
        shared: bool = False,
    ) -> None:
        self.file = file
        self.shared = shared
        self.nbytes = math.prod(shape) * dtype.itemsize
        self.padded_nbytes = hostmem.page_ceil(max(self.nbytes, 1))
        align = hostmem.HUGE_PAGE if self.nbytes >= hostmem.HUGE_PAGE else hostmem.PAGE
        self.address = hostmem.map_anonymous(self.padded_nbytes, align=align)
        self.tensor = tensor_at(
            self.address, dtype, shape, on_release=(self.address, self.padded_nbytes)
        )
        self.held = True
        self.block: Block | None = None
        self._staged: list[tuple[int, int, int]] = []  # (start, nbytes, pages) that were read
        self._lands = False  # what is being read is of the present mapping

    def file_as(self, block: Block, pool: PagePool | None = None) -> None:
        """Become *filed* at ``block``: held pages and private copies are given up.

        ``pool`` takes the held pages for the next fetch, if nobody else can be reading them.
        """
        block.check(0, self.nbytes)
        if pool is not None and self.held and self.block is not None and alone():
            for piece in self._pieces():
                pool.move_from(self.address + piece.start, piece.nbytes)
        self.file.map(self.address, self.padded_nbytes, block.extent.offset, shared=self.shared)
        self.block = block
        self.held = self._lands = False

    def map_again(self, *, shared: bool) -> None:
        """Map the block of a *filed* tensor anew, without pages; private copies are given up.

        Atomic for readers. What is written from now on reaches the file, or does not.
        """
        assert self.block is not None
        # ``shed`` may run on another thread, and must never discard private copies.
        self.shared = self.shared and shared
        self.file.map(self.address, self.padded_nbytes, self.block.extent.offset, shared=shared)
        self.shared = shared

    def fetch_jobs(self, pool: PagePool | None = None) -> list[Job]:
        """Jobs that read the tensor into pages of ``pool``; behind them ``land`` makes it *held*.

        Each is complete in itself. Without ``O_DIRECT`` the page cache is the only path: the jobs
        then fault the mapping in and the tensor stays *filed*.
        """
        self._lands = True
        call = self._read_beside if self.file.direct else self._fault_in
        return self._jobs(call, pool if self.file.direct else None)

    def land(self) -> None:
        """Become *held* in the pages that the jobs of ``fetch_jobs`` have read, if all of them did.

        Not if the tensor was *filed* anew meanwhile. See [Note: landing].

        Raises:
            TierIOError: the kernel refused; the tensor is *filed*.
        """
        staged, self._staged = self._staged, []
        lands = self._lands and sum(nbytes for _, nbytes, _ in staged) == self.padded_nbytes
        try:
            while lands and staged:
                self.held = True
                self._take_over(*staged.pop())
        except BaseException:
            assert self.block is not None
            self.file_as(self.block)
            raise
        finally:
            for _, nbytes, pages in staged:
                hostmem.unmap(pages, nbytes)

    def _take_over(self, at: int, nbytes: int, pages: int) -> None:
        """Move ``pages`` over the address; they get what is newer there."""
        here = self.address + at
        try:
            if hostmem.has_private_copies(here, nbytes):
                ctypes.memmove(pages, here, nbytes)
            hostmem.move_over(pages, here, nbytes)
        except OSError:
            hostmem.unmap(pages, nbytes)
            raise

    def hold_jobs(self) -> list[Job]:
        """Jobs that make the tensor *held*; each is complete in itself.

        Nobody may write to it meanwhile.
        """
        self.held = True  # from now on its pages are not for shedding
        return self._jobs(self._fetch, None)

    def _jobs(
        self, call: Callable[[int, int, int | None], None], pool: PagePool | None
    ) -> list[Job]:
        return [
            QueuedJob(
                piece.queue,
                partial(call, piece.start, piece.nbytes, pool.take(piece.nbytes) if pool else None),
            )
            for piece in self._pieces()
        ]

    def _pieces(self) -> list[Piece]:
        """The ranges that move as one, each on one path."""
        assert self.block is not None
        return self.file.pieces(self.block.extent.offset, self.padded_nbytes)

    def _fault_in(self, at: int, nbytes: int, _pages: int | None) -> None:
        hostmem.populate(self.address + at, nbytes)

    def _fetch(self, at: int, nbytes: int, pages: int | None) -> None:
        """Read one piece into the pages at ``pages`` and move them over the address."""
        hostmem.move_over(self._read(at, nbytes, pages), self.address + at, nbytes)

    def _read_beside(self, at: int, nbytes: int, pages: int | None) -> None:
        self._staged.append((at, nbytes, self._read(at, nbytes, pages)))

    def _read(self, at: int, nbytes: int, pages: int | None) -> int:
        """Read one piece into the pages at ``pages``, or into fresh ones; where they are."""
        assert self.block is not None
        if pages is None:
            pages = hostmem.map_anonymous(nbytes)
        try:
            self.file.read(self.block.extent.offset + at, pages, nbytes)
        except BaseException:
            hostmem.unmap(pages, nbytes)
            raise
        return pages

    def written_while_filed(self) -> bool:
        """Whether a private mapping was written since it was made ([Note: private writes])."""
        return not self.held and hostmem.has_private_copies(self.address, self.padded_nbytes)

    def shed(self) -> None:
        """Give clean cached pages back; safe at any time, from any thread, in any state."""
        if self.held:
            return
        if self.shared:
            hostmem.discard(self.address, self.padded_nbytes)
        else:
            hostmem.page_out(self.address, self.padded_nbytes)
