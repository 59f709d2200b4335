"""Cutting the optimizer's work into tiles: pure arithmetic on element counts."""

from collections.abc import Sequence
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
    if chunk_numel <= 0 or chunk_numel % 64:
        raise ValueError(f"chunk_numel must be a positive multiple of 64, not {chunk_numel}")
    tiles: list[tuple[Piece, ...]] = []
    shared: list[Piece] = []
    shared_numel = 0
    for index, numel in enumerate(numels):
        for start in range(0, numel, chunk_numel):
            piece = Piece(index, start, min(start + chunk_numel, numel))
            if piece.numel == chunk_numel:
                tiles.append((piece,))
                continue
            if shared_numel + piece.numel > chunk_numel:
                tiles.append(tuple(shared))
                shared, shared_numel = [], 0
            shared.append(piece)
            shared_numel += piece.numel
    if shared:
        tiles.append(tuple(shared))
    return tiles
