"""Which lookups give rows, and what becomes of those that don't."""

import copy

import pytest
import torch
from looked_up import ROWS, WIDTH, Several, assert_same_bits, lookup, loss_of, tokens
from torch import nn
from torch.nn import functional as F

from offload.swap.row_gradients import RowGradients


def test_more_tokens_than_rows_make_the_table(watched, swapper):
    plain = lookup()
    model = watched(plain)
    for one in (plain, model):
        loss_of(one, tokens(1, 2, ROWS)).backward()
    swapper.drain()
    assert_same_bits(model.weight.grad, plain.weight.grad)


def test_no_token_at_all(watched):
    model = watched(lookup())
    model(torch.zeros(0, dtype=torch.int64)).sum().backward()
    assert model.weight.grad.shape == (ROWS, WIDTH)
    assert not model.weight.grad.any()


def test_what_autograd_does_not_follow_is_left_alone(watched):
    model = watched(lookup())
    with torch.no_grad():
        assert model(tokens(1, 5)).grad_fn is None
    model.weight.requires_grad_(False)
    assert not model(tokens(1, 5)).requires_grad
    gradient = torch.func.grad(lambda weight: F.embedding(tokens(1, 5), weight).sum())
    assert gradient(model.weight).sum() == 5 * WIDTH


class Scaled(nn.Embedding):
    def forward(self, indices):
        return super().forward(indices) * 8.0


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.EmbeddingBag(ROWS, WIDTH), "this is EmbeddingBag"),
        (lambda: Scaled(ROWS, WIDTH), "this is Scaled with a forward of its own"),
        (lambda: nn.Embedding(ROWS, WIDTH, sparse=True), None),
        (lambda: nn.Embedding(ROWS, WIDTH, max_norm=1.0), None),
    ],
    ids=["bag", "scaled", "sparse", "max_norm"],
)
def test_other_lookups_are_left_to_torch_with_a_reason(make, reason, watched, journal, swapper):
    torch.manual_seed(0)
    plain = make()
    model = watched(plain)
    for one in (plain, model):
        loss_of(one, tokens(1, 4, 5)).backward()
    swapper.drain()
    assert [reason in notice for notice in journal.notices] == ([True] if reason else [])
    found, expected = model.weight.grad, plain.weight.grad
    assert found.layout is expected.layout
    assert_same_bits(found.to_dense(), expected.to_dense())


def test_a_table_that_is_also_looked_up_sparsely_is_left_alone(watched):
    plain = Several(2, head=False)
    plain.lookups[1].sparse = True
    model = watched(plain)
    for one in (plain, model):
        loss_of(one, tokens(1, 4, 30)).backward()
    found, expected = (one.lookups[0].weight.grad for one in (model, plain))
    assert_same_bits(found, expected)


def test_a_user_s_hook_that_came_first_may_change_what_was_looked_up(swapper, journal):
    plain = lookup()
    model = copy.deepcopy(plain)
    for one in (plain, model):
        one.register_forward_hook(lambda _module, _args, output: output * 2)
    swapper.watch("weight", model.weight)
    rows = RowGradients(model, swapper, journal)
    for one in (plain, model):
        loss_of(one, tokens(1, 5)).backward()
    rows.remove()
    assert_same_bits(model.weight.grad, plain.weight.grad)


def test_removed_hooks_leave_torch_s_own_graph(swapper, journal):
    model = lookup()
    swapper.watch("weight", model.weight)
    RowGradients(model, swapper, journal).remove()
    assert model(tokens(1, 5)).grad_fn.name() == "EmbeddingBackward0"
