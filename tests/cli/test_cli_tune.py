"""``offload tune``, as a user meets it."""

import json
import os
import signal
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from tune_verb import write_script

from forked import Forked, python
from offload.cli import main
from offload.config import make_config
from offload.planner import machines
from offload.planner.stored import Calibrated, calibrated
from offload.tiers.machine import Machine
from offload.tuning import predicting
from offload.tuning.candidates import Candidate
from offload.tuning.folders import trial_folders
from offload.tuning.search import Trial
from offload.tuning.trials import Trials


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return write_script(tmp_path / "job")


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    """Leaves one factor to search."""
    file = tmp_path / "base.yaml"
    file.write_text("budget: {host: 8GiB}\nrecompute: 'off'\nio_threads: 4\nio_engine: threads\n")
    return file


@pytest.fixture
def measured(
    tmp_path: Path, made_up: Callable[[Path, float], Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is measured but the trials themselves."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def this_machine(directory: Path, **_options: Any) -> Calibrated:
        now = datetime.now(UTC)
        return Calibrated(machine=made_up(directory, 1e9), measured=now, now=now)

    monkeypatch.setattr(machines, "this_machine", this_machine)


@pytest.fixture
def unpredicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predicting, "make_predictor", lambda *_args: None)


def refusal(capsys: pytest.CaptureFixture[str], code: int, *words: object) -> str:
    assert main(["tune", *map(str, words)]) == code
    output = capsys.readouterr()
    assert output.out == ""
    return output.err


@pytest.mark.slow
@pytest.mark.usefixtures("measured")
def test_a_script_is_tuned_end_to_end(
    script: Path, nvme: Path, settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "best.yaml"
    words = [script, "--steps=4", "--config", settings, "--nvme", nvme, "-o", file, "--json"]
    assert main(["tune", *map(str, words), "--", "100"]) == 0
    output = capsys.readouterr()
    found = json.loads(output.out)
    assert found["format"] == 1
    rows = {row["name"]: row for row in found["candidates"]}
    assert set(rows) == {"baseline", "step in backward", "step in forward"}
    for row in rows.values():
        assert row["status"] == "done"
        assert all(trial["steps"] == 4 for trial in row["trials"])
        assert row["step_s"] > 0
        assert 100 << 20 < row["peak_nbytes"] < 8 << 30
    # The slower one of both goes out behind the first round.
    assert sorted(len(row["trials"]) for row in rows.values()) == [1, 2, 2]
    assert len(rows["baseline"]["trials"]) == found["rounds"] == 2
    assert rows["baseline"]["ratio"] == 1
    assert rows["baseline"]["predicted_step_s"] > 0
    assert rows["baseline"]["predicted_peak_nbytes"] > 100 << 20
    assert rows["step in backward"]["predicted_step_s"] > 0
    assert rows["step in forward"]["predicted_step_s"] > 0
    assert "round 1, 1 of 3: baseline" in output.err
    # What the script does at its end was never done, and nothing is left.
    assert [path.name for path in script.parent.iterdir()] == ["train.py"]
    assert list(nvme.iterdir()) == []
    # The file is one that run and attach take, and says where it comes from.
    text = file.read_text()
    config = make_config(file)
    assert config.step_in_backward == (found["best"] == "step in backward")
    assert config.step_in_forward == (found["best"] == "step in forward")
    assert config.budget == {"host": 8 << 30}
    assert config.nvme == (nvme,)
    assert (config.recompute, config.io_threads) == ("off", 4)
    assert yaml.safe_load(text) == found["config"]
    assert text.startswith("# Written by offload tune, ")
    header = "".join(line for line in text.splitlines() if line.startswith("#"))
    for words_in_it in (f"offload tune {script}", "-- 100", "Machine: this machine", "a step"):
        assert words_in_it in header
    done = python("-m", "offload", "run", "--config", file, script, "2")
    assert done.returncode == 0, done.stderr
    assert "plan against measured: at most 8.00 GiB" in done.stderr


@pytest.mark.usefixtures("measured", "unpredicted")
def test_the_table_shows_what_failed_and_why(
    script: Path, nvme: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def run(_self: Trials, candidate: Candidate, _limit_s: float | None) -> Trial:
        if "tokenwise" in candidate.name:
            return Trial(status="does not fit", reason=f"{'many words ' * 20}of {candidate.name}")
        if "exceeds" in candidate.name:
            return Trial(status="exceeds the budget", reason="peak 9.00 GiB")
        return Trial(
            status="done", steps=5, step_s=0.5 if candidate.changes else 0.6, stall_s=0.1,
            read_nbytes=1 << 20, written_nbytes=1 << 20, peak_nbytes=300 << 20,
        )  # fmt: skip

    monkeypatch.setattr(Trials, "__call__", run)
    file = tmp_path / "best.yaml"
    words = [str(script), "--budget=8GiB", "--nvme", str(nvme), "-o", str(file)]
    assert main(["tune", *words]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if len(line) > 80 and str(tmp_path) not in line] == []
    for cell in ("baseline", "step in backward *", "500 ms", "0.833", "2.00 MiB", "300.00 MiB"):
        assert cell in out
    assert "does not fit: many words" in out
    assert "16.7% less" in " ".join(out.split())
    assert make_config(file).step_in_backward


@pytest.mark.usefixtures("measured", "unpredicted")
def test_nothing_better_is_said_and_the_baseline_written(
    script: Path, nvme: Path, settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    trial = Trial(status="done", steps=5, step_s=0.5)
    monkeypatch.setattr(Trials, "__call__", lambda *_args: trial)
    file = tmp_path / "best.yaml"
    words = [script, "--config", settings, "--nvme", nvme, "-o", file]
    assert main(["tune", *map(str, words)]) == 0
    assert "Nothing beats the baseline (500 ms a step) by more than" in capsys.readouterr().out
    assert not make_config(file).step_in_backward


@pytest.mark.usefixtures("measured", "unpredicted")
@pytest.mark.parametrize(
    ("steps", "code", "message"),
    [
        (0, 1, "trains nothing"),
        (2, 2, "ended by itself after 2 of 5 steps: give it more to do, or ask for fewer"),
        (3, 2, "or ask for fewer: --steps 3"),
    ],
)
def test_a_script_that_ends_too_early(
    steps: int, code: int, message: str, script: Path, nvme: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file = tmp_path / "best.yaml"
    words = [script, "--steps=5", "--budget=8GiB", "--nvme", nvme, "-o", file, "--", steps]
    assert message in refusal(capsys, code, *words)
    assert not file.exists()
    assert list(nvme.iterdir()) == []


@pytest.mark.usefixtures("measured", "unpredicted")
def test_what_fails_everywhere_tells_why(
    nvme: Path, tmp_path: Path, settings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = write_script(tmp_path / "job", "raise KeyError('mine')")
    words = [failing, "--config", settings, "--nvme", nvme, "-o", tmp_path / "best.yaml"]
    error = refusal(capsys, 1, *words, "--", 5)
    assert "train.py failed with every setting: KeyError: 'mine'" in error
    assert list(nvme.iterdir()) == []
    too_small = refusal(capsys, 3, *words, "--budget=60MiB", "--", 5)
    assert "The smallest budget that fits is host=" in too_small


@pytest.mark.usefixtures("measured", "unpredicted")
def test_a_budget_that_no_setting_fits_ends_the_search_behind_its_first_trial(
    script: Path, nvme: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [script, "--budget=60MiB", "--nvme", nvme, "-o", tmp_path / "best.yaml", "--", 5]
    error = refusal(capsys, 3, *words)
    assert "train.py fits with no setting: the host budget of 60.00 MiB" in error
    assert "The smallest budget that fits is host=" in error
    assert error.count("round 1, ") == 1
    assert list(nvme.iterdir()) == []


@pytest.mark.usefixtures("measured")
def test_a_drive_that_is_too_full_is_told_before_a_trial(
    script: Path, nvme: Path, settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], made_up: Callable[[Path, float], Machine],
) -> None:  # fmt: skip
    def this_machine(directory: Path, **_options: Any) -> Calibrated:
        machine, now = made_up(directory, 1e9), datetime.now(UTC)
        document = json.loads(machine.to_json())
        for tier in document["tiers"]:
            if tier["kind"] == "file":
                tier["free_nbytes"] = 1 << 20
        full = Machine.from_json(json.dumps(document))
        return Calibrated(machine=full, measured=now, now=now)

    def never(*_args: Any) -> Trial:
        raise AssertionError("a trial began")

    monkeypatch.setattr(machines, "this_machine", this_machine)
    monkeypatch.setattr(Trials, "__call__", never)
    words = [script, "--config", settings, "--nvme", nvme, "-o", tmp_path / "best.yaml"]
    error = refusal(capsys, 3, *words, "--", 5)
    assert "has 1.00 MiB free, the run takes" in error
    monkeypatch.setattr("offload.tiers.filesystem.free_nbytes", lambda _path: 5)
    assert "has 5 B free, a trial takes" in refusal(capsys, 3, *words, "--", 5)


@pytest.mark.usefixtures("measured", "unpredicted")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.py"], "can't read the script none.py"),
        (["SCRIPT", "--steps", "2"], "--steps 2: at least 3"),
        (
            ["SCRIPT", "--budget", "24"],
            "24 bytes of memory hold nothing; a size has a unit: 24GiB?",
        ),
        (["SCRIPT", "--budget", "host=24"], "a size has a unit: 24GiB?"),
        (["SCRIPT", "--budget", "device=9,host=24GiB"], "a size has a unit: 9GiB?"),
        (["SCRIPT", "--budget", "24Gb/s"], "is not a size"),
        (["SCRIPT", "--device", "gpu"], "is no device to compute on"),
        (["SCRIPT", "--config", "none.yaml"], "can't read the configuration none.yaml"),
        (["SCRIPT", "-o", "best.json"], "name it .yaml"),
        (["SCRIPT", "-o", "no/where/best.yaml"], "is no directory"),
        (["SCRIPT", "-o", "MINE"], "was not written by offload"),
        (["SCRIPT", "--nvme", "MINE"], "can't write to"),
        (["SCRIPT", "--nvme", "LINK"], "symbolic link"),
        (["TEXT"], "is not a Python script"),
        (["ATTACHES"], "calls offload.attach itself"),
        (["IMPORTS"], "calls offload.init itself"),
    ],
)
def test_wrong_usage_is_2_and_starts_nothing(
    words: list[str], message: str, script: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("budget: 1GiB\n")
    (tmp_path / "link").symlink_to(tmp_path / "job")
    (tmp_path / "text.py").write_text("def")
    (tmp_path / "attaches.py").write_text("import offload\noffload.attach(None)\n")
    (tmp_path / "imports.py").write_text("def f():\n    from offload import init, errors\n")
    names = {
        "SCRIPT": script, "MINE": "mine.yaml", "LINK": "link", "TEXT": "text.py",
        "ATTACHES": "attaches.py", "IMPORTS": "imports.py",
    }  # fmt: skip
    assert message in refusal(capsys, 2, *(names.get(word, word) for word in words))
    assert not (tmp_path / "offload.yaml").exists()
    assert (tmp_path / "mine.yaml").read_text() == "budget: 1GiB\n"


def test_a_folder_without_permission_is_told(
    script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(os, "access", lambda *_args: False)  # root may write anywhere
    error = refusal(capsys, 2, script, "-o", tmp_path / "best.yaml")
    assert "this user may not write to" in error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_trial_and_store(
    number: signal.Signals, tmp_path: Path, nvme: Path, settings: Path,
    made_up: Callable[[Path, float], Machine], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The script tells its process id by a pipe, and waits in its first step for ever."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    wait = f"open({str(pipe)!r}, 'w').write(str(__import__('os').getpid())); sys.stdin = None; "
    wait += "import time; time.sleep(1000)"
    script = write_script(tmp_path / "job", wait)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calibrated(
        nvme, care="full", again=True, say=print, measure=lambda path, _care: made_up(path, 1e9)
    )
    options = ["--config", settings, "--nvme", nvme, "-o", tmp_path / "best.yaml"]
    search = Forked("-m", "offload", "tune", script, *options, "--", 5)
    child = int(pipe.read_text())
    assert list(nvme.iterdir())
    os.kill(search.pid, number)
    done = search.wait()
    assert done.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert "Traceback" not in done.stderr
    assert list(nvme.iterdir()) == []
    assert not Path(f"/proc/{child}").exists()
    assert not (tmp_path / "best.yaml").exists()
    assert sorted(path.name for path in script.parent.iterdir()) == ["train.py"]


def test_folders_go_and_those_of_killed_searches_with_them(nvme: Path) -> None:
    dead = nvme / "offload-tune-dead"
    dead.mkdir()
    (dead / "store").write_text("bytes")
    (nvme / "mine").mkdir()
    with trial_folders([nvme]) as folders:
        folder = folders[nvme]
        assert not dead.exists()
        assert folder.stat().st_mode & 0o777 == 0o700
        with trial_folders([nvme]) as others:  # one that goes on is left alone
            assert folder.exists()
            assert others[nvme] != folder
    assert [path.name for path in nvme.iterdir()] == ["mine"]
