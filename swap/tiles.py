"""Cutting the optimizer's work into tiles: pure arithmetic on element counts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements ``start`` to ``stop`` of the parameter number ``index`` of its group."""

    index: int
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Elements in the piece."""
        return self.stop - self.start


def cut(numels: Sequence[int], chunk_numel: int) -> list[tuple[Piece, ...]]:
    """Tiles of at most ``chunk_numel`` elements over parameters of ``numels`` elements.

    Large parameters are cut at multiples of ``chunk_numel`` (a multiple of 64, see
    ``optim_kinds`` [Note: tiles]); small ones share a tile. A parameter's pieces are in order.

    Raises:
        ValueError: ``chunk_numel`` is off the 64-element grid.
    """
    tiles: list[tuple[Piece, ...]] = []
    for tile, count in cut_runs(numels, chunk_numel):
        tiles.append(tile)
        index = tile[0].index
        starts = range(chunk_numel, count * chunk_numel, chunk_numel)
        tiles += [(Piece(index, start, start + chunk_numel),) for start in starts]
    return tiles


def cut_runs(numels: Sequence[int], chunk_numel: int) -> Iterator[tuple[tuple[Piece, ...], int]]:
    """The tiles of ``cut``: the first of each run of whole ones of a parameter, and their count.

    Raises:
        ValueError: as ``cut``.
    """
    if chunk_numel <= 0 or chunk_numel % 64:
        raise ValueError(f"chunk_numel must be a positive multiple of 64, not {chunk_numel}")
    shared: list[Piece] = []
    shared_numel = 0
    for index, numel in enumerate(numels):
        whole, rest = divmod(numel, chunk_numel)
        if whole:
            yield (Piece(index, 0, chunk_numel),), whole
        if not rest:
            continue
        if shared_numel + rest > chunk_numel:
            yield tuple(shared), 1
            shared, shared_numel = [], 0
        shared.append(Piece(index, numel - rest, numel))
        shared_numel += rest
    if shared:
        yield tuple(shared), 1
