"""The job that ``bench_fit`` runs inside its memory limit: some steps of a decoder, any size.

Prints one JSON object: the peak resident set, what each step and its forward cost the process
(``stepmeter``) and, under Offload, its own account of the steps.
"""

import argparse
import json
import statistics
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import offload
from offload.tiers.hostmem import peak_resident_nbytes
from stepmeter import StepMeter

VOCABULARY = 32_000
SEQUENCE = 128


@dataclass(frozen=True)
class Shape:
    """A decoder-only transformer, untied head, no biases in its matrices."""

    layers: int
    width: int
    heads: int


SHAPES = {
    "124M": Shape(layers=12, width=768, heads=12),
    "350M": Shape(layers=24, width=1024, heads=16),
    "1.3B": Shape(layers=24, width=2048, heads=16),
    "3B": Shape(layers=32, width=2688, heads=21),
}


class Block(nn.Module):
    """Pre-norm attention and a four times wider GELU layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.heads = shape.heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (batch, sequence, width)
        batch, sequence, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, sequence, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, sequence, width))
        y: torch.Tensor = x + self.down(F.gelu(self.up(self.mlp_norm(x))))
        return y


class Decoder(nn.Module):
    """Token embedding, blocks, norm, head."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # (batch, sequence) of int64
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


def loss_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Next-token cross entropy."""
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.reshape(-1, VOCABULARY), tokens[:, 1:].reshape(-1))


def resident_compute_s(shape: Shape) -> float:
    """Seconds of forward, backward and fused AdamW with everything in memory.

    Measured with one block and with three; the difference gives a block, the rest is the
    embedding, the head and the loss. Medians of three steps after a warm-up.
    """
    few, more = (_step_s(replace(shape, layers=layers)) for layers in (1, 3))
    return few + (more - few) / 2 * (shape.layers - 1)


def _step_s(shape: Shape) -> float:
    torch.manual_seed(0)
    model = Decoder(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(VOCABULARY, (1, SEQUENCE + 1))
    times = []
    for _ in range(4):
        began_s = time.perf_counter()
        loss_of(model, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - began_s)
    return statistics.median(times[1:])


def main() -> None:
    """Train a few steps; print the JSON result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SHAPES, required=True)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--budget", help="host budget; without it the run is plain PyTorch")
    parser.add_argument("--nvme", type=Path)
    parser.add_argument("--commit", choices=["step", "never"], default="step")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--step-in-backward", action="store_true")
    parser.add_argument("--step-in-forward", action="store_true")
    parser.add_argument("--compute", action="store_true", help="measure resident compute only")
    arguments = parser.parse_args()
    if arguments.compute:
        print(json.dumps({"compute_s": resident_compute_s(SHAPES[arguments.size])}))
        return
    plain = arguments.budget is None
    torch.manual_seed(0)
    building = (
        nullcontext() if plain else offload.init(budget=arguments.budget, nvme=arguments.nvme)
    )
    began_s = time.perf_counter()
    with building:
        model = Decoder(SHAPES[arguments.size])
    built_s = time.perf_counter() - began_s
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    engine = None
    if not plain:
        engine = offload.attach(
            model,
            optimizer,
            record=arguments.record,
            commit=arguments.commit,
            config={
                "step_in_backward": arguments.step_in_backward,
                "step_in_forward": arguments.step_in_forward,
            },
        )
    losses, meter, forward = [], StepMeter(), StepMeter()
    for step in range(arguments.steps):
        tokens = torch.randint(
            VOCABULARY, (1, SEQUENCE + 1), generator=torch.Generator().manual_seed(step)
        )
        with meter.step():
            with forward.step():
                loss = loss_of(model, tokens)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    result = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "losses": losses,
        "built_s": built_s,
        "peak_nbytes": peak_resident_nbytes(),
        **asdict(meter),
        "forward": asdict(forward),
    }
    if engine is not None:
        result |= {"stats": asdict(engine.stats), "plan": json.loads(engine.plan.to_json())}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
