"""Float32 masters of bfloat16 weights: the bits of a loop that keeps the masters in memory."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from master_runs import (
    BOTH,
    IN_BACKWARD,
    MASTERS,
    STEPS,
    InMemory,
    assert_same,
    half_model,
    loss_of,
    overwrite,
    run_both,
    train,
    truncated,
)
from state_runs import adamw, attach_with_room, code_states, round_values
from test_exact_optimizers import OPTIMIZERS, make_model
from torch import nn

import offload
from offload.allocator.errors import UnsupportedError
from offload.engine import Engine
from offload.saving import step_writes_nbytes
from offload.swap.optim_kinds import state_nbytes
from offload.swap.residency import Residency
from offload.swap.state_precision import Precision
from offload.tiers.events import Move

pytestmark = pytest.mark.usefixtures("many_tiles")


@pytest.mark.parametrize("name", OPTIMIZERS)
@BOTH
def test_each_optimizer_steps_the_masters(name: str, config: dict[str, Any], starve: Any) -> None:
    def make_optimizer(parameters: Any) -> Any:
        # torch's Adafactor divides by the number of elements: plainly, too, it can't step none.
        return OPTIMIZERS[name]([p for p in parameters if p.numel() or name != "adafactor"])

    engine, _, _ = run_both(starve, make_optimizer, config)
    events = engine._journal.recorder.events  # type: ignore[attr-defined]
    assert {event.role for event in events if isinstance(event, Move)} >= {"weight", "state"}


@pytest.mark.parametrize("chunk_numel", [64 * 32, 64 * 1024, 2 << 20])
@BOTH
def test_tiles_of_any_size_give_the_same_bits(
    chunk_numel: int, config: dict[str, Any], starve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload.runtime.choose_chunk_numel", lambda _budget: chunk_numel)
    run_both(starve, adamw, config)


@BOTH
def test_with_room_for_everything_the_bits_are_the_same(
    config: dict[str, Any], tmp_path: Path
) -> None:
    engine, model, _ = run_both(attach_with_room(tmp_path), adamw, config)
    names = {"2.bias", "wide"}  # float32: stepped in memory, as without masters
    assert names <= set(engine.plan.resident_states)
    assert not set(engine.plan.resident_states) - names - {"empty"}
    assert set(engine.plan.resident) == {name for name, p in model.named_parameters()}
    engine.detach()


def test_states_rounded_to_bf16_beside_masters(starve: Any) -> None:
    torch.manual_seed(0)
    twin: Any = half_model()
    model = copy.deepcopy(twin)
    plain = InMemory(twin, adamw)
    masters = [whole for _, whole in plain.pairs]

    expected = train(
        twin,
        plain,
        range(STEPS),
        lambda step: code_states(round_values, twin, plain.optimizer, step, masters),
    )
    optimizer = adamw(model.parameters())
    starve(model, optimizer, config={**IN_BACKWARD, "state_precision": "bf16"})
    assert train(model, optimizer, range(STEPS)) == expected
    assert_same(plain, model, optimizer)
    assert optimizer.state[model[0].weight]["exp_avg"].dtype == torch.bfloat16


def test_groups_and_gradients_that_accumulate(starve: Any) -> None:
    torch.manual_seed(0)
    twin: Any = half_model()
    model = copy.deepcopy(twin)

    def make_optimizer(owner: Any) -> Any:
        parameters = [p for p in owner if p.shape != (0,)]
        return torch.optim.AdamW(
            [
                {"params": parameters[:2], "lr": 1e-2, "weight_decay": 0.5},
                {"params": parameters[2:], "amsgrad": True},
            ],
            lr=1e-3,
        )

    plain, optimizer = InMemory(twin, make_optimizer), make_optimizer(model.parameters())
    config = {**IN_BACKWARD, "accumulation_steps": 3}
    starve(model, optimizer, config=config)
    for one, its_optimizer in ((twin, plain), (model, optimizer)):
        for step in range(12):
            (loss_of(one, step) / 3).backward()
            if step % 3 == 2:
                its_optimizer.step()
                its_optimizer.zero_grad()
    assert_same(plain, model, optimizer)


def test_ten_bytes_a_parameter_move_each_way_beside_the_weight(starve: Any) -> None:
    engine, model, _ = run_both(starve, adamw, IN_BACKWARD)
    stepped = sum(p.numel() for p in model.parameters() if p.numel() > 64 << 10)
    rest = 4000 * 4
    moves = [e for e in engine._journal.recorder.events if isinstance(e, Move)]  # type: ignore[attr-defined]
    written = sum(e.nbytes for e in moves if e.role == "state" and e.dst != "host")
    read = sum(e.nbytes for e in moves if e.role == "state" and e.src != "host")
    assert written == STEPS * ((2 + 10) * stepped + 3 * rest)
    assert read == (STEPS - 1) * (10 * stepped + 2 * rest)


def test_what_is_reserved_and_written_counts_the_lower_halves() -> None:
    model = half_model()
    optimizer = adamw(model.parameters())
    low = sum(p.numel() for p in model.parameters() if p.dtype == torch.bfloat16)
    without, with_masters = (
        state_nbytes(optimizer, precision=one) for one in (Precision(), Precision(masters="fp32"))
    )
    assert with_masters - without == low * (2 + 4)  # two states of 4 bytes instead of 2
    writes = step_writes_nbytes(model, optimizer, Precision(masters="fp32"))
    assert writes - step_writes_nbytes(model, optimizer) == low * (2 + 4)


def beside_plain(
    config: dict[str, Any], starve: Any
) -> tuple[Any, InMemory, nn.Module, torch.optim.Optimizer, Engine]:
    """A model that trains in memory, and the same one under Offload."""
    torch.manual_seed(0)
    twin: Any = half_model()
    model = copy.deepcopy(twin)
    plain, optimizer = InMemory(twin, adamw), adamw(model.parameters())
    return twin, plain, model, optimizer, starve(model, optimizer, config=config)


@pytest.mark.parametrize("resident", [False, True])
@BOTH
def test_what_the_user_writes_is_the_new_master(
    resident: bool, config: dict[str, Any], starve: Any
) -> None:
    twin, plain, model, optimizer, engine = beside_plain(config, starve)
    if resident:
        engine.weights.keep(engine.weights.weights)
    for step in range(6):
        for one, its_optimizer in ((twin, plain), (model, optimizer)):
            train(one, its_optimizer, range(step, step + 1))
            if step in (2, 3):
                overwrite(one)
        if step in (2, 3):
            for parameter, whole in plain.pairs[3:5]:  # of model[0]
                with torch.no_grad():
                    changed = parameter != truncated(whole)
                    assert changed.any()
                    assert not changed.all()
                    whole[changed] = parameter[changed].float()
        if step == 3:
            engine.commit()
    assert_same(plain, model, optimizer)


@BOTH
def test_what_the_user_writes_to_a_weight_on_its_way_is_the_new_master(
    config: dict[str, Any], starve: Any
) -> None:
    twin, plain, model, optimizer, engine = beside_plain(config, starve)
    weight = engine.weights.weights["2.weight"]
    engine.weights.window_nbytes = 1 << 30
    met: list[Residency] = []

    def write(parameter: torch.Tensor) -> None:
        parameter.data.view(-1)[:100] += 1

    def write_in_memory(_module: Any, _args: Any, _output: Any) -> None:
        parameter, whole = plain.pairs[5]
        assert parameter is twin[2].weight
        write(parameter)
        changed = parameter != truncated(whole)
        whole.data[changed] = parameter.data[changed].float()

    def write_on_its_way(_module: Any, _args: Any, _output: Any) -> None:
        met.append(weight.residency)
        write(model[2].weight)

    twin[0].register_forward_hook(write_in_memory)
    model[0].register_forward_hook(write_on_its_way)
    for step in range(6):
        engine.weights.evict_streaming()
        steps = range(step, step + 1)
        assert train(model, optimizer, steps) == train(twin, plain, steps)
    assert met[1:] == [Residency.FETCHING] * 5
    assert_same(plain, model, optimizer)


def test_float16_is_refused_before_anything_moves(tmp_path: Path) -> None:
    model = make_model().half()
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    for _ in range(2):  # and the store is not left locked
        with pytest.raises(UnsupportedError, match=r"6 parameters .* are float16, whose exponent"):
            offload.attach(
                model, adamw(model.parameters()), budget="8GiB", nvme=tmp_path, config=MASTERS
            )
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
    for parameter in model.parameters():
        parameter.requires_grad_(requires_grad=False)
    model.add_module("head", nn.Linear(4, 4))
    optimizer = adamw(model.parameters())
    offload.attach(model, optimizer, budget="8GiB", nvme=tmp_path, config=MASTERS).detach()


def test_sparse_gradients(starve: Any) -> None:
    torch.manual_seed(0)
    twin = nn.Embedding(400, 96, sparse=True).bfloat16()
    model = copy.deepcopy(twin)
    plain = InMemory(twin, lambda p: torch.optim.SparseAdam(p, 1e-2))
    optimizer = torch.optim.SparseAdam(model.parameters(), 1e-2)
    starve(model, optimizer, config=MASTERS)
    with torch.sparse.check_sparse_tensor_invariants():  # torch warns unless it is told
        for step in range(STEPS):
            for one, its_optimizer in ((twin, plain), (model, optimizer)):
                one(torch.arange(step, 200, 3)).float().square().sum().backward()
                its_optimizer.step()
                its_optimizer.zero_grad()
    assert_same(plain, model, optimizer)


@BOTH
def test_gradients_that_accumulate_in_float32(config: dict[str, Any], starve: Any) -> None:
    """By torch's own ``grad_dtype``."""
    torch.manual_seed(0)
    twin: Any = half_model()
    if not hasattr(twin[0].weight, "grad_dtype"):
        pytest.skip("this torch has no grad_dtype")
    model = copy.deepcopy(twin)
    plain, optimizer = InMemory(twin, adamw), adamw(model.parameters())
    if "step_in_backward" in config:
        config = {**config, "accumulation_steps": 2}
    engine = starve(model, optimizer, config=config)
    for one, its_optimizer in ((twin, plain), (model, optimizer)):
        for parameter in (one[0].weight, one[0].bias):
            parameter.grad_dtype = torch.float32
        for step in range(6):
            loss_of(one, step).backward()
            if step % 2:
                assert one[0].weight.grad.dtype == torch.float32
                its_optimizer.step()
                its_optimizer.zero_grad()
    assert_same(plain, model, optimizer)
    events = engine._journal.recorder.events  # type: ignore[attr-defined]
    moved = [e for e in events if isinstance(e, Move) and e.role == "gradient"]
    assert {e.nbytes for e in moved if e.key == "0.weight"} == {300 * 257 * 4}
    assert {e.nbytes for e in moved if e.key == "2.weight"} == {300 * 257 * 2}


def test_bf16_weights_without_masters_are_told_of_them(starve: Any, tmp_path: Path) -> None:
    for number, (model, config, told) in enumerate(
        [
            (half_model(), {}, True),
            (half_model(), MASTERS, False),
            (make_model(), {}, False),
        ]
    ):
        optimizer = adamw(model.parameters())
        engine = starve(model, optimizer, nvme=tmp_path / str(number), config=config)
        assert any("master_weights='fp32'" in one for one in engine.notices) == told
