"""torch's clipping and unscaling of gradients in scratch give the bits of gradients in memory."""

import math

import numpy as np
import pytest
import torch
from gradients_in_scratch import SHAPES, Twins, values
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_  # before anything is led


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("norm_type", [2.0, math.inf, 1, 3.5, 0.5, 0, -math.inf])
@pytest.mark.parametrize("max_norm", [0.01, 1e9, math.inf])
def test_clipping_by_norm(twins, foreach, norm_type, max_norm):
    norm = twins.both(lambda ps: clip_grad_norm_(ps, max_norm, norm_type, foreach=foreach))
    assert norm.isfinite()


@pytest.mark.parametrize("foreach", [None, False])
def test_clipping_by_value(twins, foreach):
    twins.both(lambda ps: clip_grad_value_(ps, 0.3, foreach=foreach))
    assert twins.filed[0].grad.max() == torch.tensor(0.3)


def test_norms_and_scaling_in_calls_of_their_own(twins):
    def call(parameters):
        norm = nn.utils.get_total_norm([one.grad for one in parameters])
        nn.utils.clip_grads_with_norm_(parameters, 0.5, norm)
        return norm

    twins.both(call)


@pytest.mark.parametrize("spoilt", [math.nan, math.inf])
@pytest.mark.parametrize("norm_type", [2.0, math.inf, 0])
@pytest.mark.parametrize("error", [True, False])
def test_gradients_that_are_not_finite(swapper, stream, spoilt, norm_type, error):
    twins = Twins(swapper)

    def spoil(gradient):
        gradient.view(-1)[-1] = spoilt
        return gradient

    twins.backward(7, spoil)
    twins.both(lambda ps: clip_grad_norm_(ps, 1.0, norm_type, error_if_nonfinite=error))
    twins.both(lambda ps: clip_grad_norm_(ps, 1e9, norm_type))  # a factor of one
    twins.both(lambda ps: clip_grad_value_(ps, 0.5))


def test_gradients_of_several_types_and_smallest_numbers(swapper, stream):
    bf16, f64 = torch.bfloat16, torch.float64
    dtypes = (bf16, torch.float32, f64, bf16, torch.complex64)
    for scale in (1.0, 1e-41):
        twins = Twins(swapper, dtypes, scale)
        for max_norm in (1e9, 0.3):
            twins.both(lambda ps, most=max_norm: clip_grad_norm_(ps, most))


def test_a_part_of_the_gradients_in_any_order_and_twice(twins):
    twins.filed[2].grad = twins.plain[2].grad = None
    twins.filed[1].grad = values(3, SHAPES[1])
    twins.plain[1].grad = values(3, SHAPES[1])
    picked = [4, 0, 3, 1, 0, 2]
    twins.both(lambda ps: clip_grad_norm_([ps[at] for at in picked], 0.7))
    twins.both(lambda ps: clip_grad_norm_((ps[at] for at in picked), 0.6))
    twins.both(lambda ps: clip_grad_value_(ps[0], 0.01))
    twins.both(lambda ps: clip_grad_norm_(ps[4], 0.001))
    twins.both(lambda ps: clip_grad_norm_(ps[2], 0.001))  # there is none


def test_accumulated_gradients(twins):
    twins.both(lambda ps: clip_grad_norm_(ps, 0.5))
    twins.backward(20)
    twins.both(lambda ps: clip_grad_norm_(ps, 0.5))
    for parameters in (twins.filed, twins.plain):
        for one in parameters:
            one.grad.zero_()
    twins.backward(30)
    twins.both(lambda ps: clip_grad_norm_(ps, 0.5))


@pytest.mark.parametrize(
    "change",
    [
        lambda gradient: gradient.mul_(3),
        lambda gradient: gradient.data.mul_(3),
        lambda gradient: np.multiply(gradient.numpy(), 3, out=gradient.numpy()),
    ],
    ids=["in place", "data", "numpy"],
)
def test_what_the_user_wrote_is_measured_and_clipped(twins, change):
    twins.both(lambda ps: clip_grad_norm_(ps, 1e9))
    for parameters in (twins.filed, twins.plain):
        change(parameters[0].grad)
    twins.both(lambda ps: clip_grad_norm_(ps, 0.5))


def test_views_that_the_user_holds_see_the_change(twins):
    held = [[one.grad[1:], one.grad.numpy(), one.grad.detach()] for one in twins.filed[:2]]
    version = twins.filed[0].grad._version
    clip_grad_norm_(twins.filed, 0.5)
    assert twins.filed[0].grad._version > version
    for one, (part, array, whole) in zip(twins.filed, held, strict=False):
        assert torch.equal(one.grad[1:], part)
        assert torch.equal(one.grad, torch.from_numpy(array))
        assert torch.equal(one.grad, whole)


@pytest.mark.parametrize("fused", [False, True])
def test_unscaling_skipped_steps_and_growth(swapper, stream, fused):
    twins = Twins(swapper)
    rows = []
    for parameters in (twins.filed, twins.plain):
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
        optimizer = torch.optim.SGD(parameters, 0.1, fused=fused)
        row = []
        for step in range(7):
            optimizer.zero_grad()
            scaler.scale(
                sum(
                    (one * values(step + at, one.shape)).sum() * (math.inf if step == 3 else 1)
                    for at, one in enumerate(parameters)
                )
            ).backward()
            swapper.drain()
            if step % 2:
                scaler.unscale_(optimizer)
                row.append(clip_grad_norm_(parameters, 1.0).item())
            scaler.step(optimizer)
            scaler.update()
            row += [scaler.get_scale(), *(one.grad.abs().sum().item() for one in parameters)]
        rows.append(row)
    assert np.array_equal(*rows, equal_nan=True)
    assert 128.0 in rows[0]
    twins.assert_equal()
    for mine, twin in zip(twins.filed, twins.plain, strict=True):
        assert torch.equal(mine, twin)


def test_calls_inside_backward(swapper, stream):
    """Each gradient is clipped by itself as it comes."""
    twins = Twins(swapper)

    def hook(one):
        clip_grad_norm_(one, 0.1)

    for _ in range(3):
        for parameters in (twins.filed, twins.plain):
            handles = [one.register_post_accumulate_grad_hook(hook) for one in parameters]
            sum((one * values(1, one.shape)).sum() for one in parameters).backward()
            for handle in handles:
                handle.remove()
        twins.both(lambda ps: clip_grad_norm_(ps, 0.2))
