"""bench_attach_gpu: every way of one model trains on the simulated device, and is told."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import bench_attach_gpu as bench
from gpu_checks import Simulated
from gpu_decoder import SMALL


def test_every_way_of_a_model_is_measured_and_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shape = replace(SMALL, layers=1, budget_nbytes=64 << 20)
    found = bench.compare(shape, Simulated())
    bench.tell("small", found)
    lines = capsys.readouterr().out.splitlines()
    assert len(found) == len(lines) - 1 == 4
    assert all(phases.total_s > phases.step_s > 0 for phases in found.values())
    assert "1.00 of plain" in lines[1]


def test_without_a_device_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err
