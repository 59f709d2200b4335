"""The kernel's ring of AIO results, with contexts made by system call: no library has a part."""

import ctypes
import errno
import os
import platform
import resource
import struct

import pytest

from offload.tiers.engines.aioring import AioRing, ring_addresses
from offload.tiers.hostmem import PAGE
from offload.tiers.testing import Memory, pattern

# io_setup, io_destroy, io_getevents, io_submit
CALLS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}[platform.machine()]
READ, WRITE = 0, 1
libc = ctypes.CDLL(None, use_errno=True)


def call(number, *arguments):
    result = libc.syscall(CALLS[number], *map(ctypes.c_long, arguments))
    assert result >= 0, os.strerror(ctypes.get_errno())
    return result


@pytest.fixture
def context():
    context = ctypes.c_long(0)
    call(0, 4, ctypes.addressof(context))
    yield context.value
    call(1, context.value)


@pytest.fixture
def fd(tmp_path):
    (tmp_path / "data").write_bytes(pattern(2 * PAGE + 10))
    fd = os.open(tmp_path / "data", os.O_RDWR)
    yield fd
    os.close(fd)


def request(context, verb, fd, address, nbytes, offset):
    """One request, submitted and waited for; its result is not looked at."""
    block = struct.pack("QIIHhIQQqQII", 0, 0, 0, verb, 0, fd, address, nbytes, offset, 0, 0, 0)
    memory = ctypes.create_string_buffer(block, len(block))
    pointer = ctypes.c_void_p(ctypes.addressof(memory))
    call(3, context, 1, ctypes.addressof(pointer))
    events = ctypes.create_string_buffer(32)
    assert call(2, context, 1, 1, ctypes.addressof(events), 0) == 1


def test_a_context_s_ring_is_found_where_it_is_made(context):
    assert context in ring_addresses()
    assert AioRing(context).results() == []


def test_results_are_told_once_and_in_order(context, fd):
    ring = AioRing(context)
    with Memory(4 * PAGE) as memory:
        request(context, READ, fd, memory.address, PAGE, 0)
        request(context, READ, fd, memory.address, 4 * PAGE, PAGE)
        request(context, READ, fd, memory.address, PAGE, 3 * PAGE)
        assert ring.results() == [PAGE, PAGE + 10, 0]
        assert ring.results() == []


def test_an_error_is_its_negative_number(context, fd):
    ring = AioRing(context)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE, before[1]))
    try:
        with Memory(PAGE) as memory:
            request(context, WRITE, fd, memory.address, PAGE, 8 * PAGE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ring.results() == [-errno.EFBIG]


def test_a_ring_that_comes_round_is_followed(context, fd):
    ring = AioRing(context)
    with Memory(PAGE) as memory:
        for index in range(3 * ring.events):
            request(context, READ, fd, memory.address, 100 + index % 50, 0)
            assert ring.results() == [100 + index % 50]


def test_memory_that_is_no_ring_is_refused():
    with Memory(PAGE) as memory, pytest.raises(OSError, match="has an unknown form"):
        AioRing(memory.address)
