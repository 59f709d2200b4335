"""Training over several paths gives the very bits of training in memory."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

import offload
from offload.tiers import file as file_module
from offload.tiers import home as home_module
from offload.tiers.health import PathRates
from offload.tiers.store import Store
from offload.tiers.striped import StripedFile

STEPS = 20
UNIT_NBYTES = 16 << 10


class Net(nn.Module):
    """Weights of many units, of less than one, and of no whole number of them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(200, 500)
        self.dropout = nn.Dropout(0.2)
        self.norm = nn.LayerNorm(500)
        self.outer = nn.Linear(500, 200)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(torch.relu(self.inner(x)))
        return self.outer(self.dropout(hidden))


def loop(model: nn.Module, optimizer: Any, _engine: Any, first: int = 0) -> list[float]:
    losses = []
    for step in range(first, STEPS):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(96, 200, generator=generator)
        loss = F.mse_loss(model(x), x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-3, fused=True)


@pytest.fixture
def stripe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[Path]]]:
    """Directories whose disks are found to be so fast; units so small that all is on each."""
    monkeypatch.setattr(home_module, "UNIT_NBYTES", UNIT_NBYTES)

    def prepare(*bytes_per_s: float) -> list[Path]:
        def measure(_directories: Any) -> list[PathRates]:
            return [
                PathRates(read_bytes_per_s=rate, write_bytes_per_s=rate) for rate in bytes_per_s
            ]

        monkeypatch.setattr("offload.runtime.Store", partial(Store, measure=measure))
        return [tmp_path / f"path{index}" for index in range(len(bytes_per_s))]

    return prepare


def assert_spread(paths: list[Path], weights: list[int]) -> None:
    """The data of each path is in proportion to its weight, within a pattern."""
    sizes = [(path / "offload-store" / "data").stat().st_size for path in paths]
    whole = sum(sizes)
    assert whole > 20 * sum(weights) * UNIT_NBYTES
    for size, weight in zip(sizes, weights, strict=True):
        assert abs(size - whole * weight / sum(weights)) <= sum(weights) * UNIT_NBYTES


@pytest.mark.parametrize(
    ("weights", "direct"), [([3, 1], True), ([3, 1], False), ([1, 3, 2], True)], ids=str
)
def test_training_is_bit_exact_over_paths(
    stripe: Callable[..., list[Path]],
    compare: Callable[..., Any],
    weights: list[int],
    direct: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not direct:
        monkeypatch.setattr(file_module, "_open_direct", lambda fd: fd)
    paths = stripe(*(1e9 * weight for weight in weights))
    done = compare(Net, adamw, loop, nvme=paths)
    assert done.moved_roles() == {"weight", "gradient", "state", "activation"}
    file = done.engine._runtime.store.tier.file
    assert isinstance(file, StripedFile)
    assert file.direct == direct
    assert_spread(paths, weights)


@pytest.mark.parametrize("precision", ["bf16", "8bit"])
def test_states_in_less_bits_are_the_same_over_paths(
    stripe: Callable[..., list[Path]], starve: Any, tmp_path: Path, precision: str
) -> None:
    """Pieces of a state are on each path."""
    torch.manual_seed(3)
    models = [Net(), Net()]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [adamw(model) for model in models]
    places: list[Any] = [tmp_path / "one", stripe(3e9, 1e9)]
    for model, optimizer, nvme in zip(models, optimizers, places, strict=True):
        torch.manual_seed(4)
        with starve(model, optimizer, nvme=nvme, config={"state_precision": precision}) as engine:
            loop(model, optimizer, engine)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


def test_a_resumed_run_continues_bit_for_bit(stripe: Callable[..., list[Path]]) -> None:
    torch.manual_seed(3)
    plain = Net()
    begun, resumed = copy.deepcopy(plain), Net()
    torch.manual_seed(4)
    plain_optimizer = adamw(plain)
    expected = loop(plain, plain_optimizer, None)
    paths = stripe(3e9, 1e9)
    torch.manual_seed(4)
    optimizer = adamw(begun)
    losses: list[float] = []

    def stop(_optimizer: Any, _args: Any, _kwargs: Any) -> None:
        if len(optimizer_steps) == 8:
            raise KeyboardInterrupt
        optimizer_steps.append(1)

    optimizer_steps: list[int] = []
    optimizer.register_step_pre_hook(stop)
    with offload.attach(begun, optimizer, nvme=paths, budget="8GiB") as engine:
        engine.keep_streaming()
        with pytest.raises(KeyboardInterrupt):
            loop(begun, optimizer, None)
    paths = stripe(1e9, 9e9)  # measured otherwise now: the record's layout counts
    optimizer = adamw(resumed)
    with offload.attach(resumed, optimizer, nvme=paths, budget="8GiB", resume="must") as engine:
        assert engine.step == 8
        losses = loop(resumed, optimizer, None, first=8)
    assert losses == expected[8:]
    for name, value in plain.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_model_is_built_and_loaded_over_paths(
    stripe: Callable[..., list[Path]], tmp_path: Path
) -> None:
    paths = stripe(2e9, 1e9)
    torch.manual_seed(3)
    plain = Net()
    torch.manual_seed(3)
    with offload.init(budget="8GiB", nvme=paths):
        built = Net()
    torch.manual_seed(4)
    plain_optimizer = adamw(plain)
    expected = loop(plain, plain_optimizer, None)
    torch.manual_seed(4)
    optimizer = adamw(built)
    with offload.attach(built, optimizer):
        assert loop(built, optimizer, None) == expected

    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=128, vocab_size=600, n_positions=64
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "checkpoint")
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    others = [path.with_name(f"other-{path.name}") for path in paths]
    model = offload.load_pretrained(tmp_path / "checkpoint", budget="8GiB", nvme=others)
    for name, value in reference.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    with offload.attach(model, adamw(model)) as engine:
        engine.save_pretrained(tmp_path / "saved")
        assert isinstance(engine._runtime.store.tier.file, StripedFile)
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for name, value in reference.state_dict().items():
        assert torch.equal(value, saved.state_dict()[name]), name
