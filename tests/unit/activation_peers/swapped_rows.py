"""What the tests of peers' subjects share: tensors that are swapped, and how much was."""

import torch

ROWS, WIDTH = 64, 32
NBYTES = 4 * ROWS * WIDTH


def written(swap):
    return swap.journal.totals.written_nbytes


def ones(**settings):
    return torch.ones(ROWS, WIDTH, requires_grad=True, **settings)
