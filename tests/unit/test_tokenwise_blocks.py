"""Blocks are found by repetition; no class has a name here that matters."""

import pytest
from torch import nn

from offload.allocator.errors import ConfigError
from offload.swap.tokenwise.blocks import find_blocks


def layer(width=4):
    return nn.ModuleDict({"norm": nn.LayerNorm(width), "up": nn.Linear(width, width)})


def layers(count, width=4):
    return nn.ModuleList(layer(width) for _ in range(count))


def names(model, *given):
    return list(find_blocks(model, given))


def test_a_list_of_equal_modules():
    model = nn.ModuleDict({"embed": nn.Embedding(3, 4), "h": layers(3), "head": nn.Linear(4, 3)})
    assert names(model) == ["h.0", "h.1", "h.2"]


def test_a_sequential_itself():
    assert names(nn.Sequential(*layers(2))) == ["0", "1"]


def test_encoder_and_decoder():
    model = nn.ModuleDict(
        {"encoder": nn.ModuleDict({"layer": layers(2)}), "decoder": layers(2, width=6)}
    )
    assert names(model) == ["encoder.layer.0", "encoder.layer.1", "decoder.0", "decoder.1"]


def test_lists_inside_a_block_are_parts_of_it():
    def with_experts():
        return nn.ModuleDict({"experts": layers(8), "router": nn.Linear(4, 8)})

    model = nn.ModuleList(with_experts() for _ in range(4))
    assert names(model) == ["0", "1", "2", "3"]


def test_two_towers_are_not_blocks_their_layers_are():
    model = nn.ModuleList(nn.ModuleDict({"layers": layers(3)}) for _ in range(2))
    assert names(model) == [f"{tower}.layers.{index}" for tower in range(2) for index in range(3)]


def test_blocks_of_two_kinds_in_one_list_and_one_that_is_alone():
    model = nn.ModuleList([layer(), layer(6), layer(), layer(6), layer(8)])
    assert names(model) == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(2, 2),
        nn.ModuleDict({"q": nn.Linear(2, 2), "k": nn.Linear(2, 2)}),  # equal, but no list
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3)),
        nn.Sequential(nn.ReLU(), nn.ReLU()),  # nothing to train
    ],
)
def test_nothing_repeats(model):
    assert names(model) == []


def test_named_blocks_and_lists():
    model = nn.ModuleDict({"h": layers(3), "extra": layer()})
    assert names(model, "h") == ["h.0", "h.1", "h.2"]
    assert names(model, "extra", "h.1") == ["extra", "h.1"]
    with pytest.raises(ConfigError, match="no module 'layers'; its lists are: h"):
        find_blocks(model, ["layers"])
