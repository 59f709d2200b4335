"""Transients recorded from steps whose every storage is known."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from offload.allocator.bilevel import plan_memory
from offload.allocator.lifetimes import check
from offload.swap.transients import StepTrace, record_step

WIDTH, TOKENS, LAYERS = 64, 128, 6
ROWS = 4 * WIDTH * TOKENS  # bytes of an activation


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self, *, recompute: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.recompute = recompute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return x.square().mean()


def record(**options: bool) -> StepTrace:
    with FakeTensorMode():
        model = Model(**options)
        batch = torch.randn(TOKENS, WIDTH)
        return record_step(lambda: model(batch).backward())


def test_lifetimes_begin_with_the_operation_and_end_with_the_last_holder() -> None:
    def step() -> None:
        one = torch.ones(1000)
        two = one * 2
        view = one.view(10, 100)
        del one
        view.add_(1)  # one lives in its view
        del view
        torch.zeros(3)
        two.sum()

    with FakeTensorMode():
        trace = record_step(step)
    told = [
        (life.operation.split(".")[1], life.first_tick, life.last_tick) for life in trace.transients
    ]
    assert told == [("ones", 0, 3), ("mul", 1, 5), ("zeros", 4, 4), ("sum", 5, 5)]
    assert [life.nbytes for life in trace.transients] == [4000, 4000, 12, 4]
    assert trace.ticks == 6


def test_what_was_there_before_is_no_transient() -> None:
    with FakeTensorMode():
        weight, batch = torch.randn(8, 8), torch.randn(4, 8)

        def step() -> None:
            weight.mul_(2)
            weight.t()
            batch @ weight
            weight.view(64).clone()

        trace = record_step(step)
    assert [life.nbytes for life in trace.transients] == [4 * 4 * 8, 4 * 64]


def test_a_fake_step_is_the_real_one() -> None:
    torch.manual_seed(0)
    model, batch = Model(), torch.randn(TOKENS, WIDTH)
    assert record_step(lambda: model(batch).backward()) == record()


def test_modules_and_passes_are_told() -> None:
    trace = record()
    forward = [one for one in trace.transients if not one.backward]
    assert max(one.first_tick for one in forward) < min(
        one.first_tick for one in trace.transients if one.backward
    )
    for name in ("norm", "up", "down"):
        of_module = [one for one in forward if one.module == f"Model.blocks.3.{name}"]
        assert of_module, name
    backward = [one for one in trace.transients if one.backward]
    assert {f"Model.blocks.{n}.up" for n in range(LAYERS)} <= {one.module for one in backward}


def test_saved_activations_live_until_backward_and_recomputed_ones_do_not() -> None:
    kept, recomputed = record(), record(recompute=True)

    def across(trace: StepTrace) -> int:
        turn = min(one.first_tick for one in trace.transients if one.backward)
        return sum(one.nbytes for one in trace.transients if one.first_tick < turn <= one.last_tick)

    # Of each block the input, the norm's output, and the input and output of gelu.
    assert across(kept) >= LAYERS * (1 + 1 + 4 + 4) * ROWS
    assert across(recomputed) < (LAYERS + 2) * ROWS


def test_gradients_live_to_the_end() -> None:
    trace = record()
    last = [one.nbytes for one in trace.transients if one.last_tick == trace.ticks - 1]
    weights = sorted(4 * parameter.numel() for parameter in Model().parameters())
    assert not Counter(weights) - Counter(last)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_blocks_of_the_model_are_the_blocks_of_the_plan(recompute: bool) -> None:
    lives = record(recompute=recompute).lifetimes()
    plan = plan_memory(lives)
    check(plan.packing, lives)
    assert len(plan.kinds) == 2
    assert all(LAYERS - 1 <= kind.count <= LAYERS for kind in plan.kinds)
    assert plan.gap <= 0.02


def test_recording_twice_gives_the_same_trace() -> None:
    assert record() == record()


def test_a_step_that_fails_raises_its_own_error_and_is_not_watched_on() -> None:
    left = []

    def step() -> None:
        left.append(torch.ones(10) * 2)
        raise RuntimeError("out of ideas")

    with FakeTensorMode():
        with pytest.raises(RuntimeError, match="out of ideas"):
            record_step(step)
        left.clear()
        assert record().transients  # the next one is recorded as if nothing had been


def test_storages_of_no_bytes_need_no_place() -> None:
    with FakeTensorMode():
        trace = record_step(lambda: torch.ones(0) + 1)
    assert trace == StepTrace(transients=(), ticks=2)
    assert plan_memory(trace.lifetimes()).peak_nbytes == 0
