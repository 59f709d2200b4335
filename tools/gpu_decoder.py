"""The small decoder that the GPU checks train, its sizes and its batches: always the same."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How large the model and its batches are.

    Attributes:
        budget_nbytes: of the device.
    """

    width: int
    inner: int
    layers: int
    vocabulary: int
    batch: int
    tokens: int
    steps: int
    budget_nbytes: int
    dtype: torch.dtype = torch.float32
    checkpointed: bool = False
    place_first: bool = False  # the model is on the device before it is attached


# Weights and gradients of 0.75 GiB, and activations of as much.
REAL = Shape(
    width=768, inner=2048, layers=12, vocabulary=8192, batch=4, tokens=256, steps=20,
    budget_nbytes=640 * MIB,
)  # fmt: skip
SMALL = Shape(
    width=128, inner=256, layers=2, vocabulary=256, batch=2, tokens=16, steps=3,
    budget_nbytes=8 * MIB,
)  # fmt: skip


class Attention(nn.Module):
    """Causal, by plain operations, whose backward is deterministic."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 64
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        q, k, v = (
            part.view(batch, tokens, self.heads, -1).transpose(1, 2)
            for part in self.qkv(x).chunk(3, -1)
        )
        scores = (q @ k.transpose(-1, -2)) * (width // self.heads) ** -0.5 + mask
        mixed: torch.Tensor = self.out(
            (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, width)
        )
        return mixed


class Layer(nn.Module):
    """As in Llama: RMS norms, attention, a gated unit."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(shape.width) for _ in range(2))
        self.attention = Attention(shape.width)
        self.gate, self.up = (nn.Linear(shape.width, shape.inner, bias=False) for _ in range(2))
        self.down = nn.Linear(shape.inner, shape.width, bias=False)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norms[0](x), mask)
        y = self.norms[1](x)
        y = nn.functional.silu(self.gate(y)) * self.up(y)
        result: torch.Tensor = x + self.down(y)
        return result


class Model(nn.Module):
    """A small decoder with a tied head and a mask among its buffers."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.checkpointed = shape.checkpointed
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        mask = torch.full((shape.tokens, shape.tokens), float("-inf")).triu(1)
        self.register_buffer("mask", mask)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            if self.checkpointed:
                x = checkpoint(layer, x, self.mask, use_reentrant=False)
            else:
                x = layer(x, self.mask)
        logits = self.head(self.norm(x)).float()
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def make_model(shape: Shape) -> Model:
    """Always the same one, on the host."""
    torch.manual_seed(7)
    return Model(shape).to(shape.dtype)


def batches(shape: Shape, count: int) -> list[torch.Tensor]:
    """Always the same ones, on the host."""
    random = torch.Generator().manual_seed(8)
    size = shape.batch, shape.tokens
    return [torch.randint(shape.vocabulary, size, generator=random) for _ in range(count)]
