"""Small models of every shape, and loops that train them: in memory, and under Offload."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from offload.engine import Engine

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


def accumulating_loop(
    model: Any, optimizer: Any, _engine: Engine | None, *, steps: int, most_passes: int = 2
) -> list[float]:
    """Accumulation, clipping, evaluation between steps."""
    values = []
    for step in range(steps):
        for _ in range(1 + step % most_passes):
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


def crossed_loop(
    model: Any, optimizer: Any, _engine: Engine | None, *, steps: int, set_to_none: bool = True
) -> list[float]:
    """Several backwards of one forward, and several forwards of one backward."""
    values = []
    for _ in range(steps):
        loss = loss_of(model, tokens_of(4, 32))
        loss.backward(retain_graph=True)
        loss.backward()  # the same graph once more
        first, second = (loss_of(model, tokens_of(2, 32)) for _ in range(2))
        (first * second).backward()  # two forwards, one backward
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        values += [loss.item(), first.item(), second.item()]
    return values


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


def labelled_loop(model: Any, optimizer: Any, _engine: Engine | None, *, steps: int) -> list[float]:
    """As scripts train what the library ``transformers`` has."""
    model.train()
    values = []
    for _ in range(steps):
        tokens = tokens_of(2, 48)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    return values
