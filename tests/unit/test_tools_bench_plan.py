"""The benchmark of plans: its traces are what they are called, and its quick run holds."""

import json
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import bench_plan  # noqa: E402  (tools/ is no package)
from gpu_caching import random_requests, recorded_step  # noqa: E402
from offload.allocator.lifetimes import live_peak_nbytes  # noqa: E402
from plan_traces import Shape, record_training  # noqa: E402

TINY = Shape(family="llama", layers=3, width=128, tokens=256)


def test_what_is_recomputed_or_swapped_or_leaves_does_not_stay() -> None:
    pytest.importorskip("transformers")
    kept = record_training(TINY, "kept", gradients_leave=False)
    peak = live_peak_nbytes(kept.lifetimes())
    for activations in ("recomputed", "swapped"):
        trace = record_training(TINY, activations, gradients_leave=False)
        assert live_peak_nbytes(trace.lifetimes()) < peak, activations
    leaving = record_training(TINY, "kept", gradients_leave=True)
    last_ones = 5  # operations: the last gradient is only just made
    stayed = [
        [
            one.nbytes
            for one in trace.transients
            if one.first_tick < trace.ticks - last_ones and one.last_tick == trace.ticks - 1
        ]
        for trace in (kept, leaving)
    ]
    assert sum(stayed[1]) < sum(stayed[0]) / 100


def test_the_quick_run_holds(monkeypatch, tmp_path, capsys) -> None:
    pytest.importorskip("transformers")
    file = tmp_path / "plan.json"
    monkeypatch.setattr(
        sys, "argv", ["bench_plan.py", "--part", "memory", "--quick", "--json", str(file)]
    )
    assert bench_plan.main() == 0
    document = json.loads(file.read_text())
    assert [check["holds"] for check in document["checks"]] == [True]
    assert all(row["caching_ratio"] >= 1 for row in document["rows"])
    assert "DOES NOT HOLD" not in capsys.readouterr().out


def test_the_quick_run_of_placements_holds(monkeypatch, tmp_path) -> None:
    pytest.importorskip("transformers")
    file = tmp_path / "placement.json"
    words = ["bench_plan.py", "--part", "placement", "--quick", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", words)
    assert bench_plan.main() == 0
    document = json.loads(file.read_text())
    assert [check["holds"] for check in document["checks"]] == [True]
    (row,) = document["rows"]
    assert row["kinds"] < row["stages"] < row["tensors"]


def test_requests_for_the_real_allocator_come_once_and_go_once() -> None:
    for requests in (recorded_step(), random_requests(1)):
        living: set[int] = set()
        for name, nbytes in requests:
            assert (name in living) == (nbytes is None)
            living ^= {name}
        assert not living
