"""Models that stay where they are when they are moved to where they compute."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from offload.swap.staying import move_freely, stay

CUDA = torch.device("cuda", 0)


class Odd(nn.Linear):
    """Overrides what torch's own method does, as Hugging Face's models do."""

    def to(self, *args, **kwargs):
        return super().to(*args, **kwargs)


@pytest.fixture
def moved() -> list[int]:
    return []


@pytest.fixture
def model(moved: list[int]) -> Iterator[nn.Module]:
    model = nn.Sequential(nn.Linear(2, 2), Odd(2, 2))
    stay(model, CUDA, lambda: moved.append(1))
    yield model
    move_freely(model)


def test_a_call_that_moves_it_to_its_device_moves_buffers_alone(model, moved):
    weights = [(one, one.data_ptr()) for one in model.parameters()]
    calls = [
        lambda: model.to("cuda"),
        lambda: model.to(CUDA, non_blocking=True),
        model.cuda,
        lambda: model.cuda(0),
        lambda: model.cuda("cuda:0"),
        lambda: model.to(CUDA, torch.float32),
        lambda: model.to(CUDA, memory_format=torch.contiguous_format),
    ]
    for call in calls:
        assert call() is model
    assert len(moved) == len(calls)
    assert model[1].to("cuda") is model[1]
    assert [(one, one.data_ptr()) for one in model.parameters()] == weights


def test_another_type_is_torchs_matter(model):
    model.to("cuda", torch.float64)
    assert {one.dtype for one in model.parameters()} == {torch.float64}
    assert {one.device.type for one in model.parameters()} == {"cpu"}
    model.to(torch.float32)
    assert {one.dtype for one in model.parameters()} == {torch.float32}


def test_another_device_is_torchs_matter(model, moved):
    with pytest.raises((AssertionError, RuntimeError)):
        model.to("cuda:1")  # there is none
    with pytest.raises((AssertionError, RuntimeError)):
        model.cuda(1)
    model.to("meta")
    assert {one.device.type for one in model.parameters()} == {"meta"}
    assert not moved


def test_other_models_are_moved_as_ever(model, moved):
    other = nn.Linear(2, 2)
    other.to("meta")
    assert other.weight.is_meta
    assert not moved


def test_torch_is_as_it_was_afterwards():
    methods = nn.Module.to, nn.Module.cuda
    models = [nn.Linear(2, 2), nn.Linear(2, 2)]
    for one in models:
        stay(one, CUDA, lambda: None)
    assert (nn.Module.to, nn.Module.cuda) != methods
    move_freely(models[0])
    models[0].to("meta")
    assert models[0].weight.is_meta
    assert models[1].cuda() is models[1]
    move_freely(models[1])
    assert (nn.Module.to, nn.Module.cuda) == methods
