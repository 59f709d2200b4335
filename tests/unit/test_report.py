"""The report's figures from events made by hand, and its text at 80 columns."""

import dataclasses
import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from offload.allocator.errors import ConfigError
from offload.report.model import summarise
from offload.report.reader import read_run
from offload.report.text import print_report, to_json
from offload.tiers.events import (
    Event,
    Move,
    Notice,
    RunFinished,
    RunStarted,
    Stall,
    StepFinished,
)
from offload.tiers.events import (
    to_json as event_to_json,
)


def started(t_s: float) -> RunStarted:
    return RunStarted(
        t_s=t_s, command="train.py", versions={}, host={}, budget={"host": 1000 << 20}
    )


def step(number: int, step_s: float) -> StepFinished:
    return StepFinished(
        t_s=number, step=number, step_s=step_s, compute_s=1.0, stall_s=0.5, optimizer_s=0.25,
        commit_s=0.125, read_nbytes=number << 20, written_nbytes=2 << 20, peak_nbytes=number << 28,
    )  # fmt: skip


def move(key: str, nbytes: int) -> Move:
    return Move(
        t_s=0, key=key, role="weight", src="file:/x", dst="host", nbytes=nbytes, duration_s=0.5,
        lane="file→host",
    )  # fmt: skip


def stall(key: str, duration_s: float) -> Stall:
    return Stall(
        t_s=0, key=key, role="weight", lane="file→host", reason="late", duration_s=duration_s
    )


EVENTS: list[Event] = [
    move("early", 1 << 20),  # while the model was built
    started(0),
    move("a", 3 << 20),
    stall("a", 0.25),
    step(1, 2.0),
    started(0),
    move("a", 1 << 20),
    step(2, 4.0),
    step(3, 3.0),
    Notice(t_s=9, subject="resume", message="continued"),
    RunFinished(t_s=9, steps=2, peak_nbytes=800 << 20, budget_nbytes=1000 << 20, status="done"),
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    lines = "".join(event_to_json(event) + "\n" for event in EVENTS)
    (tmp_path / "rank0.jsonl").write_text(lines, encoding="utf-8")
    return tmp_path


def test_figures(run: Path) -> None:
    report = summarise(read_run(run))
    head = report.headline
    assert (head.starts, head.steps, head.status) == (2, 3, "done")
    assert (head.step_s, head.read_nbytes, head.peak_nbytes) == (3.0, 2 << 20, 800 << 20)
    (lane,) = report.lanes
    assert (lane.transfers, lane.nbytes, lane.bytes_per_s) == (3, 5 << 20, (5 << 20) / 1.5)
    assert report.tensors[0].key == "a"
    assert (report.tensors[0].nbytes, report.tensors[0].stall_s) == (4 << 20, 0.25)
    assert [(row.reason, row.count) for row in report.stalls] == [("late", 1)]


def test_text_fits_80_columns_and_json_is_versioned(run: Path) -> None:
    report = summarise(read_run(run))
    out = StringIO()
    print_report(report, Console(file=out, width=80, highlight=False))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1] == "3 steps, started 2 times; done"
    assert lines[2] == "peak memory  800.00 MiB of a budget of 1000.00 MiB (80%)"
    assert "note: resume: continued" in lines
    document = json.loads(to_json(report))
    assert document["format"] == 1
    assert document["headline"]["steps"] == 3
    assert report.buckets == ()
    assert "Batches up to" not in out.getvalue()


def test_steps_are_told_apart_by_the_sizes_of_their_batches(run: Path) -> None:
    lines = [
        event_to_json(
            dataclasses.replace(step(number, step_s), bucket=bucket, resident_nbytes=kept)
        )
        for number, step_s, bucket, kept in (
            (1, 3.0, "2x512", {"weight": 1 << 20, "activation": 7}),
            (2, 1.0, "2x64", {"weight": 4 << 20, "state": 2 << 20}),
            (3, 5.0, "2x512", {"weight": 3 << 20}),
        )
    ]
    (run / "rank0.jsonl").write_text("\n".join([event_to_json(started(0)), *lines, ""]))
    report = summarise(read_run(run))
    long, short = report.buckets
    assert (long.bucket, long.steps, long.step_s, long.read_nbytes) == ("2x512", 2, 4.0, 2 << 20)
    assert (long.kept_nbytes, short.kept_nbytes) == (2 << 20, 6 << 20)
    out = StringIO()
    print_report(report, Console(file=out, width=80, highlight=False))
    assert "Batches up to" in out.getvalue()
    assert max(map(len, out.getvalue().splitlines())) <= 80


def test_a_record_cut_off_by_a_kill_is_read_as_far_as_it_goes(run: Path) -> None:
    file = run / "rank0.jsonl"
    file.write_text(file.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    report = summarise(read_run(run))
    assert report.truncated
    assert report.headline.steps == 3
    assert report.headline.status.startswith("cut off")


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run directory"):
        read_run(tmp_path)
    file = tmp_path / "rank0.jsonl"
    file.write_text("")
    with pytest.raises(ConfigError, match="empty"):
        read_run(tmp_path)
    file.write_text("{}\n" + event_to_json(started(0)) + "\n")
    with pytest.raises(ConfigError, match="line 1 of 2 is damaged: unknown event kind None"):
        read_run(tmp_path)
    good = event_to_json(started(0)).encode()
    file.write_bytes(good + b"\n\xff\xfe\n" + good + b"\n")
    with pytest.raises(ConfigError, match=r"line 2 of 3 is damaged: .*: head -n 1 of it into"):
        read_run(tmp_path)
    file.write_bytes(good + b"\n\x00\x00\xff")
    assert read_run(tmp_path).truncated


def test_how_long_a_drive_lasts_needs_its_endurance(run: Path) -> None:
    report = summarise(read_run(run))
    assert (report.drive.written_nbytes, report.drive.life_steps) == (2 << 20, None)
    stream = StringIO()
    print_report(report, Console(file=stream, width=80))
    assert "drive life   unknown: pass its endurance" in stream.getvalue()
