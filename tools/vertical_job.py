"""The job that ``bench_vertical`` compares: steps of several micro-batches, one way of many.

Prints one JSON object: times of whole steps, bytes that the lanes moved by role and direction, and
the process's peak resident set.
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

import offload
from fit_job import VOCABULARY, Block, Decoder, Shape, loss_of
from offload.tiers.events import ListRecorder, Move
from offload.tiers.hostmem import peak_resident_nbytes

SHAPES = {
    "tiny": Shape(layers=3, width=128, heads=2),
    "70M": Shape(layers=12, width=512, heads=8),
    "350M": Shape(layers=24, width=1024, heads=16),
}
WAYS = ("plain", "horizontal", "vertical", "horizontal, in backward", "vertical, in backward")
SEQUENCE = 64


class CheckpointedBlock(Block):
    """Saves its input only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (batch, sequence, width)
        y: torch.Tensor = checkpoint(super().forward, x, use_reentrant=False)
        return y


def main() -> None:
    """Train; print the JSON result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SHAPES, required=True)
    parser.add_argument("--way", choices=WAYS, required=True)
    parser.add_argument("--count", type=int, default=4, help="micro-batches of a step")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--budget", default="host=1GiB")
    parser.add_argument("--nvme", type=Path, required=True)
    options = parser.parse_args()
    torch.manual_seed(0)
    way, count = options.way, options.count
    options.nvme.mkdir(parents=True, exist_ok=True)
    if way == "plain":
        model, engine = _decoder(SHAPES[options.size]), None
    else:
        with offload.init(budget=options.budget, nvme=options.nvme):
            model = _decoder(SHAPES[options.size])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if way != "plain":
        in_backward = way.endswith("in backward")
        config = {"step_in_backward": True, "accumulation_steps": count} if in_backward else {}
        engine = offload.attach(model, optimizer, commit="never", config=config)
    losses, steps_s, moved = [], [], []
    for step in range(options.steps):
        if engine is not None:
            engine._journal.recorder = ListRecorder()
        generator = torch.Generator().manual_seed(step)
        batches = torch.randint(VOCABULARY, (count, 1, SEQUENCE + 1), generator=generator)
        began_s = time.perf_counter()
        if engine is not None and way.startswith("vertical"):
            parts = engine.accumulate(batches, lambda tokens: loss_of(model, tokens) / count)
        else:
            parts = []
            for tokens in batches:
                loss = loss_of(model, tokens) / count
                loss.backward()
                parts.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        steps_s.append(time.perf_counter() - began_s)
        losses.append(sum(part.item() for part in parts))
        moved.append({} if engine is None else _moved(engine._journal.recorder))
    notices = [] if engine is None else engine.notices
    figures = {"losses": losses, "steps_s": steps_s, "moved": moved, "notices": notices}
    print(json.dumps({**figures, "peak_nbytes": peak_resident_nbytes()}))


def _decoder(shape: Shape) -> Decoder:
    model = Decoder(shape)
    for block in model.blocks:
        block.__class__ = CheckpointedBlock
    return model


def _moved(recorder: object) -> dict[str, int]:
    """Bytes by role and direction."""
    assert isinstance(recorder, ListRecorder)
    counts: Counter[str] = Counter()
    for event in recorder.events:
        if isinstance(event, Move):
            counts[f"{event.role}_{'read' if event.dst == 'host' else 'written'}"] += event.nbytes
    return dict(counts)


if __name__ == "__main__":
    main()
