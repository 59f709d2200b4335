"""The benchmark of training in little memory: what it states as the bound of a run."""

import json
import os
import statistics
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import bench_fit
import stepmeter
from benchlib import Result, finish
from cgroup import Finished
from stepmeter import StepMeter, processors_s

ROW = {"resident_compute_s": 10.0, "disk_s": 11.0, "disk_bytes_per_s": 100.0}


def finished(processor_s, returncode=0):
    # The first step is a warm-up. A quarter of the processors' work is forward's.
    read, written = [9999, 800, 800, 800], [9999, 500, 500, 500]
    forward = {
        "processor_s": [100.0, *(each / 4 for each in processor_s)],
        "read_nbytes": [9999, 200, 200, 200],
        "written_nbytes": [0, 0, 0, 0],
    }
    job = {
        "processor_s": [500.0, *processor_s],
        "steps_s": [99.0, 15.0, 14.0, 13.0],
        "read_nbytes": read,
        "written_nbytes": written,
        "forward": forward,
    }
    return Finished(returncode, False, 0, json.dumps(job) if returncode == 0 else "", "")


def test_a_step_is_measured_in_seconds_of_the_clock_and_of_the_processors(monkeypatch):
    passed_s = {"perf_counter": 100.0, "process_time": 7.0}
    clocks = {name: partial(passed_s.__getitem__, name) for name in passed_s}
    monkeypatch.setattr(stepmeter, "time", SimpleNamespace(**clocks))
    meter = StepMeter()
    for clock_s, worked_s in ((2.0, 3.5), (1.0, 0.25)):  # two threads work, one sleeps
        with meter.step():
            passed_s["perf_counter"] += clock_s
            passed_s["process_time"] += worked_s
    assert meter.steps_s == [2.0, 1.0]
    assert meter.processor_s == [3.5, 0.25]
    assert {name: len(values) for name, values in asdict(meter).items()} == dict.fromkeys(
        ("steps_s", "processor_s", "read_nbytes", "written_nbytes"), 2
    )


def test_a_step_that_fails_leaves_no_figures():
    meter = StepMeter()
    with pytest.raises(ArithmeticError), meter.step():
        raise ArithmeticError
    assert asdict(meter) == asdict(StepMeter())


def test_bytes_are_those_of_the_drive(tmp_path):
    meter, path = StepMeter(), tmp_path / "file"
    with meter.step(), path.open("wb") as file:
        file.write(bytes(1 << 20))
        os.fsync(file.fileno())
    assert meter.written_nbytes[0] in (0, pytest.approx(1 << 20, rel=0.1))  # 0 on tmpfs


@pytest.mark.parametrize(
    ("processor_s", "bound_s"), [([20.0, 20.0, 20.0], 11.0), ([90.0, 30.0, 26.0], None)]
)
def test_the_bound_is_the_longest_of_compute_disk_and_processors(processor_s, bound_s, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1})
    found = bench_fit._bound(ROW, finished(processor_s))
    assert found["processors_s"] == processors_s(processor_s) == statistics.median(processor_s) / 2
    assert found["bound_s"] == (bound_s or 15.0)
    assert found["passive_step_s"] == 14.0


@pytest.mark.parametrize(
    ("processor_s", "halves_s"),
    [
        ([8.0, 8.0, 8.0], 2.0 + 11.0),  # both move for longer than they work
        ([32.0, 24.0, 24.0], 3.0 + 11.0),  # forward works for longer
        ([40.0, 48.0, 40.0], 5.0 + 15.0),  # so does the rest
    ],
)
def test_each_half_of_a_step_has_a_bound(processor_s, halves_s, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1})
    assert bench_fit._bound(ROW, finished(processor_s))["halves_s"] == halves_s


def test_a_second_run_that_fails_takes_the_bound_alone_from_the_row():
    assert bench_fit._bound(ROW, finished([], returncode=1)) == {}


@pytest.mark.parametrize(
    ("rows", "figures", "width"),
    [(2, 3, 150), (2, 18, 150), (27, 3, 80), (27, 30, 80), (27, 30, 150), (40, 16, 80)],
)
def test_every_name_and_figure_of_a_table_can_be_read(rows, figures, width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    result = Result("title")
    for row in range(rows):
        result.add(**{f"figure_{number}_of_it": f"{row}:{number}" for number in range(figures)})
    assert finish(result, None) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= width
    words = {f"{row}:{number}" for row in range(rows) for number in range(figures)}
    words |= {f"figure_{number}_of_it" for number in range(figures)}
    assert words <= set(shown.split())


def test_long_text_is_folded_beside_its_figures(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = Result("title")
    result.add(case="a", step_s=1.5)
    result.add(case="b", failed="no room " * 40)
    assert finish(result, None) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.split().count("room") == 40
    assert {"case", "step_s", "failed"} <= set(shown.splitlines()[2].split())  # a line for each row
