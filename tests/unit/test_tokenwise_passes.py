"""Blocks whose saved rows are rebuilt: exact, bounded, and whole where they must be."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from offload.allocator.errors import ConfigError
from offload.swap.tokenwise.keeper import MemoryKeeper
from offload.swap.tokenwise.plans import Settings
from offload.swap.tokenwise.tokenwise import TokenWise

WIDTH, ROWS = 48, 256

pytestmark = pytest.mark.usefixtures("several_threads")


class Mlp(nn.Module):
    """A block of row-wise operations alone."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))


class Net(nn.Module):
    def __init__(self, make_block=Mlp, count=3):
        super().__init__()
        self.blocks = nn.ModuleList(make_block() for _ in range(count))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


class Pair:
    """The same model twice: plain, and with rows rebuilt."""

    def __init__(self, make_model, keeper=None, rounding=False, **settings):
        torch.manual_seed(0)
        self.plain = make_model()
        self.model = copy.deepcopy(self.plain)
        self.keeper = keeper or MemoryKeeper()
        self.notices = []
        settings = {"alpha": 0.5, "min_nbytes": 1024, **settings}
        self.rows = TokenWise(
            self.model,
            self.keeper,
            Settings(**settings),
            notice=self.notices.append,
            rounding=rounding,
        )

    def hooked(self):
        return torch.autograd.graph.saved_tensors_hooks(self.rows.pack, self.rows.unpack)

    def step(self, seed=0, shape=(2, ROWS, WIDTH), run=None):
        """One forward and backward of both; asserts that they agree in each bit."""
        run = run or (lambda model, x: model(x).backward())
        results = []
        for model in (self.plain, self.model):
            torch.manual_seed(seed)
            x = torch.randn(shape, requires_grad=True)
            model.zero_grad()
            if model is self.model:
                with self.hooked():
                    run(model, x)
            else:
                run(model, x)
            results.append([x.grad, *(one.grad for one in model.parameters())])
        for one, other in zip(*results, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)
        return self

    def reports(self):
        return self.rows.report()

    def active(self):
        """Whether every block rebuilds rows."""
        return all(
            r.gave_up is None and r.cut < r.rows and r.rebuilt_nbytes for r in self.reports()
        )


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("rounding", [False, True])
def test_rows_are_rebuilt_bit_for_bit(alpha, batch, rounding):
    pair = Pair(Net, alpha=alpha, rounding=rounding)
    for seed in range(3):
        pair.step(seed, (batch, ROWS, WIDTH))
    assert pair.active()
    assert {report.cut for report in pair.reports()} == {alpha * ROWS}
    assert pair.notices == []


def test_fewer_rows_are_stored_the_smaller_alpha_is():
    peaks = []
    for alpha in (1.0, 0.5, 0.0):
        pair = Pair(Net, alpha=alpha)
        pair.step(0)  # recorded and verified
        pair.keeper.peak_nbytes = pair.keeper.nbytes
        pair.step(1)
        peaks.append(pair.keeper.peak_nbytes)
    assert peaks[0] > peaks[1] > peaks[2]
    inputs = 3 * 2 * ROWS * WIDTH * 4
    weights = 3 * 2 * WIDTH * 3 * WIDTH * 4
    # This keeper knows neither weights nor equal storages: each input is packed for its norm and
    # as a source. Then there is the last block's output, which the square saves.
    assert peaks[2] == 2 * inputs + weights + inputs // 3


def test_two_buffers_serve_any_number_of_blocks_and_go_with_the_graph():
    peaks = []
    for count in (3, 6):
        pair = Pair(lambda count=count: Net(count=count))
        held = []

        def run(model, x, pair=pair, held=held):
            loss = model(x)
            for block in getattr(model, "blocks", ()):
                block.down.weight.register_hook(lambda g: held.append(pair.rows.held_nbytes))
            loss.backward()

        pair.step(0).step(1, run=run)
        peaks.append(max(held))
        assert pair.rows.held_nbytes == 0
        gc.collect()
        assert pair.keeper.nbytes == 0
    assert peaks[0] == peaks[1] > 0


def test_dropout_masks_are_swapped_whole_and_their_users_rebuilt():
    pair = Pair(lambda: Net(lambda: Mlp(0.2)))
    for seed in range(3):
        pair.step(seed)
    assert pair.active()
    assert any("draws random numbers" in reason for reason, _ in pair.reports()[0].whole)


@pytest.mark.parametrize("rounding", [False, True])
def test_several_forwards_before_a_backward_and_one_again(rounding):
    def run(model, x):
        first, second, third = model(x), model(2 * x), model(x - 1)
        (first * third).backward(retain_graph=True)
        (first + second).backward()

    pair = Pair(Net, rounding=rounding)
    for seed in range(3):
        pair.step(seed, run=run)
    assert pair.active()


def test_backward_twice_and_gradients_of_gradients():
    def twice(model, x):
        loss = model(x)
        loss.backward(retain_graph=True)
        loss.backward()

    def double(model, x):
        (slope,) = torch.autograd.grad(model(x), x, create_graph=True)
        slope.square().sum().backward()

    pair = Pair(Net)
    pair.step(0).step(1, run=twice).step(2, run=double).step(3, run=double)
    assert pair.active()


@pytest.mark.parametrize("rounding", [False, True])
def test_saved_tensors_that_somebody_holds_keep_their_bytes(rounding):
    pair = Pair(Net, alpha=0.0, rounding=rounding)
    pair.step(0)
    kept = []

    def run(model, x):
        loss = model(x)
        node = loss.grad_fn
        while node is not None:  # along the residual stream
            names = ("_saved_self", "_saved_mat1", "_saved_input")
            saved = [getattr(node, name) for name in names if hasattr(node, name)]
            kept.extend((one, one.clone()) for one in saved)
            inputs = [one for one, _ in node.next_functions if one is not None]
            node = inputs[-1] if inputs else None
        loss.backward()

    pair.step(1, run=run).step(2)
    assert len(kept) > 3
    assert all(torch.equal(saved, copied) for saved, copied in kept)


def test_evaluation_and_no_grad_leave_blocks_alone():
    pair = Pair(Net)
    pair.step(0)
    with pair.hooked(), torch.no_grad():
        pair.model(torch.randn(2, ROWS, WIDTH))
    pair.model.eval()
    pair.plain.eval()
    pair.step(1).step(2)
    assert pair.active()


def test_backward_inside_the_hooks_and_accumulation():
    pair = Pair(Net)

    def run(model, x):
        for part in range(3):
            model(x + part).backward()

    pair.step(0, run=run).step(1, run=run)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_inside_a_block_and_around_it(reentrant):
    class Inside(Mlp):
        def forward(self, x):
            hidden = checkpoint(lambda y: F.gelu(self.up(y)), self.norm(x), use_reentrant=reentrant)
            return x + self.down(hidden)

    class Around(Net):
        def forward(self, x):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return x.square().mean()

    for make in (lambda: Net(Inside), Around):
        pair = Pair(make)
        for seed in range(3):
            pair.step(seed)


def test_a_forward_that_raises_leaves_no_trace():
    pair = Pair(Net)
    pair.step(0)
    with pair.hooked(), pytest.raises(RuntimeError, match="size"):
        pair.model(torch.randn(2, ROWS, WIDTH - 1))
    pair.step(1).step(2)
    assert [one.cut for one in pair.reports() if one.rebuilt_nbytes] == [ROWS // 2] * 3


# What can't be rebuilt.


def test_a_scale_that_changes_is_noticed_in_the_forward_where_it_does():
    class Scaled(Mlp):
        scale = 1.0

        def forward(self, x):
            return super().forward(x * Scaled.scale)

    pair = Pair(lambda: Net(Scaled))
    for seed, scale in enumerate([1.0, 1.0, 0.5, 0.25, 0.125, 0.0625, 0.03]):
        Scaled.scale = scale
        pair.step(seed)
    assert all("changes from forward to forward" in r.gave_up for r in pair.reports())
    assert any("recorded anew" in notice for notice in pair.notices)


def test_control_flow_that_depends_on_data():
    class Branching(Mlp):
        def forward(self, x):
            hidden = self.up(self.norm(x))
            hidden = F.gelu(hidden) if x.sum() > 0 else F.silu(hidden)
            return x + self.down(hidden)

    pair = Pair(lambda: Net(Branching))
    for seed in range(8):
        pair.step(seed)


def test_shapes_have_plans_of_their_own():
    pair = Pair(Net)
    for rows in (256, 192, 256, 192, 129, 130):
        pair.step(rows, (2, rows, WIDTH))
    assert {report.rows: report.cut for report in pair.reports()} == {
        256: 128, 192: 128, 129: 64, 130: 64,
    }  # fmt: skip


def test_too_few_rows_are_swapped_whole():
    pair = Pair(Net)
    pair.step(0, (2, 100, WIDTH)).step(1, (2, 40, WIDTH))
    assert [r.gave_up is not None and r.cut == r.rows for r in pair.reports()] == [True] * 6
    assert "100 tokens have no cut near alpha 0.5" in " ".join(pair.notices)
    assert "40 tokens are too few rows" in " ".join(pair.notices)


def test_rows_that_depend_on_other_rows_are_swapped_whole():
    class Mixer(Mlp):
        def forward(self, x):
            return super().forward(x - x.mean(1, keepdim=True)).cumsum(1).tanh()

    pair = Pair(lambda: Net(Mixer))
    for seed in range(3):
        pair.step(seed)
    reasons = " ".join(reason for report in pair.reports() for reason, _ in report.whole)
    assert "aten.cumsum.default is not row-wise" in reasons


def test_rows_that_differ_are_found_and_become_sources(monkeypatch):
    """A kernel that rounds differently for fewer rows: what comes after it still verifies."""
    from offload.swap.tokenwise import replay

    real = replay._functional

    def rounded(op):
        func = real(op)
        if op != "aten.gelu.default":
            return func
        return lambda x, **kwargs: func(x, **kwargs) * (1 + 1e-6)

    monkeypatch.setattr(replay, "_functional", rounded)
    pair = Pair(Net)
    for seed in range(3):
        pair.step(seed)
    assert pair.active()
    (text,) = [reason for reason, _ in pair.reports()[0].whole if "bit-identical" in reason]
    assert "relative error" in text
    relaxed = Pair(Net, relaxed=True)
    relaxed.model.double()
    relaxed.plain.double()
    monkeypatch.setattr(
        replay,
        "_functional",
        lambda op: (lambda x, **k: real(op)(x, **k) * (1 + 1e-13)) if "gelu" in op else real(op),
    )
    x = torch.randn(2, ROWS, WIDTH, dtype=torch.float64)
    for _ in range(2):
        with relaxed.hooked():
            relaxed.model(x).backward()
    assert all(0 < r.worst_error < 1e-12 and r.gave_up is None for r in relaxed.reports())
    assert all("relaxed: rebuilt rows of blocks." in notice for notice in relaxed.notices)
    assert len(relaxed.notices) == 3


# Changes that plain autograd refuses are refused here.


def test_saved_tensor_changed_in_place_raises():
    class Ending(Mlp):
        def forward(self, x):
            return self.up(self.norm(x)).sigmoid()

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Ending() for _ in range(2))

        def forward(self, x):
            return [block(x) for block in self.blocks]

    pair = Pair(Wide)
    x = torch.randn(2, ROWS, WIDTH)
    for change in (False, True, True):
        with pair.hooked():
            outputs = pair.model(x)
        if not change:
            sum(out.sum() for out in outputs).backward()
            continue
        assert pair.active()
        with torch.no_grad():
            outputs[0].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            outputs[0].sum().backward()
        outputs[1].sum().backward()


def test_parameter_stepped_before_backward_raises():
    pair = Pair(Net)
    pair.step(0)
    x = torch.randn(2, ROWS, WIDTH)
    with pair.hooked():
        loss = pair.model(x)
    with torch.no_grad():
        pair.model.blocks[1].up.bias.add_(1)
    with pytest.raises(RuntimeError, match=r"blocks\.1\.up\.bias.*Step the optimizer after"):
        loss.backward()


def test_parameter_given_other_memory_before_backward_raises():
    pair = Pair(Net)
    pair.step(0)
    with pair.hooked():
        loss = pair.model(torch.randn(2, ROWS, WIDTH))
    up = pair.model.blocks[1].up
    up.weight.data = up.weight.data * 2
    with pytest.raises(RuntimeError, match=r"blocks\.1\.up\.weight"):
        loss.backward()


# Settings.


def test_a_block_that_is_not_there():
    with pytest.raises(ConfigError, match=r"no module 'layers'; its lists are: blocks"):
        Pair(Net, blocks=("layers",))


def test_named_blocks_and_their_lists():
    assert Pair(Net, blocks=("blocks",)).rows.block_names == ["blocks.0", "blocks.1", "blocks.2"]
    pair = Pair(Net, blocks=("blocks.1",))
    pair.step(0).step(1)
    assert [report.block for report in pair.reports()] == ["blocks.1"]


def test_a_model_without_blocks_says_so():
    pair = Pair(Mlp)
    assert "no module repeats" in pair.notices[0]


def test_autocast_is_replayed_as_it_was():
    pair = Pair(Net)

    def run(model, x):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x)
        loss.backward()

    for seed in range(3):
        pair.step(seed, run=run)
    assert pair.active()


def test_removed_hooks_leave_the_graph_usable():
    pair = Pair(Net)
    pair.step(0)
    with pair.hooked():
        loss = pair.model(torch.randn(2, ROWS, WIDTH))
    pair.rows.remove()
    loss.backward()
