"""What the tests of steps inside backward and inside the next forward share: models and loops.

``make_model`` gives a weight ``scale`` and a parameter ``empty`` of no element, beside two layers.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from offload.engine import Engine


def adamw(model: nn.Module) -> Any:
    return torch.optim.AdamW(model.parameters(), 1e-3, fused=True)


def loss_of(model: Any, x: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(model(x) * model.scale, x) + model.empty.sum()


def loop(model: Any, optimizer: Any, _engine: Engine | None, *, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = loss_of(model, torch.randn(32, 300))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def scheduled_loop(
    model: Any, optimizer: Any, _engine: Engine | None, *, steps: int
) -> list[float]:
    """The model is called in parts, of which some steps leave one out; a schedule runs."""
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps + 1)
    losses = []
    for step in range(steps):
        x = torch.randn(32, 300)
        hidden = F.gelu(model[0](x))
        loss = F.mse_loss(model[2](hidden), x) if step % 3 else hidden.square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


class Tied(nn.Module):
    """A weight of two uses, blocks that are recomputed, one layer that a step may leave out."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.embedding = nn.Embedding(400, 96)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(96), nn.Linear(96, 384), nn.GELU(), nn.Linear(384, 96))
            for _ in range(3)
        )
        self.left_out = nn.Linear(96, 256)
        self.head = nn.Linear(96, 400, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            if self.reentrant is None:
                x = x + block(x)
            else:
                x = x + checkpoint(block, x, use_reentrant=self.reentrant)
        out: torch.Tensor = self.head(x) + 0 * self.left_out(x).sum()
        return out


def tokens_loop(model: Any, optimizer: Any, _engine: Engine | None, *, steps: int) -> list[float]:
    """Of ``Tied``."""
    losses = []
    for _ in range(steps):
        tokens = torch.randint(400, (4, 64))
        loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        optimizer.step()
        model.zero_grad()
        losses.append(loss.item())
    return losses


class PutOff:
    """How many parameters were put off until the next forward, in all steps of a test."""

    def __init__(self) -> None:
        self.count = 0
