"""Blocks whose saved rows are rebuilt: exact, bounded, and whole where they must be."""

import gc

import pytest
import torch
from rebuilt_pairs import ROWS, WIDTH, Mlp, Net, Pair
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from offload.allocator.errors import ConfigError

pytestmark = pytest.mark.usefixtures("several_threads")


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
