"""``offload doctor`` and ``offload bench links``, as a user meets them."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from offload.allocator.errors import OffloadError
from offload.cli import main
from offload.planner import rehearsal
from offload.tiers.machine import ComputeRate, Machine, read_machine
from offload.tiers.probe import compute, pace, reclaim


def run(*words: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "offload", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is measured is small."""
    effort = pace.Effort(
        seconds=1.0, blocks=(64 << 10, 256 << 10), in_flight=2, repeats=3,
        repeat_nbytes=1 << 20, file_nbytes=2 << 20, memory_nbytes=8 << 20,
    )  # fmt: skip
    monkeypatch.setattr(pace, "Effort", lambda: effort)
    monkeypatch.setattr(pace, "QUICK", replace(effort, repeats=1))
    whole = compute.measure_compute
    monkeypatch.setattr(compute, "measure_compute", lambda _s, **options: whole(0.0, **options))
    monkeypatch.setattr(reclaim, "measure_reclaimed", lambda _nbytes: None)


@pytest.mark.usefixtures("tiny")
def test_a_good_directory_gives_a_table_and_a_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nvme").mkdir()
    file = tmp_path / "machine.json"
    assert main(["doctor", "--nvme", str(tmp_path / "nvme"), "-o", str(file)]) == 0
    output = capsys.readouterr()
    assert f"wrote {file}" in output.err
    for title in ("Software", "Machine", "Kernel", "Limits", "Storage in", "Links"):
        assert title in output.out
    assert re.search(r"(no|\d+) warnings?, no failures", output.out)
    long = [line for line in output.out.splitlines() if len(line) > 80]
    assert [line for line in long if str(tmp_path) not in line] == []
    assert "\x1b" not in output.out  # it goes to no terminal
    machine = read_machine(file)
    machine.check_measured()
    name = f"file:{(tmp_path / 'nvme').resolve()}"
    assert machine.link("host", name).bytes_per_s > 0
    assert machine.link(name, name).bytes_per_s > 0
    assert machine.rates("matmul", "float32")
    assert list((tmp_path / "nvme").iterdir()) == []


@pytest.mark.usefixtures("tiny")
def test_what_a_plan_lacks_is_told_and_a_rehearsal_measures_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "machine.json"
    words = ["doctor", "--nvme", str(tmp_path / "none"), str(tmp_path), "-o", str(file)]
    assert main(words) == 1
    out = capsys.readouterr().out
    assert re.search(r"ok +cpu +matmul: float32 [\d.]+ [GT]FLOP/s, bfloat16 [\d.]+ [GT]FLOP/s", out)
    assert re.search(r"warn +rehearsal +not measured", out)
    assert "→ offload doctor --rehearse -o machine.json" in out

    def rehearsed(machine: Machine, directory: Path, drive: str) -> Machine:
        assert directory == tmp_path  # the first whose links were measured
        assert machine.link(drive, "host").bytes_per_s > 0
        rates = {"flush": 50.0, "tiles": 1.5e9, "moves": 3e9}
        mapped = {"page writes": 2e4, "page reads": 3e3}
        recoded = dict.fromkeys(rehearsal.RECODED, 2e9)
        fixed = dict.fromkeys(rehearsal.FIXED, 5e3)
        return rehearsal._with(machine, {**rates, **mapped, **fixed, **recoded})

    monkeypatch.setattr(rehearsal, "add_rehearsal", rehearsed)
    assert main([*words, "--rehearse"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    told = (
        "ok rehearsal 50 flushes/s, tiles 1.50 GB/s, computing loses a second by 3.00 GB moved, "
        "3,000 first looks at pages/s, 20,000 first writes to pages/s, 5,000 gradients/s, "
        "5,000 fetches/s, 5,000 tile parts/s, 5,000 small steps/s, "
        "bf16 states 2.00 GB/s, 8bit states 2.00 GB/s, masters 2.00 GB/s"
    )
    assert told in out
    assert "free memory" not in out
    assert {*rehearsal.REHEARSED} <= {rate.work for rate in read_machine(file).compute}


@pytest.mark.usefixtures("tiny")
def test_a_hypervisor_that_takes_memory_back_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = ComputeRate(
        processor="cpu", work="reclaimed touch", dtype="float32", size=1 << 30, per_s=0.5e9
    )
    monkeypatch.setattr(reclaim, "measure_reclaimed", lambda _nbytes: found)
    monkeypatch.setattr(rehearsal, "add_rehearsal", lambda machine, *_directories: machine)
    file = tmp_path / "machine.json"
    words = ["doctor", "--nvme", str(tmp_path), "-o", str(file)]
    assert main(words) == 0
    assert "free memory" not in capsys.readouterr().out  # takes seconds: with --rehearse alone
    assert main([*words, "--rehearse"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "warn free memory taken back by the hypervisor, 1.00 GiB at once" in out
    assert "come again at 500.00 MB/s" in out
    assert found in read_machine(file).compute


@pytest.mark.usefixtures("tiny")
def test_a_rehearsal_that_fails_fails_its_line_and_the_rest_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object) -> Machine:
        raise OffloadError("a rehearsal of training failed: no room")

    monkeypatch.setattr(rehearsal, "add_rehearsal", fail)
    assert main(["doctor", "--nvme", str(tmp_path), "--json", "--rehearse"]) == 1
    document = json.loads(capsys.readouterr().out)
    (line,) = (
        finding
        for part in document["sections"]
        for finding in part["findings"]
        if finding["subject"] == "rehearsal"
    )
    assert (line["status"], line["value"]) == ("fail", "a rehearsal of training failed: no room")
    assert document["machine"]["compute"]
    assert main(["doctor", "--nvme", str(tmp_path / "none"), "--json", "--rehearse"]) == 1
    assert "it needs a directory whose links were measured" in capsys.readouterr().out


def test_a_rehearsal_for_nobody_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--rehearse"]) == 2
    assert "give -o machine.json, or --json" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny")
def test_json_is_versioned_and_holds_the_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--json", "--nvme", str(tmp_path)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["format"] == 1
    machine = Machine.from_json(json.dumps(document["machine"]))
    assert machine.missing_links() == ()
    findings = [finding for part in document["sections"] for finding in part["findings"]]
    assert {"subject", "value", "status", "detail", "mend"} == set(findings[0])
    for status in ("ok", "warn", "fail"):
        assert document[status] == sum(finding["status"] == status for finding in findings)


@pytest.mark.usefixtures("tiny")
def test_a_directory_that_cannot_be_used_fails_its_line_and_the_rest_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "none"
    assert main(["doctor", "--nvme", str(missing), str(tmp_path), "--nvme", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "1 failure" in out
    assert "does not exist" in out.replace("\n", " ")
    assert "→ mkdir -p" in out
    assert out.count(f"host → file:{tmp_path.resolve()}") == 1  # named twice, measured once


@pytest.mark.usefixtures("tiny")
def test_bench_links_prints_measurements_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "links", "--nvme", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "Kernel" not in out
    assert f"file:{tmp_path.resolve()} → host" in out
    assert re.search(r"64\.00 KiB +2 +[\d.]+ [kMG]B/s +[-+]\d+% [-+]\d+% +[\d.]+ \w+", out)
    assert main(["bench", "links", "--quick", "--json", "--nvme", str(tmp_path / "none")]) == 1
    output = capsys.readouterr()
    assert "does not exist: mkdir -p" in output.err
    document = json.loads(output.out)
    assert document["format"] == 1
    assert {link["target"] for link in document["machine"]["links"]} == {"host"}
    assert {link["repeats"] for link in document["machine"]["links"]} == {1}


@pytest.mark.usefixtures("tiny")
def test_a_machine_file_that_cannot_be_written_is_wrong_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "missing" / "machine.json"
    assert main(["doctor", "--nvme", str(tmp_path), "--machine", str(file)]) == 2
    output = capsys.readouterr()
    assert "can't write the machine" in output.err
    assert output.out == ""  # told before anything was measured


@pytest.mark.parametrize("words", [["doctor", "--nvme"], ["bench"], ["bench", "disks"]])
def test_wrong_usage_is_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "usage: offload" in capsys.readouterr().err


def test_help_and_examination_without_a_gpu_leave_torch_alone(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom dataclasses import replace\nfrom pathlib import Path\n"
        "from offload.cli import build_parser\nbuild_parser().format_help()\n"
        "assert not {'torch', 'numpy', 'rich'} & set(sys.modules)\n"
        "from offload.doctor.examine import bench_links, diagnose\n"
        "from offload.doctor.text import to_json\nfrom offload.tiers.probe.pace import Effort\n"
        "from offload.tiers.system import System\n"
        "effort = Effort(seconds=0.5, blocks=(1 << 16,), file_nbytes=1 << 20)\n"
        "system = System(run=lambda _: None)\n"
        "to_json(diagnose([Path(sys.argv[1])], effort=effort, system=system))\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_colours_stay_off_where_nobody_wants_them(tmp_path: Path) -> None:
    words = ("bench", "links", "--quick", "--nvme", tmp_path)
    done = run(*words, NO_COLOR="1", FORCE_COLOR="1", TERM="xterm-256color")
    assert done.returncode == 0
    assert "\x1b[1m" in done.stdout
    assert not re.search(r"\x1b\[[\d;]*\b3\d", done.stdout)  # bold may stay, colours may not
