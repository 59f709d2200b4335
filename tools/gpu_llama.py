"""A stack of Llama-shaped blocks in plain torch, for what is measured on a device."""

from collections.abc import Callable  # noqa: TC003  (as in the package)
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of a stack, and of its one batch: (1, rows, width), float32."""

    width: int
    hidden: int  # of the MLP
    heads: int
    rows: int
    layers: int

    @property
    def saved_nbytes(self) -> int:
        """Roughly what autograd saves of all blocks."""
        return self.layers * self.rows * 4 * (12 * self.width + 4 * self.hidden)


class Block(nn.Module):
    """Norm, rotary attention, norm, gated MLP."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.norm, self.post_norm = (nn.RMSNorm(shape.width) for _ in range(2))
        self.q, self.k, self.v, self.o = (
            nn.Linear(shape.width, shape.width, bias=False) for _ in range(4)
        )
        self.gate, self.up = (nn.Linear(shape.width, shape.hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """(1, rows, width) to the same."""
        q, k, v = self.heads_of(x, cos, sin)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        attended = attended.transpose(1, 2).reshape(x.shape)
        residual, hidden = self.hidden_of(x, attended)
        out: torch.Tensor = residual + self.down(hidden)
        return out

    def heads_of(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> list[torch.Tensor]:
        """Queries, keys and values: (1, heads, rows, width / heads)."""
        normed = self.norm(x)
        split = [one(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                 for one in (self.q, self.k, self.v)]  # fmt: skip
        return [one * cos + _turned(one) * sin for one in split[:2]] + split[2:]

    def hidden_of(
        self, x: torch.Tensor, attended: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual behind attention, and what the last projection takes."""
        residual = x + self.o(attended)
        normed = self.post_norm(residual)
        return residual, F.silu(self.gate(normed)) * self.up(normed)


class Stack(nn.Module):
    """Blocks in a row. ``mark`` is called at each border, in forward and in backward."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        angles = torch.outer(
            torch.arange(shape.rows), 1e4 ** -torch.linspace(0, 1, shape.width // shape.heads // 2)
        ).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        self.mark: Callable[[], None] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(1, rows, width) to a loss."""
        self._border(x)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
            self._border(x)
        return x.square().mean()

    def _border(self, x: torch.Tensor) -> None:
        mark = self.mark
        if mark is not None:
            mark()
            x.register_hook(lambda _gradient: mark())


def _turned(heads: torch.Tensor) -> torch.Tensor:
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
