"""kill -9 `make run`'s training at random moments, again and again, then let it finish.

The quickstart runs twice over the same checkpoint: once undisturbed, once killed with all its
children at ``--kills`` moments drawn at random from the first third of a run, so that it takes
many starts to get to the end. Only kills that meet a living run count. The final weights, by their
checksum, and every loss must be the same.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchlib import Result, arguments, finish

QUICKSTART = Path(__file__).resolve().parent.parent / "recipes" / "quickstart.py"


def main() -> int:
    """Run and print."""
    parser = arguments(__doc__ or "", nvme=Path("runs/kill"))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    command = [
        sys.executable,
        str(QUICKSTART),
        f"--runs={options.nvme}",
        f"--steps={options.steps}",
    ]
    command += ["--quick"] if options.quick else []
    place = options.nvme / "quickstart"
    _run(command)  # makes the checkpoint and measures the plain job, once
    began_s = time.monotonic()
    _run(command)
    calm_s = time.monotonic() - began_s
    calm = _training(place)
    moments = random.Random(options.seed)
    (place / "training.json").unlink()
    (place / "job.json").unlink()
    killed, steps = 0, []
    while killed < options.kills:  # a run that ends before its moment counts for nothing
        if _run_and_kill(command, moments.uniform(0, calm_s / 3)):
            killed += 1
            steps.append(_steps_recorded(place))
    _run(command)
    disturbed = _training(place)
    result = Result("The quickstart, killed and resumed")
    same = [float(calm[key] == disturbed[key]) for key in ("weights_xxh3", "losses")]
    result.add(
        kills=killed,
        calm_s=calm_s,
        steps=options.steps,
        steps_seen_at_kills=" ".join(map(str, steps)),
        weights_xxh3=disturbed["weights_xxh3"],
    )
    result.check("final weights are the same, bit for bit", same[0], 1)
    result.check("every loss is the same", same[1], 1)
    return finish(result, options.json)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _run_and_kill(command: list[str], after_s: float) -> bool:
    """Kill the run ``after_s`` from its start; False if it had ended by then."""
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        try:
            process.wait(timeout=after_s)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)  # its children die with it
            return True
    return False


def _training(place: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((place / "training.json").read_text())
    return content


def _steps_recorded(place: Path) -> int:
    """The last step that the run's record knows."""
    record = place / "record" / "rank0.jsonl"
    lines = record.read_text(errors="replace").splitlines() if record.exists() else []
    finished = [line for line in lines if '"StepFinished"' in line and line.endswith("}")]
    return int(json.loads(finished[-1])["step"]) if finished else 0


if __name__ == "__main__":
    sys.exit(main())
