"""bench_lookups: a table is looked up both ways, and advice is as it was afterwards."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import bench_lookups
from benchlib import Result
from offload.tiers import hostmem


def test_both_ways_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_lookups, "_PAIRS", 2)
    advised: list[int] = []
    advise = hostmem.will_need
    monkeypatch.setattr(
        hostmem, "will_need", lambda at, nbytes: (advised.append(nbytes), advise(at, nbytes))
    )
    watched, result = hostmem.will_need, Result("lookups")
    bench_lookups.measure(result, tmp_path, 4000, 128, 8)
    assert hostmem.will_need is watched
    assert len(advised) >= 2  # once for each of the lookups that ask, at the least
    (row,) = result.rows
    assert row["table"] == "4000 x 128"
    assert row["rows"] == 8
    assert not list(tmp_path.iterdir())
