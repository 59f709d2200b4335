"""bench_first_touch: what is filled is given back, and each part has its rate."""

import sys
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import bench_first_touch
from benchlib import Result

MIB = 1 << 20


@pytest.mark.parametrize("pages", bench_first_touch.PAGES)
def test_memory_is_fresh_each_time_and_given_back(
    pages: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_first_touch, "_BLOCK_NBYTES", 8 * MIB)
    begun, process = [], psutil.Process()
    take = bench_first_touch.PAGES[pages]

    def watched(nbytes: int) -> object:
        begun.append(process.memory_info().rss)
        return take(nbytes)

    monkeypatch.setitem(bench_first_touch.PAGES, pages, watched)
    result = Result("first touch")
    bench_first_touch.measure(result, pages, 0.0, 64 * MIB)
    (row,) = result.rows
    assert row["pages"] == pages
    parts = [name for name in row if name.startswith("up_to_")]
    assert parts == [f"up_to_{gib}_gib_bytes_per_s" for gib in (0.0156, 0.0312, 0.0469, 0.0625)]
    rounds = [begun[at : at + 8] for at in range(0, len(begun), 8)]
    assert len(rounds) == 4
    for each in rounds[1:]:
        assert each[-1] - each[0] > 48 * MIB  # all blocks but the last are held
        assert abs(each[0] - rounds[1][0]) < 8 * MIB  # and none of the round before
