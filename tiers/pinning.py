"""Making host memory fit for a device's copy engine: registered with CUDA, locked, or neither.

[Note: registration] ``cudaHostRegister`` works on memory that is mapped already, so huge pages,
placement and exact sizes stay ours; torch's pinned allocator rounds each size up to a power of
two. One call registers less than 512 GiB: some drivers fail beyond (CUDA r580), so larger ranges
go in pieces, and a refused piece takes those before it back. No copy may cross two pieces. A call
that fails leaves its error behind in the CUDA runtime, where the next kernel launch would find it
and blame itself: it is read, and so cleared, at once.

All calls go to one copy of the CUDA runtime, through ctypes: that which torch has loaded, or else
one of the system's. The registration itself belongs to the process and holds for both.
"""

import ctypes
import errno as errno_codes
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from offload.allocator.errors import OffloadError, TierIOError
from offload.allocator.units import format_nbytes
from offload.tiers.hostmem import PAGE

MAX_REGISTERED_NBYTES = 256 << 30  # in one call; see [Note: registration]
_PORTABLE = 1  # pinned for every CUDA context of the process
_UNLOADED = 4  # cudaErrorCudartUnloading: the process ends, and its registrations with it
_SONAMES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so")

PAGEABLE_COST = (
    "copies to and from the device then pass through a small buffer of the driver and block the "
    "host: measured on an H200, 53-55 GB/s from registered memory, 10-17 GB/s from memory that is "
    "locked only, less from pageable memory"
)


class PinRefusedError(OffloadError):
    """Memory could not be pinned; the pool goes on without."""


class Pinner(Protocol):
    """A way to pin. ``pin`` and ``unpin`` take whole pages."""

    name: str  # what the memory is then: registered | locked
    piece_nbytes: int | None  # no copy may cross a multiple of this, counted from ``address``

    def pin(self, address: int, nbytes: int) -> None:
        """Pin the range, or leave it as it was.

        Raises:
            PinRefusedError: saying how many bytes, why, and what mends it.
        """

    def unpin(self, address: int, nbytes: int) -> None:
        """Undo ``pin``.

        Raises:
            TierIOError: the range is still pinned, and must not be unmapped.
        """


class CudaRuntimeLibrary(Protocol):
    """The calls of the CUDA runtime that registration needs, as C has them: 0 is success."""

    def register(self, address: int, nbytes: int, flags: int) -> int: ...
    def unregister(self, address: int) -> int: ...
    def last_error(self) -> int: ...
    def error_text(self, code: int) -> str: ...


class Cudart:
    """``libcudart`` through ctypes.

    Raises:
        PinRefusedError: there is no CUDA device, or no library.
    """

    def __init__(self) -> None:
        import torch

        if not torch.cuda.is_available():
            raise PinRefusedError("torch finds no CUDA device, so no driver to register with")
        torch.cuda.init()  # registration needs the context
        self._library = _load_cudart()
        self._library.cudaHostRegister.argtypes = [
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_uint,
        ]
        self._library.cudaHostUnregister.argtypes = [ctypes.c_void_p]
        self._library.cudaGetErrorString.restype = ctypes.c_char_p

    def register(self, address: int, nbytes: int, flags: int) -> int:
        return int(self._library.cudaHostRegister(address, nbytes, flags))

    def unregister(self, address: int) -> int:
        return int(self._library.cudaHostUnregister(address))

    def last_error(self) -> int:
        return int(self._library.cudaGetLastError())

    def error_text(self, code: int) -> str:
        return str(self._library.cudaGetErrorString(code).decode())


def _load_cudart() -> ctypes.CDLL:
    for path in (*_loaded_cudarts(Path("/proc/self/maps").read_text()), *_SONAMES):
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue
    raise PinRefusedError(
        f"the CUDA runtime was not found: neither torch nor the system has any of {_SONAMES}. "
        "pip install nvidia-cuda-runtime, in the version of torch.version.cuda"
    )


def _loaded_cudarts(maps: str) -> list[str]:
    """Paths of the CUDA runtimes that this process has mapped."""
    paths = (line.split(maxsplit=5)[5] for line in maps.splitlines() if line.count("/"))
    return list(dict.fromkeys(path for path in paths if "/libcudart" in path))


class CudaPinner:
    """Registers memory with CUDA. See [Note: registration].

    ``library`` is found at the first use by default, so that a machine without CUDA can ask.
    """

    name = "registered"

    def __init__(
        self,
        library: CudaRuntimeLibrary | None = None,
        *,
        piece_nbytes: int = MAX_REGISTERED_NBYTES,
    ) -> None:
        self._found = library
        self.piece_nbytes: int | None = piece_nbytes
        self._piece_nbytes = piece_nbytes

    @property
    def _library(self) -> CudaRuntimeLibrary:
        if self._found is None:
            self._found = Cudart()
        return self._found

    def _pieces(self, address: int, nbytes: int) -> Iterator[tuple[int, int]]:
        for at in range(0, nbytes, self._piece_nbytes):
            yield address + at, min(self._piece_nbytes, nbytes - at)

    def pin(self, address: int, nbytes: int) -> None:
        registered: list[int] = []
        for start, piece in self._pieces(address, nbytes):
            code = self._library.register(start, piece, _PORTABLE)
            if code == 0:
                registered.append(start)
                continue
            reason = self._reason(code)
            for before in registered:
                self._unregister(before)
            raise PinRefusedError(
                f"cudaHostRegister of {piece} bytes ({format_nbytes(nbytes)} in all, "
                f"{len(registered)} pieces before it) failed: {reason}"
            )

    def unpin(self, address: int, nbytes: int) -> None:
        for start, _ in self._pieces(address, nbytes):
            self._unregister(start)

    def _unregister(self, address: int) -> None:
        code = self._library.unregister(address)
        if code not in {0, _UNLOADED}:
            raise TierIOError(
                errno_codes.EIO, f"cudaHostUnregister at {address:#x} failed: {self._reason(code)}"
            )

    def _reason(self, code: int) -> str:
        """What ``code`` means; clears the error. See [Note: registration]."""
        self._library.last_error()
        return f"{self._library.error_text(code)} (CUDA error {code})"


class MemoryLocks(Protocol):
    """``mlock`` and ``munlock``: 0, or the kernel's errno."""

    def lock(self, address: int, nbytes: int) -> int: ...
    def unlock(self, address: int, nbytes: int) -> int: ...


class LibcLocks:
    """The C library's."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        for call in (self._libc.mlock, self._libc.munlock):
            call.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

    def lock(self, address: int, nbytes: int) -> int:
        return ctypes.get_errno() if self._libc.mlock(address, nbytes) else 0

    def unlock(self, address: int, nbytes: int) -> int:
        return ctypes.get_errno() if self._libc.munlock(address, nbytes) else 0


class LockPinner:
    """Locks memory: it is never swapped out, but no device knows, and copies stay slow."""

    name = "locked"
    piece_nbytes: int | None = None

    def __init__(self, locks: MemoryLocks | None = None) -> None:
        self._locks: MemoryLocks = locks or LibcLocks()

    def pin(self, address: int, nbytes: int) -> None:
        if code := self._locks.lock(address, nbytes):
            self._locks.unlock(address, nbytes)  # part of it may be locked
            raise PinRefusedError(
                f"mlock of {format_nbytes(nbytes)} ({nbytes} bytes) failed: {os.strerror(code)}. "
                f"{_lock_hint(nbytes)}"
            )

    def unpin(self, address: int, nbytes: int) -> None:
        if code := self._locks.unlock(address, nbytes):
            raise TierIOError(code, f"munlock of {nbytes} bytes failed: {os.strerror(code)}")


def _lock_hint(nbytes: int) -> str:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    told = "unlimited" if limit == resource.RLIM_INFINITY else format_nbytes(limit)
    kib = -(-nbytes // PAGE) * PAGE >> 10
    return f"RLIMIT_MEMLOCK is {told}: ulimit -l {kib} before the start, or CAP_IPC_LOCK, mends it"
