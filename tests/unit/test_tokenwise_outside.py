"""What a pass saves outside of its blocks: counted by storage, weights left out."""

import torch
from torch import nn

from offload.swap.tokenwise.outside import OutsideBytes


def saving(outside: OutsideBytes, *tensors: torch.Tensor) -> None:
    for tensor in tensors:
        outside.saved(tensor)


def test_a_storage_counts_once_and_weights_never():
    model = nn.Linear(8, 8)
    outside = OutsideBytes(model)
    outside.begin("block")
    logits = torch.zeros(100)
    saving(outside, logits, logits[:10], logits.view(10, 10), model.weight, model.weight.t())
    assert outside.nbytes == logits.nbytes


def test_each_pass_is_counted_anew_and_the_largest_stays():
    outside = OutsideBytes(nn.Linear(8, 8))
    for numel in (100, 300, 200):
        for block in ("first", "second"):
            outside.begin(block)
        held = torch.zeros(numel)
        saving(outside, held)
    assert outside.nbytes == 300 * 4


def test_without_a_block_nothing_is_counted_or_kept():
    """Blocks inside of a checkpoint never run here, say."""
    outside = OutsideBytes(nn.Linear(8, 8))
    saving(outside, torch.zeros(100))
    outside.begin("block")
    outside.end()
    saving(outside, torch.zeros(100))
    assert outside.nbytes == 0


def test_a_sparse_tensor_has_no_storage_to_count():
    outside = OutsideBytes(nn.Linear(8, 8))
    outside.begin("block")
    saving(outside, torch.eye(3).to_sparse())
    assert outside.nbytes == 0
