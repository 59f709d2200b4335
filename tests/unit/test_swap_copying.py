"""Ordinary tensors travel to and from blocks, whatever their alignment."""

import os

import pytest
import torch

from offload.swap.copying import read_jobs, storage_use_count, write_jobs
from offload.tiers.file import TierFile
from offload.tiers.filetier import FileTier, Lanes
from offload.tiers.hostmem import PAGE
from offload.tiers.journal import Journal
from offload.tiers.testing import Memory, pattern

SIZES = [1, PAGE - 1, PAGE, PAGE + 1, (4 << 20) + 5, (16 << 20) + PAGE + 3]


@pytest.fixture
def tier(tmp_path):
    lanes = Lanes(Journal())
    with FileTier(tmp_path, "data", lanes) as tier:
        yield tier
    lanes.close()


def run(jobs):
    for job in reversed(jobs):  # each job is complete in itself
        job()


@pytest.mark.parametrize("shift", [0, 64, 4000])
@pytest.mark.parametrize("nbytes", SIZES)
def test_bytes_arrive_whole_and_touch_nothing_else(tier, nbytes, shift):
    before, block, after = (tier.allocate(PAGE), tier.allocate(nbytes), tier.allocate(PAGE))
    for other in (before, after):
        os.pwrite(tier.file.fd, b"\xee" * PAGE, other.extent.offset)
    data = pattern(nbytes)
    with Memory.of(data, shift=shift) as memory:
        run(write_jobs(tier.file, block, memory.address, nbytes))
    assert os.pread(tier.file.fd, nbytes, block.extent.offset) == data
    for other in (before, after):
        assert os.pread(tier.file.fd, PAGE, other.extent.offset) == b"\xee" * PAGE
    with Memory(nbytes + 100, shift=shift) as memory:
        run(read_jobs(tier.file, block, memory.address, nbytes))
        assert memory.data() == data + bytes(100)


def test_large_tensors_are_cut_into_requests(tier):
    block = tier.allocate(40 << 20)
    assert len(write_jobs(tier.file, block, 0, 40 << 20)) == 3
    assert len(read_jobs(tier.file, block, 64, 40 << 20)) == 3
    assert write_jobs(tier.file, block, 0, 0) == []


def test_memory_off_the_page_grid_is_still_moved_by_direct_requests(tier, monkeypatch):
    """Through an aligned buffer: else the page cache would hold a second copy of it all."""
    addresses = []
    whole = TierFile.write

    def write(self, offset, address, nbytes):
        addresses.append(address)
        whole(self, offset, address, nbytes)

    monkeypatch.setattr(TierFile, "write", write)
    block = tier.allocate(9 << 20)
    with Memory(9 << 20, shift=64) as memory:
        run(write_jobs(tier.file, block, memory.address, 9 << 20))
    assert len(addresses) == 3
    assert all(address % PAGE == 0 for address in addresses)


def test_owners_of_a_storage_are_counted():
    tensor = torch.zeros(10)
    alone = storage_use_count(tensor)
    view = tensor[2:5]
    assert storage_use_count(tensor) == alone + 1
    alias = tensor.detach()
    assert storage_use_count(view) == alone + 2
    del view, alias
    assert storage_use_count(tensor) == alone
