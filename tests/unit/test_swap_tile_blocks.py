"""Blocks of a tile: small beside it, on the kernels' grid; their scratch is given back."""

import pytest
import torch

from offload.swap.tile_blocks import BLOCK_NUMEL, BlockStep, block_numel
from offload.swap.tiles import cut
from offload.tiers.hostmem import resident_nbytes


@pytest.mark.parametrize("chunk_numel", [64, 6400, 1 << 16, 1 << 18, 3 * 64 * 11111, 2 << 20])
def test_a_block_is_no_more_than_a_tile_and_on_the_grid(chunk_numel):
    numel = block_numel(chunk_numel)
    assert 0 < numel <= min(chunk_numel, BLOCK_NUMEL)
    assert len(cut([chunk_numel], numel)) == -(-chunk_numel // numel)  # raises off the grid


@pytest.mark.own_process
def test_scratch_of_float32_is_given_back():
    blocks = BlockStep(torch.optim.AdamW([torch.zeros(64)]), 2 << 20)

    def take():
        for number in range(2):
            blocks._values(number).fill_(1)

    take()  # what a first call takes beside stays
    blocks.close()
    before = resident_nbytes()[0]
    take()
    held = resident_nbytes()[0] - before
    blocks.close()
    assert held >= 2 * 4 * BLOCK_NUMEL
    assert resident_nbytes()[0] - before < held // 4
