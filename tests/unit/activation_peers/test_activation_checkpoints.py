"""Views and checkpoints: torchtune's and DeepSpeed's suites; see ``tests/peers/README.md``."""

import pytest
import torch
from swapped_rows import NBYTES, ROWS, WIDTH, ones, written
from torch import nn
from torch.utils.checkpoint import checkpoint

from offload import ActivationSwap
from offload.allocator.errors import ConfigError
from offload.swap.residency import Residency

# torchtune: what backward returns or saves again may be a view of what came back.


class ReturnsWhatItSaved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.t())
        return x.sum()

    @staticmethod
    def backward(ctx, _gradient):
        (saved,) = ctx.saved_tensors
        return saved.t()


class SavesSomethingElse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(torch.full_like(x, 5))
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        (saved,) = ctx.saved_tensors
        assert torch.all(saved == 5)
        return gradient


def test_a_gradient_may_be_a_view_of_what_came_back(swap):
    """The nodes after it fetch into memory that they must not take from it."""
    x = ones()
    with swap:
        y = x
        for _ in range(4):
            y = SavesSomethingElse.apply(y)
        loss = ReturnsWhatItSaved.apply(y.clone())
    del y
    assert written(swap) == 5 * NBYTES
    loss.backward()
    assert torch.equal(x.grad, torch.ones(ROWS, WIDTH))


class SavesAView(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.t().t())
        return x.clone()

    @staticmethod
    def backward(ctx, _gradient):
        (saved,) = ctx.saved_tensors
        return saved.clone()


def test_recomputation_may_save_a_view_of_what_came_back(swap):
    x = ones()
    with swap:
        y = SavesSomethingElse.apply(x).clone()
        loss = checkpoint(
            lambda y: SavesSomethingElse.apply(SavesAView.apply(y)), y, use_reentrant=False
        ).sum()
    del y
    loss.backward()
    assert torch.equal(x.grad, torch.ones(ROWS, WIDTH))


# DeepSpeed: inputs of checkpointed layers leave, the last ones stay.


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_the_last_inputs_of_checkpointed_layers_stay(tmp_path, monkeypatch, kept):
    layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(4)])
    x = torch.randn(ROWS, WIDTH, requires_grad=True)

    def run():
        y = x
        for layer in layers:
            y = checkpoint(layer, y, use_reentrant=False)
        return y.sum()

    run().backward()
    right = [x.grad, *(each.grad for each in layers.parameters())]
    x.grad = None
    layers.zero_grad()
    swap = ActivationSwap(limit=f"{kept * NBYTES}B", min_nbytes=0, in_flight=0, nvme=tmp_path)
    units, add = [], swap.cache.lookahead.add
    monkeypatch.setattr(swap.cache.lookahead, "add", lambda unit: units.append(unit) or add(unit))
    with swap:
        loss = run()
    residencies = [unit.residency for unit in units]
    assert residencies == [Residency.ABSENT] * (4 - kept) + [Residency.READY] * kept
    assert written(swap) == (4 - kept) * NBYTES
    loss.backward()
    found = [x.grad, *(each.grad for each in layers.parameters())]
    assert all(map(torch.equal, found, right))
    swap.close()


VIEWS = {
    "an offset": lambda base: base[ROWS // 2 :],
    "strides": lambda base: base[:, ::2],
    "overlapping": lambda base: base[:1].expand(7, ROWS, WIDTH)[:, :1],
    "overlapping windows": lambda base: base.view(-1).unfold(0, 64, 16),
    "transposed": lambda base: base.t(),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_view_is_the_input_of_a_checkpointed_region(swap, view):
    def gradient(context):
        x = view(torch.arange(ROWS * WIDTH).view(ROWS, WIDTH) / NBYTES).detach().requires_grad_()
        with context:
            loss = checkpoint(lambda x: x.sin().square(), x, use_reentrant=False).sum()
        layout = x.stride(), x.storage_offset()
        loss.backward()
        assert (x.stride(), x.storage_offset()) == layout
        return x.grad

    right = gradient(torch.enable_grad())
    assert torch.equal(gradient(swap), right)
    assert written(swap) == NBYTES  # its storage, once


def test_an_error_inside_leaves_no_hooks_behind(swap):
    with pytest.raises(ValueError, match="mine"), swap, swap:
        raise ValueError("mine")
    loss = ones().exp().sum()
    loss.backward()
    assert written(swap) == 0


@pytest.mark.parametrize("name", ["limit", "min_nbytes", "in_flight"])
def test_a_negative_size_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=f"{name}: "):
        ActivationSwap(nvme=tmp_path, **{name: -1})
