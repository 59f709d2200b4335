"""Each tier of the house passes the shipped contract."""

import os
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from offload.tiers import file as file_module
from offload.tiers.file import TierFile
from offload.tiers.filetier import FileTier, Lanes
from offload.tiers.health import PathHealth, PathRates
from offload.tiers.hostmem import PAGE
from offload.tiers.journal import Journal
from offload.tiers.memory import memory_at
from offload.tiers.mempolicy import allowed_nodes
from offload.tiers.numa import NumaTier
from offload.tiers.ram import RamTier
from offload.tiers.striped import open_striped
from offload.tiers.stripes import Stripes
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


class TestNumaTier(TestRamTier):
    """On the machine's first node; on others it runs in the virtual machine (tests/numa)."""

    @contextmanager
    def open_tier(self, directory):
        with NumaTier(allowed_nodes()[0], 5 * self.large_nbytes) as tier:
            yield tier


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


class TestStripedTier(TierContract):
    """Three paths of unequal weight; units so small that most blocks are on several."""

    bounded = False
    weights = (3, 1, 2)
    unit_nbytes = 8 * PAGE

    @contextmanager
    def open_tier(self, directory):
        lanes = Lanes(Journal(), 2, len(self.weights))
        folders = [directory / f"path{index}" for index in range(len(self.weights))]
        for folder in folders:
            folder.mkdir()
        rates = PathRates(read_bytes_per_s=1e9, write_bytes_per_s=1e9)
        health = PathHealth([rates] * len(folders), lambda slow: None)
        make = [partial(TierFile, folder, "data") for folder in folders]
        file = open_striped(make, Stripes(self.unit_nbytes, self.weights), health)
        try:
            with FileTier(directory, "data", lanes, file=file) as tier:
                yield tier
        finally:
            lanes.close()

    def _places(self, tier, first, nbytes):
        """(path's file, offset in it, nbytes) of a range, unit by unit."""
        at, end = first, first + nbytes
        while at < end:
            path, place = tier.file.stripes.place(at)
            part = min(self.unit_nbytes - at % self.unit_nbytes, end - at)
            yield tier.file.files[path].directory / "data", place, part
            at += part

    def peek(self, tier, block, offset, nbytes):
        found = bytearray()
        for path, place, part in self._places(tier, block.extent.offset + offset, nbytes):
            with path.open("rb", buffering=0) as file:
                found += os.pread(file.fileno(), part, place)
        return bytes(found)

    def poke(self, tier, block, offset, data):
        done = 0
        for path, place, part in self._places(tier, block.extent.offset + offset, len(data)):
            with path.open("r+b", buffering=0) as file:
                assert os.pwrite(file.fileno(), data[done : done + part], place) == part
            done += part


class TestStripedTierWithoutDirectIO(TestStripedTier):
    """One path without ``O_DIRECT`` is enough: all I/O of that path goes through the cache."""

    @contextmanager
    def open_tier(self, directory):
        with pytest.MonkeyPatch.context() as patch:
            whole = file_module._open_direct
            opened = []

            def second_refuses(fd):
                opened.append(fd)
                return fd if len(opened) == 2 else whole(fd)

            patch.setattr(file_module, "_open_direct", second_refuses)
            with super().open_tier(directory) as tier:
                assert [file.direct for file in tier.file.files] == [True, False, True]
                assert not tier.file.direct
                yield tier
