"""Pages leave, come and are told apart, and no byte of them is lost."""

import os

import pytest
from host_memory import NBYTES, PAGES, get, put

from offload.allocator.errors import TierIOError
from offload.tiers import hostmem
from offload.tiers.hostmem import PAGE
from offload.tiers.testing import pattern


def test_discard_empties_anonymous_pages_and_keeps_those_of_a_shared_file(memory, file):
    path, fd = file
    anonymous, shared = memory(NBYTES), memory(NBYTES)
    put(anonymous, pattern(NBYTES))
    hostmem.discard(anonymous, PAGE)
    assert get(anonymous) == bytes(PAGE) + pattern(NBYTES)[PAGE:]
    hostmem.map_file(shared, NBYTES, fd, 0, shared=True)
    put(shared, b"written")
    hostmem.discard(shared, NBYTES)
    assert get(shared) == b"written" + pattern(NBYTES)[7:]
    assert path.read_bytes()[:7] == b"written"


def test_discard_of_unmapped_memory_is_an_error():
    address = hostmem.map_anonymous(PAGE)
    hostmem.unmap(address, PAGE)
    with pytest.raises(TierIOError, match=r"madvise\(MADV_DONTNEED\) of 4096 bytes failed"):
        hostmem.discard(address, PAGE)


def test_page_out_keeps_values_and_private_copies(memory, file):
    _, fd = file
    address = memory(NBYTES)
    hostmem.map_file(address, NBYTES, fd, 0, shared=False)
    get(address)
    put(address + 2 * PAGE, b"private")
    hostmem.page_out(address, NBYTES)
    assert hostmem.has_private_copies(address, NBYTES)
    assert get(address + 2 * PAGE, 7) == b"private"
    assert get(address, 2 * PAGE) == pattern(NBYTES)[: 2 * PAGE]


@pytest.mark.own_process
def test_page_out_gives_clean_pages_back(tmp_path, memory):
    nbytes = 32 << 20
    path = tmp_path / "large"
    path.write_bytes(pattern(nbytes))
    with path.open("rb") as file:
        os.fsync(file.fileno())
    fd = os.open(path, os.O_RDWR)
    address = memory(nbytes)
    hostmem.map_file(address, nbytes, fd, 0, shared=False)
    hostmem.populate(address, nbytes)
    _, before = hostmem.resident_nbytes()
    hostmem.page_out(address, nbytes)
    _, after = hostmem.resident_nbytes()
    os.close(fd)
    assert before - after > nbytes * 3 // 4


@pytest.mark.own_process
def test_populate_makes_a_file_range_resident_without_copies(tmp_path, memory):
    nbytes = 8 << 20
    path = tmp_path / "large"
    path.write_bytes(pattern(nbytes))
    fd = os.open(path, os.O_RDWR)
    address = memory(nbytes)
    hostmem.map_file(address, nbytes, fd, 0, shared=False)
    _, before = hostmem.resident_nbytes()
    hostmem.populate(address, nbytes)
    _, after = hostmem.resident_nbytes()
    os.close(fd)
    assert after - before > nbytes * 3 // 4
    assert not hostmem.has_private_copies(address, nbytes)


def test_populate_beyond_the_end_of_the_file_is_an_error(memory, file):
    _, fd = file
    address = memory(2 * NBYTES)
    hostmem.map_file(address, 2 * NBYTES, fd, 0, shared=False)
    with pytest.raises(TierIOError, match="MADV_POPULATE_READ"):
        hostmem.populate(address, 2 * NBYTES)


@pytest.mark.parametrize("page", [0, 1, PAGES - 1])
def test_private_copies_are_seen_exactly_after_a_write(memory, file, page):
    _, fd = file
    address = memory(NBYTES)
    hostmem.map_file(address, NBYTES, fd, 0, shared=False)
    assert not hostmem.has_private_copies(address, NBYTES)  # nothing faulted in
    get(address)
    assert not hostmem.has_private_copies(address, NBYTES)  # read only
    put(address + page * PAGE + 17, get(address + page * PAGE + 17, 1))  # the same value again
    assert hostmem.has_private_copies(address, NBYTES)
    assert hostmem.has_private_copies(address + page * PAGE, 1)
    others = [number for number in range(PAGES) if number != page]
    assert not any(hostmem.has_private_copies(address + other * PAGE, PAGE) for other in others)
    hostmem.map_file(address, NBYTES, fd, 0, shared=False)
    assert not hostmem.has_private_copies(address, NBYTES)  # made anew


def test_private_copies_are_seen_in_a_file_in_shared_memory(memory):
    """Pages of a tmpfs are anonymous in some of the kernel's eyes."""
    fd = os.memfd_create("file")
    os.write(fd, pattern(NBYTES))
    address = memory(NBYTES)
    hostmem.map_file(address, NBYTES, fd, 0, shared=False)
    get(address)
    assert not hostmem.has_private_copies(address, NBYTES)
    put(address, b"x")
    assert hostmem.has_private_copies(address, NBYTES)
    os.close(fd)


def test_is_cached_tells_whether_most_pages_are_in_the_page_cache(tmp_path, memory):
    fd = os.open(tmp_path / "sparse", os.O_RDWR | os.O_CREAT, 0o600)
    os.truncate(fd, NBYTES)
    address = memory(NBYTES)
    hostmem.map_file(address, NBYTES, fd, 0, shared=True)
    assert not hostmem.is_cached(address, NBYTES)  # a hole that nobody has read
    os.pwrite(fd, b"x" * (NBYTES // 2), 0)
    assert not hostmem.is_cached(address, NBYTES)  # half is not most
    os.pwrite(fd, b"x" * PAGE, NBYTES // 2)
    assert hostmem.is_cached(address, NBYTES)
    os.close(fd)


def test_unmapped_memory_is_not_cached():
    address = hostmem.map_anonymous(PAGE)
    hostmem.unmap(address, PAGE)
    assert not hostmem.is_cached(address, PAGE)


def test_zero_range_clears_exactly_the_range_or_says_that_it_can_not(file):
    path, fd = file
    before = pattern(NBYTES)
    can = hostmem.zero_range(fd, 3 * PAGE, 2 * PAGE)
    zeros = bytes(2 * PAGE) if can else before[3 * PAGE : 5 * PAGE]
    assert path.read_bytes() == before[: 3 * PAGE] + zeros + before[5 * PAGE :]


def test_zero_range_of_a_bad_descriptor_says_so():
    assert hostmem.zero_range(-1, 0, PAGE) is False
