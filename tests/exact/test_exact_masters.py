"""Float32 masters of bfloat16 weights: the bits of a loop that keeps the masters in memory."""

import copy
import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_exact_optimizers import OPTIMIZERS, make_model
from torch import nn
from torch.nn import functional as F

import offload
from offload.allocator.errors import ConfigError, StoreMismatchError, UnsupportedError
from offload.engine import Engine
from offload.saving import step_writes_nbytes
from offload.swap.masters import MASTER_LOW
from offload.swap.optim_kinds import state_nbytes
from offload.swap.rounding import round_to_bf16
from offload.swap.staged_states import rounding_key
from offload.swap.state_precision import Precision
from offload.tiers.events import Move

MASTERS = {"master_weights": "fp32"}
IN_BACKWARD = {**MASTERS, "step_in_backward": True}
BOTH = pytest.mark.parametrize("config", [MASTERS, IN_BACKWARD], ids=["behind", "in backward"])
STEPS = 8


@pytest.fixture(autouse=True)
def many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an end that is off every grid: 300 * 257 = 77,100 elements."""
    monkeypatch.setattr("offload.runtime.choose_chunk_numel", lambda _budget: 64 * 160)


def half_model() -> Any:
    """Bfloat16, but for one weight and a bias."""
    model = make_model().bfloat16()
    model[2].bias = nn.Parameter(torch.linspace(0, 1, 300))
    model.register_parameter("wide", nn.Parameter(torch.linspace(-1, 1, 4000)))
    return model


def adamw(parameters: Any) -> Any:
    return torch.optim.AdamW(parameters, 1e-3, fused=True)


def truncated(values: torch.Tensor) -> torch.Tensor:
    """The bfloat16 numbers of which ``values`` are the continuation."""
    return (values.view(torch.int32) & -65536).view(torch.float32).bfloat16()


class InMemory:
    """What Offload is held against: an optimizer over float32 copies of all weights."""

    def __init__(self, model: Any, make_optimizer: Callable[[Any], Any]) -> None:
        self.pairs = [
            (one, nn.Parameter(one.detach().float()) if one.dtype == torch.bfloat16 else one)
            for one in model.parameters()
        ]
        self.optimizer = make_optimizer([master for _, master in self.pairs])

    def step(self) -> None:
        for parameter, master in self.pairs:
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float()
        self.optimizer.step()
        with torch.no_grad():
            for parameter, master in self.pairs:
                if master is not parameter:
                    parameter.copy_(truncated(master))

    def zero_grad(self) -> None:
        for parameter, _ in self.pairs:
            parameter.grad = None


def loss_of(model: Any, step: int) -> torch.Tensor:
    x = torch.randn(32, 300, generator=torch.Generator().manual_seed(step)).bfloat16()
    hidden = F.linear(model[1](model[0](x)), model[2].weight).float() + model[2].bias
    return F.mse_loss(hidden * model.scale, x.float()) + model.wide.square().mean()


def train(model: Any, optimizer: Any, steps: range, after: Any = None) -> list[float]:
    losses = []
    for step in steps:
        loss = loss_of(model, step) + model.empty.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if after is not None:
            after(step)
    return losses


def master(parameter: Any, optimizer: Any) -> torch.Tensor:
    """Both halves put together, plainly."""
    high = parameter.detach().view(torch.int16).int() << 16
    low = optimizer.state.get(parameter, {}).get(MASTER_LOW)
    return (high if low is None else high | (low.int() & 0xFFFF)).view(torch.float32)


def assert_same(plain: InMemory, model: Any, optimizer: Any) -> None:
    """Weights, masters and states have the same bits, and states the same order."""
    for (one, whole), twin in zip(plain.pairs, model.parameters(), strict=True):
        assert torch.equal(one, twin)
        kept, shown = plain.optimizer.state.get(whole, {}), dict(optimizer.state.get(twin, {}))
        if one.dtype == torch.bfloat16:
            assert torch.equal(whole, master(twin, optimizer))
            assert shown.pop(MASTER_LOW, torch.empty(0, dtype=torch.int16)).dtype == torch.int16
        assert list(kept) == list(shown)
        for name, value in kept.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, shown[name].to(value.dtype)), name
            else:
                assert value == shown[name]


def run_both(
    starve: Any,
    make_optimizer: Callable[[Any], Any],
    config: dict[str, Any],
    *,
    between: Callable[[Any], None] = lambda _model: None,
    steps: int = STEPS,
) -> tuple[Engine, Any, Any]:
    torch.manual_seed(0)
    twin: Any = half_model()
    model = copy.deepcopy(twin)
    plain = InMemory(twin, make_optimizer)
    expected = train(twin, plain, range(steps))
    optimizer = make_optimizer(list(model.parameters()))
    engine = starve(model, optimizer, config=config)
    assert train(model, optimizer, range(steps), lambda _step: between(model)) == expected
    assert_same(plain, model, optimizer)
    lows = [state[MASTER_LOW] for state in optimizer.state.values() if MASTER_LOW in state]
    assert len(lows) >= 4
    assert all(low.any() for low in lows if low.numel() > 1)
    return engine, model, optimizer


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
    def attach(model: Any, optimizer: Any, **options: Any) -> Engine:
        return offload.attach(model, optimizer, budget="8GiB", nvme=tmp_path, **options)

    engine, model, _ = run_both(attach, adamw, config)
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
    names = [name for name, _ in twin.named_parameters()]

    def round_states(step: int) -> None:
        for name, (_, whole) in zip(names, plain.pairs, strict=True):
            for key, value in plain.optimizer.state.get(whole, {}).items():
                if value.numel() > 1024:
                    rounded = torch.empty(value.numel(), dtype=torch.bfloat16)
                    bits = rounding_key(step, f"{name}#{key}", "step")
                    round_to_bf16(value.flatten(), rounded, key=bits, start=0)
                    value.copy_(rounded.view_as(value))

    expected = train(twin, plain, range(STEPS), round_states)
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


def overwrite(model: Any) -> None:
    """Some elements get other values, some the same again."""
    with torch.no_grad():
        for parameter in (model[0].weight, model[0].bias):
            written = parameter.clone()
            written.view(-1)[:100] += 1
            written.view(-1)[200:] *= 1
            parameter.copy_(written)


@pytest.mark.parametrize("resident", [False, True])
@BOTH
def test_what_the_user_writes_is_the_new_master(
    resident: bool, config: dict[str, Any], starve: Any
) -> None:
    torch.manual_seed(0)
    twin: Any = half_model()
    model = copy.deepcopy(twin)
    plain, optimizer = InMemory(twin, adamw), adamw(model.parameters())
    engine = starve(model, optimizer, config=config)
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
def test_a_resumed_run_continues_bit_for_bit(config: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    twin: Any = half_model()
    start = copy.deepcopy(twin)
    plain = InMemory(twin, adamw)
    expected = train(twin, plain, range(6))
    losses = []
    for first, last in itertools.pairwise((0, 2, 5, 6)):
        model = copy.deepcopy(start)
        optimizer = adamw(model.parameters())
        with offload.attach(
            model, optimizer, budget="8GiB", nvme=tmp_path, config=config
        ) as engine:
            assert engine.step == first
            losses += train(model, optimizer, range(first, last))
            if last == 5:  # after a resume, too, it is known whose lower halves these are
                overwrite(model)
                engine.commit()
                overwrite(model)
                for name in ("0.weight", "0.bias"):
                    written = model.get_parameter(name).detach().view(-1)[:100]
                    found = engine.master_weight(name).view(-1)[:100]
                    assert torch.equal(found, written.float())
                break
    assert losses == expected[:5]


def test_another_setting_does_not_continue_a_store(tmp_path: Path) -> None:
    for config, other, message in (
        (MASTERS, {}, "its master_weights is fp32, this one's is none .set it to 'fp32'"),
        ({}, MASTERS, "its master_weights is none, this one's is fp32 .set it to 'none'"),
    ):
        nvme = tmp_path / str(len(config))
        for settings in (config, other):
            model = half_model()
            optimizer = adamw(model.parameters())
            if settings is other:
                with pytest.raises(StoreMismatchError, match=message):
                    offload.attach(model, optimizer, budget="8GiB", nvme=nvme, config=settings)
                break
            with offload.attach(model, optimizer, budget="8GiB", nvme=nvme, config=settings):
                train(model, optimizer, range(1))


def saved_state(model: Any, optimizer: Any) -> Any:
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("commits", [False, True])
def test_state_dicts_carry_the_masters_to_another_store(
    commits: bool, starve: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    twin: Any = half_model()
    model = copy.deepcopy(twin)
    plain, optimizer = InMemory(twin, adamw), adamw(model.parameters())
    train(twin, plain, range(6))
    starve(model, optimizer, nvme=tmp_path / "one", config=MASTERS)
    train(model, optimizer, range(3))
    weights, states = saved_state(model, optimizer)
    fresh: Any = half_model()
    other = adamw(fresh.parameters())
    engine = starve(fresh, other, nvme=tmp_path / "other", config=MASTERS)
    train(fresh, other, range(2))  # it had lower halves of its own
    fresh.load_state_dict(weights)
    if commits:
        engine.commit()
    other.load_state_dict(states)
    train(fresh, other, range(3, 6))
    assert_same(plain, fresh, other)


def test_states_of_a_run_without_masters_are_taken(starve: Any) -> None:
    model: Any = half_model()
    before = adamw(model.parameters())
    train(model, before, range(2))
    optimizer = adamw(model.parameters())
    engine = starve(model, optimizer, config=MASTERS)
    optimizer.load_state_dict(before.state_dict())
    engine.commit()
    for parameter in (model[0].weight, model[0].bias):
        found = optimizer.state[parameter]["exp_avg"]
        assert torch.equal(found.float(), before.state[parameter]["exp_avg"].float())
    train(model, optimizer, range(2, 4))
    assert optimizer.state[model[0].weight]["exp_avg"].dtype == torch.float32
    assert optimizer.state[model[0].bias]["exp_avg"].dtype == torch.float32


def test_a_detached_optimizer_has_everything_to_go_on_elsewhere(
    starve: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    twin: Any = half_model()
    model = copy.deepcopy(twin)
    plain, optimizer = InMemory(twin, adamw), adamw(model.parameters())
    train(twin, plain, range(6))
    engine = starve(model, optimizer, nvme=tmp_path / "one", config=MASTERS)
    train(model, optimizer, range(3))
    engine.detach()
    state = optimizer.state[model[0].weight]
    assert state["exp_avg"].dtype == torch.float32
    assert state[MASTER_LOW].dtype == torch.int16
    starve(model, optimizer, nvme=tmp_path / "two", config=IN_BACKWARD)
    train(model, optimizer, range(3, 6))
    assert_same(plain, model, optimizer)


def test_masters_are_saved(starve: Any, tmp_path: Path) -> None:
    engine, model, optimizer = run_both(starve, adamw, MASTERS)
    for masters in (False, True):
        engine.save_pretrained(tmp_path / "saved", masters=masters)
        found = load_file(tmp_path / "saved" / "model.safetensors")
        for name, parameter in model.named_parameters():
            expected = parameter.detach()
            if masters and parameter.dtype == torch.bfloat16 and parameter.numel():
                expected = master(parameter, optimizer)
                assert parameter.numel() < 2 or not torch.equal(expected, parameter.float())
            assert found[name].dtype == expected.dtype
            assert torch.equal(found[name], expected)
    whole = engine.master_weight("0.weight")
    assert torch.equal(whole, master(model[0].weight, optimizer))
    with torch.no_grad():
        model[0].weight.fill_(0.5)
    assert (engine.master_weight("0.weight") == 0.5).all()
    for name in ("2.bias", "nothing"):
        with pytest.raises(ConfigError, match=f"'{name}' is no bfloat16 parameter"):
            engine.master_weight(name)


def test_masters_that_are_not_kept_can_not_be_saved(starve: Any, tmp_path: Path) -> None:
    model = half_model()
    engine = starve(model, adamw(model.parameters()))
    with pytest.raises(ConfigError, match="no masters are kept: attach with"):
        engine.save_pretrained(tmp_path / "saved", masters=True)
    with pytest.raises(ConfigError, match="no masters are kept"):
        engine.master_weight("0.weight")


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


def test_lower_halves_that_torch_has_spoilt_are_refused(starve: Any, tmp_path: Path) -> None:
    model: Any = half_model()
    optimizer = adamw(model.parameters())
    starve(model, optimizer, nvme=tmp_path / "one", config=MASTERS)
    train(model, optimizer, range(2))
    weights, states = saved_state(model, optimizer)
    fresh: Any = half_model()
    fresh.load_state_dict(weights)
    other = adamw(fresh.parameters())
    other.load_state_dict(states)  # before attach
    starve(fresh, other, nvme=tmp_path / "other", config=MASTERS)
    with pytest.raises(UnsupportedError, match=r"master_low of .*load_state_dict after"):
        train(fresh, other, range(2, 3))
    other.zero_grad()
    other.load_state_dict(states)
    assert train(fresh, other, range(2, 5)) == train(model, optimizer, range(2, 5))


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
