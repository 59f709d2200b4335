"""Token-wise recompute on a CUDA device: what alpha is solved from, and how good it is.

    python tools/bench_tokenwise_gpu.py --json FILE          # under 2 minutes; torch and numpy
    python tools/bench_tokenwise_gpu.py --simulated --quick  # the same logic without a GPU

For a link at its full rate and at fractions of it: a table of the blocks' times as measured for
the solver beside those that events tell of passes without hooks, the passes of the trials, and the
steps of the solved alpha beside fixed ones. Exit codes: 0 all holds, 1 something does not, 2 there
is no CUDA device.
"""

import argparse
import json
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import gpu_check

TIMES = (1, 2, 4)  # slower than the link is
_ROUNDS, _LIMIT_S = 9, 12.0


@dataclass
class Check:
    """One figure that is asked for, and whether it holds."""

    name: str
    value: float
    target: str
    holds: bool


@dataclass
class Found:
    """Rows of figures, checks, and what went wrong."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def run_link(found: Found, device: Any, times: int, *, quick: bool) -> None:
    """Measure behind one link; an error is a check that does not hold, and not the end."""
    import gpu_alpha

    name = f"link 1/{times}"

    def say(text: str) -> None:
        print(f"  {time.perf_counter() - began_s:6.1f} s  {name}: {text}", flush=True)

    began_s = time.perf_counter()
    shape = gpu_alpha.SMALL if device.name == "simulated" else gpu_alpha.FULL
    try:
        measured = gpu_alpha.measure(
            device, shape, times, rounds=2 if quick else _ROUNDS, limit_s=_LIMIT_S, say=say
        )
        tell(found, measured, name, judged=device.name != "simulated")
    except Exception as error:  # noqa: BLE001  told, and the other links are still measured
        found.notes.append(f"{name}: {traceback.format_exc()}")
        found.checks.append(Check(f"{name}: {type(error).__name__}", 0.0, "no error", holds=False))


def tell(found: Found, measured: Any, name: str, *, judged: bool) -> None:
    """Rows and checks of one link."""
    import gpu_alpha

    report = measured.report
    if measured.relaxed:
        found.notes.append(f"{name}: rebuilt rows were allowed to differ in their last bits")
    figures = {
        "forward of a block": (report.cost and report.cost.forward_s, measured.plain.forward_s),
        "backward of a block": (report.cost and report.cost.backward_s, measured.plain.backward_s),
        "rebuild of all rows": (report.cost and report.cost.rebuild_s, measured.plain.rebuild_s),
        "a GB over the link": (
            1e9 / max(measured.link_bytes_per_s, 1.0),
            1e9 / measured.plain_bytes_per_s,
        ),
    }
    low, high = gpu_alpha.BAND
    for what, (mine, reference) in figures.items():
        ratio = mine / reference if mine is not None else float("nan")
        found.rows.append(
            {"link": name, "what": what, "measured_s": mine, "reference_s": reference,
             "ratio": ratio}
        )  # fmt: skip
        if what != "rebuild of all rows":  # whose reference is only nearly the same work
            target = f"{low}..{high}"
            check = Check(f"{name}: {what}, measured over reference", ratio, target,
                          gpu_alpha.in_band(ratio))  # fmt: skip
            found.checks.append(check)
    for what, seconds in gpu_alpha.trial_times(report).items():
        found.rows.append({"link": name, "what": f"trial of alpha {what}", "measured_s": seconds})
    for one in (measured.solved, *measured.fixed):
        found.rows.append(
            {"link": name, "what": f"step, alpha {one.alpha}", "measured_s": one.median_s,
             "alpha": one.swapped, "ratio": one.median_s / measured.best.median_s}
        )  # fmt: skip
    solved = report.solution.alpha if report.solution is not None else float("nan")
    settled = gpu_alpha.name_of(report.settled)
    found.notes.append(
        f"{name}: alpha solved {solved:.3f}, trials settled on {settled}; best fixed "
        f"{measured.best.alpha}; {report.rebuilt_nbytes} bytes of a block are rebuilt, refused "
        f"cuts {list(report.refused)} of {report.rows}; cost {report.cost}"
    )
    ratio = measured.over(measured.best)
    if judged:
        check = Check(f"{name}: solved alpha's step over the best fixed one's", ratio, "<= 1.05",
                      ratio <= 1.05)  # fmt: skip
        found.checks.append(check)


def show(found: Found) -> None:
    """One line for each row, check and note."""
    for row in found.rows:
        figures = [
            f"{name} {row[name]:.5g}"
            for name in ("measured_s", "reference_s", "ratio", "alpha")
            if row.get(name) is not None
        ]
        print(f"{row['link']:<10}  {row['what']:<24}  {'  '.join(figures)}")
    for check in found.checks:
        state = "ok  " if check.holds else "FAIL"
        print(f"{state}  {check.name}: {check.value:.3f} ({check.target})")
    for note in found.notes:
        print(note)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--simulated", action="store_true", help="no GPU: the simulated device")
    parser.add_argument("--quick", action="store_true", help="one link, few steps")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    options = parser.parse_args(arguments)
    import torch

    if not options.simulated and not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no CUDA device", file=sys.stderr)
        return 2
    gpu_check.make_importable()
    import contract_runner

    contract_runner.import_contract()
    import gpu_checks

    device = gpu_checks.Simulated() if options.simulated else gpu_checks.Cuda()
    print(f"bench_tokenwise_gpu on {device.name}, torch {torch.__version__}")
    found = Found()
    for times in TIMES[:1] if options.quick else TIMES:
        run_link(found, device, times, quick=options.quick)
    show(found)
    if options.json is not None:
        document = {
            "format": 1,
            "command": " ".join(["tools/bench_tokenwise_gpu.py", *sys.argv[1:]]),
            "device": device.name,
            "machine": gpu_check.machine(),
            "rows": found.rows,
            "checks": [asdict(check) for check in found.checks],
            "notes": found.notes,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0 if all(check.holds for check in found.checks) else 1


if __name__ == "__main__":
    sys.exit(main())
