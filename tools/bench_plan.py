"""What plans promise, against what they are held to.

    python tools/bench_plan.py --part memory --json runs/bench/plan_memory.json

``memory``: addresses of a step's transients, in two levels, on recorded steps of transformers.
``published``: results of papers, from their own figures of the hardware, by the simulator.
``prediction``: peaks and steps of real runs, predicted before; half an hour on a quiet machine.
``simulator``: how fast steps are simulated, and what planning a deep model takes.
``placement``: where everything goes over all tiers, against fixed rules.
"""

import sys
from collections.abc import Callable

import bench_plan_memory
import bench_plan_placement
import bench_plan_simulator
import bench_published
import plan_prediction
from benchlib import Result, arguments, finish

PARTS: dict[str, Callable[..., None]] = {
    "memory": bench_plan_memory.measure,
    "prediction": plan_prediction.measure,
    "published": bench_published.measure,
    "simulator": bench_plan_simulator.measure,
    "placement": bench_plan_placement.measure,
}


def main() -> int:
    """Run and print."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all of them")
    options = parser.parse_args()
    parts = options.part or list(PARTS)
    result = Result(f"Plans: {', '.join(parts)}")
    for part in parts:
        where = {"nvme": options.nvme} if part == "prediction" else {}
        PARTS[part](result, quick=options.quick, **where)
    return finish(result, options.json)


if __name__ == "__main__":
    sys.exit(main())
