"""Memory is mapped, moved and given back as the tiers build on."""

import os
import re
import threading
from pathlib import Path

import pytest
from host_memory import NBYTES, get, put

from mappings import is_mapped
from offload.allocator.errors import TierIOError
from offload.tiers import hostmem
from offload.tiers.hostmem import HUGE_PAGE, PAGE
from offload.tiers.testing import pattern


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
