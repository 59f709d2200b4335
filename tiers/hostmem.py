"""The kernel's memory calls that tiers are built on, with errors instead of return codes.

Everything here works on plain addresses and byte counts. Lengths and offsets must be
multiples of ``PAGE`` unless a docstring says otherwise.
"""

import ctypes
import errno as errno_codes
import mmap
import os

import numpy as np

from offload.allocator.errors import TierIOError

PAGE = mmap.PAGESIZE
HUGE_PAGE = 2 << 20

_PROT_READ, _PROT_WRITE = 0x1, 0x2
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED = 0x01, 0x02, 0x10
_MAP_ANONYMOUS, _MAP_NORESERVE = 0x20, 0x4000
_MREMAP_MAYMOVE, _MREMAP_FIXED, _MREMAP_DONTUNMAP = 0x1, 0x2, 0x4
_MADV_WILLNEED, _MADV_DONTNEED, _MADV_HUGEPAGE, _MADV_PAGEOUT = 3, 4, 14, 21
_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23
_FALLOC_FL_ZERO_RANGE = 0x10
_MS_ASYNC = 1
_MAP_FAILED = ctypes.c_void_p(-1).value
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
# The PAGEMAP_SCAN ioctl and its categories of pages.
_PAGEMAP_SCAN = 0xC0606610
_PAGE_IS_FILE, _PAGE_IS_PRESENT, _PAGE_IS_SWAPPED = 1 << 2, 1 << 3, 1 << 4
_PAGE_IS_HUGE = 1 << 6
_REGIONS = 512  # that one call of PAGEMAP_SCAN may answer
# Bits of one 64-bit /proc/self/pagemap entry.
_PAGEMAP_PRESENT, _PAGEMAP_SWAPPED, _PAGEMAP_FILE = 1 << 63, 1 << 62, 1 << 61

_LOWEST_BIT = bytes(value & 1 for value in range(256))

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.mremap.restype = ctypes.c_void_p
_libc.mremap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_void_p,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _fail(call: str, nbytes: int) -> TierIOError:
    code = ctypes.get_errno()
    return TierIOError(code, f"{call} of {nbytes} bytes failed: {os.strerror(code)}")


def page_ceil(nbytes: int) -> int:
    """``nbytes`` rounded up to whole pages."""
    return -(-nbytes // PAGE) * PAGE


def map_anonymous(nbytes: int, *, align: int = HUGE_PAGE) -> int:
    """Address of fresh private zero pages, huge-page advised, aligned to ``align`` bytes.

    ``MAP_PRIVATE`` matters: shared anonymous memory never gets huge pages.

    Raises:
        TierIOError: the kernel refused.
    """
    nbytes = page_ceil(nbytes)
    raw = _mmap(None, nbytes + align, _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE, -1, 0)
    address = -(-raw // align) * align
    if address > raw:
        unmap(raw, address - raw)
    if (tail := raw + align - address) > 0:
        unmap(address + nbytes, tail)
    _libc.madvise(address, nbytes, _MADV_HUGEPAGE)  # advice: a refusal costs speed only
    return address


def map_file(address: int, nbytes: int, fd: int, offset: int, *, shared: bool) -> None:
    """Replace the pages at ``address`` by a mapping of the file, atomically for every reader.

    ``shared`` writes reach the file; otherwise writes make private copies of their pages.
    """
    kind = _MAP_SHARED if shared else _MAP_PRIVATE | _MAP_NORESERVE
    _mmap(address, nbytes, kind | _MAP_FIXED, fd, offset)


def _mmap(address: int | None, nbytes: int, flags: int, fd: int, offset: int) -> int:
    got = _libc.mmap(address, nbytes, _PROT_READ | _PROT_WRITE, flags, fd, offset)
    if got is None or got == _MAP_FAILED:
        raise _fail("mmap", nbytes)
    return int(got)


def move_over(source: int, target: int, nbytes: int) -> None:
    """Move the pages at ``source`` over those at ``target``; nothing is copied.

    Atomic for readers of ``target``; ``source`` is unmapped.
    """
    flags = _MREMAP_MAYMOVE | _MREMAP_FIXED
    if _libc.mremap(source, nbytes, nbytes, flags, target) != target:
        raise _fail("mremap", nbytes)


def move_leaving_zeros(source: int, target: int, nbytes: int) -> None:
    """Move private pages over ``target``; ``source`` stays mapped and reads zeros (Linux 5.7).

    Raises:
        TierIOError: the kernel can't.
    """
    flags = _MREMAP_MAYMOVE | _MREMAP_FIXED | _MREMAP_DONTUNMAP
    if _libc.mremap(source, nbytes, nbytes, flags, target) != target:
        raise _fail("mremap(MREMAP_DONTUNMAP)", nbytes)


def unmap(address: int, nbytes: int) -> None:
    """Give the address range back."""
    if nbytes and _libc.munmap(address, nbytes):
        raise _fail("munmap", nbytes)


def discard(address: int, nbytes: int) -> None:
    """Drop the pages: a shared file mapping keeps its data, an anonymous one reads zeros."""
    if _libc.madvise(address, nbytes, _MADV_DONTNEED):
        raise _fail("madvise(MADV_DONTNEED)", nbytes)


def will_need(address: int, nbytes: int) -> None:
    """Ask the kernel to begin to read the pages of a file mapping; does not wait for them."""
    _libc.madvise(address, nbytes, _MADV_WILLNEED)  # advice: a refusal costs speed only


def page_out(address: int, nbytes: int) -> None:
    """Ask the kernel to reclaim clean pages; private copies of file pages are kept."""
    _libc.madvise(address, nbytes, _MADV_PAGEOUT)  # advice: older kernels ignore it


def populate(address: int, nbytes: int) -> None:
    """Fault the range in by reading (Linux 5.14); a no-op on older kernels.

    Raises:
        TierIOError: the file behind the range could not be read.
    """
    if _libc.madvise(address, nbytes, _MADV_POPULATE_READ):
        if ctypes.get_errno() == errno_codes.EINVAL:
            return
        raise _fail("madvise(MADV_POPULATE_READ)", nbytes)


def touch(address: int, nbytes: int) -> None:
    """Give every page of an anonymous range memory of its own; what it holds stays.

    Raises:
        TierIOError: the kernel has no memory for it.
    """
    if not _libc.madvise(address, nbytes, _MADV_POPULATE_WRITE):
        return
    if ctypes.get_errno() != errno_codes.EINVAL:
        raise _fail("madvise(MADV_POPULATE_WRITE)", nbytes)
    # Before Linux 5.14: write one byte of each page, as it is.
    memory = memoryview((ctypes.c_ubyte * nbytes).from_address(address)).cast("B")
    memory[::PAGE] = bytes(memory[::PAGE])


def huge_ranges(address: int, nbytes: int) -> list[tuple[int, int]] | None:
    """The parts (start, end) of a range that are mapped by huge pages; None before Linux 6.7."""
    end = address + page_ceil(nbytes)
    regions = (ctypes.c_uint64 * (3 * _REGIONS))()
    found: list[tuple[int, int]] = []
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        while address < end:
            argument = (ctypes.c_uint64 * 12)(
                96, 0, address, end, 0, ctypes.addressof(regions), _REGIONS, 0,
                0, _PAGE_IS_HUGE, 0, _PAGE_IS_HUGE,
            )  # fmt: skip
            count = _libc.ioctl(fd, ctypes.c_ulong(_PAGEMAP_SCAN), argument)
            if count < 0:
                return None
            found += [(regions[3 * at], regions[3 * at + 1]) for at in range(count)]
            address = argument[4]  # where the walk ended
    finally:
        os.close(fd)
    return found


def has_private_copies(address: int, nbytes: int) -> bool:
    """Whether a private file mapping holds pages that were written since it was made.

    The kernel's page map tells: a page that is present (or swapped) and not backed by the
    file is a private copy. See Documentation/admin-guide/mm/pagemap.rst.
    """
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = _scan_pagemap(fd, address, page_ceil(nbytes))
        return _read_pagemap(fd, address, nbytes) if found is None else found
    finally:
        os.close(fd)


def _scan_pagemap(fd: int, address: int, nbytes: int) -> bool | None:
    """The answer by ``PAGEMAP_SCAN``, which skips what is absent; None before Linux 6.7."""
    region = (ctypes.c_uint64 * 3)()
    argument = (ctypes.c_uint64 * 12)(
        96, 0, address, address + nbytes, 0, ctypes.addressof(region), 1, 1,
        _PAGE_IS_FILE, _PAGE_IS_FILE, _PAGE_IS_PRESENT | _PAGE_IS_SWAPPED, _PAGE_IS_PRESENT,
    )  # fmt: skip
    regions = _libc.ioctl(fd, ctypes.c_ulong(_PAGEMAP_SCAN), argument)
    return None if regions < 0 else regions > 0


def _read_pagemap(fd: int, address: int, nbytes: int) -> bool:
    """The answer by reading one entry for each page."""
    first, count = address // PAGE, page_ceil(nbytes) // PAGE
    bits = np.frombuffer(os.pread(fd, 8 * count, 8 * first), dtype=np.uint64)
    held = (bits & np.uint64(_PAGEMAP_PRESENT | _PAGEMAP_SWAPPED)) != 0
    return bool((held & ((bits & np.uint64(_PAGEMAP_FILE)) == 0)).any())


def is_cached(address: int, nbytes: int) -> bool:
    """Whether most of a file mapping's range is in the page cache (``mincore``)."""
    pages = page_ceil(nbytes) // PAGE
    vector = (ctypes.c_ubyte * pages)()
    if _libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(pages * PAGE), vector):
        return False
    return 2 * sum(bytes(vector).translate(_LOWEST_BIT)) > pages


def is_mapped(address: int, nbytes: int) -> bool:
    """Whether every page that the bytes touch is mapped (``msync`` fails on a hole)."""
    start = address // PAGE * PAGE
    length = ctypes.c_size_t(address + nbytes - start)
    return bool(_libc.msync(ctypes.c_void_p(start), length, _MS_ASYNC) == 0)


def zero_range(fd: int, offset: int, nbytes: int) -> bool:
    """Zero a range of a file by its extents alone; False where the file system can't."""
    call = getattr(_libc, "fallocate", None)
    arguments = (fd, _FALLOC_FL_ZERO_RANGE, ctypes.c_long(offset), ctypes.c_long(nbytes))
    return call is not None and call(*arguments) == 0


def return_freed_memory() -> None:
    """Make glibc hand large freed blocks straight back to the kernel.

    By default glibc raises its mmap threshold to 32 MiB as a program frees big blocks, and
    then keeps them: half of a training step's freed activations stay in the resident set.
    A fixed threshold makes every free of 256 KiB or more an ``munmap``.
    """
    mallopt = getattr(_libc, "mallopt", None)
    if mallopt is not None:  # glibc only; musl always returns big blocks
        mallopt(_M_MMAP_THRESHOLD, 256 << 10)
        mallopt(_M_TRIM_THRESHOLD, 4 << 20)
        mallopt(_M_ARENA_MAX, 2)


def trim_heap() -> None:
    """Return the free pages of glibc's heap to the kernel, those between blocks in use too."""
    trim = getattr(_libc, "malloc_trim", None)
    if trim is not None:
        trim(0)


def resident_nbytes() -> tuple[int, int]:
    """Bytes of the resident set of this process now: all of it, and the part from files."""
    fd = os.open("/proc/self/statm", os.O_RDONLY)
    try:
        _, resident, shared, *_ = os.read(fd, 128).split()
    finally:
        os.close(fd)
    return int(resident) * PAGE, int(shared) * PAGE


def peak_resident_nbytes() -> int:
    """The kernel's peak resident set of this process so far (``VmHWM``), in bytes."""
    fd = os.open("/proc/self/status", os.O_RDONLY)  # asked several times in each step
    try:
        text = b""
        while part := os.read(fd, 1 << 14):
            text += part
    finally:
        os.close(fd)
    _, found, rest = text.partition(b"\nVmHWM:")
    if found:
        return int(rest.split(maxsplit=1)[0]) * 1024
    raise TierIOError(errno_codes.ENOENT, "/proc/self/status has no VmHWM line")
