"""Lookups in a table on the drive, none of whose rows are in memory: asked for, and faulted in.

    python tools/bench_lookups.py

A lookup asks for the pages of all its rows before it reads them (``swap/looked_up``). In turn with
that, rows are left to page faults, as they would be without.
"""

import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn

import offload
from benchlib import Result, arguments, finish, quantiles
from offload.engine import Engine
from offload.tiers import hostmem

_CASES = ((32_000, 128, 64), (32_000, 512, 128), (32_000, 256, 1024), (32_000, 2048, 128))
_SMALL = ((4_000, 128, 64),)
_PAIRS = 15


def measure(result: Result, folder: Path, rows: int, width: int, looked_up: int) -> None:
    """One table, and lookups of so many rows."""
    model = nn.Sequential(nn.Embedding(rows, width), nn.Linear(width, 8))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with (
        tempfile.TemporaryDirectory(dir=folder) as store,
        offload.attach(model, optimizer, budget="8GiB", nvme=store, commit="never") as engine,
    ):
        engine.keep_streaming()
        asked: list[float] = []
        faulted: list[float] = []
        for _ in range(_PAIRS):
            asked.append(_lookup_s(engine, model[0], looked_up))
            with patch.object(hostmem, "will_need"):
                faulted.append(_lookup_s(engine, model[0], looked_up))
    result.add(
        table=f"{rows} x {width}",
        rows=looked_up,
        asked_s=quantiles(asked),
        faulted_s=quantiles(faulted),
    )
    pairs = sorted(one / other for one, other in zip(asked, faulted, strict=True))
    result.at_most(
        f"{looked_up} of {rows} x {width}: asked for over faulted in", pairs[len(pairs) // 2], 1.0
    )


def _lookup_s(engine: Engine, table: nn.Module, looked_up: int) -> float:
    engine.weights.uncache(["0.weight"])
    assert isinstance(table, nn.Embedding)
    indices = torch.randint(table.num_embeddings, (1, looked_up))
    with torch.no_grad():
        began_s = time.perf_counter()
        table(indices)
        return time.perf_counter() - began_s


def main() -> int:
    """Measure and print."""
    options = arguments(__doc__ or "").parse_args()
    result = Result("Lookups in a table on the drive")
    options.nvme.mkdir(parents=True, exist_ok=True)
    for case in _SMALL if options.quick else _CASES:
        measure(result, options.nvme, *case)
    return finish(result, options.json)


if __name__ == "__main__":
    sys.exit(main())
