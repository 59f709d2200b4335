"""Gradients that stay in memory, and those that come back to it."""

import pytest
import torch
from gradients_in_scratch import PATIENCE_S, SHAPE, backward, left_alone, values
from torch import nn

from offload.swap.gradients import MIN_NBYTES


def test_small_gradients_stay(swapper):
    parameter = nn.Parameter(torch.zeros(MIN_NBYTES // 4 - 1))
    swapper.watch("bias", parameter)
    backward(parameter, torch.ones(MIN_NBYTES // 4 - 1))
    assert left_alone(swapper, parameter)


def test_frozen_parameters_have_no_gradient(swapper):
    parameter = nn.Parameter(torch.zeros(SHAPE), requires_grad=False)
    swapper.watch("frozen", parameter)
    assert left_alone(swapper, parameter)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_gradients_that_are_part_of_a_graph_stay(swapper, parameter):
    (parameter**3).sum().backward(create_graph=True)
    assert parameter.grad.requires_grad
    assert left_alone(swapper, parameter)
    parameter.grad = None


def test_sparse_gradients_stay(swapper):
    table = nn.Embedding(128, 128, sparse=True)
    swapper.watch("table", table.weight)
    table(torch.tensor([1, 5])).sum().backward()
    assert table.weight.grad.is_sparse
    assert left_alone(swapper, table.weight)


@pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout contract")
def test_gradients_with_strides_of_their_own_stay(swapper, parameter):
    parameter.grad = torch.zeros(SHAPE).t()
    backward(parameter, values(1))
    assert not parameter.grad.is_contiguous()
    assert left_alone(swapper, parameter)
    assert torch.equal(parameter.grad, values(1))


def test_when_stopped_gradients_are_ordinary_again(swapper, parameter):
    backward(parameter, values(1))
    swapper.stop()
    swapper.materialise()
    assert swapper.home_of(parameter) is None
    assert torch.equal(parameter.grad, values(1))
    parameter.grad = None
    backward(parameter, values(2))
    assert not swapper._leaving
    assert torch.equal(parameter.grad, values(2))


def test_a_gradient_that_is_kept_does_not_leave(swapper, parameter, journal):
    swapper.keep([parameter])
    for seed in (1, 2):
        backward(parameter, values(seed))
        swapper.drain()
    assert swapper.home_of(parameter) is None
    assert torch.equal(parameter.grad, values(1) + values(2))
    assert not [event for event in journal.recorder.events if type(event).__name__ == "Move"]


def test_a_gradient_that_has_left_comes_back_to_be_kept(swapper, parameter):
    backward(parameter, values(1))
    swapper.drain()
    swapper.keep([parameter])
    assert torch.equal(parameter.grad, values(1))
    backward(parameter, values(2))
    assert swapper.home_of(parameter) is None
    assert torch.equal(parameter.grad, values(1) + values(2))
    swapper.keep([])
    parameter.grad = None
    backward(parameter, values(3))
    swapper.drain()
    assert swapper.home_of(parameter) is not None
    assert torch.equal(parameter.grad, values(3))


def test_a_kept_gradient_leaves_when_it_is_kept_no_more(swapper, parameter):
    swapper.keep([parameter])
    backward(parameter, values(1))
    assert swapper.home_of(parameter) is None
    swapper.keep([])
    swapper.release([parameter])
    swapper.drain()
    assert swapper.home_of(parameter) is not None
    backward(parameter, values(2))
    swapper.drain()
    assert torch.equal(parameter.grad, values(1) + values(2))


def test_a_gradient_on_its_way_when_it_is_to_be_kept(swapper, parameter, gate):
    backward(parameter, values(1))
    assert gate.begun.wait(PATIENCE_S)
    swapper.keep([parameter])
    backward(parameter, values(2))
    gate.open()
    swapper.drain()
    assert torch.equal(parameter.grad, values(1) + values(2))
    backward(parameter, values(3))
    assert swapper.home_of(parameter) is None
    assert torch.equal(parameter.grad, values(1) + values(2) + values(3))
