"""Token rows rebuilt on a device, in training through ``attach``: every bit as in memory."""

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import transformers
from device_runs import attach_starved, computing_on, train_both
from exact_models import adamw
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from offload.engine import Engine
from offload.tiers.accelerator import Accelerator
from offload.tiers.cpudevice import CpuAccelerator
from offload.tiers.testing import assert_no_race, find_race

ROWS, WIDTH, LAYERS, STEPS = 256, 128, 3, 4


class Layer(nn.Module):
    """As in Llama: norms, attention by plain operations, a gated unit; and a buffer."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.before, self.behind = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.gate, self.up = (nn.Linear(WIDTH, 2 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.register_buffer("scale", torch.full((WIDTH,), 0.5))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, rows, _ = x.shape
        q, k, v = (
            part.view(batch, rows, 4, -1).transpose(1, 2)
            for part in self.qkv(self.before(x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).reshape(batch, rows, -1)))
        y = self.behind(x) * self.scale
        return x + self.dropout(self.down(F.silu(self.gate(y)) * self.up(y)))


class Decoder(nn.Module):
    """With a tied head, and layers that repeat in a list."""

    def __init__(self, dropout: float = 0.0, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.embedding = nn.Embedding(64, WIDTH)
        self.layers = nn.ModuleList(Layer(dropout) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 64, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        logits: torch.Tensor = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def loop(
    model: Any, optimizer: Any, _engine: Engine | None, *, steps: int = STEPS, dtype: Any = None
) -> list[float]:
    """Accumulation, clipping, a graph that is used twice."""
    values = []
    for step in range(steps):
        for part in range(1 + step % 2):
            tokens = torch.randint(64, (2, ROWS))
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                loss = model(tokens)
            loss.backward(retain_graph=not part)
            if not part:
                loss.backward()
            values.append(loss.item())
        values.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
    return values


def settings(alpha: float | str) -> dict[str, Any]:
    return {"config": {"recompute": "tokenwise", "alpha": alpha, "min_swap_nbytes": 1024}}


def rebuilt_nbytes(engine: Engine) -> int:
    assert engine.tokenwise is not None
    return sum(report.rebuilt_nbytes for report in engine.tokenwise.report())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("alpha", [0.0, 0.5, "auto"])
def test_rows_are_rebuilt(alpha: float | str, dropout: float, tmp_path: Path) -> None:
    engine = train_both(
        partial(Decoder, dropout), adamw, loop, CpuAccelerator(), tmp_path, **settings(alpha)
    )
    assert engine.tokenwise is not None
    assert engine.tokenwise.block_names == [f"layers.{at}" for at in range(LAYERS)]
    for report in engine.tokenwise.report():
        assert report.gave_up is None
        assert not any("differ" in reason or "can't" in reason for reason, _ in report.whole)
    if alpha != "auto":
        assert rebuilt_nbytes(engine) > 0


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
def test_rows_are_rebuilt_under_autocast(dtype: torch.dtype, tmp_path: Path) -> None:
    cast_loop = partial(loop, dtype=dtype)
    engine = train_both(Decoder, adamw, cast_loop, CpuAccelerator(), tmp_path, **settings(0.5))
    assert rebuilt_nbytes(engine) > 0


def test_checkpointed_regions_are_left_to_themselves(tmp_path: Path) -> None:
    make = partial(Decoder, checkpointed=True)
    engine = train_both(make, adamw, loop, CpuAccelerator(), tmp_path, **settings(0.0))
    assert rebuilt_nbytes(engine) == 0


def test_frozen_layers_are_rebuilt_too(tmp_path: Path) -> None:
    def make() -> nn.Module:
        model = Decoder(0.1)
        for layer in model.layers:
            layer.requires_grad_(False)
            layer.gate.requires_grad_(True)
        return model

    engine = train_both(make, adamw, loop, CpuAccelerator(), tmp_path, **settings(0.0))
    assert rebuilt_nbytes(engine) > 0


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_transformers(name: str, tmp_path: Path) -> None:
    def make() -> Any:
        if name == "llama":
            config: Any = transformers.LlamaConfig(
                vocab_size=64, hidden_size=WIDTH, intermediate_size=2 * WIDTH,
                num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                max_position_embeddings=ROWS,
            )  # fmt: skip
            return transformers.LlamaForCausalLM(config)
        config = transformers.GPT2Config(
            vocab_size=64, n_positions=ROWS, n_embd=WIDTH, n_layer=2, n_head=4
        )
        return transformers.GPT2LMHeadModel(config)

    def labelled(model: Any, optimizer: Any, _engine: Engine | None) -> list[float]:
        values = []
        model.train()
        for _ in range(STEPS):
            tokens = torch.randint(64, (2, ROWS))
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            values.append(loss.item())
        return values

    engine = train_both(make, adamw, labelled, CpuAccelerator(), tmp_path, **settings(0.0))
    assert rebuilt_nbytes(engine) > 0


def test_a_weight_that_is_changed_before_backward_is_noticed(tmp_path: Path) -> None:
    accelerator = CpuAccelerator()
    torch.manual_seed(0)
    model = Decoder()
    engine = attach_starved(model, adamw(model), accelerator, tmp_path, **settings(0.0))
    tokens = torch.randint(64, (2, ROWS))
    with engine, computing_on(accelerator, engine):
        for _ in range(2):
            model(tokens).backward()
        loss = model(tokens)
        with torch.no_grad():
            model.layers[1].behind.weight.mul_(2)
        with pytest.raises(RuntimeError, match=r"modified by an inplace"):
            loss.backward()


def train(device: Accelerator) -> list[torch.Tensor]:
    """Losses and weights of some steps, with rebuilt rows in all but the first."""
    torch.manual_seed(0)
    model = Decoder()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    results: list[torch.Tensor] = []
    with TemporaryDirectory() as folder:
        engine = attach_starved(model, optimizer, device, Path(folder), **settings(0.5))
        with engine, computing_on(device, engine):
            for step in range(3):
                tokens = torch.randint(64, (1 + step % 2, ROWS))
                loss = model(tokens)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                results.append(torch.tensor(loss.item()))
            assert rebuilt_nbytes(engine) > 0
    return [*results, *(value.clone() for value in model.state_dict().values())]


@pytest.mark.slow
def test_no_order_of_the_device_changes_a_bit() -> None:
    assert_no_race(train, seeds=range(4))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 200, 50))  # a test may take five minutes
def test_no_order_of_the_device_changes_a_bit_under_many_seeds(first: int) -> None:
    assert_no_race(train, seeds=range(first, first + 50))


def test_rebuilding_without_waiting_for_what_it_starts_from_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("offload.swap.places.DevicePlace.order", lambda *_: True)
    assert find_race(train, seeds=range(20)) is not None
