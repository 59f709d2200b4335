"""The optimizer's benchmark: how sure it is of a median, and that it repeats until it is."""

import itertools
import random
import statistics
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import bench_optimizer
from benchlib import Result, median_interval


def test_the_interval_holds_the_median_nineteen_times_in_twenty():
    generator = random.Random(0)
    held = 0
    for _ in range(500):
        values = [generator.lognormvariate(0, 0.5) for _ in range(40)]
        low, high = median_interval(values)
        assert low <= statistics.median(values) <= high
        held += low <= 1 <= high
    assert 0.92 <= held / 500 <= 0.99


def test_few_values_are_never_sure():
    assert median_interval([3.0]) == (3.0, 3.0)
    assert median_interval([3.0, 1.0, 2.0, 5.0]) == (1.0, 5.0)


@pytest.mark.parametrize(("ratios", "pairs"), [([1.04], 7), ([0.9, 1.2], 15)])
def test_processes_are_repeated_in_turn_until_the_median_is_known(
    ratios, pairs, monkeypatch, tmp_path
):
    turns, asked = itertools.cycle(ratios), []

    def run(size, way, budget, folder):
        asked.append(way)
        return {"visible_s": 1.0 if way == "plain" else next(turns)}, ""

    monkeypatch.setattr(bench_optimizer, "_run", run)
    result = Result("")
    runs = {
        "plain": {"visible_s": 1.0, "peak_nbytes": 1 << 30},
        bench_optimizer.IN_MEMORY: {"visible_s": next(turns)},
    }
    bench_optimizer._in_memory_jobs(result, "70M", tmp_path, runs)
    assert result.rows[0]["pairs"] == pairs
    assert asked.count("plain") == asked.count(bench_optimizer.IN_MEMORY) == pairs - 1
    assert asked[:4] == [bench_optimizer.IN_MEMORY, "plain", "plain", bench_optimizer.IN_MEMORY]
    assert result.checks[0].value == pytest.approx(statistics.median((ratios * pairs)[:pairs]))
