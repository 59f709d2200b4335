"""Whether a hypervisor takes free memory back: by what filling it again takes."""

import dataclasses

import psutil
import pytest
from planning_models import machine

from offload.tiers.probe import reclaim
from offload.tiers.probe.reclaim import add_reclaimed, measure_reclaimed

BLOCK = 64 << 20
GIB = 1 << 30


class Host:
    """Takes so many of the blocks back that lie free for longer than two seconds, the last first.

    A block that is there takes a hundredth of a second, one that was taken back half of one.
    """

    def __init__(self, takes: int) -> None:
        self.takes = takes
        self.gone = 1 << 30  # nothing has ever been touched
        self.slept_s: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        self.gone = self.takes if seconds > 2.0 else 0

    def fill(self, count: int) -> list[float]:
        late = min(self.gone, count)
        self.gone = 0
        return [0.01] * (count - late) + [0.5] * late


def test_what_was_taken_back_is_told_with_its_rate() -> None:
    host = Host(takes=16)
    found = measure_reclaimed(2 * GIB, fill=host.fill, sleep=host.sleep)
    assert found is not None
    assert found.work == "reclaimed touch"
    assert found.size == 16 * BLOCK
    assert found.per_s == pytest.approx(BLOCK / 0.5)
    assert len(host.slept_s) == 1
    assert 2.0 < host.slept_s[0] < 4.0  # one pass


@pytest.mark.parametrize(("takes", "nbytes"), [(0, 2 * GIB), (3, 2 * GIB), (16, 3 * BLOCK)])
def test_noise_and_little_memory_tell_nothing(takes: int, nbytes: int) -> None:
    host = Host(takes)
    assert measure_reclaimed(nbytes, fill=host.fill, sleep=host.sleep) is None


def test_no_more_than_a_quarter_of_what_is_free_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(reclaim, "measure_reclaimed", asked.append)
    given = machine()
    for free_nbytes in (1 * GIB, 64 * GIB):
        tiers = tuple(
            dataclasses.replace(tier, free_nbytes=free_nbytes) if tier.kind == "host" else tier
            for tier in given.tiers
        )
        changed = dataclasses.replace(given, tiers=tiers)
        assert add_reclaimed(changed) == changed
    assert asked == [GIB // 4, 2 * GIB]


def test_blocks_are_held_together_and_then_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reclaim, "_BLOCK_NBYTES", 8 << 20)
    process, seen = psutil.Process(), []
    release = reclaim.HostBuffer.release

    def watched(buffer: reclaim.HostBuffer) -> None:
        seen.append(process.memory_info().rss)
        release(buffer)

    monkeypatch.setattr(reclaim.HostBuffer, "release", watched)
    before = process.memory_info().rss
    assert len(reclaim._fill(8)) == 8
    assert seen[0] - before > 60 << 20
    assert process.memory_info().rss - before < 8 << 20
