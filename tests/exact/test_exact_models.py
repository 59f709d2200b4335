"""Models of every shape, streamed, give the bits they give in memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from offload.engine import Engine

STEPS = 20
VOCABULARY = 512


class Net(nn.Module):
    """Tied embeddings, dropout, a frozen layer, an unused one, a batch norm."""

    def __init__(self, recompute: bool | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 128)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(128), nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128))
            for _ in range(3)
        )
        self.norm = nn.BatchNorm1d(128)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(128, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.unused = nn.Linear(200, 200)
        self.blocks[1].requires_grad_(False)
        self.recompute = recompute  # None: keep; else: checkpoint, reentrant or not

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            if self.recompute is None or not self.training:
                x = x + block(x)
            else:
                x = x + checkpoint(block, self.dropout(x), use_reentrant=self.recompute)
        x = self.norm(self.dropout(x).transpose(1, 2)).transpose(1, 2)
        return self.head(x)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, 1e-3, fused=True)


def tokens_of(*shape: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, shape)


def loss_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


def plain_loop(model: Any, optimizer: Any, _engine: Engine | None) -> list[float]:
    """Accumulation, clipping, evaluation between steps."""
    values = []
    for step in range(STEPS):
        for _ in range(1 + step % 2):
            loss = loss_of(model, tokens_of(4, 32))
            loss.backward()
        values.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            values += [loss.item(), loss_of(model, tokens_of(2, 32)).item()]
        model.train()
    return values


@pytest.mark.parametrize("recompute", [None, False, True], ids=["keep", "checkpoint", "reentrant"])
def test_a_network_with_everything(recompute: bool | None, compare: Any) -> None:
    same = compare(lambda: Net(recompute), adamw, plain_loop)
    assert same.moved_roles() >= {"weight", "gradient", "state", "activation"}


def test_residency_that_grows_changes_no_bit(compare: Any) -> None:
    def growing(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        if engine is not None:
            engine.weights.keep([name for name in engine.weights.weights if "0" in name])
        return plain_loop(model, optimizer, engine)

    same = compare(Net, adamw, growing)
    assert any(weight.in_memory for weight in same.engine.weights.weights.values())


def test_several_backwards_and_forwards(compare: Any) -> None:
    def loop(model: Any, optimizer: Any, _engine: Engine | None) -> list[float]:
        values = []
        for _ in range(STEPS):
            loss = loss_of(model, tokens_of(4, 32))
            loss.backward(retain_graph=True)
            loss.backward()  # the same graph once more
            first, second = (loss_of(model, tokens_of(2, 32)) for _ in range(2))
            (first * second).backward()  # two forwards, one backward
            optimizer.step()
            optimizer.zero_grad()
            values += [loss.item(), first.item(), second.item()]
        return values

    compare(Net, adamw, loop)


def test_double_backward(compare: Any) -> None:
    def make_model() -> nn.Module:
        return nn.Sequential(nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 200))

    def loop(model: Any, optimizer: Any, _engine: Engine | None) -> list[float]:
        values = []
        for _ in range(STEPS):
            x = torch.randn(128, 200, requires_grad=True)
            (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
            penalty = (slope.norm() - 1) ** 2
            penalty.backward()
            optimizer.step()
            optimizer.zero_grad()
            values.append(penalty.item())
        return values

    compare(make_model, lambda model: torch.optim.AdamW(model.parameters(), 1e-3), loop)


def test_saved_tensor_changed_in_place_raises_as_plain_autograd_does(starve: Any) -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.Sigmoid())
    starve(model, torch.optim.SGD(model.parameters(), 0.1))
    output = model(torch.randn(256, 256))
    with torch.no_grad():
        output.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64])
def test_other_types(dtype: torch.dtype, compare: Any) -> None:
    def loop(model: Any, optimizer: Any, _engine: Engine | None) -> list[float]:
        values = []
        for _ in range(STEPS):
            output = model(torch.randn(64, 256, dtype=dtype))
            loss = output.abs().float().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            values.append(loss.item())
        return values

    same = compare(
        lambda: nn.Linear(256, 256, dtype=dtype),
        lambda model: torch.optim.Adam(model.parameters(), 1e-3),
        loop,
    )
    assert same.moved_roles() >= {"weight", "gradient", "state"}


def test_sparse_gradients(compare: Any) -> None:
    def loop(model: Any, optimizer: Any, _engine: Engine | None) -> list[float]:
        values = []
        for _ in range(STEPS):
            loss = model(tokens_of(8)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            values.append(loss.item())
        return values

    compare(
        lambda: nn.Embedding(VOCABULARY, 128, sparse=True),
        lambda model: torch.optim.SparseAdam(list(model.parameters()), 1e-2),
        loop,
    )


TRANSFORMERS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=64, n_embd=128, n_layer=2, n_head=4
        )
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        )
    ),
    "bert": lambda: transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=256, max_position_embeddings=64,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name: str, compare: Any) -> None:
    def loop(model: Any, optimizer: Any, _engine: Engine | None) -> list[float]:
        model.train()
        values = []
        for _ in range(STEPS):
            tokens = tokens_of(2, 48)
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            values.append(loss.item())
        return values

    same = compare(TRANSFORMERS[name], adamw, loop)
    assert same.moved_roles() >= {"weight", "gradient", "state", "activation"}
