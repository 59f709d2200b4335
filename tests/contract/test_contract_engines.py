"""Each engine and each wrapper passes the shipped contract, by itself and under a tier."""

import os
from contextlib import contextmanager

import pytest

from offload.tiers.engines.aiofiles import AiofilesEngine
from offload.tiers.engines.base import OpenFile
from offload.tiers.engines.deepspeed import DeepspeedEngine
from offload.tiers.engines.kvikio import KvikioEngine
from offload.tiers.engines.memory import MemoryEngine
from offload.tiers.engines.threads import ThreadsEngine
from offload.tiers.filetier import FileTier, Lanes
from offload.tiers.journal import Journal
from offload.tiers.memory import memory_at
from offload.tiers.ram import RamTier
from offload.tiers.testing import EngineContract, TierContract
from offload.tiers.wrappers import (
    Fault,
    FaultKind,
    FaultyEngine,
    Link,
    RecordingEngine,
    SeededFaults,
    ThrottledEngine,
)


class VirtualTime:
    """A clock that only sleeping moves."""

    def __init__(self):
        self.now_s = 0.0

    def clock(self):
        return self.now_s

    def sleep(self, seconds):
        self.now_s += seconds


def throttled(engine):
    time = VirtualTime()
    link = Link(bytes_per_s=1e6, latency_s=0.01, clock=time.clock, sleep=time.sleep)
    return ThrottledEngine(engine, link)


def faulty(engine):
    """Every second request comes short or late, which no caller may notice."""
    harmless = (Fault(kind=FaultKind.SHORT), Fault(kind=FaultKind.STALL))
    return FaultyEngine(engine, SeededFaults(1, 0.5, *harmless), sleep=VirtualTime().sleep)


def recording(engine):
    return RecordingEngine(engine, [])


def cached(file):
    """As where the file system refuses ``O_DIRECT``."""
    return OpenFile(file.fd, None)


ENGINES = {
    "Threads": ThreadsEngine,
    "ThreadsCached": lambda file: ThreadsEngine(cached(file)),
    "Aiofiles": AiofilesEngine,
    "AiofilesCached": lambda file: AiofilesEngine(cached(file)),
    "Throttled": lambda file: throttled(ThreadsEngine(file)),
    "Faulty": lambda file: faulty(ThreadsEngine(file)),
    "Recording": lambda file: recording(ThreadsEngine(file)),
    "Composed": lambda file: recording(throttled(faulty(AiofilesEngine(file)))),
    "Deepspeed": DeepspeedEngine,
    "Kvikio": KvikioEngine,
}
MARKS = {"Deepspeed": [pytest.mark.peers], "Kvikio": [pytest.mark.gpu]}
OWN_TIERS = {"Threads", "ThreadsCached"}  # test_contract_tiers.py has them


class FileTierByEngine(TierContract):
    """A file tier whose bytes travel by ``make``."""

    bounded = False
    make = None

    @contextmanager
    def open_tier(self, directory):
        lanes = Lanes(Journal(), engine=type(self).make)
        try:
            with FileTier(directory, None, lanes) as tier:
                yield tier
        finally:
            lanes.close()

    def peek(self, tier, block, offset, nbytes):
        return os.pread(tier.file.fd, nbytes, block.extent.offset + offset)

    def poke(self, tier, block, offset, data):
        assert os.pwrite(tier.file.fd, data, block.extent.offset + offset) == len(data)


class EngineByName(EngineContract):
    make = None

    def open_engine(self, file):
        return type(self).make(file)


for name, make in ENGINES.items():
    body = {"make": staticmethod(make), "pytestmark": MARKS.get(name, [])}
    globals()[f"Test{name}Engine"] = type(f"Test{name}Engine", (EngineByName,), body)
    if name not in OWN_TIERS:
        globals()[f"Test{name}Tier"] = type(f"Test{name}Tier", (FileTierByEngine,), body)


class TestRamTierByWrappers(TierContract):
    """The wrappers serve memory tiers as they are."""

    @contextmanager
    def open_tier(self, directory):
        engine = recording(throttled(faulty(MemoryEngine())))
        with RamTier(5 * self.large_nbytes, engine=engine) as tier:
            yield tier

    def peek(self, tier, block, offset, nbytes):
        return bytes(memory_at(tier.address(block) + offset, nbytes))

    def poke(self, tier, block, offset, data):
        memory_at(tier.address(block) + offset, len(data))[:] = data
