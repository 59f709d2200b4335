"""How close the streamed AdamW step comes to the disk's own limit, measured side by side.

A model's weights, gradients and states live on the disk; one step reads {p, g, m, v} and writes
{p, m, v}. The limit moves as many bytes, mixed in the same proportion, by plain direct I/O.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import offload
from benchlib import Result, arguments, finish, quantiles
from iolimit import DiskLimit

REPEATS = 5


class Weights(nn.Module):
    """Matrices whose gradients are cheap to make."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.matrices = nn.ParameterList(
            nn.Parameter(torch.zeros(width, width)) for _ in range(count)
        )

    def forward(self) -> torch.Tensor:
        return torch.stack([matrix.sum() for matrix in self.matrices]).sum()


def main() -> int:
    """Run and print."""
    options = arguments(__doc__ or "").parse_args()
    count, width = (4, 1024) if options.quick else (48, 2048)
    options.nvme.mkdir(parents=True, exist_ok=True)
    ratios, limits, rates, seconds = [], [], [], []
    with tempfile.TemporaryDirectory(dir=options.nvme) as folder:
        with offload.init(budget="host=1400MiB", nvme=folder):
            model = Weights(count, width)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        with offload.attach(model, optimizer, commit="manual") as engine:
            engine.keep_streaming()
            moved = 7 * 4 * count * width * width
            limit = DiskLimit(Path(folder), min(moved, 4 << 30))
            for repeat in range(REPEATS + 2):
                model().backward()
                engine.gradients.drain()
                began_s = time.perf_counter()
                optimizer.step()
                step_s = time.perf_counter() - began_s
                optimizer.zero_grad()
                ceiling = limit.mixed_bytes_per_s(4 / 7, moved)
                if repeat < 2:  # the first step has no states to read, the second warms up
                    continue
                rates.append(moved / step_s)
                limits.append(ceiling)
                ratios.append(rates[-1] / ceiling)
                seconds.append(step_s)
            limit.close()
    result = Result("Streamed AdamW step against the disk's own limit")
    result.add(
        parameters=count * width * width,
        step_s=statistics.median(seconds),
        streamed_bytes_per_s=statistics.median(rates),
        limit_bytes_per_s=statistics.median(limits),
        ratio_min_median_max=quantiles(ratios),
    )
    if not options.quick:
        result.check("share of the mixed read/write limit", statistics.median(ratios), 0.85)
    return finish(result, options.json)


if __name__ == "__main__":
    sys.exit(main())
