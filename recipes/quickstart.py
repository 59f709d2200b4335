"""What `make run` runs: fine-tune a 124M-parameter model in 40 % of the memory it asks for.

    python recipes/quickstart.py [--runs DIR] [--steps N] [--quick]

1. Make a checkpoint of GPT-2's shape, once (random weights: no hub is reachable everywhere).
2. Take two steps of the plain PyTorch job in a child process and see what memory it asks for.
3. Give the same job 40 % of that, and train it under Offload: `recipes/finetune_lm.py` with the
   settings of `recipes/finetune_lm.yaml`.
4. Print what it took and what it brought; leave the figures in ``result.json``.

Run it again: what was made is kept, an interrupted training goes on, a finished one starts anew.
Everything is under ``runs/quickstart``. Progress goes to stderr, the result to stdout. This
process stays small on purpose: a child inherits its parent's peak in the kernel's books.

Exit codes: 0 done, 130 interrupted, else the code of the part that failed.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from offload.recipes.children import ChildError, run_child

RECIPES = Path(__file__).resolve().parent
# Beside the recipes in a repository; where Offload is installed as a wheel, the current folder.
HOME = RECIPES.parent if (RECIPES.parent / "pyproject.toml").is_file() else Path()
BUDGET_SHARE = 0.4
PLAIN_STEPS = 2  # the second one holds weights, gradients, states and activations at once
MIB = 1 << 20
PEAKS_DIFFER_NBYTES = 32 * MIB  # the kernel counts a process's pages in batches, per thread

# --quick is for tests: a model so small that the Python process is nearly all of the memory.
QUICK_MODEL = ["--vocabulary=512", "--positions=64", "--width=64", "--layers=2", "--heads=2"]
QUICK_JOB = ["--batch=2", "--seq=32", "--steps=4", "--warmup=1", "--lr=0.01"]
QUICK_BUDGET_SHARE = 1.5

RESULT_KEYS = (
    "plain_peak_bytes",
    "budget_bytes",
    "peak_bytes",
    "loss_before",
    "loss_after",
    "heldout_before",
    "heldout_after",
    "step_s",
    "compute_s",
    "stall_s",
    "optimizer_s",
    "read_bytes_per_step",
    "written_bytes_per_step",
)


def say(message: str) -> None:
    """Progress, for people."""
    print(message, file=sys.stderr, flush=True)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; empty if there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``path`` whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def key_of(*parts: object) -> str:
    """Names a result by what it depends on: these parts, the recipes, and the libraries."""
    digest = hashlib.sha256(repr(parts).encode())
    for path in sorted(RECIPES.glob("*.py")) + sorted(RECIPES.glob("*.yaml")):
        digest.update(path.read_bytes())
    for library in ("torch", "transformers", "tokenizers"):
        digest.update(importlib.metadata.version(library).encode())
    return digest.hexdigest()


def ensure_checkpoint(place: Path, model: list[str]) -> None:
    """Make ``place/checkpoint`` unless it is there as ``model`` describes it."""
    made = place / "checkpoint.json"
    key = key_of("checkpoint", model)
    if read_json(made).get("key") == key and (place / "checkpoint" / "config.json").is_file():
        return
    say("making a checkpoint: GPT-2's shape, random weights, a tokenizer trained on the text")
    run_child([RECIPES / "make_checkpoint.py", place / "checkpoint", *model])
    write_json(made, {"key": key})


def ensure_plain_peak(place: Path, job: list[str]) -> int:
    """Peak resident set of the job in plain PyTorch, in bytes; measured once."""
    key = key_of("plain", job)
    known = read_json(place / "plain.json")
    if known.get("key") == key:
        return int(known["peak_bytes"])
    say(f"plain PyTorch: {PLAIN_STEPS} steps to see what memory the job asks for")
    flags = [*job, f"--steps={PLAIN_STEPS}", "--plain"]
    peak_nbytes = run_child([RECIPES / "finetune_lm.py", *flags]).peak_nbytes
    write_json(place / "plain.json", {"key": key, "peak_bytes": peak_nbytes})
    return peak_nbytes


def train(place: Path, job: list[str], budget_nbytes: int) -> dict[str, Any]:
    """The job under Offload in a child process; goes on with an interrupted one.

    Raises:
        ChildError: it failed, or its peak is not what the kernel says, or is over the budget.
    """
    command = [*job, f"--budget=host={budget_nbytes // MIB}MiB"]
    key = key_of("training", command)
    finished = place / "training.json"
    resume = read_json(place / "job.json").get("key") == key and not finished.exists()
    if not resume:
        shutil.rmtree(place / "record", ignore_errors=True)
        finished.unlink(missing_ok=True)
        write_json(place / "job.json", {"key": key})
    say(f"Offload: {budget_nbytes / MIB:,.0f} MiB")
    paths = [f"--nvme={place / 'store'}", f"--record={place / 'record'}", f"--result={finished}"]
    mode = f"--resume={'auto' if resume else 'never'}"
    child = run_child([RECIPES / "finetune_lm.py", *command, *paths, mode])
    result = read_json(finished)
    differ_nbytes = abs(child.peak_nbytes - result["peak_bytes"])
    if differ_nbytes > PEAKS_DIFFER_NBYTES:
        raise ChildError(f"two measurements of the peak differ by {differ_nbytes:,} bytes", 1)
    result["peak_bytes"] = max(child.peak_nbytes, result["peak_bytes"])
    if result["peak_bytes"] > budget_nbytes:
        excess = result["peak_bytes"] - budget_nbytes
        raise ChildError(f"the peak is {excess:,} bytes over the budget", 1)
    return result


def table_of(result: dict[str, Any]) -> Table:
    """The figures, for people."""

    def mib(name: str) -> str:
        return f"{result[name] / MIB:,.0f} MiB"

    share = result["budget_bytes"] / result["plain_peak_bytes"]
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("plain PyTorch needs", mib("plain_peak_bytes"))
    table.add_row("budget", f"{mib('budget_bytes')} ({share:.0%})")
    table.add_row("measured peak", f"{mib('peak_bytes')} (the kernel's peak resident set)")
    for label, name in (("training loss", "loss"), ("held-out loss", "heldout")):
        table.add_row(label, f"{result[name + '_before']:.3f} -> {result[name + '_after']:.3f}")
    table.add_row(
        "step time",
        f"{result['step_s']:.2f} s: compute {result['compute_s']:.2f}, "
        f"stall {result['stall_s']:.2f}, optimizer {result['optimizer_s']:.2f}",
    )
    moved = f"{mib('read_bytes_per_step')} read, {mib('written_bytes_per_step')} written"
    table.add_row("per step", moved)
    return table


def run(place: Path, *, steps: int | None, quick: bool) -> dict[str, Any]:
    """All four parts; returns what ``result.json`` holds.

    Raises:
        ChildError: a part failed.
    """
    place.mkdir(parents=True, exist_ok=True)
    (place / "result.json").unlink(missing_ok=True)
    ensure_checkpoint(place, QUICK_MODEL if quick else [])
    job = [f"--checkpoint={place / 'checkpoint'}", *(QUICK_JOB if quick else [])]
    plain_peak_nbytes = ensure_plain_peak(place, job)
    share = QUICK_BUDGET_SHARE if quick else BUDGET_SHARE
    budget_nbytes = int(plain_peak_nbytes * share) // MIB * MIB
    steps_given = [] if steps is None else [f"--steps={steps}"]
    figures = train(place, [*job, *steps_given], budget_nbytes)
    figures["plain_peak_bytes"] = plain_peak_nbytes
    result = {name: figures[name] for name in RESULT_KEYS}
    write_json(place / "result.json", result)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the quickstart; the return value is the exit code."""
    parser = argparse.ArgumentParser(description="Fine-tune a 124M model in 40 % of its memory.")
    parser.add_argument("--runs", type=Path, default=HOME / "runs", metavar="DIR")
    parser.add_argument("--steps", type=int, metavar="N")
    parser.add_argument("--quick", action="store_true", help="a tiny model, for tests")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # for the children: all they need is here
    place = arguments.runs.resolve() / "quickstart"
    try:
        result = run(place, steps=arguments.steps, quick=arguments.quick)
    except ChildError as error:
        say(f"quickstart: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        say("quickstart: interrupted; the same command goes on")
        return 130
    console = Console()
    console.print(table_of(result))
    console.print(f"report: offload report {place / 'record'}", soft_wrap=True, highlight=False)
    console.print(f"figures: {place / 'result.json'}", soft_wrap=True, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
