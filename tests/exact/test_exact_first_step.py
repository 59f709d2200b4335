"""A first step makes states within the budget: those of a block at a time, with the same bits."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from offload.swap import pipeline, tile_blocks
from offload.swap.optim_kinds import step_on
from offload.swap.tile_blocks import block_numel

CHUNK_NUMEL = 1 << 18  # of a tile; its blocks have a quarter


def train(model: nn.Module, optimizer: Any) -> None:
    for step in range(3):
        x = torch.randn(4, 512, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("config", [{}, {"state_precision": "8bit"}], ids=["exact", "8bit"])
def test_states_that_are_made_take_no_more_than_a_block(
    config: dict[str, Any], starve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    stepped: list[int] = []

    def watched(optimizer: Any, group: Any, parameters: Any, states: Any) -> Any:
        numels = [one.numel() for one in parameters]
        made.append(sum(n for n, state in zip(numels, states, strict=True) if not state))
        stepped.append(sum(numels))
        return step_on(optimizer, group, parameters, states)

    monkeypatch.setattr("offload.runtime.choose_chunk_numel", lambda _budget: CHUNK_NUMEL)
    monkeypatch.setattr(pipeline, "step_on", watched)
    monkeypatch.setattr(tile_blocks, "step_on", watched)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 1024))
    model = copy.deepcopy(plain)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    starve(model, optimizer, config=config)
    train(model, optimizer)
    assert 0 < max(made) <= block_numel(CHUNK_NUMEL)
    assert max(stepped) == CHUNK_NUMEL  # whole tiles, once there are states
    if not config:
        train(plain, torch.optim.AdamW(plain.parameters(), fused=True))
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(ours, theirs)
