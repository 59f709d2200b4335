"""bench_tokenwise_gpu: its logic on the simulated device; an error in one link ends no other."""

import json
import sys
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import bench_tokenwise_gpu as bench  # noqa: E402  (tools/ is no package)
import gpu_alpha  # noqa: E402
from gpu_checks import Simulated  # noqa: E402
from gpu_tokenwise import AlphaChecks  # noqa: E402


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    shape = gpu_alpha.Shape(width=32, hidden=64, heads=2, rows=192, layers=2)
    monkeypatch.setattr(gpu_alpha, "SMALL", shape)
    monkeypatch.setattr(gpu_alpha, "FULL", shape)
    monkeypatch.setattr(gpu_alpha, "FIXED", (0.0, 1.0))
    monkeypatch.setattr(gpu_alpha, "_REFERENCES", 1)
    monkeypatch.setattr(gpu_alpha, "_SETTLING", 6)
    monkeypatch.setattr(gpu_alpha, "_WARM_UPS", 0)
    monkeypatch.setattr(gpu_alpha, "_LEAST_ROUNDS", 1)


def test_the_device_s_own_events_agree_with_what_was_measured(tmp_path, capsys):
    path = tmp_path / "result.json"
    assert bench.main(["--simulated", "--quick", "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert document["device"] == "simulated"
    assert {check["name"].partition(": ")[2] for check in document["checks"]} == {
        f"{what}, measured over reference"
        for what in ("forward of a block", "backward of a block", "a GB over the link")
    }
    for check in document["checks"]:
        assert check["holds"]
        assert check["value"] == pytest.approx(1.0, rel=0.01)
    rows = {row["what"]: row for row in document["rows"]}
    assert {"trial of alpha 0", "step, alpha auto", "step, alpha 0.0", "step, alpha 1.0"} <= set(
        rows
    )
    assert rows["step, alpha 0.0"]["alpha"] == 0.0
    assert "alpha solved" in capsys.readouterr().out


def test_the_checks_share_what_was_measured():
    checks = AlphaChecks(Simulated())
    outcomes = {name: check() for name, check in checks.all().items()}
    solved = outcomes.pop("solved alpha against fixed ones")
    assert all(outcome.holds for outcome in outcomes.values())
    assert solved.value > 0


def test_an_error_is_a_check_that_does_not_hold(monkeypatch):
    monkeypatch.setattr(bench, "TIMES", (1, 2))
    asked = []

    def measure(_device, _shape, times, **_how):
        asked.append(times)
        raise RuntimeError("out of something")

    monkeypatch.setattr(gpu_alpha, "measure", measure)
    assert bench.main(["--simulated"]) == 1
    assert asked == [1, 2]
    checks = AlphaChecks(Simulated())
    for check in checks.all().values():
        with pytest.raises(RuntimeError, match="out of something"):
            check()
    assert len(asked) == 3  # measured once for all four


def test_a_machine_without_cuda_is_told_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    assert bench.main([]) == 2
    assert "finds no CUDA device" in capsys.readouterr().err
