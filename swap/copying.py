"""Moving the bytes of ordinary tensors, which the caller's allocator owns, to and from blocks."""

from collections.abc import Callable
from functools import partial

import torch

from offload.tiers.base import Block
from offload.tiers.file import TierFile
from offload.tiers.hostmem import PAGE
from offload.tiers.lanes import Job
from offload.tiers.memory import HostBuffer, memory_at

_CHUNK_NBYTES = 16 << 20
_BOUNCE_NBYTES = 4 << 20


def write_jobs(file: TierFile, block: Block, address: int, nbytes: int) -> list[Job]:
    """Jobs that write ``nbytes`` at ``address`` (any alignment) to ``block``."""
    call = file.write if address % PAGE == 0 else partial(_write_bounced, file)
    return _in_chunks(call, block, address, nbytes)


def read_jobs(file: TierFile, block: Block, address: int, nbytes: int) -> list[Job]:
    """Jobs that read ``nbytes`` of ``block`` to ``address`` (any alignment)."""
    call = file.read if address % PAGE == 0 else partial(_read_bounced, file)
    return _in_chunks(call, block, address, nbytes)


def _in_chunks(
    call: Callable[[int, int, int], None], block: Block, address: int, nbytes: int
) -> list[Job]:
    return [
        partial(call, block.extent.offset + at, address + at, min(_CHUNK_NBYTES, nbytes - at))
        for at in range(0, nbytes, _CHUNK_NBYTES)
    ]


def _write_bounced(file: TierFile, offset: int, address: int, nbytes: int) -> None:
    """Direct I/O needs page-aligned memory: pass through a small aligned buffer."""
    buffer = HostBuffer(min(nbytes, _BOUNCE_NBYTES))
    try:
        for at in range(0, nbytes, buffer.nbytes):
            part = min(buffer.nbytes, nbytes - at)
            buffer.view(0, part)[:] = memory_at(address + at, part)
            file.write(offset + at, buffer.address, part)
    finally:
        buffer.release()


def _read_bounced(file: TierFile, offset: int, address: int, nbytes: int) -> None:
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
