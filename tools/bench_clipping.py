"""What clipping and unscaling of gradients in scratch cost: streamed, and through their mappings.

Gradients larger than the memory of the process are clipped by torch's own functions, in turn as a
stream (as while Offload is attached) and through the mappings behind ``p.grad`` (as torch alone
does it, and Offload did before). The optimizer's step follows each call, for what a call leaves in
the page cache the step need not read; so does a flush, for what a call leaves to the kernel to
write must be written. What is told is the time and the bytes beyond a backward and a step without
any call, by the kernel's count for the process, in a memory cgroup where this machine has them.
"""

import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import offload
from benchlib import Result, arguments, finish, quantiles
from cgroup import CgroupUnavailableError, MemoryCgroup
from offload.engine import Engine
from offload.swap.known_norms import KnownNorms
from offload.swap.torch_seams import lead, leave

WAYS = ("mapping", "stream")
NOTHING = "no call"
_MIB = 1 << 20
_KERNEL_NBYTES = 64 * _MIB  # what a cgroup counts beside the resident set
Call = Callable[[list[nn.Parameter], torch.optim.Optimizer], object]


def _unscale(_parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    scaler.unscale_(optimizer)


def _unscale_and_clip(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    _unscale(parameters, optimizer)
    nn.utils.clip_grad_norm_(parameters, 1.0)


CALLS: dict[str, Call] = {
    NOTHING: lambda _parameters, _optimizer: None,
    "clip_grad_norm_, norm below the limit": lambda ps, _: nn.utils.clip_grad_norm_(ps, 1e30),
    "clip_grad_norm_, norm above it": lambda ps, _: nn.utils.clip_grad_norm_(ps, 1.0),
    "clip_grad_value_": lambda ps, _: nn.utils.clip_grad_value_(ps, 1e-3),
    "GradScaler.unscale_": _unscale,
    "unscale_, then clip_grad_norm_": _unscale_and_clip,
}


class Weights(nn.Module):
    """Matrices whose gradients are cheap to make."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.matrices = nn.ParameterList(
            nn.Parameter(torch.zeros(width, width)) for _ in range(count)
        )

    def forward(self) -> torch.Tensor:
        return torch.stack([matrix.sum() for matrix in self.matrices]).sum()


def measure(folder: Path, count: int, width: int, budget: str, repeats: int) -> dict[str, Any]:
    """Seconds, bytes read and written, and the peak resident set of every call and its step."""
    with offload.init(budget=budget, nvme=folder):
        model = Weights(count, width)
    optimizer = torch.optim.SGD(model.parameters(), 1e-6)
    rows: dict[str, list[tuple[float, int, int, int]]] = {}
    with offload.attach(model, optimizer, commit="never") as engine:
        engine.keep_streaming()
        for _ in range(repeats):
            for name, call in CALLS.items():
                for way in WAYS if name != NOTHING else ("stream",):
                    # As a loop does it that always makes this call: the first tells what comes.
                    engine.gradients.places.norms = KnownNorms(engine.gradients.scratch.file)
                    _once(engine, model, optimizer, call, way)
                    figures = _once(engine, model, optimizer, call, way)
                    rows.setdefault(f"{name}|{way}", []).append(figures)
    return rows


def _once(
    engine: Engine, model: nn.Module, optimizer: torch.optim.Optimizer, call: Call, way: str
) -> tuple[float, int, int, int]:
    gc.collect()
    before = _moved()
    began_s = time.perf_counter()
    model().backward()  # counts, for norms are taken there
    engine.gradients.drain()
    engine._runtime.governor.restart_peak()
    if way == "mapping":
        leave(engine.gradient_stream)
    try:
        call(list(model.parameters()), optimizer)
    finally:
        lead(engine.gradient_stream)
    peak_nbytes = engine._runtime.governor.seen_nbytes
    optimizer.step()
    engine.gradients.scratch.file.sync()
    spent_s = time.perf_counter() - began_s
    optimizer.zero_grad()
    after = _moved()
    return spent_s, after[0] - before[0], after[1] - before[1], peak_nbytes


def _moved() -> tuple[int, int]:
    """Bytes that this process had drives read and write, write-back of its pages included."""
    lines = Path("/proc/self/io").read_text().splitlines()
    counts = dict(line.split(": ") for line in lines)
    return int(counts["read_bytes"]), int(counts["write_bytes"])


def main() -> int:
    """Run and print."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--job", help="internal: measure in this process")
    options = parser.parse_args()
    if options.job:
        count, width, budget, repeats = options.job.split(",")
        rows = measure(options.nvme, int(count), int(width), budget, int(repeats))
        print(json.dumps(rows))
        return 0
    count, width, budget_mib, repeats = (12, 2048, 448, 1) if options.quick else (48, 2048, 640, 5)
    folder = options.nvme / "clipping"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    result = Result(f"Gradients of {count * width * width * 4 / _MIB:.0f} MiB, {budget_mib} MiB")
    command = [sys.executable, __file__, "--nvme", str(folder)]
    command += ["--job", f"{count},{width},host={budget_mib}MiB,{repeats}"]
    found = json.loads(_run(command, budget_mib * _MIB + _KERNEL_NBYTES, result))
    shutil.rmtree(folder, ignore_errors=True)
    _tell(result, found, 4 * count * width * width, budget_mib * _MIB, quick=options.quick)
    return finish(result, options.json)


def _run(command: list[str], limit_nbytes: int, result: Result) -> str:
    try:
        with MemoryCgroup("offload-clipping", limit_nbytes) as group:
            done = group.run(command, env=os.environ)
            if done.returncode == 0:
                return done.stdout
            raise SystemExit(f"the job ended with {done.returncode}: {done.stderr}")
    except CgroupUnavailableError as error:
        result.notes.append(f"outside of a memory cgroup, so with all its page cache: {error}")
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _tell(
    result: Result, rows: dict[str, Any], nbytes: int, budget_nbytes: int, *, quick: bool
) -> None:
    alone_s, alone_read, alone_written, _ = _medians(rows[f"{NOTHING}|stream"])
    result.add(call=NOTHING, way="backward and step alone", seconds=alone_s)
    for name in CALLS:
        if name == NOTHING:
            continue
        ratios = [
            mapping[0] / stream[0]
            for mapping, stream in zip(*(rows[f"{name}|{way}"] for way in WAYS), strict=True)
        ]
        for way in WAYS:
            seconds, read, written, peak_nbytes = _medians(rows[f"{name}|{way}"])
            result.add(
                call=name,
                way=way,
                seconds=seconds,
                beyond_the_step_s=seconds - alone_s,
                times_read=round((read - alone_read) / nbytes, 2),
                times_written=round((written - alone_written) / nbytes, 2),
                peak_nbytes=peak_nbytes,
                mapping_over_stream=quantiles(ratios) if way == "stream" else None,
            )
        if not quick:
            result.check(f"{name}: with its step, over the stream's", statistics.median(ratios), 1)
    peaks = [row[3] for name, found in rows.items() if name.endswith("stream") for row in found]
    result.at_most("a streamed call's peak over the budget", max(peaks) / budget_nbytes, 1)


def _medians(figures: list[list[float]]) -> list[float]:
    return [statistics.median(column) for column in zip(*figures, strict=True)]


if __name__ == "__main__":
    raise SystemExit(main())
