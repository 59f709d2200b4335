"""Predictions stay what they were: figures of whole runs, written down.

After a decision of the runtime has changed, and its simulation with it, write them anew:

    python tests/unit/test_planning_golden.py
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from planning_models import BASELINE, machine, settings
from planning_programs import decoder

from offload.swap.planning.predict import Prediction, Settings, predict
from offload.swap.planning.program import Program

FILE = Path(__file__).with_name("planning_golden.json")
_LONG = partial(decoder, blocks=8, tokens=1024)
_DEEP = partial(decoder, blocks=16, width=320, tokens=96)
_WIDE = partial(decoder, blocks=2, width=1024, tokens=32, vocabulary=16_000)
CASES: Mapping[str, tuple[Callable[[], Program], Settings]] = {
    "streaming": (decoder, settings(375)),
    "least": (_DEEP, settings(370)),
    "resident weights": (_DEEP, settings(420)),
    "resident states": (_DEEP, settings(800)),
    "spilling": (_LONG, settings(560)),
    "spilling less": (_LONG, settings(640)),
    "recomputed": (partial(_LONG, recomputed=True), settings(480)),
    "frozen": (partial(_DEEP, frozen=True), settings(370)),
    "many tiles": (_WIDE, settings(680)),
    "many tiles, not fused": (partial(_WIDE, fused=False), settings(760)),
    "in backward": (_DEEP, dataclasses.replace(settings(420), step_in_backward=True)),
    "in forward": (_DEEP, dataclasses.replace(settings(420), step_in_forward=True)),
    "micro-batches": (_DEEP, dataclasses.replace(settings(420), micro_batches=3)),
    "micro-batches, spilling": (_LONG, dataclasses.replace(settings(640), micro_batches=2)),
    "micro-batches, in backward": (
        _DEEP,
        dataclasses.replace(settings(420), micro_batches=3, step_in_backward=True),
    ),
    "never committed": (_WIDE, dataclasses.replace(settings(900), commits=False)),
}


def figures(found: Prediction) -> list[dict[str, Any]]:
    """Of each step: times, bytes, the peak's parts, the plan's."""
    return [
        {
            **dataclasses.asdict(step.finished),
            "busy_s": dict(step.busy_s),
            "peak_roles": {role: nbytes for role, nbytes in step.peak_roles.items() if nbytes},
            "spilled_nbytes": step.spilled_nbytes,
            "resident": len(step.plan.resident),
            "resident_states": len(step.plan.resident_states),
        }
        for step in found.steps
    ]


@pytest.mark.parametrize("name", CASES)
def test_predictions_are_those_that_were_written_down(name: str) -> None:
    make, case = CASES[name]
    found = figures(predict(make(), machine(), case, BASELINE))
    expected = json.loads(FILE.read_text(encoding="utf-8"))[name]
    for step, before in zip(found, expected, strict=True):
        assert step.keys() == before.keys()
        for key, value in step.items():
            # Seconds are added up in another order than they were.
            seconds = key.endswith("_s")
            expected_value = pytest.approx(value, rel=1e-6, abs=1e-9) if seconds else value
            assert before[key] == expected_value, key


def test_what_was_written_down_spans_what_a_run_does() -> None:
    written = json.loads(FILE.read_text(encoding="utf-8"))
    last = {name: steps[-1] for name, steps in written.items()}
    assert written.keys() == CASES.keys()
    assert last["streaming"]["read_nbytes"] > 0
    assert last["spilling"]["spilled_nbytes"] > last["spilling less"]["spilled_nbytes"] > 0
    assert last["resident weights"]["resident"] > 0 == last["least"]["resident"]
    assert last["resident states"]["resident_states"] > 0


def main() -> None:
    """Write them down."""
    written = {
        name: figures(predict(make(), machine(), case, BASELINE))
        for name, (make, case) in CASES.items()
    }
    FILE.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
