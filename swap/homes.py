"""Where saved activations go: homes in the order in which they are tried, fastest first.

A home gives out blocks, and copies between them and host memory. It stands on a tier: files, plain
or pinned host memory, memory nodes. What saved tensors live in is a ``Place``.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial

from offload.allocator.errors import CapacityError
from offload.swap.copying import read_jobs, write_jobs
from offload.tiers.base import Block, Tier
from offload.tiers.filetier import FileTier
from offload.tiers.lanes import Job, Lane

SPARE_NBYTES = 64 << 20  # of a store's disk that saved activations leave: records need some
_CHUNK_NBYTES = 16 << 20
ROLE = "activation"


class Home(ABC):
    """Where the bytes of saved storages wait.

    Attributes:
        name: of its tier.
        reads, writes: the links to and from it.
    """

    name: str
    reads: Lane
    writes: Lane

    @abstractmethod
    def allocate(self, nbytes: int) -> Block:
        """A block of at least ``nbytes``.

        Raises:
            CapacityError: the home takes no more; the next one may.
        """

    @abstractmethod
    def room_nbytes(self) -> int:
        """Bytes that its blocks may take in all."""

    @abstractmethod
    def write_jobs(self, block: Block, address: int, nbytes: int, offset: int = 0) -> list[Job]:
        """Jobs that copy ``nbytes`` of memory at ``address`` to ``block`` from ``offset`` on."""

    @abstractmethod
    def read_jobs(self, block: Block, address: int, nbytes: int, offset: int = 0) -> list[Job]:
        """Jobs that copy ``nbytes`` of ``block`` from ``offset`` on to memory at ``address``."""


class FileHome(Home):
    """A file tier, by way of its lanes and bounded bounce buffers."""

    def __init__(self, tier: FileTier) -> None:
        self.tier = tier
        self.name = tier.spec.name
        self.reads, self.writes = tier.lanes.reads, tier.lanes.writes

    def allocate(self, nbytes: int) -> Block:
        return self.tier.allocate(nbytes)

    def room_nbytes(self) -> int:
        return self.tier.room_nbytes()

    def write_jobs(self, block: Block, address: int, nbytes: int, offset: int = 0) -> list[Job]:
        return write_jobs(self.tier.file, block, address, nbytes, offset)

    def read_jobs(self, block: Block, address: int, nbytes: int, offset: int = 0) -> list[Job]:
        return read_jobs(self.tier.file, block, address, nbytes, offset)


class MemoryHome(Home):
    """A tier whose copies the processor makes (host memory, a memory node), on lanes of its own."""

    def __init__(self, tier: Tier, reads: Lane, writes: Lane) -> None:
        self.tier = tier
        self.name = tier.spec.name
        self.reads, self.writes = reads, writes

    def allocate(self, nbytes: int) -> Block:
        return self.tier.allocate(nbytes)

    def room_nbytes(self) -> int:
        return self.tier.spec.capacity

    def write_jobs(self, block: Block, address: int, nbytes: int, offset: int = 0) -> list[Job]:
        return [partial(self._copy_in, block, address, offset, *chunk) for chunk in _chunks(nbytes)]

    def read_jobs(self, block: Block, address: int, nbytes: int, offset: int = 0) -> list[Job]:
        return [
            partial(self._copy_out, block, address, offset, *chunk) for chunk in _chunks(nbytes)
        ]

    def _copy_in(self, block: Block, address: int, offset: int, at: int, nbytes: int) -> None:
        self.tier.write(block, address + at, offset=offset + at, nbytes=nbytes).wait()

    def _copy_out(self, block: Block, address: int, offset: int, at: int, nbytes: int) -> None:
        self.tier.read(block, address + at, offset=offset + at, nbytes=nbytes).wait()


def allocate_in(homes: Sequence[Home], nbytes: int) -> tuple[Home, Block]:
    """A block in the first home that takes it.

    Raises:
        CapacityError: none does; with what each of them said.
    """
    refusals = [] if homes else ["no home was given: name a directory with nvme="]
    for home in homes:
        try:
            return home, home.allocate(nbytes)
        except CapacityError as error:
            refusals.append(f"{home.name}: {error}")
    raise CapacityError("; ".join(refusals))


def _chunks(nbytes: int) -> list[tuple[int, int]]:
    """(offset, nbytes) of each copy."""
    return [(at, min(_CHUNK_NBYTES, nbytes - at)) for at in range(0, nbytes, _CHUNK_NBYTES)]
