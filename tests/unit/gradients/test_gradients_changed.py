"""What the user's code does to a gradient is kept, wherever the gradient is by then."""

import numpy as np
import pytest
import torch
from gradients_in_scratch import PATIENCE_S, SHAPE, Gate, backward, values
from torch import nn


@pytest.mark.parametrize(
    "change",
    [
        lambda gradient: gradient.mul_(0.5),
        lambda gradient: gradient.data.mul_(0.5),  # tells no version counter
        lambda gradient: np.multiply(gradient.numpy(), 0.5, out=gradient.numpy()),
    ],
    ids=["in place", "data", "numpy"],
)
def test_a_change_by_the_user_while_a_gradient_leaves_is_kept(swapper, parameter, gate, change):
    backward(parameter, values(1))
    assert gate.begun.wait(PATIENCE_S)
    change(parameter.grad)
    gate.open()
    swapper.drain()
    assert swapper.home_of(parameter) is not None
    assert torch.equal(parameter.grad, values(1) * 0.5)


def test_changes_between_later_steps_are_kept_too(swapper, parameter, gate):
    """A gradient that leaves again, outside of backward, is watched as the first time."""
    backward(parameter, values(1))
    assert gate.begun.wait(PATIENCE_S)
    parameter.grad.mul_(0.5)
    gate.open()
    swapper._leaving[0].transfer.settle()
    swapper.poll()  # leaves again
    parameter.grad.data.mul_(0.5)
    swapper.drain()
    assert torch.equal(parameter.grad, values(1) * 0.25)


def test_a_change_by_the_user_is_kept_when_the_gradient_left_again_in_backward(
    swapper, parameter, scratch, monkeypatch
):
    """Its first write has ended, unnoticed, when the second backward adds to it."""
    first = Gate(scratch, monkeypatch, "after")
    backward(parameter, values(1))
    first.open()
    swapper._leaving[0].transfer.settle()
    gate = Gate(scratch, monkeypatch, "after")
    backward(parameter, values(2))
    assert gate.begun.wait(PATIENCE_S)
    parameter.grad.data.mul_(3)  # tells no version counter
    gate.open()
    swapper.drain()
    assert torch.equal(parameter.grad, (values(1) + values(2)) * 3)


@pytest.mark.parametrize("kind", ["post accumulate", "tensor"])
def test_a_change_inside_backward_by_a_hook_of_a_parameter_is_kept(swapper, parameter, gate, kind):
    """It tells no version counter, and the write has begun."""
    later = nn.Parameter(torch.zeros(SHAPE))
    swapper.watch("later", later)
    on_their_way = []

    def change(_gradient):
        assert gate.begun.wait(PATIENCE_S)
        on_their_way.extend(swapper._leaving.of(parameter))
        parameter.grad.data.mul_(0.5)

    if kind == "tensor":
        later.register_hook(change)
    else:
        later.register_post_accumulate_grad_hook(change)
    # What was computed last is first in backward.
    ((later * values(2)).sum() + (parameter * values(1)).sum()).backward()
    gate.open()
    swapper.drain()
    assert len(on_their_way) == 1
    assert swapper.home_of(parameter) is not None
    assert torch.equal(parameter.grad, values(1) * 0.5)
    assert torch.equal(later.grad, values(2))


def test_a_checksum_is_taken_where_the_user_s_code_could_change_bytes(swapper, parameter, gate):
    """Not inside of backward where none of it runs."""
    noted = []
    swapper.before_end = lambda: noted.append(swapper._leaving[-1].checksum is not None)
    backward(parameter, values(1))
    parameter.grad = None
    handle = parameter.register_post_accumulate_grad_hook(lambda _parameter: None)
    gate.open()
    backward(parameter, values(2))
    parameter.grad = None
    handle.remove()
    backward(parameter, values(3))
    assert noted == [False, True, False]


def test_a_failed_backward_does_not_end_the_watch(swapper, parameter, gate):
    class Refuse(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise ValueError("no")

    other = nn.Parameter(torch.zeros(SHAPE))
    swapper.watch("other", other)
    with pytest.raises(ValueError, match="no"):
        (Refuse.apply(torch.ones((), requires_grad=True)) + other.sum()).backward()
    backward(parameter, values(1))
    assert gate.begun.wait(PATIENCE_S)
    parameter.grad.data.mul_(0.5)
    gate.open()
    swapper.drain()
    assert torch.equal(parameter.grad, values(1) * 0.5)


def test_a_change_by_the_user_after_a_gradient_has_left_is_kept(swapper, parameter):
    backward(parameter, values(1))
    swapper.drain()
    norm = nn.utils.clip_grad_norm_([parameter], 1.0)
    expected = values(1)
    expected.mul_(torch.clamp(1.0 / (values(1).norm() + 1e-6), max=1.0))
    assert torch.equal(norm, values(1).norm())
    assert torch.equal(parameter.grad, expected)
    swapper.home_of(parameter).shed()
    assert torch.equal(parameter.grad, expected)


@pytest.mark.parametrize("replacement", [None, torch.ones(SHAPE)], ids=["dropped", "replaced"])
def test_what_the_user_puts_in_place_of_a_leaving_gradient_stays(
    swapper, parameter, gate, replacement
):
    backward(parameter, values(1))
    assert gate.begun.wait(PATIENCE_S)
    parameter.grad = replacement
    gate.open()
    swapper.drain()
    assert parameter.grad is replacement
