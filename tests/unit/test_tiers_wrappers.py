"""Throttled links in virtual time, faults by script and by seed, and what is recorded."""

import errno
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from offload.allocator.errors import TierIOError
from offload.tiers.engines.memory import MemoryEngine
from offload.tiers.engines.threads import ThreadsEngine
from offload.tiers.file import TierFile
from offload.tiers.hostmem import PAGE
from offload.tiers.ram import RamTier
from offload.tiers.testing import Memory, get, pattern, put
from offload.tiers.wrappers import (
    DISK_FULL,
    Fault,
    FaultKind,
    FaultyEngine,
    Link,
    RecordingEngine,
    SeededFaults,
    ThrottledEngine,
    scripted,
)

FILE_NBYTES = 8 * PAGE


class VirtualTime:
    def __init__(self):
        self.now_s = 100.0
        self.slept = []

    def clock(self):
        return self.now_s

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now_s += seconds


@pytest.fixture
def time():
    return VirtualTime()


def link_of(time, **settings):
    return Link(**settings, clock=time.clock, sleep=time.sleep)


@pytest.fixture
def open_with(tmp_path):
    """Opens a patterned file by a wrapped engine."""
    files = []

    def open_file(wrap):
        file = TierFile(tmp_path, None, lambda opened: wrap(ThreadsEngine(opened)))
        file.grow(FILE_NBYTES)
        os.pwrite(file.fd, pattern(FILE_NBYTES), 0)
        files.append(file)
        return file

    yield open_file
    for file in files:
        file.close()


def on_disk(file):
    return os.pread(file.fd, FILE_NBYTES, 0)


# The throttle.


def test_a_request_takes_its_latency_and_its_bytes(time):
    engine = ThrottledEngine(MemoryEngine(), link_of(time, bytes_per_s=1000, latency_s=0.5))
    with Memory(4000) as memory:
        assert engine.read(memory.address, memory.address + 2000, 2000) == 2000
    assert time.slept == [2.5]


def test_requests_share_the_rate_but_overlap_their_latencies(time):
    link = link_of(time, bytes_per_s=1000, latency_s=0.5)
    ends = [link.book(1000) for _ in range(3)]
    assert ends == [101.5, 102.5, 103.5]
    time.now_s = 110.0  # an idle link saves nothing up
    assert link.book(1000) == 111.5


def test_engines_given_one_link_share_it_in_both_directions(time):
    link = link_of(time, bytes_per_s=1000)
    store, scratch = (ThrottledEngine(MemoryEngine(), link) for _ in range(2))
    with Memory(4000) as memory:
        store.read(memory.address, memory.address + 2000, 1000)
        scratch.write(memory.address, memory.address + 2000, 1000)
    assert time.now_s == 102.0


def test_a_disk_slower_than_the_link_is_not_slowed_further(time):
    class Slow(MemoryEngine):
        def read(self, offset, address, nbytes):
            time.now_s += 10
            return super().read(offset, address, nbytes)

    engine = ThrottledEngine(Slow(), link_of(time, bytes_per_s=1000))
    with Memory(2000) as memory:
        engine.read(memory.address, memory.address + 1000, 1000)
    assert time.slept == []


def test_bookings_of_many_threads_add_up(time):
    link = link_of(time, bytes_per_s=1000)
    with ThreadPoolExecutor(4) as threads:
        ends = list(threads.map(lambda _: link.book(100), range(40)))
    assert sorted(ends) == [pytest.approx(100 + 0.1 * (index + 1)) for index in range(40)]


@pytest.mark.parametrize("settings", [{"bytes_per_s": 0}, {"bytes_per_s": 1, "latency_s": -1}])
def test_a_link_that_can_not_be_is_refused(settings):
    with pytest.raises(ValueError, match="the rate must be above 0"):
        Link(**settings)


# Faults.


@pytest.mark.parametrize("verb", ["read", "write"])
def test_a_short_request_is_continued_to_the_last_byte(open_with, verb):
    requests = []
    plan = scripted({(verb, 0): Fault(kind=FaultKind.SHORT)})
    file = open_with(lambda engine: FaultyEngine(RecordingEngine(engine, requests), plan))
    with Memory.of(pattern(4 * PAGE, seed=2)) as memory:
        getattr(file, verb)(0, memory.address, 4 * PAGE)
        assert memory.data() == on_disk(file)[: 4 * PAGE]
    assert [(request.offset, request.nbytes) for request in requests] == [
        (0, 2 * PAGE),
        (2 * PAGE, 2 * PAGE),
    ]


@pytest.mark.parametrize("verb", ["read", "write"])
@pytest.mark.parametrize("fault", [Fault(kind=FaultKind.ERROR), DISK_FULL])
def test_an_error_names_file_byte_and_size_and_moves_nothing(open_with, verb, fault):
    file = open_with(lambda engine: FaultyEngine(engine, scripted({(verb, 0): fault})))
    with Memory.of(pattern(2 * PAGE, seed=2)) as memory:
        with pytest.raises(TierIOError) as raised:
            getattr(file, verb)(PAGE, memory.address, 2 * PAGE)
        assert memory.data() == pattern(2 * PAGE, seed=2)
        assert on_disk(file) == pattern(FILE_NBYTES)
        getattr(file, verb)(PAGE, memory.address, 2 * PAGE)  # the next one is well again
        assert memory.data() == on_disk(file)[PAGE : 3 * PAGE]
    assert raised.value.errno == fault.errno
    assert f"{verb} of 8192 bytes at byte 4096 of {file.label} failed" in str(raised.value)
    assert os.strerror(fault.errno) in str(raised.value)


def test_a_torn_write_leaves_its_first_half_and_fails(open_with):
    plan = scripted({("write", 0): Fault(kind=FaultKind.TORN)})
    file = open_with(lambda engine: FaultyEngine(engine, plan))
    data = pattern(4 * PAGE, seed=3)
    with Memory.of(data) as memory, pytest.raises(TierIOError) as raised:
        file.write(0, memory.address, 4 * PAGE)
    assert raised.value.errno == errno.EIO
    assert on_disk(file) == data[: 2 * PAGE] + pattern(FILE_NBYTES)[2 * PAGE :]


@pytest.mark.parametrize("verb", ["read", "write"])
def test_a_flip_is_one_bit_and_says_nothing(open_with, verb):
    plan = scripted({(verb, 0): Fault(kind=FaultKind.FLIP, bit=8 * PAGE + 3)})
    file = open_with(lambda engine: FaultyEngine(engine, plan))
    data = pattern(2 * PAGE, seed=4)
    with Memory.of(data) as memory:
        getattr(file, verb)(0, memory.address, 2 * PAGE)
        got = memory.data() if verb == "read" else on_disk(file)[: 2 * PAGE]
        expected = pattern(FILE_NBYTES)[: 2 * PAGE] if verb == "read" else data
        if verb == "write":
            assert memory.data() == data  # the caller's memory is nobody's to change
    differing = [index for index in range(2 * PAGE) if got[index] != expected[index]]
    assert differing == [PAGE]
    assert got[PAGE] ^ expected[PAGE] == 1 << 3


def test_a_stall_is_late_and_whole(open_with, time):
    plan = scripted({("read", 0): Fault(kind=FaultKind.STALL, seconds=7.0)})
    file = open_with(lambda engine: FaultyEngine(engine, plan, sleep=time.sleep))
    with Memory(PAGE) as memory:
        file.read(0, memory.address, PAGE)
        assert memory.data() == pattern(FILE_NBYTES)[:PAGE]
    assert time.slept == [7.0]


def test_a_lost_process_leaves_its_first_half(tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from offload.tiers.engines.threads import ThreadsEngine\n"
        "from offload.tiers.file import TierFile\n"
        "from offload.tiers.testing import Memory, pattern\n"
        "from offload.tiers.wrappers import Fault, FaultKind, FaultyEngine, scripted\n"
        "plan = scripted({('write', 1): Fault(kind=FaultKind.LOST)})\n"
        "make = lambda opened: FaultyEngine(ThreadsEngine(opened), plan)\n"
        "file = TierFile(Path(sys.argv[1]), 'data', make)\n"
        "file.grow(8 * 4096)\n"
        "for seed in (1, 2):\n"
        "    file.write(0, Memory.of(pattern(4 * 4096, seed)).address, 4 * 4096)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
    assert done.returncode == -signal.SIGKILL
    torn = pattern(4 * PAGE, 2)[: 2 * PAGE] + pattern(4 * PAGE, 1)[2 * PAGE :]
    assert (tmp_path / "data").read_bytes() == torn + bytes(4 * PAGE)


def test_a_seed_chooses_the_same_faults_again():
    def met(seed):
        plan = SeededFaults(seed, 0.3, Fault(kind=FaultKind.SHORT), DISK_FULL)
        return [plan(None) for _ in range(200)]

    assert met(1) == met(1) != met(2)
    share = sum(fault is not None for fault in met(1)) / 200
    assert 0.2 < share < 0.4
    assert {fault.kind for fault in met(1) if fault} == {FaultKind.SHORT, FaultKind.ERROR}


# The record, and tiers that are no files.


def test_requests_are_numbered_by_direction(open_with):
    requests = []
    file = open_with(lambda engine: RecordingEngine(engine, requests))
    with Memory(PAGE) as memory:
        for verb in ("read", "write", "read"):
            getattr(file, verb)(2 * PAGE, memory.address, PAGE)
        file.read(0, memory.address, 100)  # a tail goes by the page cache
    assert [(request.verb, request.number) for request in requests] == [
        ("read", 0),
        ("write", 0),
        ("read", 1),
    ]


@pytest.mark.parametrize("verb", ["read", "write"])
def test_a_memory_tier_fails_when_its_transfer_is_waited_for(verb):
    plan = scripted({(verb, 0): Fault(kind=FaultKind.ERROR)})
    with RamTier(1 << 20, engine=FaultyEngine(MemoryEngine(), plan)) as tier:
        block = tier.allocate(5000)
        with Memory.of(pattern(5000)) as memory:
            transfer = getattr(tier, verb)(block, memory.address)
            assert transfer.done()
            with pytest.raises(TierIOError, match=f"{verb} of 5000 bytes .* of the host tier"):
                transfer.wait()
        put(tier, block, pattern(5000))
        assert get(tier, block, offset=0, nbytes=5000) == pattern(5000)
