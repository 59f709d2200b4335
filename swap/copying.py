"""Moving the bytes of ordinary tensors, which the caller's allocator owns, to and from blocks."""

from functools import partial

import torch

from offload.tiers.base import Block
from offload.tiers.hostmem import PAGE
from offload.tiers.lanes import Job
from offload.tiers.memory import HostBuffer, memory_at
from offload.tiers.pieces import BlockFile, move_jobs

_BOUNCE_NBYTES = 4 << 20


def write_jobs(
    file: BlockFile, block: Block, address: int, nbytes: int, offset: int = 0
) -> list[Job]:
    """Jobs that write ``nbytes`` at ``address`` (any alignment) to ``block`` from ``offset`` on."""
    call = file.write if address % PAGE == 0 else partial(_write_bounced, file)
    return move_jobs(file, call, block.extent.offset + offset, address, nbytes)


def read_jobs(
    file: BlockFile, block: Block, address: int, nbytes: int, offset: int = 0
) -> list[Job]:
    """Jobs that read ``nbytes`` of ``block`` from ``offset`` on to ``address`` (any alignment)."""
    call = file.read if address % PAGE == 0 else partial(_read_bounced, file)
    return move_jobs(file, call, block.extent.offset + offset, address, nbytes)


def _write_bounced(file: BlockFile, offset: int, address: int, nbytes: int) -> None:
    """Direct I/O needs page-aligned memory: pass through a small aligned buffer."""
    buffer = HostBuffer(min(nbytes, _BOUNCE_NBYTES))
    try:
        for at in range(0, nbytes, buffer.nbytes):
            part = min(buffer.nbytes, nbytes - at)
            buffer.view(0, part)[:] = memory_at(address + at, part)
            file.write(offset + at, buffer.address, part)
    finally:
        buffer.release()


def _read_bounced(file: BlockFile, offset: int, address: int, nbytes: int) -> None:
    buffer = HostBuffer(min(nbytes, _BOUNCE_NBYTES))
    try:
        for at in range(0, nbytes, buffer.nbytes):
            part = min(buffer.nbytes, nbytes - at)
            file.read(offset + at, buffer.address, part)
            memory_at(address + at, part)[:] = buffer.view(0, part)
    finally:
        buffer.release()


def storage_use_count(tensor: torch.Tensor) -> int:
    """How many owners the storage of ``tensor`` has, the probe itself included."""
    storage = tensor.untyped_storage()
    return int(torch._C._storage_Use_Count(storage._cdata))
