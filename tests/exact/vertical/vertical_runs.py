"""Models and loops whose micro-batches go through together under an engine, one by one without."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from offload.engine import Engine
from offload.tiers.events import Move

STEPS = 6
MANY_STEPS = 20
VOCABULARY, WIDTH = 300, 96
IN_BACKWARD = {"step_in_backward": True}


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.down(self.dropout(F.gelu(self.up(self.norm(x)))))
        return out


class Net(nn.Module):
    """Tied embeddings, blocks, a batch norm; blocks may be recomputed or skipped."""

    def __init__(
        self, *, dropout: float = 0.0, reentrant: bool | None = None, statistics: bool = True
    ) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(4))
        self.norm = nn.BatchNorm1d(WIDTH, track_running_stats=statistics)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor, uses: tuple[int, ...] = (0, 1, 2, 3)) -> torch.Tensor:
        x = self.embedding(tokens)
        for index in uses:
            block = self.blocks[index]
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        out: torch.Tensor = self.head(self.norm(x.flatten(0, 1)))
        return out


def adamw(model: nn.Module) -> Any:
    return torch.optim.AdamW(model.parameters(), 1e-3)


def token_batches(count: int, seed: int, rows: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (rows, 16), generator=generator) for _ in range(count)]


def loss_of(model: Any, tokens: torch.Tensor, *uses: Any) -> torch.Tensor:
    return F.cross_entropy(model(tokens, *uses), tokens.flatten())


def accumulate(engine: Engine | None, batches: list[Any], forward: Any) -> list[float]:
    """Together under an engine, a loop without."""
    if engine is not None:
        return [loss.item() for loss in engine.accumulate(batches, forward)]
    losses = []
    for batch in batches:
        loss = forward(batch)
        loss.backward()
        losses.append(loss.item())
    return losses


def loop(count: int, steps: int = STEPS, **changes: Any) -> Any:
    def run(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        values = []
        for step in range(steps):
            batches = token_batches(count, step, **changes)
            values += accumulate(engine, batches, lambda tokens: loss_of(model, tokens) / count)
            optimizer.step()
            optimizer.zero_grad()
        return values

    return run


def moves_of(engine: Engine, role: str, side: str) -> list[Move]:
    events: Any = engine._journal.recorder.events  # type: ignore[attr-defined]
    moves = [event for event in events if isinstance(event, Move) and event.role == role]
    return [move for move in moves if getattr(move, side).startswith("file")]


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.ModuleList(nn.Linear(200, 200) for _ in range(3))
        self.right = nn.ModuleList(nn.Linear(200, 200) for _ in range(3))
        self.head = nn.Linear(200, 200)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for block in self.left:
            x = block(x).relu()
        for block in self.right:
            y = block(y + 1).relu()
        out: torch.Tensor = self.head(x + y)
        return out
