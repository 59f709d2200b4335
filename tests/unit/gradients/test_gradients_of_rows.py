"""Gradients of lookups are made of rows, and are torch's to the bit, whoever looks at them."""

import errno

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from looked_up import ROWS, WIDTH, Several, assert_same_bits, lookup, loss_of, tokens
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from offload.allocator.errors import TierIOError
from offload.swap.row_gradients import rows_of
from offload.tiers.events import Move


class Tables(TorchDispatchMode):
    """Collects the operations that make a new tensor of at least ``numel`` elements."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.made = numel, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        mine = {
            one.untyped_storage().data_ptr()
            for one in args
            if isinstance(one, torch.Tensor) and one.layout is torch.strided
        }
        if (
            isinstance(output, torch.Tensor)
            and output.layout is torch.strided
            and output.numel() >= self.numel
            and output.untyped_storage().data_ptr() not in mine
        ):
            self.made.append(str(func))
        return output


@given(
    indices=st.lists(st.integers(0, 19), min_size=0, max_size=40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    padding=st.integers(-1, 19),
    scaled=st.booleans(),
)
def test_rows_have_the_bits_of_the_dense_gradient(indices, dtype, index_dtype, padding, scaled):
    looked_up = torch.tensor(indices, dtype=index_dtype)
    gradient = torch.randn(len(indices), 33).to(dtype)
    gradient[::3] = -0.0
    dense = torch.ops.aten.embedding_dense_backward(gradient, looked_up, 20, padding, scaled)
    rows, values = rows_of(gradient, looked_up, padding, scaled=scaled)
    assert rows.tolist() == sorted(set(indices))
    assert_same_bits(torch.zeros_like(dense).index_copy_(0, rows, values), dense)


@pytest.mark.parametrize(
    "options",
    [{}, {"padding_idx": 3}, {"scale_grad_by_freq": True}, {"dtype": torch.bfloat16}],
    ids=["plain", "padding", "scaled", "bfloat16"],
)
def test_a_gradient_is_made_at_home_and_accumulates_there(options, watched, swapper, monkeypatch):
    monkeypatch.setattr("offload.swap.row_gradients._SHARD_NBYTES", 16 << 10)
    plain = lookup(**options)
    model = watched(plain)
    for step in range(3):
        indices = tokens(step, 7, 20) % 90
        expected = loss_of(plain, indices)
        expected.backward()
        with Tables(ROWS * WIDTH) as tables:
            found = loss_of(model, indices)
            found.backward()
        assert found.item() == expected.item()
        assert tables.made == []
        assert swapper.home_of(model.weight) is not None
        assert_same_bits(model.weight.grad, plain.weight.grad)


def test_the_next_gradient_begins_with_zeros(watched, swapper):
    plain = lookup()
    model = watched(plain)
    for step in range(3):
        plain.weight.grad = model.weight.grad = None
        for one in (plain, model):
            loss_of(one, tokens(step, 5)).backward()
        assert_same_bits(model.weight.grad, plain.weight.grad)


def test_a_gradient_that_the_user_keeps_is_not_overwritten(watched):
    model = watched(lookup())
    loss_of(model, tokens(1, 5)).backward()
    kept, expected = model.weight.grad, model.weight.grad.clone()
    model.weight.grad = None
    loss_of(model, tokens(2, 5)).backward()
    assert_same_bits(kept, expected)


def test_what_is_written_is_recorded(watched, journal):
    model = watched(lookup())
    loss_of(model, torch.tensor([4, 4, 9])).backward()
    moves = [event for event in journal.recorder.events if isinstance(event, Move)]
    assert [(move.key, move.role, move.nbytes) for move in moves] == [
        ("weight", "gradient", 2 * WIDTH * 4)
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_zeros_that_the_user_made_negative_lose_their_sign_as_in_torch(dtype, watched):
    plain = lookup().to(dtype)
    model = watched(plain)
    for one in (plain, model):
        loss_of(one, tokens(1, 5)).backward()
        one.weight.grad.mul_(-1)
        assert one.weight.grad.signbit().sum() > ROWS
        loss_of(one, tokens(2, 5)).backward()
    assert_same_bits(model.weight.grad, plain.weight.grad)


@pytest.mark.parametrize("kind", ["kept", "own", "own negative zeros", "sparse"])
def test_gradients_elsewhere_get_the_same_bits(kind, watched, swapper):
    plain = lookup()
    model = watched(plain)
    if kind == "kept":
        swapper.keep([model.weight])
    for one in (plain, model):
        if kind.startswith("own"):
            one.weight.grad = torch.zeros(ROWS, WIDTH) * (-1 if "negative" in kind else 1)
        if kind == "sparse":
            one.weight.grad = torch.zeros(ROWS, WIDTH).to_sparse(1)
        for step in range(2):
            loss_of(one, tokens(step, 5)).backward()
    swapper.drain()
    assert model.weight.grad.layout is torch.strided
    assert (swapper.home_of(model.weight) is None) == (kind == "kept")
    assert_same_bits(model.weight.grad, plain.weight.grad)


@pytest.mark.parametrize("head", [False, True], ids=["no head", "tied head"])
@pytest.mark.parametrize("lookups", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_weights_are_summed_in_torch_s_order(lookups, head, dtype, watched):
    plain = Several(lookups, head).to(dtype)
    model = watched(plain)
    for step in range(3):
        for one in (plain, model):
            loss_of(one, tokens(step, 4, 30)).backward()
        assert_same_bits(model.lookups[0].weight.grad, plain.lookups[0].weight.grad)


def test_negative_zeros_of_a_tied_head_lose_their_sign_as_in_torch(watched):
    def loss(model, indices):
        return loss_of(model, indices) + (model.weight * -0.0).sum()

    plain = lookup()
    model = watched(plain)
    for one in (plain, model):
        loss(one, tokens(1, 5)).backward()
        assert not one.weight.grad.signbit()[one.weight.grad == 0].any()
    assert_same_bits(model.weight.grad, plain.weight.grad)


def test_hooks_and_autograd_see_dense_gradients(watched):
    model, seen = watched(lookup()), []
    indices = tokens(1, 9)
    (found,) = torch.autograd.grad(loss_of(model, indices), [model.weight])
    hook = model.weight.register_hook(lambda gradient: seen.append(gradient.layout))
    loss_of(model, indices).backward()
    hook.remove()
    assert seen == [torch.strided]
    assert_same_bits(found, model.weight.grad)
    assert model.weight.grad.layout is torch.strided


def test_gradients_of_gradients(watched):
    plain = lookup()
    model = watched(plain)
    for one in (plain, model):
        first = one(tokens(1, 9)).pow(3).sum()
        (gradient,) = torch.autograd.grad(first, [one.weight], create_graph=True)
        gradient.square().sum().backward()
    assert_same_bits(model.weight.grad, plain.weight.grad)


def test_the_same_graph_twice_and_changes_in_place(watched):
    plain = lookup()
    model = watched(plain)
    for one in (plain, model):
        found = one(tokens(1, 9))
        found *= 2.0
        found += 1.0
        found.square().sum().backward(retain_graph=True)
        found.square().sum().backward()
    assert_same_bits(model.weight.grad, plain.weight.grad)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch has no grad_dtype")
@pytest.mark.parametrize("head", [False, True], ids=["no head", "tied head"])
def test_gradients_that_accumulate_in_float32(head, watched):
    plain = Several(1, head).bfloat16()
    model = watched(plain)
    for one in (plain, model):
        one.lookups[0].weight.grad_dtype = torch.float32
        for step in range(3):
            loss_of(one, tokens(step, 4, 30)).backward()
    assert_same_bits(model.lookups[0].weight.grad, plain.lookups[0].weight.grad)


def test_a_lookup_that_is_checkpointed(watched, swapper):
    plain = lookup()
    model = watched(plain)
    for one in (plain, model):
        found = checkpoint(nn.Sequential(one, nn.Tanh()), tokens(1, 9), use_reentrant=False)
        found.square().sum().backward()
    assert swapper.home_of(model.weight) is not None
    assert_same_bits(model.weight.grad, plain.weight.grad)


def test_a_disk_that_fails_fails_backward_and_the_next_one_begins_anew(
    watched, swapper, monkeypatch
):
    plain = lookup()
    model = watched(plain)

    def fail(_block):
        raise TierIOError(errno.EIO, "the disk is gone")

    with monkeypatch.context() as patched:
        patched.setattr(swapper.scratch, "clear", fail)
        with pytest.raises(TierIOError, match="the disk is gone"):
            loss_of(model, tokens(1, 9)).backward()
    assert model.weight.grad is None
    for one in (plain, model):
        loss_of(one, tokens(2, 9)).backward()
    assert_same_bits(model.weight.grad, plain.weight.grad)
