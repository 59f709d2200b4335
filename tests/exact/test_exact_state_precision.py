"""States in bfloat16: the bits of a loop in memory that rounds its states after each step.

What is lossy is lossy in one way only, whatever the tiles, the budget, the moment of the step and
the number of starts.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from state_runs import LARGE_NUMEL, Lossy, adamw_of, round_values, through_a_file
from test_exact_optimizers import OPTIMIZERS, make_model, two_groups
from torch import nn
from torch.nn import functional as F

import offload
from offload.allocator.errors import UnsupportedError
from offload.engine import Engine
from offload.saving import step_writes_nbytes
from offload.swap import optim_kinds, tile_blocks
from offload.swap.optim_kinds import state_nbytes
from offload.swap.state_precision import Precision
from offload.tiers.events import Move

BF16 = {"state_precision": "bf16"}
BF16_STATES = Precision(states="bf16")
IN_BACKWARD = {**BF16, "step_in_backward": True}
STEPS = 10
REFUSED = {
    "third-party": r"of Lion may be rounded: set .*='exact'",
    "adafactor": "of Adafactor may be rounded",
    "asgd": "of ASGD may be rounded",
    "rprop": "of Rprop may be rounded",
    "rmsprop": "centered RMSprop takes the root of a difference",
}
ROUNDABLE = {name: make for name, make in OPTIMIZERS.items() if name not in REFUSED} | {
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.5)
}


pytestmark = pytest.mark.usefixtures("many_tiles")


def loss_of(model: Any, step: int) -> torch.Tensor:
    x = torch.randn(32, 300, generator=torch.Generator().manual_seed(step))
    return F.mse_loss(model(x) * model.scale, x)


def check(value: torch.Tensor, shown: torch.Tensor) -> None:
    large = value.numel() > LARGE_NUMEL
    assert shown.dtype == (torch.bfloat16 if large else torch.float32)
    assert torch.equal(value, shown.to(value.dtype))


ROUNDED = Lossy(make_model=make_model, loss_of=loss_of, code=round_values, check=check)
train = ROUNDED.train


@pytest.mark.parametrize("name", ROUNDABLE)
@pytest.mark.parametrize("config", [BF16, IN_BACKWARD], ids=["behind", "in backward"])
def test_each_optimizer_computes_with_its_states_rounded(
    name: str, config: dict[str, Any], starve: Any
) -> None:
    ROUNDED.run_both(
        starve, lambda model: ROUNDABLE[name](model.parameters()), config, range(STEPS)
    )


@pytest.mark.parametrize("chunk_numel", [64 * 32, 64 * 1024, 2 << 20])
@pytest.mark.parametrize("config", [BF16, IN_BACKWARD], ids=["behind", "in backward"])
def test_tiles_of_any_size_give_the_same_bits(
    chunk_numel: int, config: dict[str, Any], starve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small budgets choose small tiles."""
    monkeypatch.setattr("offload.runtime.choose_chunk_numel", lambda _budget: chunk_numel)
    ROUNDED.run_both(starve, two_groups, config, range(STEPS))


@pytest.mark.parametrize("block_numel", [64, 64 * 100, 1 << 16])
@pytest.mark.parametrize("config", [BF16, IN_BACKWARD], ids=["behind", "in backward"])
def test_blocks_of_any_size_give_the_same_bits(
    block_numel: int, config: dict[str, Any], starve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a tile is cut into while its states are float32."""
    monkeypatch.setattr("offload.runtime.choose_chunk_numel", lambda _budget: 64 * 1024)
    monkeypatch.setattr(tile_blocks, "block_numel", lambda _chunk_numel: block_numel)
    seen: list[int] = []

    def step_on(optimizer: Any, group: Any, parameters: Any, states: Any) -> Any:
        seen.append(sum(one.numel() for one in parameters))
        return optim_kinds.step_on(optimizer, group, parameters, states)

    monkeypatch.setattr(tile_blocks, "step_on", step_on)
    ROUNDED.run_both(
        starve,
        lambda model: torch.optim.AdamW(model.parameters(), 1e-3, amsgrad=True, fused=True),
        config,
        range(3),
    )
    assert max(seen) <= block_numel < sum(seen)


def test_half_of_the_bytes_of_states_move(starve: Any) -> None:
    engine, model, _ = ROUNDED.run_both(starve, adamw_of, IN_BACKWARD, range(STEPS))
    stepped = sum(p.numel() for p in model.parameters() if p.numel() > 64 << 10)
    moves = [e for e in engine._journal.recorder.events if isinstance(e, Move)]  # type: ignore[attr-defined]
    states = [e for e in moves if e.role == "state"]
    assert sum(e.nbytes for e in states if e.dst != "host") == STEPS * 8 * stepped  # 12 if exact
    assert sum(e.nbytes for e in states if e.src != "host") == (STEPS - 1) * 4 * stepped


def test_what_is_reserved_and_written_is_half_of_it_too() -> None:
    model = make_model()
    optimizer = adamw_of(model)
    exact, rounded = (state_nbytes(optimizer, precision=one) for one in (Precision(), BF16_STATES))
    assert exact == 2 * rounded == 8 * sum(p.numel() for p in model.parameters())
    writes = [step_writes_nbytes(model, optimizer, one) for one in (Precision(), BF16_STATES)]
    assert writes[0] - writes[1] == rounded


def test_training_is_close_to_that_with_exact_states(starve: Any) -> None:
    torch.manual_seed(0)
    plain: Any = make_model()
    model = copy.deepcopy(plain)
    plain_optimizer, optimizer = adamw_of(plain), adamw_of(model)
    expected = train(plain, plain_optimizer, range(60))
    starve(model, optimizer, config=IN_BACKWARD)
    losses = train(model, optimizer, range(60))
    assert losses != expected
    assert losses[-1] < losses[0] * 0.8
    assert losses == pytest.approx(expected, rel=5e-3)


def test_parameters_that_are_bf16_have_exact_states(compare: Any) -> None:
    """Their states are made in bfloat16: nothing is rounded that the optimizer would not round."""

    def loop(model: Any, optimizer: Any, _engine: Engine | None) -> list[float]:
        losses = []
        for _ in range(STEPS):
            loss = model(torch.randn(8, 300).bfloat16()).float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    compare(lambda: make_model().bfloat16(), adamw_of, loop, config=BF16)


def test_sparse_gradients(starve: Any) -> None:
    torch.manual_seed(0)
    plain = nn.Embedding(400, 96, sparse=True)
    model = copy.deepcopy(plain)
    optimizers = [torch.optim.Adagrad(one.parameters(), 1e-2) for one in (plain, model)]
    starve(model, optimizers[1], config=BF16)
    with torch.sparse.check_sparse_tensor_invariants():  # torch warns unless it is told
        for step in range(STEPS):
            rows = torch.arange(step, 200, 3)
            for one, optimizer in zip((plain, model), optimizers, strict=True):
                one(rows).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
    sums = [o.state[m.weight]["sum"] for o, m in zip(optimizers, (plain, model), strict=True)]
    assert sums[1].dtype == torch.bfloat16
    assert not sums[1][200:].any()  # rows that no batch has touched
    torch.testing.assert_close(sums[1].float(), sums[0], rtol=0.05, atol=0)
    torch.testing.assert_close(model.weight, plain.weight, rtol=0.02, atol=1e-3)


def test_a_state_dict_goes_out_and_comes_back(starve: Any, tmp_path: Path) -> None:
    model: Any = make_model()
    optimizer = adamw_of(model)
    starve(model, optimizer, nvme=tmp_path / "one", config=BF16)
    train(model, optimizer, range(3))
    saved = through_a_file(optimizer.state_dict())
    assert saved["state"][2]["exp_avg"].dtype == torch.bfloat16
    fresh: Any = make_model()
    other = adamw_of(fresh)
    engine = starve(fresh, other, nvme=tmp_path / "other", config=BF16)
    other.load_state_dict(saved)
    engine.commit()  # stored as it is: what bfloat16 holds is not rounded again
    for index, state in other.state_dict()["state"].items():
        for key, value in state.items():
            assert torch.equal(value, saved["state"][index][key])
            assert value.dtype == saved["state"][index][key].dtype


def test_exact_states_are_rounded_where_they_are_loaded(starve: Any) -> None:
    plain: Any = make_model()
    plain_optimizer = adamw_of(plain)
    train(plain, plain_optimizer, range(3))
    model: Any = make_model()
    optimizer = adamw_of(model)
    engine = starve(model, optimizer, config=BF16)
    optimizer.load_state_dict(plain_optimizer.state_dict())
    engine.commit()
    exact = plain_optimizer.state[plain[0].weight]["exp_avg_sq"]
    found = optimizer.state[model[0].weight]["exp_avg_sq"]
    assert found.dtype == torch.bfloat16
    assert ((found.float() - exact).abs() <= exact / 128).all()
    assert (found.float().mean() / exact.mean() - 1).abs() < 1e-3
    train(model, optimizer, range(3, 6))
    assert int(optimizer.state[model[0].weight]["step"]) == 6


@pytest.mark.parametrize("config", [BF16, IN_BACKWARD], ids=["behind", "in backward"])
def test_a_resumed_run_continues_bit_for_bit(config: dict[str, Any], tmp_path: Path) -> None:
    ROUNDED.resume_and_compare(config, tmp_path)


@pytest.mark.parametrize(("first", "second"), [("exact", "bf16"), ("bf16", "exact")])
def test_another_precision_does_not_continue_a_store(
    first: str, second: str, tmp_path: Path
) -> None:
    ROUNDED.refuse_another(first, second, tmp_path)


def test_a_detached_optimizer_has_states_of_its_own_type(starve: Any) -> None:
    model: Any = make_model()
    optimizer = adamw_of(model)
    engine = starve(model, optimizer, config=BF16)
    train(model, optimizer, range(2))
    engine.detach()
    states = [v for state in optimizer.state.values() for v in state.values()]
    assert {value.dtype for value in states} == {torch.float32}
    train(model, optimizer, range(2, 4))


@pytest.mark.parametrize("name", REFUSED)
def test_states_that_may_not_be_rounded_are_refused_before_anything_moves(
    name: str, tmp_path: Path
) -> None:
    model = make_model()
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    for _ in range(2):  # and the store is not left locked
        with pytest.raises(UnsupportedError, match=REFUSED[name]):
            offload.attach(
                model,
                OPTIMIZERS[name](list(model.parameters())[:1]),
                budget="8GiB",
                nvme=tmp_path,
                config=BF16,
            )
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses


def test_a_group_that_may_not_be_rounded_is_refused_before_the_step(starve: Any) -> None:
    model: Any = make_model()
    optimizer = torch.optim.RMSprop(model[0].parameters(), 1e-3)
    engine = starve(model, optimizer, config=BF16)
    train(model, optimizer, range(1))
    optimizer.add_param_group({"params": model[2].parameters(), "centered": True})
    with pytest.raises(UnsupportedError, match="centered"):
        train(model, optimizer, range(1, 2))
    assert engine.step == 1
