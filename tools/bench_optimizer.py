"""The optimizer step: close to the disk's own limit, and beside plain PyTorch and DeepSpeed.

First the streamed AdamW step alone. A model's weights, gradients and states live on the disk; one
step reads {p, g, m, v} and writes {p, m, v}. The limit moves as many bytes, mixed in the same
proportion, by plain direct I/O.

The same step where the budget has room for all of it: beside plain PyTorch's, step by step in turn,
until the median of the ratios is known to 2 %; so are whole processes of either, with a model.

Then whole training steps of one model in processes of their own: plain PyTorch in memory; Offload
with everything on a file, the optimizer behind backward and in it, there also with states in
bfloat16 and in 8 bits and with bfloat16 weights and float32 masters, and with everything in memory;
DeepSpeed's ZeRO-3 with the optimizer on NVMe, where it is installed. What a way costs is its step
beyond the forward and backward of plain PyTorch; bytes are the kernel's count for the process.
Beside each stands what no schedule could go below: the seconds in which the disk alone moves these
bytes, mixed as they are, and in which all processors do the work that the process gave them.
Threads that wait busily for one another count as work: OMP_WAIT_POLICY=passive in the environment
leaves the work itself.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import offload
from benchlib import Result, arguments, finish, median_interval, quantiles
from iolimit import DiskLimit
from optimizer_job import IN_MEMORY, MASTERS, WAYS
from stepmeter import processors_s

REPEATS = 5
WARM_UPS = 2  # states are made in the first step, pages are warm after the second
# Shares of plain PyTorch's peak resident set that Offload gets.
BUDGETS = {"tiny": 1.5, "70M": 0.45, "350M": 0.35}
AMPLE = 3.0  # the same share where everything is to stay in memory
MOST_IN_MEMORY = 1.05  # of plain PyTorch's step
SURE = 0.02  # of a median of ratios: what is asked for leaves 0.05
STEP_PAIRS = (30, 400)  # least and most, in one process
JOB_PAIRS = (7, 15)  # of processes
_JOB = Path(__file__).with_name("optimizer_job.py")
_MIB = 1 << 20
_LIMIT_NBYTES = 1 << 30  # moved to find the disk's rate for one way


class Weights(nn.Module):
    """Matrices whose gradients are cheap to make."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.matrices = nn.ParameterList(
            nn.Parameter(torch.zeros(width, width)) for _ in range(count)
        )

    def forward(self) -> torch.Tensor:
        return torch.stack([matrix.sum() for matrix in self.matrices]).sum()


def alone(result: Result, folder: Path, *, quick: bool) -> None:
    """The streamed step against the disk's own limit."""
    count, width = (4, 1024) if quick else (48, 2048)
    ratios, limits, rates, seconds = [], [], [], []
    with offload.init(budget="host=1400MiB", nvme=folder):
        model = Weights(count, width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    with offload.attach(model, optimizer, commit="manual") as engine:
        engine.keep_streaming()
        moved = 7 * 4 * count * width * width
        limit = DiskLimit(folder, min(moved, 4 << 30))
        for repeat in range(REPEATS + WARM_UPS):
            model().backward()
            engine.gradients.drain()
            began_s = time.perf_counter()
            optimizer.step()
            step_s = time.perf_counter() - began_s
            optimizer.zero_grad()
            ceiling = limit.mixed_bytes_per_s(4 / 7, moved)
            if repeat < WARM_UPS:
                continue
            rates.append(moved / step_s)
            limits.append(ceiling)
            ratios.append(rates[-1] / ceiling)
            seconds.append(step_s)
        limit.close()
    result.add(
        model=f"{count * width * width / 1e6:.0f}M of matrices",
        way="streamed step alone",
        step_s=statistics.median(seconds),
        moved_bytes_per_s=statistics.median(rates),
        disk_bytes_per_s=statistics.median(limits),
        share_min_median_max=quantiles(ratios),
    )
    if not quick:
        result.check("share of the mixed read/write limit", statistics.median(ratios), 0.9)


def in_memory(result: Result, folder: Path, *, quick: bool) -> None:
    """The step with everything in memory against plain PyTorch's, in turn in one process."""
    count, width = (4, 512) if quick else (24, 2048)
    least, most = (6, 6) if quick else STEP_PAIRS
    plain, model = Weights(count, width), Weights(count, width)
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-4, fused=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    budget = f"host={2 + 10 * 4 * count * width * width // (1 << 30)}GiB"
    seconds: list[tuple[float, float]] = []
    with offload.attach(model, optimizer, budget=budget, nvme=folder, commit="manual") as engine:
        for repeat in range(most + WARM_UPS):
            if repeat % 2:  # neither is always the one behind the other
                ours_s = _timed_step(model, optimizer)
                plain_s = _timed_step(plain, plain_optimizer)
            else:
                plain_s = _timed_step(plain, plain_optimizer)
                ours_s = _timed_step(model, optimizer)
            if repeat >= WARM_UPS:
                seconds.append((plain_s, ours_s))
            if len(seconds) >= least and _is_sure(_ratios(seconds)):
                break
        kept = len(engine.plan.resident_states)
    result.add(
        model=f"{count * width * width / 1e6:.0f}M of matrices",
        way=f"{IN_MEMORY}: states of {kept} of {count} matrices",
        **_of_pairs(seconds, ours="step_s"),
    )
    result.check("states that are in memory", kept, count)
    if not quick:
        result.at_most(
            "step visible part over plain fused AdamW's",
            statistics.median(_ratios(seconds)),
            MOST_IN_MEMORY,
        )


def _ratios(seconds: Sequence[tuple[float, float]]) -> list[float]:
    return [ours_s / plain_s for plain_s, ours_s in seconds]


def _is_sure(ratios: Sequence[float]) -> bool:
    low, high = median_interval(ratios)
    return high - low <= 2 * SURE


def _of_pairs(seconds: Sequence[tuple[float, float]], ours: str) -> dict[str, Any]:
    """What pairs of plain and our seconds tell; ``ours`` is the name of the latter."""
    ratios = _ratios(seconds)
    low, high = median_interval(ratios)
    return {
        ours: statistics.median(ours_s for _, ours_s in seconds),
        "plain_step_s": statistics.median(plain_s for plain_s, _ in seconds),
        "ratio_min_median_max": quantiles(ratios),
        "pairs": len(ratios),
        "ratio_median_interval": f"{low:.3g} to {high:.3g}",
    }


def _timed_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    model().backward()
    began_s = time.perf_counter()
    optimizer.step()
    step_s = time.perf_counter() - began_s
    optimizer.zero_grad()
    return step_s


def beside(result: Result, size: str, folder: Path, ways: Sequence[str]) -> None:
    """Whole steps of one model, plain and each of ``ways``."""
    runs: dict[str, dict[str, Any]] = {}
    limit = DiskLimit(folder, _LIMIT_NBYTES)
    for way in [way for way in WAYS if way == "plain" or way in ways]:
        share = AMPLE if way == IN_MEMORY else BUDGETS[size]
        most = share * runs["plain"]["peak_nbytes"] if runs else 0
        figures, why = _run(size, way, f"host={int(most) // _MIB}MiB", folder)
        if figures is None:
            result.notes.append(f"{size}, {way}: could not be run: {why}")
            result.at_most(f"{size}, {way}: could not be run", 1, 0)
            continue
        runs[way] = figures
        compute_s = runs["plain"]["step_s"] - runs["plain"]["visible_s"]
        figures["cost_s"] = figures["step_s"] - compute_s
        figures["disk_s"] = _disk_s(limit, figures["read_nbytes"], figures["written_nbytes"])
        result.add(model=size, way=way, **figures)
    limit.close()
    if size != "tiny":
        _check(result, size, runs)
        if IN_MEMORY in runs:
            _in_memory_jobs(result, size, folder, runs)


def _in_memory_jobs(
    result: Result, size: str, folder: Path, runs: dict[str, dict[str, Any]]
) -> None:
    """Plain PyTorch and everything in memory, each in processes of its own, in turn."""
    seconds = [(runs["plain"]["visible_s"], runs[IN_MEMORY]["visible_s"])]
    least, most = JOB_PAIRS
    budget = f"host={int(AMPLE * runs['plain']['peak_nbytes']) // _MIB}MiB"
    while len(seconds) < least or (len(seconds) < most and not _is_sure(_ratios(seconds))):
        ways = ("plain", IN_MEMORY)[:: -1 if len(seconds) % 2 else 1]
        found = {way: _run(size, way, budget, folder) for way in ways}
        if why := "".join(why for _, why in found.values()):
            result.notes.append(f"{size}, {IN_MEMORY}, in turn: could not be run: {why}")
            break
        plain, ours = (found[way][0] or {} for way in ("plain", IN_MEMORY))
        seconds.append((plain["visible_s"], ours["visible_s"]))
    result.add(
        model=size,
        way=f"{IN_MEMORY}, processes in turn",
        **_of_pairs(seconds, ours="visible_s"),
    )
    result.at_most(
        f"{size}: step visible part over plain fused AdamW's",
        statistics.median(_ratios(seconds)),
        MOST_IN_MEMORY,
    )


def _disk_s(limit: DiskLimit, read: int, written: int) -> float:
    """Seconds in which the disk alone moves so many bytes, reads and writes mixed as they are."""
    if not read + written:
        return 0.0
    rates = [limit.mixed_bytes_per_s(read / (read + written), _LIMIT_NBYTES) for _ in range(3)]
    return (read + written) / statistics.median(rates)


def _run(size: str, way: str, budget: str, folder: Path) -> tuple[dict[str, Any] | None, str]:
    store = folder / "job"
    command = [sys.executable, str(_JOB), "--size", size, "--way", way, "--nvme", str(store)]
    command += ["--steps", str(REPEATS + WARM_UPS), "--budget", budget]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    shutil.rmtree(store, ignore_errors=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        tail = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        return None, f"exit code {done.returncode}: {''.join(tail)[:300]}"
    job = json.loads(lines[-1])

    def median(name: str) -> float:
        return float(statistics.median(job[name][WARM_UPS:]))

    return {
        "step_s": median("steps_s"),
        "visible_s": median("visible_s"),
        "processors_s": processors_s(job["processor_s"][WARM_UPS:]),
        "read_nbytes": int(median("read_nbytes")),
        "written_nbytes": int(median("written_nbytes")),
        "peak_nbytes": job["peak_nbytes"],
        "parameters": job["parameters"],
        "last_loss": job["losses"][-1],
    }, ""


def _check(result: Result, size: str, runs: dict[str, dict[str, Any]]) -> None:
    plain, ours = runs["plain"], runs.get("in backward")
    if ours is None:
        return
    same = ours["last_loss"] == plain["last_loss"]
    result.check(f"{size}: the loss is plain PyTorch's, bit for bit", float(same), 1)
    share = ours["peak_nbytes"] / plain["peak_nbytes"]
    result.at_most(f"{size}: peak resident set over plain PyTorch's", share, BUDGETS[size])
    rounded = runs.get("in backward, bf16 states")
    if rounded is not None:
        apart = abs(rounded["last_loss"] / plain["last_loss"] - 1)
        result.at_most(f"{size}: loss with bf16 states, off plain PyTorch's", apart, 0.01)
    if coded := runs.get("in backward, 8bit states"):
        apart = abs(coded["last_loss"] / plain["last_loss"] - 1)
        result.at_most(f"{size}: loss with 8bit states, off plain PyTorch's", apart, 0.02)
        result.at_most(  # 4 of weight, 65/64 of each state
            f"{size}: bytes a parameter written with 8bit states",
            coded["written_nbytes"] / coded["parameters"],
            (4 + 2 * 65 / 64) * 1.01,
        )
    if split := runs.get(MASTERS):  # 2 of weight, 2 of its master's rest, 4 and 4 of states
        result.at_most(
            f"{size}: bytes a parameter written with masters",
            split["written_nbytes"] / split["parameters"],
            12 * 1.01,
        )
        result.at_most(  # of the weight twice, none of the gradient
            f"{size}: bytes a parameter read with masters",
            split["read_nbytes"] / split["parameters"],
            14 * 1.01,
        )
    peers = [figures for way, figures in runs.items() if way.startswith("deepspeed")]
    if not peers:
        return
    cost_s = min(peer["cost_s"] for peer in peers)
    result.check(f"{size}: cost of DeepSpeed's best over ours", cost_s / ours["cost_s"], 2)
    if rounded is not None:
        share = cost_s / rounded["cost_s"]
        result.check(f"{size}: cost of DeepSpeed's best over ours with bf16 states", share, 4)
    visible_s = min(peer["visible_s"] for peer in peers)
    result.at_most(
        f"{size}: part behind backward over DeepSpeed's", ours["visible_s"] / visible_s, 0.25
    )
    leanest = min(peer["peak_nbytes"] for peer in peers)
    result.at_most(
        f"{size}: peak resident set over DeepSpeed's leanest", ours["peak_nbytes"] / leanest, 0.3
    )


def main() -> int:
    """Run and print."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--sizes", nargs="*", choices=BUDGETS, help="models of the whole steps")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=WAYS, help="beside plain")
    parser.add_argument("--steps-only", action="store_true", help="leave out the step alone")
    options = parser.parse_args()
    options.nvme.mkdir(parents=True, exist_ok=True)
    result = Result("The optimizer step: the disk's limit, plain PyTorch, DeepSpeed")
    for part in () if options.steps_only else (alone, in_memory):
        with tempfile.TemporaryDirectory(dir=options.nvme) as folder:
            part(result, Path(folder), quick=options.quick)
    default = ["tiny"] if options.quick else ["70M", "350M"]
    for size in default if options.sizes is None else options.sizes:
        with tempfile.TemporaryDirectory(dir=options.nvme) as folder:
            beside(result, size, Path(folder), options.ways)
    return finish(result, options.json)


if __name__ == "__main__":
    sys.exit(main())
