"""Bytes in memory become the next versions in the store, all requests in flight at once."""

from collections.abc import Sequence
from dataclasses import dataclass

from offload.tiers.base import Block
from offload.tiers.hostmem import page_ceil
from offload.tiers.journal import Label
from offload.tiers.lanes import Job, Transfer, wait_for_all
from offload.tiers.pieces import move_jobs
from offload.tiers.store import Store, StoredTensor, checksum, role_of


@dataclass(frozen=True, slots=True)
class _Flight:
    """A version on its way; ``checksums`` are filled in as its chunks are written."""

    stored: StoredTensor
    target: Block
    checksums: list[int]
    transfer: Transfer


def write_back(store: Store, tensors: Sequence[tuple[StoredTensor, int]]) -> None:
    """Store the next version of each tensor from memory at its address; blocks, copies nothing.

    The memory is whole pages, and nobody changes it meanwhile. Versions go to the blocks that the
    last commit does not name.

    Raises:
        TierIOError: a write failed; all tensors stay at the versions that they had.
    """
    targets = [stored.target(store.tier) for stored, _ in tensors]
    flights = [
        _take_off(store, stored, address, target)
        for (stored, address), target in zip(tensors, targets, strict=True)
    ]
    wait_for_all([flight.transfer for flight in flights])
    for flight in flights:
        flight.stored.publish(flight.target, flight.checksums)


def _take_off(store: Store, stored: StoredTensor, address: int, target: Block) -> _Flight:
    chunks = stored.chunks()
    checksums = [0] * len(chunks)
    jobs: list[Job] = []
    for index, (at, nbytes) in enumerate(chunks):
        jobs += _chunk_jobs(store, target, address, at, nbytes, checksums, index)
    label = Label(stored.name, role_of(stored), "host", store.tier.spec.name)
    transfer = store.tier.lanes.writes.submit(jobs, label, stored.nbytes)
    return _Flight(stored, target, checksums, transfer)


def _chunk_jobs(
    store: Store,
    target: Block,
    address: int,
    at: int,
    nbytes: int,
    checksums: list[int],
    index: int,
) -> list[Job]:
    file, first = store.tier.file, address + at

    def write(offset: int, source: int, piece_nbytes: int) -> None:
        file.write(offset, source, piece_nbytes)
        if source == first:  # once for all the pieces of the chunk
            checksums[index] = checksum(first, nbytes)

    return move_jobs(file, write, target.extent.offset + at, first, page_ceil(nbytes))


def is_changed(store: Store, stored: StoredTensor, address: int) -> bool:
    """Whether memory at ``address`` differs from the current version that it was read from.

    Raises:
        StoreCorruptError: it does, but because the disk gave other bytes than were written.
    """
    same = all(
        checksum(address + at, nbytes) == expected
        for (at, nbytes), expected in zip(stored.chunks(), stored.checksums, strict=True)
    )
    if not same:
        store.verify(stored)
    return not same
