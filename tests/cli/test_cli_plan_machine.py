"""Which machine ``offload plan`` plans for, and what corrects its figures."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from plan_verb import LAPTOP, SCRIPT, answer, refusal

from forked import python
from offload.allocator.errors import OffloadError
from offload.cli import main
from offload.doctor import examine
from offload.doctor.finding import Finding
from offload.planner.baseline import measure_baseline
from offload.planner.machines import library_machine, list_machines
from offload.planner.script_memory import Held
from offload.planner.stored import calibrated
from offload.tiers.machine import Machine, write_machine


def test_a_machine_that_lacks_measurements_names_them(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, machine = tmp_path / "machine.json", library_machine("laptop-16gb")
    words = (model, "--baseline", "300MiB", "--machine", file)
    write_machine(dataclasses.replace(machine, links=machine.links[:2]), file)
    error = refusal(capsys, 2, *words)
    assert "the link host → file:samsung-970-evo-plus-2tb was not measured" in error
    write_machine(dataclasses.replace(machine, compute=()), file)
    assert "offload doctor -o machine.json" in refusal(capsys, 2, *words)
    memory_only = dataclasses.replace(machine, tiers=machine.tiers[:1], links=machine.links[:1])
    write_machine(memory_only, file)
    assert "this machine has no drive" in refusal(capsys, 2, *words)
    file.write_text(file.read_text()[:100])
    assert "write it anew with: offload doctor -o machine.json" in refusal(capsys, 2, *words)


def test_a_drive_that_a_machine_lacks_is_measured_with(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, nvme = tmp_path / "machine.json", tmp_path / "nvme"
    write_machine(library_machine("laptop-16gb"), file)
    words = (model, "--baseline", "300MiB", "--machine", file, "--nvme", nvme)
    error = refusal(capsys, 2, *words)
    assert f"{file} has file:samsung-970-evo-plus-2tb, not file:{nvme}" in error
    assert f"offload doctor --nvme {nvme} -o {file}" in error


def test_a_drive_that_cannot_be_measured_tells_the_mend(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    failure = Finding(subject="free space", value="4.09 MiB", status="fail", mend="du -xh small")
    bench = examine.Bench(machine=library_machine("laptop-16gb"), failures=(failure,), seconds=0.0)
    monkeypatch.setattr(examine, "bench_links", lambda *_args, **_keywords: bench)
    error = refusal(capsys, 2, model, "--baseline", "300MiB", "--nvme", tmp_path)
    assert f"can't measure {tmp_path}: free space: 4.09 MiB; mend it with: du -xh small" in error
    assert "another directory with --nvme, or a machine of --machine list" in error


def test_the_library_is_whole_and_names_its_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--machine", "list"]) == 0
    out = capsys.readouterr().out.rstrip("\n")
    assert out == list_machines()
    names = [line.split()[0] for line in out.partition("\n\n")[0].splitlines()]
    assert len(names) >= 6
    for name in names:
        library_machine(name).check_measured()
    sources = out.partition("Published figures of:\n")[2].splitlines()
    assert len(sources) >= 10
    assert len(set(sources)) == len(sources)
    assert all(source.startswith("https://") for source in sources)


def test_a_baseline_that_cannot_be_measured_says_what_to_give() -> None:
    with pytest.raises(OffloadError, match=r"No module named 'no_such_module'.*--baseline"):
        measure_baseline(Held(imports=("no_such_module",)))


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.usefixtures("cached")
def test_a_machine_that_was_measured_is_used_at_once(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, made_up: Callable[[Path, float], Machine],
) -> None:  # fmt: skip
    nvme = tmp_path / "nvme"
    nvme.mkdir()
    calibrated(
        nvme, care="full", again=True, say=print, measure=lambda path, _care: made_up(path, 3e9)
    )

    def never(*_args: object, **_options: object) -> None:
        raise RuntimeError("it was measured")

    monkeypatch.setattr(examine, "bench_links", never)
    words = (model, "--nvme", nvme, "--seq", 128, "--baseline", "300MiB", "--budget", "400MiB")
    found = answer(capsys, *words)
    assert found["machine"].startswith("this machine, measured just now: ")
    assert "3.00 GB/s read" in found["machine"]
    with pytest.raises(RuntimeError, match="it was measured"):
        main(["plan", *map(str, words), "--measure"])


@pytest.mark.slow
def test_a_recorded_run_corrects_the_plan(
    script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    made_up: Callable[[Path, float], Machine],
) -> None:  # fmt: skip
    plain = tmp_path / "plain.py"
    plain.write_text(
        SCRIPT.replace('with offload.init(budget="host=1GiB"):\n    model', "model")
        .replace('engine = offload.attach(model, optimizer, budget="host=1GiB")', "")
        .replace("engine.step", "0")
        .replace('raise AssertionError("backward has been seen")', "optimizer.step()")
        .replace("range(3)", "range(5)")
    )
    nvme, run, file = tmp_path / "nvme", tmp_path / "run", tmp_path / "machine.json"
    options = ["--budget=1GiB", f"--nvme={nvme}", f"--record={run}"]
    done = python("-m", "offload", "run", *options, plain)
    assert done.returncode == 0, done.stderr
    assert "plan against measured: at most 1.00 GiB, peak" in done.stderr
    write_machine(made_up(nvme, 1e9), file)
    given = (plain, "--machine", file, "--budget", "400MiB")
    found = answer(capsys, *given, "--from", run)
    (note,) = (note for note in found["notes"] if "corrected by" in note)
    assert re.search(r"compute x\d+\.\d\d, .*measured \d", note)
    process = next(row for row in found["rows"] if row["name"] == "process")
    held = json.loads((run / "plan.json").read_text())["baseline_nbytes"]
    assert process["memory_nbytes"] >= held > 100 << 20
    faster = answer(capsys, *given, "--from", run, "--what-if", "compute=4x")
    assert faster["step_s"] < found["step_s"]
    narrow = tmp_path / "narrow.py"
    narrow.write_text(plain.read_text().replace("500", "400"))
    other = refusal(capsys, 2, narrow, *given[1:], "--from", run)
    assert "'a.weight' is float32 [500, 300], this one's weight 'a.weight' is float32 [400" in other
    assert "ran on another processor" in refusal(capsys, 2, plain, *LAPTOP, "--from", run)
    assert "not a run directory" in refusal(capsys, 2, plain, *LAPTOP, "--from", nvme)


@pytest.mark.slow
@pytest.mark.usefixtures("cached")
def test_this_machine_is_measured_where_none_is_kept(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (model, "--nvme", tmp_path, "--seq", 128)
    found = answer(capsys, *words)
    assert found["machine"].startswith("this machine, measured just now: ")
    process = next(row for row in found["rows"] if row["name"] == "process")
    assert 100 << 20 < process["memory_nbytes"] < 2 << 30
    assert main(["plan", *map(str, words)]) == 0
    assert "measuring this machine" not in capsys.readouterr().err
