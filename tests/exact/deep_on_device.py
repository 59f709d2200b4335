"""A model of equal layers that trains within a part of its bytes on a device."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

WIDTH, LAYERS = 256, 6
MIB = 1 << 20


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Deep(nn.Module):
    """12 MiB of weights, and as many of gradients, in layers of 1 MiB."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.register_buffer("scale", torch.full((WIDTH,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x * self.scale


def loop(model: Any, optimizer: Any, steps: int = 6) -> list[float]:
    values = []
    for _ in range(steps):
        x = torch.randn(96, WIDTH)
        loss = model(x).square().mean()
        loss.backward()
        values.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    return values


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-3)
