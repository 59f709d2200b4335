"""Each tier of the house passes the shipped contract."""

import os
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from offload.tiers import file as file_module
from offload.tiers.filetier import FileTier, Lanes
from offload.tiers.journal import Journal
from offload.tiers.memory import memory_at
from offload.tiers.ram import RamTier
from offload.tiers.testing import TierContract

SHARED_MEMORY = Path("/dev/shm")


class TestRamTier(TierContract):
    @contextmanager
    def open_tier(self, directory):
        with RamTier(5 * self.large_nbytes) as tier:
            yield tier

    def peek(self, tier, block, offset, nbytes):
        return bytes(memory_at(tier.address(block) + offset, nbytes))

    def poke(self, tier, block, offset, data):
        memory_at(tier.address(block) + offset, len(data))[:] = data


class TestFileTier(TierContract):
    bounded = False

    @contextmanager
    def open_tier(self, directory):
        lanes = Lanes(Journal())
        try:
            with FileTier(directory, "data", lanes) as tier:
                assert tier.file.direct
                yield tier
        finally:
            lanes.close()

    def peek(self, tier, block, offset, nbytes):
        with (tier.file.directory / "data").open("rb", buffering=0) as file:
            return os.pread(file.fileno(), nbytes, block.extent.offset + offset)

    def poke(self, tier, block, offset, data):
        with (tier.file.directory / "data").open("r+b", buffering=0) as file:
            assert os.pwrite(file.fileno(), data, block.extent.offset + offset) == len(data)


class TestFileTierWithoutDirectIO(TestFileTier):
    """File systems that refuse ``O_DIRECT``: all I/O goes through the page cache."""

    @contextmanager
    def open_tier(self, directory):
        lanes = Lanes(Journal())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(file_module, "_open_direct", lambda fd: fd)
            tier = FileTier(directory, "data", lanes)
        try:
            with tier:
                assert not tier.file.direct
                yield tier
        finally:
            lanes.close()


class TestFileTierInSharedMemory(TestFileTier):
    """A tmpfs, which takes ``O_DIRECT`` since Linux 6.6 only and lacks ``ZERO_RANGE``."""

    @contextmanager
    def open_tier(self, directory):
        lanes = Lanes(Journal())
        try:
            with (
                TemporaryDirectory(dir=SHARED_MEMORY) as folder,
                FileTier(Path(folder), "data", lanes) as tier,
            ):
                yield tier
        finally:
            lanes.close()


class TestScratch(TestFileTier):
    """The unlinked file of scratch, reached through its descriptor only."""

    @contextmanager
    def open_tier(self, directory):
        lanes = Lanes(Journal())
        try:
            with FileTier(directory, None, lanes) as tier:
                assert list(directory.iterdir()) == []
                yield tier
        finally:
            lanes.close()

    def peek(self, tier, block, offset, nbytes):
        return os.pread(tier.file.fd, nbytes, block.extent.offset + offset)

    def poke(self, tier, block, offset, data):
        assert os.pwrite(tier.file.fd, data, block.extent.offset + offset) == len(data)
