"""Versions written straight from memory: all of them, checksummed, beside the committed ones."""

import pytest
import torch

from offload.allocator.errors import StoreCorruptError, TierIOError
from offload.swap.writeback import is_changed, write_back
from offload.tiers.events import ListRecorder, Move
from offload.tiers.filetier import Lanes
from offload.tiers.hostmem import PAGE
from offload.tiers.journal import Journal
from offload.tiers.memory import HostBuffer
from offload.tiers.store import Store

CHUNK_NBYTES = 4 * PAGE
NUMELS = (10_000, 4096, 1, 5000)  # some chunks and a rest, whole chunks, next to nothing


@pytest.fixture
def journal():
    return Journal(ListRecorder())


@pytest.fixture
def store(tmp_path, journal):
    lanes = Lanes(journal)
    store = Store(tmp_path, lanes)
    yield store
    store.close()
    lanes.close()


@pytest.fixture
def held(store):
    """Tensors in whole pages of memory, each with its stored twin."""
    buffers = [HostBuffer(4 * numel) for numel in NUMELS]
    yield [
        (
            store.add(f"w{index}#m", torch.float32, (numel,), CHUNK_NBYTES),
            buffer.tensor(torch.float32, (numel,)),
        )
        for index, (numel, buffer) in enumerate(zip(NUMELS, buffers, strict=True))
    ]
    for buffer in buffers:
        buffer.release()


def write(store, held, seed):
    generator = torch.Generator().manual_seed(seed)
    for _, tensor in held:
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    write_back(store, [(stored, tensor.data_ptr()) for stored, tensor in held])


def test_what_is_written_is_what_is_read(store, held, journal):
    write(store, held, 1)
    for stored, tensor in held:
        store.verify(stored)
        read = torch.empty_like(tensor)
        store.read_into(stored, read)
        assert torch.equal(read, tensor)
    moves = [e for e in journal.recorder.events if isinstance(e, Move) and e.src == "host"]
    assert sorted((move.key, move.nbytes, move.role) for move in moves) == sorted(
        (stored.name, stored.nbytes, "state") for stored, _ in held
    )  # a lane's workers end in any order


def test_the_committed_version_stays(store, held):
    write(store, held, 1)
    before = [tensor.clone() for _, tensor in held]
    store.commit(1, {}, {})
    committed = [stored.current for stored, _ in held]
    for seed in (2, 3):  # the second goes over the first: only one is committed
        write(store, held, seed)
    for (stored, tensor), block, value in zip(held, committed, before, strict=True):
        assert stored.current is not block
        store.verify(stored)
        read = HostBuffer(stored.nbytes)
        store.tier.read(block, read.address, nbytes=read.nbytes).wait()
        assert torch.equal(read.tensor(torch.float32, tuple(value.shape)), value)
        assert not torch.equal(tensor, value)
        read.release()


def test_memory_that_was_written_to_is_told_from_a_damaged_disk(store, held):
    write(store, held, 1)
    for stored, tensor in held:
        assert not is_changed(store, stored, tensor.data_ptr())
        tensor[-1] += 1
        assert is_changed(store, stored, tensor.data_ptr())
    stored, tensor = held[0]
    stored.checksums[0] ^= 1
    with pytest.raises(StoreCorruptError, match="w0#m is damaged"):
        is_changed(store, stored, tensor.data_ptr())


def test_a_write_that_fails_leaves_the_older_version(store, held, monkeypatch):
    write(store, held, 1)
    store.commit(1, {}, {})
    current = [stored.current for stored, _ in held]

    def fail(*_args):
        raise TierIOError(5, "the disk is gone")

    monkeypatch.setattr(store.tier.file, "write", fail)
    with pytest.raises(TierIOError, match="the disk is gone"):
        write(store, held, 2)
    assert [stored.current for stored, _ in held] == current
    monkeypatch.undo()
    store.tier.lanes.settle()
