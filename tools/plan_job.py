"""The job that ``plan_prediction`` compares predictions with: some steps of a decoder of any shape.

Prints one JSON object: the plan's baseline, the resident set's peak of each step, times and bytes.
"""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch

import offload
from fit_job import VOCABULARY, Decoder, Shape, loss_of
from offload.tiers.engines.registry import wrapping
from offload.tiers.hostmem import peak_resident_nbytes
from offload.tiers.wrappers import Link, ThrottledEngine

WARM = 2  # steps: the first learns, the second has grown


def _restart_peak() -> int:
    """The kernel's peak so far, and a new one from now on."""
    peak = peak_resident_nbytes()
    Path("/proc/self/clear_refs").write_text("5")
    return peak


@contextmanager
def making(dtype: torch.dtype) -> Iterator[None]:
    """New parameters are of ``dtype`` meanwhile."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def main() -> None:
    """Train; print the JSON result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", required=True, metavar="LAYERS,WIDTH,HEADS")
    parser.add_argument("--sequence", type=int, required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--micro-batches", type=int, default=1, help="of a step")
    parser.add_argument("--budget", required=True)
    parser.add_argument("--nvme", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5, help="at most")
    parser.add_argument(
        "--enough-s", type=float, help="no more once those behind the second took so long"
    )
    parser.add_argument("--bytes-per-s", type=float, help="throttle the drive")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--paths", type=int, default=1, help="directories of the store, in --nvme")
    parser.add_argument("--config", default="{}", help="further settings, as JSON")
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    shape = Shape(*map(int, options.shape.split(",")))
    throttled: AbstractContextManager[None] = nullcontext()
    if options.bytes_per_s:
        link = Link(bytes_per_s=options.bytes_per_s)
        throttled = wrapping(lambda engine: ThrottledEngine(engine, link))
    stores = [options.nvme / str(number) for number in range(options.paths)]
    steps_s: list[float] = []
    peaks: list[int] = []
    with throttled:
        with (
            offload.init(
                budget=options.budget,
                nvme=stores if options.paths > 1 else options.nvme,
                config=json.loads(options.config),
            ),
            making(getattr(torch, options.dtype)),
        ):
            model = Decoder(shape)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        engine = offload.attach(model, optimizer, record=options.record)
        peaks.append(_restart_peak())  # of building the model
        for step in range(options.steps):
            if options.enough_s and sum(steps_s[WARM:]) >= options.enough_s:
                break
            began_s = time.perf_counter()
            seeded = torch.Generator().manual_seed(step)
            for _ in range(options.micro_batches):
                tokens = torch.randint(
                    VOCABULARY, (options.batch, options.sequence + 1), generator=seeded
                )
                (loss_of(model, tokens) / options.micro_batches).backward()
            optimizer.step()
            optimizer.zero_grad()
            steps_s.append(time.perf_counter() - began_s)
            peaks.append(_restart_peak())
        result = {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "steps_s": steps_s,
            "peaks_nbytes": peaks,
            "stats": asdict(engine.stats),
            "plan": json.loads(engine.plan.to_json()),
        }
        engine.detach()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
