"""Everything that needs a GPU, in one command of under 8 minutes.

    python tools/gpu_check.py              # on a CUDA machine: torch, numpy and this checkout
    python tools/gpu_check.py --simulated  # all of its logic, on the simulated device

Runs the contract of the device tier and of the pinned pool, the race scenarios with streams held
up on purpose, a few training steps with weights and optimizer states in each tier (bit-exact
against the same steps in device memory), the pool's rates against torch's pinned memory, its
exact size, the rates that the doctor measures, training through offload.attach within a device
budget, and the memory limit. Prints one table and writes one JSON file below docs/results.

Exit codes: 0 all holds, 1 something does not, 2 there is no CUDA device.
"""

import argparse
import platform
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: list[str] | None = None) -> int:
    """Check, print, write; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--simulated", action="store_true", help="no GPU: the simulated device")
    parser.add_argument("--quick", action="store_true", help="few seeds: a check that it runs")
    parser.add_argument(
        "--only",
        metavar="GROUP",
        help="contract, races, exact, rates, attach, step, arena, pool or budget",
    )
    parser.add_argument("--results", type=Path, metavar="DIR", help="where the JSON file goes")
    options = parser.parse_args(arguments)
    try:
        import torch
    except ImportError:
        print("gpu_check needs torch and numpy: pip install torch numpy", file=sys.stderr)
        return 2
    if not options.simulated and not torch.cuda.is_available():
        print(
            f"torch {torch.__version__} finds no CUDA device. With one, run this again; without "
            "one, --simulated checks the same logic on the simulated device.",
            file=sys.stderr,
        )
        return 2
    make_importable()
    import contract_runner

    missing = contract_runner.import_contract()
    import gpu_checks
    from gpu_report import Report, write

    under_test = gpu_checks.Simulated() if options.simulated else gpu_checks.Cuda()
    report = Report(under_test.name, machine(), only=options.only)
    if missing:
        report.notes.append(f"not installed, and not needed: {', '.join(missing)}")
    print(f"gpu_check on {report.device}, torch {torch.__version__}")
    gpu_checks.run_all(report, under_test, quick=options.quick)
    folder = options.results or (None if options.simulated else ROOT / "docs" / "results")
    if folder is not None:
        print(f"written: {write(report, folder)}")
    failed = sum(not check.holds for check in report.checks)
    print(f"{len(report.checks) - failed} of {len(report.checks)} checks hold on {report.device}")
    return 0 if report.holds else 1


def make_importable() -> None:
    """Import ``offload`` from this checkout, installed or not."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import typetree

    sys.path.insert(0, str(typetree.build(ROOT)))


def machine() -> dict[str, Any]:
    """What this ran on."""
    import torch

    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kernel": platform.release(),
        "cuda": torch.version.cuda,
    }
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        facts |= {
            "gpu": torch.cuda.get_device_name(),
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "gpu_nbytes": total,
            "gpu_free_nbytes": free,
        }
    return facts


if __name__ == "__main__":
    sys.exit(main())
