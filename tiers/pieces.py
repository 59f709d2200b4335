"""Cutting a move into requests: pieces of a file's range, each on one path, each a job."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from offload.tiers.lanes import Job, QueuedJob

PIECE_NBYTES = 16 << 20  # large enough for full speed, small enough to share lanes


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes that move as one request.

    Attributes:
        queue: the lanes' queue for it: the number of the path that it lies on.
        start: where it begins in the range that was cut, in bytes.
    """

    queue: int
    start: int
    nbytes: int


class BlockFile(Protocol):
    """The file under a ``FileTier``: one ``TierFile``, or several as one ``StripedFile``."""

    label: str
    nbytes: int

    @property
    def direct(self) -> bool: ...
    @property
    def block_align(self) -> int: ...
    def pieces(self, offset: int, nbytes: int) -> list[Piece]: ...
    def grow(self, nbytes: int) -> None: ...
    def growth_nbytes(self) -> int: ...
    def read(self, offset: int, address: int, nbytes: int) -> None: ...
    def write(self, offset: int, address: int, nbytes: int) -> None: ...
    def map(self, address: int, nbytes: int, offset: int, *, shared: bool) -> None: ...
    def clear(self, offset: int, nbytes: int) -> None: ...
    def sync(self) -> None: ...
    def uncache(self, offset: int, nbytes: int) -> None: ...
    def stamp(self) -> bool: ...
    def is_stamped(self) -> bool: ...
    def close(self) -> None: ...


def cut(queue: int, start: int, nbytes: int) -> list[Piece]:
    """Pieces of at most ``PIECE_NBYTES`` over ``nbytes`` that lie together."""
    return [
        Piece(queue, start + at, min(PIECE_NBYTES, nbytes - at))
        for at in range(0, nbytes, PIECE_NBYTES)
    ]


def move_jobs(
    file: BlockFile,
    call: Callable[[int, int, int], None],
    offset: int,
    address: int,
    nbytes: int,
) -> list[Job]:
    """One job for each piece: ``call(offset, address, nbytes)`` of it, on its path's queue."""
    return [
        QueuedJob(
            piece.queue, partial(call, offset + piece.start, address + piece.start, piece.nbytes)
        )
        for piece in file.pieces(offset, nbytes)
    ]
