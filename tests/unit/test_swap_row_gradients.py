"""Gradients of lookups are made of rows, and are torch's to the bit, whoever looks at them."""

import copy
import errno

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from offload.allocator.errors import TierIOError
from offload.swap.governor import Governor
from offload.swap.gradients import GradientSwapper
from offload.swap.row_gradients import RowGradients, rows_of
from offload.tiers.events import ListRecorder, Move
from offload.tiers.filetier import FileTier, Lanes
from offload.tiers.journal import Journal

ROWS, WIDTH = 600, 64
PLENTY = 1 << 40


@pytest.fixture
def journal():
    return Journal(ListRecorder())


@pytest.fixture
def swapper(tmp_path, journal):
    lanes, governor = Lanes(journal), Governor(PLENTY)
    with FileTier(tmp_path, None, lanes) as scratch:
        swapper = GradientSwapper(scratch, journal, governor, PLENTY)
        yield swapper
        swapper.stop()
        swapper.drain()
    governor.close()
    lanes.close()


@pytest.fixture
def watched(swapper, journal):
    """Makes a copy of a model whose lookups give rows; hooks go when the test ends."""
    installed = []

    def watch(model):
        twin = copy.deepcopy(model)
        for name, parameter in twin.named_parameters():
            swapper.watch(name, parameter)
        installed.append(RowGradients(twin, swapper, journal))
        return twin

    yield watch
    for rows in installed:
        rows.remove()


def tokens(seed, *shape):
    return torch.randint(ROWS, shape, generator=torch.Generator().manual_seed(seed))


def lookup(**options):
    torch.manual_seed(0)
    return nn.Embedding(ROWS, WIDTH, **options)


def loss_of(model, indices):
    found = model(indices)
    return (found * torch.linspace(-1, 1, found.numel()).view_as(found)).sum()


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def assert_same_bits(one, other):
    assert one.dtype == other.dtype
    assert torch.equal(bits(one), bits(other))


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


def test_zeros_that_the_user_made_negative_lose_their_sign_as_in_torch(watched):
    plain = lookup()
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


class Several(nn.Module):
    """Lookups and a head that share a weight."""

    def __init__(self, lookups, head):
        super().__init__()
        torch.manual_seed(0)
        self.lookups = nn.ModuleList(nn.Embedding(ROWS, WIDTH) for _ in range(lookups))
        for other in self.lookups[1:]:
            other.weight = self.lookups[0].weight
        self.head = head

    def forward(self, indices):
        weight = self.lookups[0].weight
        x = self.lookups[0](indices).tanh()
        for at, other in enumerate(self.lookups[1:], 1):
            x = (x + other((indices + at) % ROWS)).tanh()
        return F.linear(x, weight) if self.head else x


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
