"""gpu_check: its logic on the simulated device, with torch and numpy only, and its exit codes."""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import contract_runner  # noqa: E402  (tools/ is no package)
import gpu_checks  # noqa: E402
import gpu_training  # noqa: E402
from gpu_report import Outcome, Report, write  # noqa: E402
from offload.tiers.device import DeviceTier  # noqa: E402
from offload.tiers.lanes import Transfer  # noqa: E402
from offload.tiers.ram import RamTier  # noqa: E402
from offload.tiers.testing import TierContract  # noqa: E402

# Only what a bare machine has, and no installed package of the project.
BARE = """
import sys
from importlib.machinery import PathFinder
MISSING = {"pytest", "hypothesis", "psutil", "pydantic", "rich", "xxhash", "yaml"}
class Bare:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] not in MISSING:
            return PathFinder.find_spec(name, path, target)
finders = [finder for finder in sys.meta_path if "__editable__" not in str(finder)]
sys.meta_path[:] = [Bare if finder is PathFinder else finder for finder in finders]
sys.path.insert(0, sys.argv.pop(1))
import gpu_check
code = gpu_check.main(sys.argv[1:])
import offload
print(offload.__file__)
sys.exit(code)
"""

WHOLE = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import gpu_check
sys.exit(gpu_check.main(sys.argv[1:]))
"""


def run(*arguments, code=BARE):
    return subprocess.run(
        [sys.executable, "-c", code, TOOLS, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )


def test_all_logic_holds_on_the_simulated_device_of_a_bare_machine(tmp_path):
    done = run("--simulated", "--quick", "--results", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.iterdir()
    assert re.fullmatch(r"gpu_check-simulated-\d{4}-\d\d-\d\d\.json", path.name)
    document = json.loads(path.read_text())
    assert document["device"] == "simulated"
    assert document["notes"] == [
        "not installed, and not needed: pytest, hypothesis",
        "offload.attach was not checked: it needs yaml",
    ]
    assert {check["group"] for check in document["checks"]} == {
        "contract",
        "races",
        "exact",
        "rates",
        "pool",
    }
    assert all(check["holds"] for check in document["checks"])
    told = {check["name"]: check["result"] for check in document["checks"]}
    assert re.fullmatch(r"(\d\d) of \1 tests pass", told["device tier"])
    assert told["planted: missing_wait"].startswith("found under seed")
    assert told["device and file"] == "12 tensors and 4 losses, 0 of them differ"
    assert done.stdout.splitlines()[-1].endswith("build/typetree/offload/__init__.py")


def test_a_machine_without_cuda_is_told_so():
    path = "sys.argv.pop(1) + '/gpu_check.py'"
    done = run(code=f"import runpy, sys; runpy.run_path({path}, run_name='__main__')")
    assert (done.returncode, done.stdout) == (2, "")
    assert "finds no CUDA device" in done.stderr
    assert "--simulated checks the same logic" in done.stderr


def test_a_machine_without_torch_is_told_what_to_install():
    done = run(code="import sys; sys.modules['torch'] = None\n" + BARE)
    assert done.returncode == 2
    assert done.stderr == "gpu_check needs torch and numpy: pip install torch numpy\n"


def test_results_are_never_overwritten(tmp_path):
    report = Report("NVIDIA H100 80GB HBM3", {})
    report.run("group", "name", lambda: Outcome("found", value=1.0))
    first, second = write(report, tmp_path), write(report, tmp_path)
    assert first.name.startswith("gpu_check-nvidia-h100-80gb-hbm3-")
    assert second.name == first.name.replace(".json", "-2.json")
    assert first.read_text() == second.read_text()
    (check,) = json.loads(first.read_text())["checks"]
    assert (check["result"], check["holds"], check["value"]) == ("found", True, 1.0)


def test_an_error_is_a_check_that_does_not_hold(capsys):
    report = Report("device", {})
    report.run("group", "fine", lambda: Outcome("found"))
    assert report.holds
    report.run("group", "broken", lambda: Outcome(str(1 // 0)))
    assert not report.holds
    assert "FAIL  group       broken" in capsys.readouterr().out
    assert report.checks[-1].result == "ZeroDivisionError: integer division or modulo by zero"


class Ram(TierContract):
    """A contract that the runner can run, of a tier that may be broken."""

    large_nbytes = (1 << 20) + 4097
    broken = False

    @contextlib.contextmanager
    def open_tier(self, directory):
        with RamTier(5 * self.large_nbytes) as tier:
            if self.broken:
                tier.write = lambda block, address, *, label=None, **_: Transfer(label, 0, 0)
            yield tier

    def peek(self, tier, block, offset, nbytes):
        return bytes(self._view(tier, block, offset, nbytes))

    def poke(self, tier, block, offset, data):
        self._view(tier, block, offset, len(data))[:] = data

    def _view(self, tier, block, offset, nbytes):
        return tier._buffers[block.generation].view(offset, nbytes)


def test_the_runner_runs_what_pytest_would():
    count, failures = contract_runner.run_contract(Ram())
    assert failures == []
    assert count == 54


def test_the_runner_tells_what_fails():
    class Broken(Ram):
        broken = True

    _, failures = contract_runner.run_contract(Broken())
    assert any(
        line.startswith("test_write_puts_exactly_these_bytes{'nbytes': 1}: Assertion")
        for line in failures
    )


def test_a_race_of_the_tier_fails_the_checks(monkeypatch):
    monkeypatch.setattr(DeviceTier, "_host_events", lambda *arguments: [])
    device = gpu_checks.Simulated()
    outcome = gpu_checks.right_code_is_right(device, "there_and_back", range(100))
    assert not outcome.holds
    assert outcome.result.startswith("race under seed")


def test_a_race_that_is_not_found_fails_the_checks(monkeypatch):
    monkeypatch.setattr(gpu_checks, "_SCENARIO_LIMIT_S", 0.2)
    monkeypatch.setitem(gpu_checks.RACY, "missing_wait", gpu_checks.RIGHT["round_trip"])
    outcome = gpu_checks.planted_race_is_found(gpu_checks.Simulated(), "missing_wait")
    assert not outcome.holds
    assert re.fullmatch(r"not found under \d+ seeds", outcome.result)


def test_a_home_that_loses_bytes_fails_the_checks(monkeypatch):
    class Lossy(gpu_training.PinnedHome):
        def evict(self, block, index):
            if index != 5:
                super().evict(block, index)

    monkeypatch.setitem(gpu_checks.HOMES, "pinned", Lossy)
    outcome = gpu_checks.training_is_exact(gpu_checks.Simulated(), "pinned")
    assert not outcome.holds
    assert outcome.value >= 1


@pytest.mark.parametrize("name", ["pytest", "hypothesis"])
def test_nothing_stands_in_for_what_is_installed(name):
    assert contract_runner.import_contract() == []
    assert sys.modules[name].__file__


def test_training_through_attach_is_checked_where_it_can_be(tmp_path):
    arguments = ["--simulated", "--quick", "--only", "attach", "--results", str(tmp_path)]
    done = run(*arguments, code=WHOLE)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.iterdir()
    checks = json.loads(path.read_text())["checks"]
    assert {check["group"] for check in checks} == {"attach"}
    assert len(checks) >= 6
    assert "0 of 20 tensors differ" in " ".join(check["result"] for check in checks)
