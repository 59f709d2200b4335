"""What autograd can do with saved tensors of a device, each as a body that a ``World`` runs."""

from functools import partial

import pytest
import torch
from device_worlds import WIDTH, mlp, square
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from offload.swap.tokenwise.keeper import CacheKeeper
from offload.swap.tokenwise.plans import Settings
from offload.swap.tokenwise.timing import Timer
from offload.swap.tokenwise.tokenwise import TokenWise
from offload.tiers.hostmem import PAGE
from offload.tiers.simulated.accelerator import SimulatedAccelerator


def steps(world):
    """Three steps: the second and third know what the first one used."""
    x, weights = square(), [square(0.2) for _ in range(4)]
    for _ in range(3):
        with world.saving():
            loss = mlp(x, weights)
        loss.backward()
    return [loss, x.grad, *(weight.grad for weight in weights)]


def dropout_in_checkpoint(world):
    x, weights = square(), [square(0.2) for _ in range(3)]

    def region(y, weight):
        return F.dropout(torch.tanh(y @ weight), 0.3) + y

    with world.saving():
        y = x
        for weight in weights:
            y = checkpoint(region, y, weight, use_reentrant=False)
        loss = y.square().sum()
    loss.backward()
    return [loss, x.grad, *(weight.grad for weight in weights)]


def several_forwards_and_retained_graphs(world):
    x, weights = square(), [square(0.2) for _ in range(2)]
    losses = []
    for scale in (1.0, 0.5):
        with world.saving():
            losses.append(mlp(x * scale, weights))
    losses[1].backward(retain_graph=True)
    losses[0].backward()
    losses[1].backward()
    return [x.grad, *(weight.grad for weight in weights)]


def double_backward(world):
    x, weights = square(), [square(0.2) for _ in range(2)]
    with world.saving():
        (slope,) = torch.autograd.grad(mlp(x, weights), x, create_graph=True)
        penalty = slope.square().sum()
    penalty.backward()
    return [penalty, x.grad, *(weight.grad for weight in weights)]


def dead_branches(world):
    x = square()
    with world.saving():
        mlp(x, [square(), square()])
        loss = mlp(x.exp(), [square(0.1)])
    loss.backward()
    return [loss, x.grad]


def views_of_one_storage(world):
    """Strided, sliced and transposed views; and small storages that move in batches."""
    x, bias = square(), torch.randn(WIDTH, requires_grad=True)
    with world.saving():
        y = x * 2
        z = (y[::2] * y[1::2]).t() @ y[: WIDTH // 2]
        rows = [torch.sigmoid(z[index] + bias) for index in range(8)]
        loss = torch.stack([row * row.exp() for row in rows]).sum()
    loss.backward()
    return [loss, x.grad, bias.grad]


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        result = x * factor
        ctx.save_for_backward(x, result)
        return result

    @staticmethod
    def backward(ctx, gradient):
        x, result = ctx.saved_tensors
        return gradient * (result - x), None


def custom_functions(world):
    x = square()
    with world.saving():
        loss = Scaled.apply(Scaled.apply(x.sin(), 3.0).cos(), 2.0).sum()
    loss.backward()
    return [loss, x.grad]


def tensors_that_are_used_again(world):
    """What is still held when it is saved a second time, or was changed in between."""
    x = square()
    with world.saving():
        y = x.exp()
        first = y.sin()
        for _ in range(4):
            y = y + first
            first = y.sin() * first
        held = y.detach()
        loss = first.sum() + y.cos().sum()
    loss.backward()
    return [loss, x.grad, held]


def backward_on_another_stream(world):
    """Forward on one stream, backward on a second one that waits for the first."""
    device = world.device
    x, weights = square(), [square(0.2) for _ in range(3)]
    with world.saving():
        loss = mlp(x, weights)
    if not isinstance(device, SimulatedAccelerator):
        loss.backward()
        return [x.grad, *(weight.grad for weight in weights)]
    forward = device.current_stream().record()
    with device.use_stream("backward"):
        device.current_stream().wait(forward)
        loss.backward()
    return [x.grad, *(weight.grad for weight in weights)]


def reentrant_checkpoint_inside(world):
    """Backward runs the region again, inside of the context and outside of the graph."""
    x, weight = square(), square(0.2)
    with world.saving():
        y = checkpoint(lambda z: torch.tanh(z @ weight).exp(), x * 2, use_reentrant=True)
        loss = (y * y).sum()
        loss.backward()
    return [loss, x.grad, weight.grad]


def selective_checkpoint(world):
    """What the policy offloads leaves the device; the rest is computed again."""
    x, weight = square(), square(0.2)

    def policy(_context, function, *_args, **_kwargs):
        offloaded = function is torch.ops.aten.mm.default
        chosen = CheckpointPolicy.MUST_CPU_OFFLOAD
        return chosen if offloaded else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    with world.saving():
        y = checkpoint(
            lambda z: torch.tanh(z @ weight) @ weight, x, use_reentrant=False, context_fn=contexts
        )
        loss = y.square().sum()
    loss.backward()
    return [loss, x.grad, weight.grad]


def modules(world):
    """Parameters and buffers, their transposes and tied ones, stay where they are."""
    first, norm, last = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)
    last.weight = first.weight
    model = nn.Sequential(first, norm, nn.SiLU(), last)
    world.cache.fixed.know_model(model)
    x = square()
    for _ in range(2):
        with world.saving():
            loss = model(x).square().mean()
        loss.backward()
    return [loss, x.grad, norm.running_var, *(one.grad for one in model.parameters())]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return x + self.down(F.silu(self.up(self.norm(x))))


def token_rows(world, alpha=0.5, passes=2):
    """What lies behind the cut is rebuilt from what was fetched; heads are copied out and back."""
    model = nn.Sequential(*(Block() for _ in range(2)))
    world.cache.fixed.know_model(model)
    world.rows = TokenWise(
        model,
        CacheKeeper(world.cache),
        Settings(alpha=alpha, min_nbytes=PAGE),
        timer=Timer(accelerator=world.device),
        rounding=True,
    )
    results = []
    for _ in range(passes):
        x = torch.randn(1, 4 * WIDTH, WIDTH).requires_grad_()
        with world.saving():
            loss = model(x).square().mean()
        loss.backward()
        results += [loss, x.grad]
    reports = world.rows.report()  # none where hooks are off
    assert all(report.rebuilt_nbytes > report.whole_nbytes for report in reports)
    assert alpha == "auto" or all(report.cut == alpha * report.rows for report in reports)
    world.rows.remove()
    return [*results, *(one.grad for one in model.parameters())]


def token_rows_solved(world):
    """Which rows, is found out meanwhile: times are told late, in any order of the host's work."""
    return token_rows(world, alpha="auto", passes=3)


def changes_in_place(world):
    """They are errors, wherever the bytes are; a tensor that nobody saved may be changed."""
    x = square()
    with world.saving():
        y = x.exp()
        z = y.sin()
        loss = z.sum() + (x * 3).add_(1).sum()
    loss.backward(retain_graph=True)
    y.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    return [loss.detach(), x.grad]


BODIES = (
    steps,
    dropout_in_checkpoint,
    several_forwards_and_retained_graphs,
    double_backward,
    dead_branches,
    views_of_one_storage,
    custom_functions,
    tensors_that_are_used_again,
    backward_on_another_stream,
    reentrant_checkpoint_inside,
    selective_checkpoint,
    modules,
    token_rows,
    token_rows_solved,
    changes_in_place,
)
