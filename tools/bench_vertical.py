"""Gradient accumulation in vertical order beside the loop: bytes moved, step time, peak.

One decoder with checkpointed blocks, AdamW, n micro-batches a step, each way in a process of its
own: plain PyTorch in memory; Offload within a share of its peak, by a loop over the micro-batches
and by ``engine.accumulate``, the optimizer behind backward and in it. Bytes are those of the
lanes in the last step, seconds the median of the steps behind the first two.
"""

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchlib import Result, arguments, finish
from vertical_job import WAYS

SHARE = {"tiny": 1.5, "70M": 0.5, "350M": 0.4}  # of plain PyTorch's peak
WARM_UPS = 2
_JOB = Path(__file__).with_name("vertical_job.py")
_MIB = 1 << 20


def beside(result: Result, size: str, count: int, steps: int, folder: Path) -> None:
    """All ways of one model."""
    runs: dict[str, dict[str, Any]] = {}
    budget_mib = 0
    for way in WAYS:
        figures, why = _run(size, way, count, steps, budget_mib, folder)
        if figures is None:
            result.notes.append(f"{size}, {way}: could not be run: {why}")
            result.at_most(f"{size}, {way}: could not be run", 1, 0)
            continue
        runs[way] = figures
        result.notes += [f"{size}, {way}: {notice}" for notice in figures.pop("notices")]
        result.add(model=size, micro_batches=count, way=way, **figures)
        if way == "plain":
            budget_mib = int(SHARE[size] * figures["peak_nbytes"]) // _MIB
    _check(result, size, runs, budget_mib)


def _run(
    size: str, way: str, count: int, steps: int, budget_mib: int, folder: Path
) -> tuple[dict[str, Any] | None, str]:
    store = folder / "job"
    command = [sys.executable, str(_JOB), "--size", size, "--way", way, "--nvme", str(store)]
    command += ["--count", str(count), "--steps", str(steps), "--budget", f"host={budget_mib}MiB"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    shutil.rmtree(store, ignore_errors=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        tail = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        return None, f"exit code {done.returncode}: {''.join(tail)[:300]}"
    job = json.loads(lines[-1])
    moved = job["moved"][-1]
    names = ("weight_read", "gradient_read", "gradient_written", "activation_written")
    return {
        "step_s": statistics.median(job["steps_s"][WARM_UPS:]),
        **{f"{name}_nbytes": moved.get(name, 0) for name in names},
        "all_read_nbytes": sum(moved[name] for name in moved if name.endswith("_read")),
        "all_written_nbytes": sum(moved[name] for name in moved if name.endswith("_written")),
        "peak_nbytes": job["peak_nbytes"],
        "last_loss": job["losses"][-1],
        "notices": job["notices"],
    }, ""


def _check(result: Result, size: str, runs: dict[str, dict[str, Any]], budget_mib: int) -> None:
    for way, figures in runs.items():
        if way == "plain":
            continue
        same = figures["last_loss"] == runs["plain"]["last_loss"]
        result.check(f"{size}, {way}: the loss is plain PyTorch's, bit for bit", float(same), 1)
        share = figures["peak_nbytes"] / (budget_mib * _MIB)
        result.at_most(f"{size}, {way}: peak resident set over the budget", share, 1)
    for step in ("", ", in backward"):
        loop, together = runs.get(f"horizontal{step}"), runs.get(f"vertical{step}")
        if loop is None or together is None or size == "tiny":
            continue
        moved = [figures["all_read_nbytes"] + figures["all_written_nbytes"]
                 for figures in (together, loop)]  # fmt: skip
        result.at_most(
            f"{size}{step}: bytes moved, vertical over horizontal", moved[0] / moved[1], 1
        )
        seconds = together["step_s"] / loop["step_s"]
        result.at_most(f"{size}{step}: step time, vertical over horizontal", seconds, 1)


def main() -> int:
    """Compare; print the table, write the JSON."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--sizes", nargs="+", choices=SHARE, default=["70M", "350M"])
    parser.add_argument("--count", type=int, default=4, help="micro-batches of a step")
    options = parser.parse_args()
    result = Result(f"Gradient accumulation of {options.count} micro-batches, by order")
    options.nvme.mkdir(parents=True, exist_ok=True)
    for size in ["tiny"] if options.quick else options.sizes:
        steps = WARM_UPS + (1 if options.quick else 5)
        beside(result, size, options.count, steps, options.nvme)
    return finish(result, options.json)


if __name__ == "__main__":
    sys.exit(main())
