"""Tiles cover every element once, in order, on the grid that keeps fused kernels exact."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.swap.tiles import Piece, cut

CHUNKS = st.integers(1, 8).map(lambda count: 64 * count)
NUMELS = st.lists(
    st.integers(0, 3000) | st.integers(1, 40).map(lambda count: 64 * count), max_size=20
)


@given(numels=NUMELS, chunk_numel=CHUNKS)
def test_pieces_partition_every_parameter(numels, chunk_numel):
    ends = dict.fromkeys(range(len(numels)), 0)
    for tile in cut(numels, chunk_numel):
        for piece in tile:
            assert piece.start == ends[piece.index]  # in order, no gap, no overlap
            assert piece.stop > piece.start
            ends[piece.index] = piece.stop
    assert ends == dict(enumerate(numels))


@given(numels=NUMELS, chunk_numel=CHUNKS)
def test_tiles_are_bounded_and_never_empty(numels, chunk_numel):
    for tile in cut(numels, chunk_numel):
        assert 0 < sum(piece.numel for piece in tile) <= chunk_numel
        assert all(piece.numel == piece.stop - piece.start for piece in tile)


@given(numels=NUMELS, chunk_numel=CHUNKS)
def test_cuts_stand_on_the_chunk_grid(numels, chunk_numel):
    """A chunk of the store has one checksum, so a piece is exactly one chunk of its parameter."""
    for tile in cut(numels, chunk_numel):
        for piece in tile:
            assert piece.start % chunk_numel == 0
            assert piece.start % 64 == 0
            assert piece.stop == min(piece.start + chunk_numel, numels[piece.index])


@given(numels=NUMELS, chunk_numel=CHUNKS)
def test_a_tile_has_one_piece_of_a_parameter(numels, chunk_numel):
    for tile in cut(numels, chunk_numel):
        indices = [piece.index for piece in tile]
        assert len(indices) == len(set(indices))


@given(numels=st.lists(st.integers(1, 64), min_size=2, max_size=30))
def test_small_parameters_share_tiles(numels):
    tiles = cut(numels, 128)
    for first, second in itertools.pairwise(tiles):
        together = sum(piece.numel for piece in (*first, second[0]))
        assert together > 128  # the next one did not fit


def test_a_large_parameter_does_not_close_the_tile_that_small_ones_share():
    assert cut([10, 128, 20], 128) == [
        (Piece(1, 0, 128),),
        (Piece(0, 0, 10), Piece(2, 0, 20)),
    ]


@pytest.mark.parametrize("chunk_numel", [0, -64, 1, 63, 65, 100])
def test_a_chunk_off_the_grid_is_refused(chunk_numel):
    with pytest.raises(ValueError, match=f"positive multiple of 64, not {chunk_numel}"):
        cut([100], chunk_numel)
