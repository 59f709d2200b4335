"""The optimizer's step on the device gives the bits of a loop that steps there, whatever moves."""

import copy
import errno
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from device_runs import assert_same, computing_on, moved_roles, train_both
from exact_models import Net, accumulating_loop, adamw, loss_of, tokens_of
from torch import nn
from torch.nn import functional as F

import offload
from offload import sharing
from offload.allocator.errors import (
    BudgetError,
    CapacityError,
    ConfigError,
    ConsumedGradientError,
    TierIOError,
    UnsupportedError,
)
from offload.engine import Engine
from offload.swap import device_step
from offload.swap.device_step import DeviceStep
from offload.swap.ferry import Ferry
from offload.swap.tile_share import StepRates
from offload.tiers.cpudevice import CpuAccelerator
from offload.tiers.events import Move

STEPS = 4
CHUNK = 4096  # elements of a tile: most weights of the model have several
loop = partial(accumulating_loop, steps=STEPS, most_passes=3)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.runtime.choose_chunk_numel", lambda _budget: CHUNK)


@pytest.fixture
def stepped_there(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Elements of each tile that the device steps."""
    numels: list[int] = []
    original = DeviceStep.send

    def send(self: DeviceStep, group: Any, parts: Any, done: Any) -> None:
        numels.append(sum(part.parameter.numel() for part in parts))
        original(self, group, parts, done)

    monkeypatch.setattr(DeviceStep, "send", send)
    return numels


@pytest.fixture
def same(tmp_path: Path) -> Callable[..., tuple[Engine, CpuAccelerator]]:
    """Trains in memory and on a device of its own; nothing may differ."""

    def run(
        make_model: Callable[[], nn.Module] = Net,
        make_optimizer: Callable[[nn.Module], Any] = adamw,
        loop: Any = loop,
        *,
        who: str | float = "device",
        config: Mapping[str, Any] | None = None,
    ) -> tuple[Engine, CpuAccelerator]:
        accelerator = CpuAccelerator()
        settings = {"optimizer_device": who, **(config or {})}
        engine = train_both(
            make_model, make_optimizer, loop, accelerator, tmp_path / "nvme", config=settings
        )
        return engine, accelerator

    return run


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def weights_and_states(loop: Any, engine: Engine | None, model: Any, optimizer: Any) -> list[float]:
    """The loop with weights and states streaming, then with all that can be in memory."""
    values: list[float] = loop(model, optimizer, engine)
    if engine is not None:
        engine.weights.keep(engine.weights.weights)
        memory = engine._optimizing.streamed.memory
        memory.keep(memory.nbytes())
    return [*values, *loop(model, optimizer, engine)]


@pytest.mark.parametrize("who", ["device", 0.5, 0.3])
def test_streaming_and_in_memory(who: str | float, same: Any, stepped_there: list[int]) -> None:
    def both(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        return weights_and_states(loop, engine, model, optimizer)

    engine, accelerator = same(loop=both, who=who)
    assert "state" in moved_roles(engine, accelerator)
    model: Any = engine.model
    numel = sum(p.numel() for p in trained(model)) - sum(
        p.numel() for p in model.unused.parameters()
    )
    found = sum(stepped_there) / (2 * STEPS * numel)
    assert found == 1 if who == "device" else abs(found - who) < 0.15


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "adam": lambda parameters: torch.optim.Adam(parameters, 1e-3, amsgrad=True),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, 1e-2),
    "asgd": lambda parameters: torch.optim.ASGD(parameters, 1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_with_states_of_other_kinds(
    name: str, same: Any, stepped_there: list[int]
) -> None:
    def make(model: nn.Module) -> Any:
        halves = trained(model)
        return OPTIMIZERS[name]([{"params": halves[::2]}, {"params": halves[1::2], "lr": 2e-3}])

    same(make_optimizer=make, loop=partial(loop, steps=3))
    assert stepped_there


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64])
def test_other_types(dtype: torch.dtype, same: Any) -> None:
    def run(model: Any, optimizer: Any, _engine: Engine | None) -> list[float]:
        values = []
        for _ in range(STEPS):
            loss = model(torch.randn(16, 100, dtype=dtype)).abs().float().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            values.append(loss.item())
        return values

    make = partial(nn.Linear, 100, 100, dtype=dtype)
    same(make, lambda model: torch.optim.Adam(model.parameters(), 1e-3), run)


# -- a device whose kernels round in another way --------------------------------------------------

FACTOR = 1 + 2.0**-10


@pytest.fixture
def other_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is stepped on the device is a little larger: this tells who stepped what."""
    original = device_step.step_on

    def step_on(optimizer: Any, group: Any, parameters: Any, states: Any) -> Any:
        after = original(optimizer, group, parameters, states)
        for parameter in parameters:
            parameter.mul_(FACTOR)
        return after

    monkeypatch.setattr(device_step, "step_on", step_on)


class Elsewhere:
    """An optimizer in memory whose every step is that of the other kernels."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)

    def step(self) -> None:
        self.optimizer.step()
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.mul_(FACTOR)


@pytest.mark.usefixtures("other_kernels")
@pytest.mark.parametrize("config", [{}, {"state_precision": "exact", "commit": "manual"}])
def test_every_bit_is_the_devices(config: dict[str, Any], same: Any) -> None:
    """Small parameters, and those in memory, too."""

    def run(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        if engine is None:
            optimizer = Elsewhere(optimizer)
        return weights_and_states(loop, engine, model, optimizer)

    same(loop=run, config=config)


def train(
    nvme: Path, who: str | float, *, steps: int = STEPS, keeps: int = 0, **options: Any
) -> tuple[list[float], dict[str, torch.Tensor], Engine]:
    """Losses and weights; from step ``keeps`` on, all that can be is in memory."""
    torch.manual_seed(0)
    model, accelerator = Net(), CpuAccelerator()
    optimizer = torch.optim.AdamW(trained(model), 1e-3)
    engine = offload.attach(
        model,
        optimizer,
        budget="host=8GiB,device=1GiB",
        nvme=nvme,
        accelerator=accelerator,
        config={"optimizer_device": who},
        **options,
    )
    engine.keep_streaming()
    losses = []
    with engine, computing_on(accelerator, engine):
        while engine.step < steps:
            if engine.step == keeps:
                engine.weights.keep(engine.weights.weights)
                engine._optimizing.streamed.memory.keep(engine._optimizing.streamed.memory.nbytes())
            torch.manual_seed(engine.step)
            tokens = tokens_of(4, 32)
            loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1).flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses, copy.deepcopy(model.state_dict()), engine


@pytest.mark.usefixtures("other_kernels")
def test_a_share_does_not_depend_on_what_is_in_memory(tmp_path: Path) -> None:
    runs = [train(tmp_path / str(keeps), 0.4, keeps=keeps) for keeps in (1, 2, STEPS + 1)]
    for losses, weights, _ in runs[1:]:
        assert losses == runs[0][0]
        assert_same(weights, runs[0][1])
    for who in ("host", "device"):
        assert train(tmp_path / who, who)[0] != runs[0][0]


def rated(monkeypatch: pytest.MonkeyPatch, host_s: float, device_s: float) -> None:
    rates = StepRates(host_s=host_s, device_s=device_s)
    monkeypatch.setattr(sharing, "measure_rates", lambda *_arguments: rates)


@pytest.mark.usefixtures("other_kernels")
def test_a_choice_goes_on_with_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rated(monkeypatch, 1e-9, 2e-9)
    right, weights, engine = train(tmp_path / "whole", "auto")
    (notice,) = [text for text in engine.notices if "optimizer_device" in text]
    assert "the device steps 1/3 of the tiles" in notice
    assert "1.00 ns on the host, and 2.00 ns there and back" in notice
    assert "optimizer_device=0.3333 chooses the same" in notice
    first, _, _ = train(tmp_path / "parts", "auto", steps=2)
    rated(monkeypatch, 5e-9, 1e-9)  # a resumed run does not look at it
    rest, end, engine = train(tmp_path / "parts", "auto")
    assert first + rest == right
    assert_same(end, weights)
    assert not [text for text in engine.notices if "optimizer_device" in text]
    named, end, _ = train(tmp_path / "named", 0.3333)
    assert named == right
    assert_same(end, weights)


def test_a_choice_that_changes_is_told(tmp_path: Path) -> None:
    train(tmp_path, 0.5, steps=1)
    _, _, engine = train(tmp_path, "host", steps=2)
    assert any(
        "until the last commit the device stepped 1/2 of the tiles, from now on no tile" in text
        for text in engine.notices
    )


@pytest.mark.parametrize(
    ("host_s", "device_s", "setting"), [(1e-9, 1e-7, "'host'"), (1e-7, 1e-9, "'device'")]
)
def test_one_alone_is_chosen_where_the_other_is_slow(
    host_s: float, device_s: float, setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    stepped_there: list[int],
) -> None:  # fmt: skip
    rated(monkeypatch, host_s, device_s)
    _, _, engine = train(tmp_path, "auto", steps=1)
    assert any(f"optimizer_device={setting} chooses the same" in text for text in engine.notices)
    assert bool(stepped_there) is (setting == "'device'")


def test_rates_are_measured_and_nothing_else_changes(tmp_path: Path, same: Any) -> None:
    torch.manual_seed(0)
    model = Net()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adagrad(trained(model), 1e-2)  # has states from the beginning
    states = copy.deepcopy(optimizer.state_dict())
    engine = offload.attach(
        model,
        optimizer,
        budget="8GiB",
        nvme=tmp_path / "measured",
        accelerator=CpuAccelerator(),
        config={"optimizer_device": "auto"},
    )
    assert any("ns there and back" in text for text in engine.notices)
    assert_same(model.state_dict(), before)
    for one, other in zip(
        optimizer.state_dict()["state"].values(), states["state"].values(), strict=True
    ):
        assert_same(one, other)
    engine.detach()
    same(who="auto")


# -- in backward ----------------------------------------------------------------------------------

IN_BACKWARD: dict[str, Any] = {"step_in_backward": True}


def unclipped(
    model: Any, optimizer: Any, _engine: Engine | None, *, passes: int = 1, steps: int = STEPS
) -> list[float]:
    values = []
    for _ in range(steps):
        for _ in range(passes):
            loss = loss_of(model, tokens_of(4, 32))
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    return values


@pytest.mark.parametrize(
    ("who", "recompute"), [("host", None), ("host", True), ("device", None), ("device", False)]
)
def test_a_step_in_backward(who: str, recompute: bool | None, same: Any) -> None:
    engine, accelerator = same(lambda: Net(recompute), loop=unclipped, who=who, config=IN_BACKWARD)
    gradients = [move for move in engine._journal.recorder.events if moves_gradient(move)]
    assert {move.src for move in gradients} == {accelerator.name}
    assert {move.dst for move in gradients} == {"host"}  # none goes to scratch


def moves_gradient(event: Any) -> bool:
    return isinstance(event, Move) and event.role == "gradient"


def test_a_shared_step_in_backward_after_several_passes(same: Any) -> None:
    run = partial(unclipped, passes=3, steps=4)

    def both(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        return weights_and_states(run, engine, model, optimizer)

    same(loop=both, who=0.5, config={**IN_BACKWARD, "accumulation_steps": 3})


@pytest.mark.usefixtures("other_kernels")
def test_a_step_in_backward_has_the_devices_bits(same: Any) -> None:
    def run(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        if engine is None:
            optimizer = Elsewhere(optimizer)
        return weights_and_states(unclipped, engine, model, optimizer)

    same(loop=run, config=IN_BACKWARD)


def test_a_gradient_that_a_step_has_used_up(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, accelerator = Net(), CpuAccelerator()
    optimizer = adamw(model)
    with (
        attach(model, optimizer, tmp_path, accelerator=accelerator, config=IN_BACKWARD) as engine,
        computing_on(accelerator, engine),
    ):
        loss_of(model, tokens_of(4, 32)).backward()
        with pytest.raises(ConsumedGradientError, match="has used up already"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with pytest.raises(ConsumedGradientError, match="has used up already"):
            loss_of(model, tokens_of(4, 32)).backward()  # names no accumulation_steps


def test_a_step_in_backward_keeps_the_device_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload.runtime.choose_chunk_numel", lambda _budget: 1 << 16)
    ample, _, right = fit(tmp_path / "ample", 64 << 20, in_backward=True)
    with pytest.raises(BudgetError, match="the largest layer") as refusal:
        fit(tmp_path / "none", 1 << 20, in_backward=True)
    least = (-(-refusal.value.needed_nbytes // (1 << 20)) << 20) + (1 << 20)
    tight, accelerator, losses = fit(tmp_path / "tight", least, in_backward=True)
    assert accelerator.peak_nbytes() <= least
    assert losses == right
    assert_same(tight.state_dict(), ample.state_dict())


# -- precision, scales, budgets -------------------------------------------------------------------


@pytest.mark.parametrize("config", [{"state_precision": "bf16"}, {"state_precision": "8bit"}])
def test_states_are_rounded_by_the_same_bits(
    config: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What 8 bits take of a tile is whole pages.
    monkeypatch.setattr("offload.runtime.choose_chunk_numel", lambda _budget: 1 << 18)

    def run(who: str) -> list[float]:
        torch.manual_seed(0)
        model, accelerator = Net(), CpuAccelerator()
        optimizer = torch.optim.AdamW(trained(model), 1e-3)
        engine = offload.attach(
            model,
            optimizer,
            budget="8GiB",
            nvme=tmp_path / who,
            accelerator=accelerator,
            config={"optimizer_device": who, **config},
        )
        with engine, computing_on(accelerator, engine):
            torch.manual_seed(1)
            return loop(model, optimizer, engine)

    assert run("device") == run("host")


def test_masters_of_bfloat16_weights(tmp_path: Path) -> None:
    def run(who: str) -> tuple[list[float], dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        model, accelerator = nn.Linear(100, 100).bfloat16(), CpuAccelerator()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        engine = offload.attach(
            model,
            optimizer,
            budget="8GiB",
            nvme=tmp_path / who,
            accelerator=accelerator,
            config={"optimizer_device": who, "master_weights": "fp32"},
        )
        losses = []
        with engine, computing_on(accelerator, engine):
            for _ in range(STEPS):
                loss = model(torch.randn(16, 100).bfloat16()).float().square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            masters = {name: engine.master_weight(name) for name in ("weight", "bias")}
        return losses, masters

    (losses, masters), (right, right_masters) = run("device"), run("host")
    assert losses == right
    assert_same(masters, right_masters)


@pytest.mark.parametrize("keeps", [False, True])
def test_a_loss_scale_is_divided_out_where_the_step_is(keeps: bool, same: Any) -> None:
    def run(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        if engine is not None and keeps:
            weights_and_states(lambda *_: [], engine, model, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=2)
        values = []
        for _ in range(STEPS):
            scaler.scale(loss_of(model, tokens_of(2, 32))).backward()
            scaler.step(optimizer)
            if keeps:
                values += [p.grad.norm().item() for p in trained(model) if p.grad is not None]
            scaler.update()
            optimizer.zero_grad()
            values.append(scaler.get_scale())
        return values

    same(loop=run)


class Wide(nn.Module):
    """Layers of 64 KiB, so that a tile of the step is larger than a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(128, 128) for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def fit(
    tmp_path: Path, budget: int, held: int = 0, *, in_backward: bool = False
) -> tuple[nn.Module, CpuAccelerator, list[float]]:
    torch.manual_seed(0)
    model, accelerator = Wide(), CpuAccelerator()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    engine = offload.attach(
        model,
        optimizer,
        budget=f"host=8GiB,device={budget}",
        nvme=tmp_path / str(budget),
        accelerator=accelerator,
        config={"optimizer_device": "device", "step_in_backward": in_backward},
    )
    losses = []
    with engine, computing_on(accelerator, engine):
        mine = accelerator.allocate(held) if held else None
        for _ in range(3):
            loss = model(torch.ones(4, 128)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        del mine
    return model, accelerator, losses


def test_the_device_budget_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.runtime.choose_chunk_numel", lambda _budget: 1 << 16)
    ample, accelerator, right = fit(tmp_path, 64 << 20)
    with pytest.raises(BudgetError, match="a tile of the optimizer's step, which") as refusal:
        fit(tmp_path, 1 << 20)
    least = -(-refusal.value.needed_nbytes // (1 << 20)) << 20
    assert f"device={least >> 20}MiB" in str(refusal.value)
    tight, accelerator, losses = fit(tmp_path, least)
    assert accelerator.peak_nbytes() <= least
    assert losses == right
    assert_same(tight.state_dict(), ample.state_dict())


def test_a_device_that_the_user_fills_gets_fewer_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload.runtime.choose_chunk_numel", lambda _budget: 1 << 16)
    _, _, right = fit(tmp_path / "ample", 64 << 20)
    _, accelerator, losses = fit(tmp_path / "filled", 8 << 20, held=5 << 20)
    assert losses == right
    assert accelerator.peak_nbytes() <= 8 << 20
    with pytest.raises(CapacityError, match="may hold"):
        fit(tmp_path / "full", 16 << 20, held=15 << 20)


# -- bad input and errors -------------------------------------------------------------------------


def attach(model: nn.Module, optimizer: Any, nvme: Path, **options: Any) -> Engine:
    options.setdefault("accelerator", CpuAccelerator())
    options.setdefault("config", {"optimizer_device": "device"})
    return offload.attach(model, optimizer, budget="8GiB", nvme=nvme, **options)


def test_a_model_that_computes_on_the_cpu(tmp_path: Path) -> None:
    model = nn.Linear(64, 64)
    with pytest.raises(ConfigError, match=r"optimizer_device='device' .* set device='cuda'"):
        attach(model, adamw(model), tmp_path, accelerator=None)
    attach(
        model, adamw(model), tmp_path, accelerator=None, config={"optimizer_device": "auto"}
    ).detach()  # has nothing to choose


def test_an_optimizer_that_does_not_go_by_tiles(tmp_path: Path) -> None:
    model = nn.Linear(64, 64)
    optimizer = torch.optim.Adafactor(model.parameters())
    with pytest.raises(UnsupportedError, match="Adafactor is not known to be elementwise"):
        attach(model, optimizer, tmp_path)
    engine = attach(model, optimizer, tmp_path, config={"optimizer_device": "auto"})
    assert any("host: Adafactor" in text for text in engine.notices)
    engine.detach()


def test_a_sparse_gradient(tmp_path: Path) -> None:
    model = nn.Embedding(100, 64, sparse=True)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with attach(model, optimizer, tmp_path):
        model.weight.grad = torch.sparse_coo_tensor(
            [[3]], torch.ones(1, 64), (100, 64), check_invariants=True
        )
        with pytest.raises(UnsupportedError, match=r"weight \(100, 64\) is sparse"):
            optimizer.step()
        assert torch.equal(model.weight, before)
        model.weight.grad = torch.ones(100, 64)
        optimizer.step()
        assert torch.equal(model.weight, before - 0.1)


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("link", ["jobs_in", "jobs_out"])
def test_a_copy_that_fails_leaves_the_last_commit(
    link: str, keeps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, weights, _ = train(tmp_path / "right", "device", steps=3)
    original = getattr(Ferry, link)

    def broken(self: Ferry, cargo: Any, nbytes: int, mover: Any) -> Any:
        inside = sys._getframe(1).f_code.co_filename == device_step.__file__
        if not inside or engine_step() == 0:
            return original(self, cargo, nbytes, mover)

        def job() -> None:
            raise TierIOError(errno.EIO, "the device failed")

        return [job]

    finished: list[int] = []

    def engine_step() -> int:
        return len(finished)

    after_step = Engine._after_step

    def count(self: Engine, *times: float) -> None:
        after_step(self, *times)
        finished.append(self.step)

    monkeypatch.setattr(Engine, "_after_step", count)
    monkeypatch.setattr(Ferry, link, broken)
    with pytest.raises(TierIOError, match="the device failed"):
        train(tmp_path / "broken", "device", steps=3, keeps=1 if keeps else STEPS)
    monkeypatch.undo()
    monkeypatch.setattr("offload.runtime.choose_chunk_numel", lambda _budget: CHUNK)
    losses, end, engine = train(tmp_path / "broken", "device", steps=3)
    assert engine.resumed
    assert losses == right[1:]
    assert_same(end, weights)


SCRIPT = """
import os
import sys
sys.path[:0] = sys.argv[1:2]
from test_exact_device_step import *
import offload.runtime
offload.runtime.choose_chunk_numel = lambda _budget: CHUNK
original, sent = DeviceStep.send, []
def send(self, *arguments):
    original(self, *arguments)
    sent.append(1)
    if len(sent) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
DeviceStep.send = send
print(train(Path(sys.argv[2]), 0.5, steps=3)[0])
"""


def test_a_run_that_is_killed_in_a_step_goes_on(tmp_path: Path, stepped_there: list[int]) -> None:
    right, weights, _ = train(tmp_path / "right", 0.5, steps=3)
    each = len(stepped_there) // 3
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, Path(__file__).parent, tmp_path / "killed", str(each + 3)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    losses, end, engine = train(tmp_path / "killed", 0.5, steps=3)
    assert engine.resumed
    assert losses == right[1:]
    assert_same(end, weights)
