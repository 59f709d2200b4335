"""States in 8 bits: the bits of a loop in memory that codes its states after each step."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from master_runs import InMemory
from state_runs import (
    LARGE_NUMEL,
    Lossy,
    adamw,
    adamw_of,
    attach_with_room,
    code_states,
    through_a_file,
)
from test_exact_optimizers import OPTIMIZERS
from torch import nn
from torch.nn import functional as F

import offload
from offload.allocator.errors import UnsupportedError
from offload.saving import step_writes_nbytes
from offload.swap.eightbit import pack, packed_nbytes, unpack
from offload.swap.optim_kinds import state_nbytes
from offload.swap.packed_state import PackedState
from offload.swap.state_precision import Precision
from offload.tiers.events import Move

EIGHT = {"state_precision": "8bit"}
IN_BACKWARD = {**EIGHT, "step_in_backward": True}
BOTH = pytest.mark.parametrize("config", [EIGHT, IN_BACKWARD], ids=["behind", "in backward"])
STEPS = 5
REFUSED = {
    "third-party": r"averages of gradients, .* of Lion may be rounded: set .*='exact'",
    "adafactor": "of Adafactor may be rounded",
    "asgd": "of ASGD may be rounded",
    "rprop": "of Rprop may be rounded",
    "adagrad": "of Adagrad may be rounded",
    "adadelta": "of Adadelta may be rounded",
    "adamax": "of Adamax may be rounded",
    "adam-amsgrad": "the largest of all second moments",
    "rmsprop": "centered RMSprop takes the root of a difference",
}
CODED = {name: make for name, make in OPTIMIZERS.items() if name not in REFUSED} | {
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.5)
}


@pytest.fixture(autouse=True)
def smallest_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest that there are: 700 * 601 elements are one and a part of another."""
    monkeypatch.setattr("offload.runtime.choose_chunk_numel", lambda _budget: 1 << 18)


def make_model() -> Any:
    model = nn.Sequential(nn.Linear(700, 601), nn.GELU(), nn.Linear(601, 303))
    model.register_parameter("scale", nn.Parameter(torch.ones(1)))
    model.register_parameter("empty", nn.Parameter(torch.ones(0)))
    return model


def loss_of(model: Any, step: int) -> torch.Tensor:
    x = torch.randn(8, 700, generator=torch.Generator().manual_seed(step))
    x = x.to(model[0].weight.dtype)
    return F.mse_loss(model(x).float() * model.scale, x[:, :303].float())


def code(values: torch.Tensor, name: str, key: int) -> None:
    signed = name in ("exp_avg", "momentum_buffer")
    packed = torch.empty(packed_nbytes(values.numel()), dtype=torch.uint8)
    pack(values.flatten(), packed, signed=signed, key=key, start=0)
    unpack(packed, values.view(-1), signed=signed)


def check(value: torch.Tensor, shown: torch.Tensor) -> None:
    assert isinstance(shown, PackedState) == (value.numel() > LARGE_NUMEL)
    assert (shown.dtype, shown.shape) == (value.dtype, value.shape)
    assert torch.equal(value, shown)


IN_8_BITS = Lossy(make_model=make_model, loss_of=loss_of, code=code, check=check)
train = IN_8_BITS.train


@pytest.mark.parametrize("name", CODED)
@BOTH
def test_each_optimizer_computes_with_its_states_coded(
    name: str, config: dict[str, Any], starve: Any
) -> None:
    IN_8_BITS.run_both(starve, lambda model: CODED[name](model.parameters()), config, range(STEPS))


@pytest.mark.parametrize("chunk_numel", [1 << 19, 2 << 20])
@BOTH
def test_tiles_of_any_size_give_the_same_bits(
    chunk_numel: int, config: dict[str, Any], starve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small budgets choose small tiles."""
    monkeypatch.setattr("offload.runtime.choose_chunk_numel", lambda _budget: chunk_numel)
    IN_8_BITS.run_both(starve, adamw_of, config, range(STEPS))


def test_with_room_for_everything_the_bits_are_the_same(tmp_path: Path) -> None:
    engine, _, _ = IN_8_BITS.run_both(attach_with_room(tmp_path), adamw_of, EIGHT, range(STEPS))
    assert not set(engine.plan.resident_states) - {"empty"}
    engine.detach()


def test_with_masters_of_bf16_weights(starve: Any) -> None:
    torch.manual_seed(0)
    twin = make_model().bfloat16()
    model = copy.deepcopy(twin)
    plain, optimizer = InMemory(twin, adamw), adamw_of(model)
    masters = [master for _, master in plain.pairs]
    steps = range(STEPS)
    expected = train(
        twin, plain, steps, lambda step: code_states(code, twin, plain.optimizer, step, masters)
    )
    starve(model, optimizer, config={**IN_BACKWARD, "master_weights": "fp32"})
    assert train(model, optimizer, steps) == expected
    for parameter, master in zip(model.parameters(), masters, strict=True):
        for key, value in plain.optimizer.state[master].items():
            assert torch.equal(value, optimizer.state[parameter][key])
    low = optimizer.state[model[0].weight]["master_low"].int() & 0xFFFF
    assert torch.equal(masters[2].view(torch.int32) & 0xFFFF, low)


def test_two_bytes_a_parameter_of_states_move(starve: Any) -> None:
    engine, model, _ = IN_8_BITS.run_both(starve, adamw_of, IN_BACKWARD, range(STEPS))
    weights = [p.numel() for p in model.parameters() if p.numel() > 64 << 10]
    states = 2 * sum(packed_nbytes(numel) for numel in weights)
    moves = [e for e in engine._journal.recorder.events if isinstance(e, Move)]  # type: ignore[attr-defined]
    moved = [e for e in moves if e.role == "state"]
    written = sum(e.nbytes for e in moved if e.dst != "host")
    assert written == STEPS * (states + 4 * sum(weights))
    assert sum(e.nbytes for e in moved if e.src != "host") == (STEPS - 1) * states
    assert states < 2.04 * sum(weights)


def test_what_is_reserved_and_written_is_a_quarter_of_it_too() -> None:
    model = make_model()
    optimizer = adamw_of(model)
    exact, coded = (
        state_nbytes(optimizer, precision=one) for one in (Precision(), Precision(states="8bit"))
    )
    assert 3.9 < exact / coded < 4
    writes = step_writes_nbytes(model, optimizer, Precision(states="8bit"))
    assert step_writes_nbytes(model, optimizer) - writes == exact - coded


def test_what_is_shown_reads_as_numbers_and_can_not_be_written(starve: Any) -> None:
    _, model, optimizer = IN_8_BITS.run_both(starve, adamw_of, EIGHT, range(STEPS))
    shown = optimizer.state[model[0].weight]["exp_avg_sq"]
    values = shown.clone()
    assert type(values) is torch.Tensor
    assert (values >= 0).all()
    assert torch.equal(shown.sqrt().sum(), values.sqrt().sum())
    assert torch.equal(shown[3, 5:9], values[3, 5:9])
    assert str(values[0, 0].item())[:4] in repr(shown)
    refused = r"\(601, 700\) that the store keeps in 8 bits"
    for write in (
        lambda: shown.mul_(2),
        lambda: shown.copy_(values),
        lambda: torch.neg(values, out=shown),
    ):
        with pytest.raises(UnsupportedError, match=refused):
            write()
    optimizer.state[model[0].weight]["exp_avg_sq"] = values * 4  # a float32 tensor in its place
    train(model, optimizer, range(STEPS, STEPS + 1))
    again = optimizer.state[model[0].weight]["exp_avg_sq"]
    assert (again.sum() / values.sum()).item() == pytest.approx(4, rel=0.05)


def test_a_state_dict_goes_out_and_comes_back(starve: Any, tmp_path: Path) -> None:
    model = make_model()
    optimizer = adamw_of(model)
    starve(model, optimizer, nvme=tmp_path / "one", config=EIGHT)
    train(model, optimizer, range(3))
    saved = through_a_file(optimizer.state_dict())
    direct = optimizer.state_dict()
    for source in (saved, direct, copy.deepcopy(direct)):
        fresh = make_model()
        other = adamw_of(fresh)
        place = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        with offload.attach(fresh, other, budget="8GiB", nvme=place, config=EIGHT) as engine:
            other.load_state_dict(source)
            engine.commit()  # stored as it is: what 8 bits hold is not rounded again
            for index, state in other.state_dict()["state"].items():
                for key, value in state.items():
                    assert torch.equal(value, saved["state"][index][key])
    for index, state in saved["state"].items():  # plain: any loop in memory takes it
        for value in state.values():
            assert type(value) is torch.Tensor
            assert value.dtype == torch.float32
        assert list(state) == list(direct["state"][index])


@BOTH
def test_a_resumed_run_continues_bit_for_bit(config: dict[str, Any], tmp_path: Path) -> None:
    states = IN_8_BITS.resume_and_compare(config, tmp_path)
    for state in states.values():
        if state["exp_avg"].numel():
            assert all(type(value) is torch.Tensor for value in state.values())  # detached
            assert all(value.dtype == torch.float32 for value in state.values())


@pytest.mark.parametrize(("first", "second"), [("bf16", "8bit"), ("8bit", "exact")])
def test_another_precision_does_not_continue_a_store(
    first: str, second: str, tmp_path: Path
) -> None:
    IN_8_BITS.refuse_another(first, second, tmp_path)


@pytest.mark.parametrize("name", REFUSED)
def test_states_that_may_not_be_coded_are_refused_before_anything_moves(
    name: str, tmp_path: Path
) -> None:
    model = make_model()
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    with pytest.raises(UnsupportedError, match=REFUSED[name]):
        offload.attach(
            model,
            OPTIMIZERS[name](list(model.parameters())[2:]),
            budget="8GiB",
            nvme=tmp_path,
            config=EIGHT,
        )
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses


def test_a_gradient_that_turns_sparse(starve: Any) -> None:
    """Such a parameter is stepped whole, in memory; its states are coded where they are stored."""
    torch.manual_seed(0)
    plain = nn.Embedding(400, 96)
    model = copy.deepcopy(plain)
    optimizers = [torch.optim.SGD(one.parameters(), 1e-2, momentum=0.9) for one in (plain, model)]
    engine = starve(model, optimizers[1], config=EIGHT)
    with torch.sparse.check_sparse_tensor_invariants():  # torch warns unless it is told
        for step in range(STEPS):
            rows = torch.arange(step, 200, 3)
            for one, optimizer in zip((plain, model), optimizers, strict=True):
                one.sparse = step > 0
                one(rows).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
    assert isinstance(optimizers[1].state[model.weight]["momentum_buffer"], PackedState)
    torch.testing.assert_close(model.weight, plain.weight, rtol=0.02, atol=1e-2)
    assert engine.step == STEPS
