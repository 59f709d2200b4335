"""A file that holds a tier's bytes: direct I/O to and from memory, and mappings of it.

Two descriptors stand on the same file. The direct one (``O_DIRECT``) moves bulk data between
the disk and page-aligned memory without the page cache, by a file engine (``engines``); the
buffered one serves mappings and unaligned tails. The kernel keeps the two coherent: a direct
read first flushes dirty cached pages of its range, a direct write drops cached ones.
"""

import contextlib
import errno
import mmap
import os
from pathlib import Path
from typing import Self

from offload.allocator.errors import CapacityError, TierIOError
from offload.allocator.units import format_nbytes
from offload.tiers import hostmem
from offload.tiers.engines.base import EngineFactory, OpenFile
from offload.tiers.engines.threads import ThreadsEngine
from offload.tiers.hostmem import PAGE
from offload.tiers.memory import memory_at
from offload.tiers.moving import move_whole
from offload.tiers.pieces import Piece, cut

_ZEROS_NBYTES = 1 << 20
_STAMP_NS = 1_000_000_000  # a second after the epoch: no clock tells it


class TierFile:
    """One file of a tier.

    Args:
        directory: existing folder, mode 0700 recommended.
        name: file name inside it; ``None`` makes an unlinked file (scratch) whose bytes no
            crash can leave behind.
        engine: makes the engine that moves whole pages.
        spare_nbytes: of the disk that the file leaves free when it grows.

    Raises:
        TierIOError: the file can't be opened for writing.
    """

    def __init__(
        self,
        directory: Path,
        name: str | None,
        engine: EngineFactory = ThreadsEngine,
        *,
        spare_nbytes: int = 0,
    ) -> None:
        self.directory = directory
        self._spare_nbytes = spare_nbytes
        self.label = str(directory / name) if name else f"scratch in {directory}"
        try:
            self.fd = _open(directory, name)
            self.nbytes = os.fstat(self.fd).st_size
        except OSError as error:
            raise TierIOError(
                error.errno, f"can't open {self.label} for writing: {error.strerror}"
            ) from error
        self.direct_fd = _open_direct(self.fd)
        self._tells_writes: bool | None = None  # of this file system; not known yet
        try:
            self.engine = engine(OpenFile(self.fd, self.direct_fd if self.direct else None))
        except BaseException:
            self._close_descriptors()
            raise

    @property
    def direct(self) -> bool:
        """Whether the file system takes ``O_DIRECT``; otherwise all I/O goes by the cache."""
        return self.direct_fd != self.fd

    @property
    def block_align(self) -> int:
        """Where large blocks should begin: at multiples of so many bytes."""
        return PAGE

    def pieces(self, offset: int, nbytes: int) -> list[Piece]:
        """The requests that move ``nbytes`` from ``offset`` on."""
        del offset  # the bytes of one file lie together, wherever they begin
        return cut(0, 0, nbytes)

    def growth_nbytes(self) -> int:
        """Bytes by which the file can still grow, as its disk is now."""
        return max(self._free_nbytes() - self._spare_nbytes, 0)

    def _free_nbytes(self) -> int:
        stats = os.fstatvfs(self.fd)
        return stats.f_bavail * stats.f_frsize

    def grow(self, nbytes: int) -> None:
        """Preallocate up to ``nbytes`` in all, so that a full disk is met here, not mid-step.

        Raises:
            CapacityError: the disk has not enough room.
        """
        if nbytes <= self.nbytes:
            return
        if self._spare_nbytes and nbytes - self.nbytes > self.growth_nbytes():
            raise self._full(nbytes - self.nbytes)
        try:
            os.posix_fallocate(self.fd, self.nbytes, nbytes - self.nbytes)
        except OSError as error:
            self.shrink(self.nbytes)  # some file systems keep what they found before the end
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise TierIOError(error.errno, f"can't grow {self.label}: {error}") from error
            raise self._full(nbytes - self.nbytes) from error
        self.nbytes = nbytes

    def _full(self, nbytes: int) -> CapacityError:
        spare = self._spare_nbytes
        spared = f", {format_nbytes(spare)} of which stay free for records" if spare else ""
        return CapacityError(
            f"{self.label} needs {format_nbytes(nbytes)} more ({nbytes} bytes), but its disk has "
            f"{format_nbytes(self._free_nbytes())} free{spared}: "
            "free that much, or pass another directory with nvme="
        )

    def shrink(self, nbytes: int) -> None:
        """Give back the room beyond ``nbytes``, where the file system lets it go."""
        with contextlib.suppress(OSError):
            os.ftruncate(self.fd, nbytes)
            self.nbytes = nbytes

    def read(self, offset: int, address: int, nbytes: int) -> None:
        """Fill ``nbytes`` at ``address`` from ``offset``; blocks, without the GIL.

        Raises:
            TierIOError: the kernel reported an error, or the file ended early.
        """
        move_whole("read", self._read, self.label, offset, address, nbytes)

    def write(self, offset: int, address: int, nbytes: int) -> None:
        """Write ``nbytes`` at ``address`` to ``offset``; blocks, without the GIL.

        Raises:
            TierIOError: the kernel reported an error (a full disk among them).
        """
        move_whole("write", self._write, self.label, offset, address, nbytes)

    def _read(self, offset: int, address: int, nbytes: int) -> int:
        if whole := _whole_pages(offset, address, nbytes):
            return self.engine.read(offset, address, whole)
        return os.preadv(self.fd, [memory_at(address, nbytes)], offset)

    def _write(self, offset: int, address: int, nbytes: int) -> int:
        if whole := _whole_pages(offset, address, nbytes):
            return self.engine.write(offset, address, whole)
        return os.pwritev(self.fd, [memory_at(address, nbytes)], offset)

    def map(self, address: int, nbytes: int, offset: int, *, shared: bool) -> None:
        """Map ``nbytes`` of the file at ``offset`` over the pages at ``address``."""
        hostmem.map_file(address, nbytes, self.fd, offset, shared=shared)

    def clear(self, offset: int, nbytes: int) -> None:
        """Make a range of whole pages read as zeros.

        Raises:
            TierIOError: the kernel reported an error.
        """
        if hostmem.zero_range(self.fd, offset, nbytes):
            return
        zeros = memoryview(bytes(min(nbytes, _ZEROS_NBYTES)))
        done = 0
        while done < nbytes:
            part, at = zeros[: nbytes - done], offset + done
            try:
                done += os.pwritev(self.fd, [part], at)
            except OSError as error:
                raise TierIOError(
                    error.errno,
                    f"clear of {len(part)} bytes at byte {at} of {self.label} failed: "
                    f"{error.strerror}",
                ) from error

    def sync(self) -> None:
        """Make all written bytes durable.

        Raises:
            TierIOError: the disk could not take them.
        """
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            raise TierIOError(error.errno, f"sync of {self.label} failed: {error}") from error

    def uncache(self, offset: int, nbytes: int) -> None:
        """Drop clean cached pages of the range."""
        os.posix_fadvise(self.fd, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def stamp(self) -> bool:
        """Begin to tell, by ``is_stamped``, whether anything is written to the file.

        Returns:
            False where the file system does not tell of writes through mappings.
        """
        if self._tells_writes is None:
            self._tells_writes = tells_mapped_writes(self.directory)
        if self._tells_writes:
            os.utime(self.fd, ns=(_STAMP_NS, _STAMP_NS))
        return self._tells_writes

    def is_stamped(self) -> bool:
        """Whether nothing has been written since ``stamp``, by anyone in any way.

        A mapping must be new, or have no pages, when the file is stamped: a page that was
        written before can be written again without the kernel's knowing.
        """
        return os.fstat(self.fd).st_mtime_ns == _STAMP_NS

    def close(self) -> None:
        """Close both descriptors; mappings stay valid, reads and writes fail; once only."""
        self.engine.close()
        self._close_descriptors()

    def _close_descriptors(self) -> None:
        descriptors = {self.fd, self.direct_fd}
        # Never a number that the next file opened by anyone may get.
        self.fd = self.direct_fd = -1
        for fd in descriptors - {-1}:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def tells_mapped_writes(directory: Path) -> bool:
    """Whether a write to a page of a shared mapping sets the time of its file's last change.

    It does on ext4, XFS and Btrfs, not on tmpfs. Tried on a page that is not in memory, on one that
    was only read, and on one that was written before and given up.
    """
    try:
        fd = _open(directory, None)
    except OSError:
        return False
    try:
        os.posix_fallocate(fd, 0, 3 * PAGE)
        with mmap.mmap(fd, 3 * PAGE) as mapped:
            mapped[2 * PAGE] = 1
            mapped.madvise(mmap.MADV_DONTNEED)
            _ = mapped[PAGE]
            return all(_tells_write(fd, mapped, at) for at in (0, PAGE, 2 * PAGE))
    except (OSError, ValueError):
        return False
    finally:
        os.close(fd)


def _tells_write(fd: int, mapped: mmap.mmap, at: int) -> bool:
    os.utime(fd, ns=(_STAMP_NS, _STAMP_NS))
    before = os.fstat(fd).st_mtime_ns
    mapped[at] = 2
    return before == _STAMP_NS != os.fstat(fd).st_mtime_ns


def _whole_pages(offset: int, address: int, nbytes: int) -> int:
    """What the engine moves of a request; the page cache takes unaligned ones and tails."""
    return nbytes // PAGE * PAGE if (offset | address) % PAGE == 0 else 0


def _open(directory: Path, name: str | None) -> int:
    flags = os.O_RDWR | os.O_CLOEXEC
    if name is not None:
        return os.open(directory / name, flags | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        return os.open(directory, flags | os.O_TMPFILE, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
    # File systems without O_TMPFILE: create under a random name and unlink at once.
    path = directory / f".scratch-{os.getpid()}-{os.urandom(8).hex()}"
    fd = os.open(path, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    path.unlink()
    return fd


def _open_direct(fd: int) -> int:
    """A second descriptor with ``O_DIRECT``, or ``fd`` itself where that is refused."""
    try:
        direct = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        return fd
    return direct
