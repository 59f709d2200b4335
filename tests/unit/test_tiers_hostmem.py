"""The kernel's memory calls do what the tiers build on."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from mappings import is_mapped

from offload.allocator.errors import TierIOError
from offload.tiers import hostmem
from offload.tiers.hostmem import HUGE_PAGE, PAGE
from offload.tiers.memory import HostBuffer, memory_at, tensor_at
from offload.tiers.testing import pattern

PAGES = 16
NBYTES = PAGES * PAGE


@pytest.fixture
def memory():
    """Maps anonymous memory; gives all of it back."""
    mapped = []

    def make(nbytes, **options):
        address = hostmem.map_anonymous(nbytes, **options)
        mapped.append((address, hostmem.page_ceil(nbytes)))
        return address

    yield make
    for address, nbytes in mapped:
        hostmem.unmap(address, nbytes)


@pytest.fixture
def file(tmp_path):
    """A file of ``NBYTES`` patterned bytes: (path, descriptor)."""
    path = tmp_path / "file"
    path.write_bytes(pattern(NBYTES))
    fd = os.open(path, os.O_RDWR)
    yield path, fd
    os.close(fd)


def put(address, data):
    memory_at(address, len(data))[:] = data


def get(address, nbytes=NBYTES):
    return bytes(memory_at(address, nbytes))


def area_of(address):
    """The lines of /proc/self/smaps about the mapping that holds ``address``; [] if none does."""
    lines, found = [], False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            found = int(bounds[1], 16) <= address < int(bounds[2], 16)
        if found:
            lines.append(line)
    return lines


class Ledger:
    """The kernel's calls, and the pages that they mapped and did not give back."""

    def __init__(self, libc, hint):
        self._libc, self._hint = libc, hint
        self.pages = set()

    def __getattr__(self, name):
        return getattr(self._libc, name)

    def mmap(self, _anywhere, nbytes, *arguments):
        address = self._libc.mmap(self._hint, nbytes, *arguments)
        self.pages.update(range(address, address + nbytes, PAGE))
        return address

    def munmap(self, address, nbytes):
        self.pages.difference_update(range(address, address + nbytes, PAGE))
        return self._libc.munmap(address, nbytes)


@pytest.mark.parametrize(
    ("nbytes", "rounded"), [(0, 0), (1, PAGE), (PAGE, PAGE), (PAGE + 1, 2 * PAGE)]
)
def test_page_ceil(nbytes, rounded):
    assert hostmem.page_ceil(nbytes) == rounded


@pytest.mark.parametrize("align", [PAGE, 1 << 16, HUGE_PAGE])
@pytest.mark.parametrize("nbytes", [1, PAGE, HUGE_PAGE - 1, HUGE_PAGE, 3 * HUGE_PAGE + 5])
def test_anonymous_memory_is_aligned_zero_and_writable_to_its_last_byte(memory, nbytes, align):
    address = memory(nbytes, align=align)
    assert address % align == 0
    assert get(address, nbytes) == bytes(nbytes)
    put(address + nbytes - 1, b"\x07")
    assert get(address + nbytes - 1, 1) == b"\x07"


def test_anonymous_memory_is_private_and_huge_page_advised(memory):
    address = memory(4 * HUGE_PAGE)
    area = area_of(address)
    assert area[0].split()[1] == "rw-p"
    flags = next(line for line in area if line.startswith("VmFlags:")).split()
    assert "hg" in flags


@pytest.mark.parametrize("align", [PAGE, HUGE_PAGE])
@pytest.mark.parametrize("off_align", [0, PAGE, HUGE_PAGE - PAGE])
def test_alignment_leaves_no_address_space_behind(monkeypatch, align, off_align):
    """By what the kernel is asked, for the size of a process grows as its threads allocate."""
    nbytes = HUGE_PAGE + PAGE
    free = hostmem.map_anonymous(4 * HUGE_PAGE)
    hostmem.unmap(free, 4 * HUGE_PAGE)
    ledger = Ledger(hostmem._libc, hint=free + off_align)
    monkeypatch.setattr(hostmem, "_libc", ledger)
    address = hostmem.map_anonymous(nbytes, align=align)
    assert ledger.pages == set(range(address, address + nbytes, PAGE))
    hostmem.unmap(address, nbytes)
    assert not ledger.pages


def test_memory_that_the_kernel_can_not_give_is_an_error():
    with pytest.raises(TierIOError, match=r"mmap of \d+ bytes failed"):
        hostmem.map_anonymous(1 << 60)


def test_a_private_mapping_shows_the_file_and_keeps_writes_to_itself(memory, file):
    path, fd = file
    address = memory(NBYTES)
    hostmem.map_file(address, NBYTES, fd, 0, shared=False)
    assert get(address) == pattern(NBYTES)
    put(address + PAGE + 3, b"mine")
    assert get(address + PAGE + 3, 4) == b"mine"
    assert path.read_bytes() == pattern(NBYTES)
    os.pwrite(fd, b"theirs", 5 * PAGE)  # a page that was not written shows the file still
    assert get(address + 5 * PAGE, 6) == b"theirs"


def test_a_shared_mapping_writes_to_the_file(memory, file):
    path, fd = file
    address = memory(NBYTES)
    hostmem.map_file(address, NBYTES, fd, 0, shared=True)
    assert get(address) == pattern(NBYTES)
    put(address + PAGE + 3, b"ours")
    assert path.read_bytes()[PAGE + 3 : PAGE + 7] == b"ours"


def test_a_mapping_begins_at_its_offset_and_replaces_what_was_there(memory, file):
    _, fd = file
    address = memory(NBYTES)
    put(address, b"\xff" * NBYTES)
    hostmem.map_file(address + 4 * PAGE, 2 * PAGE, fd, 3 * PAGE, shared=False)
    assert get(address, 4 * PAGE) == b"\xff" * 4 * PAGE
    assert get(address + 4 * PAGE, 2 * PAGE) == pattern(NBYTES)[3 * PAGE : 5 * PAGE]
    assert get(address + 6 * PAGE, PAGE) == b"\xff" * PAGE


def test_mapping_a_bad_descriptor_is_an_error(memory):
    with pytest.raises(TierIOError, match="mmap of 4096 bytes failed: Bad file descriptor"):
        hostmem.map_file(memory(PAGE), PAGE, -1, 0, shared=False)


@pytest.mark.own_process
def test_move_over_brings_the_pages_and_takes_the_source(memory):
    target = memory(4 * PAGE)
    put(target, b"\x01" * 4 * PAGE)
    source = hostmem.map_anonymous(2 * PAGE)
    put(source, pattern(2 * PAGE))
    hostmem.move_over(source, target + PAGE, 2 * PAGE)
    assert get(target, 4 * PAGE) == b"\x01" * PAGE + pattern(2 * PAGE) + b"\x01" * PAGE
    assert not is_mapped(source)


def test_move_leaving_zeros_keeps_the_source_mapped(memory):
    target, source = memory(2 * PAGE), memory(2 * PAGE)
    put(source, pattern(2 * PAGE))
    hostmem.move_leaving_zeros(source, target, 2 * PAGE)
    assert get(target, 2 * PAGE) == pattern(2 * PAGE)
    assert get(source, 2 * PAGE) == bytes(2 * PAGE)


@pytest.mark.parametrize("move", [hostmem.move_over, hostmem.move_leaving_zeros])
def test_moving_unmapped_pages_is_an_error(memory, move):
    source = hostmem.map_anonymous(PAGE)
    hostmem.unmap(source, PAGE)
    with pytest.raises(TierIOError, match=r"mremap.* of 4096 bytes failed"):
        move(source, memory(PAGE), PAGE)


def test_a_reader_never_sees_the_pages_change_hands(memory, file):
    """File to memory and back under another thread's eyes: always the same bytes."""
    _, fd = file
    address, expected = memory(NBYTES), pattern(NBYTES)
    hostmem.map_file(address, NBYTES, fd, 0, shared=False)
    stop, reads, wrong = threading.Event(), [0], []
    started = threading.Event()

    def read():
        while not stop.is_set():
            seen = get(address)
            reads[0] += 1
            if seen != expected:
                wrong.append(seen)
            started.set()

    reader = threading.Thread(target=read)
    reader.start()
    started.wait(30)
    for _ in range(300):
        staged = hostmem.map_anonymous(NBYTES)
        put(staged, expected)
        hostmem.move_over(staged, address, NBYTES)
        hostmem.map_file(address, NBYTES, fd, 0, shared=False)
    stop.set()
    reader.join()
    assert reads[0] > 0
    assert wrong == []


@pytest.mark.own_process
def test_unmap_gives_the_range_back_and_takes_nothing_for_nothing():
    address = hostmem.map_anonymous(2 * PAGE)
    hostmem.unmap(address, 0)
    assert is_mapped(address)
    hostmem.unmap(address, 2 * PAGE)
    assert not is_mapped(address)
    with pytest.raises(TierIOError, match="munmap of 1 bytes failed: Invalid argument"):
        hostmem.unmap(address + 1, 1)


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


@pytest.mark.own_process
def test_the_resident_set_falls_when_a_buffer_is_released():
    nbytes = 64 << 20
    before, _ = hostmem.resident_nbytes()
    buffer = HostBuffer(nbytes)
    buffer.view()[:] = b"\x01" * nbytes
    full, _ = hostmem.resident_nbytes()
    buffer.release()
    after, _ = hostmem.resident_nbytes()
    assert full - before > nbytes * 7 // 8
    assert full - after > nbytes * 7 // 8


@pytest.mark.own_process
def test_the_peak_stays_when_the_resident_set_has_fallen():
    resident, _ = hostmem.resident_nbytes()
    peak = hostmem.peak_resident_nbytes()
    nbytes = max(peak - resident, 0) + (32 << 20)
    buffer = HostBuffer(nbytes)
    buffer.view()[:] = bytes(nbytes)
    buffer.release()
    assert hostmem.peak_resident_nbytes() - peak > 16 << 20


FREED = """
from offload.tiers import hostmem
hostmem.return_freed_memory()
large = bytearray(24 << 20)
del large  # glibc now raises its threshold, unless told not to
blocks = [bytearray(1 << 20) for _ in range(64)]
pin = bytearray(200 << 10)  # keeps the heap's end where it is
full = hostmem.resident_nbytes()[0]
del blocks
print(full - hostmem.resident_nbytes()[0])
"""


def test_freed_memory_goes_back_to_the_kernel():
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 60 << 20


def test_trim_heap_may_be_called_at_any_time():
    hostmem.trim_heap()
    hostmem.trim_heap()


@pytest.mark.own_process
@pytest.mark.parametrize("nbytes", [1, PAGE, HUGE_PAGE, HUGE_PAGE + 1])
def test_a_buffer_has_whole_pages_aligned_for_its_size(nbytes):
    buffer = HostBuffer(nbytes)
    assert buffer.nbytes == hostmem.page_ceil(nbytes)
    assert buffer.address % (HUGE_PAGE if buffer.nbytes >= HUGE_PAGE else PAGE) == 0
    assert len(buffer.view()) == buffer.nbytes
    buffer.view(1, 3)[:] = b"abc"
    assert bytes(buffer.view(0, 5)) == b"\0abc\0"
    buffer.release()
    buffer.release()  # once is enough, twice is safe
    assert not is_mapped(buffer.address)


def test_a_tensor_over_a_buffer_shares_its_bytes():
    import torch

    buffer = HostBuffer(PAGE)
    tensor = buffer.tensor(torch.float32, (2, 3), offset=64)
    tensor.copy_(torch.arange(6.0).view(2, 3))
    assert bytes(buffer.view(64, 24)) == tensor.numpy().tobytes()
    assert tensor.is_contiguous()
    assert tensor.data_ptr() == buffer.address + 64
    buffer.release()


@pytest.mark.own_process
def test_released_memory_of_a_tensor_lives_as_long_as_its_last_view():
    import torch

    address = hostmem.map_anonymous(HUGE_PAGE)
    tensor = tensor_at(
        address, torch.float32, (4, 4), on_release=(address, hostmem.page_ceil(HUGE_PAGE))
    )
    tensor.fill_(3)
    view = tensor[1:, 2].t()
    del tensor
    assert view.sum() == 9
    assert is_mapped(address)
    del view
    assert not is_mapped(address)
