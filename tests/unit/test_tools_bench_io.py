"""The I/O benchmark: who takes part, who is best, and that a missing peer is told."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import bench_io
import io_contenders
from io_contenders import Aiofiles, Buffers, Job, OffloadEngine, Sample

PAGE = 4096


@pytest.fixture
def buffers():
    buffers = Buffers()
    yield buffers
    buffers.release()


@pytest.fixture
def path(tmp_path, buffers):
    bench_io.prepare(tmp_path / "data", 64 << 20, buffers)
    return tmp_path / "data"


def test_a_peer_that_can_not_run_is_named_with_its_reason(path, buffers, monkeypatch):
    monkeypatch.setattr(io_contenders.shutil, "which", lambda _: None)
    monkeypatch.setattr(io_contenders, "URING_BINDING", "no_such_binding")
    monkeypatch.setattr(io_contenders.deepspeed.importlib.util, "find_spec", lambda _: None)
    io_contenders.deepspeed.load_operator.cache_clear()
    ready, missing, _ = io_contenders.contenders(path, buffers)
    for contender in ready:
        contender.close()
    assert {contender.name for contender in ready} == {
        "offload threads", "offload aiofiles", "aiofiles",
    }  # fmt: skip
    reasons = dict(text.split(": ", 1) for text in missing)
    assert reasons["fio libaio"] == "fio is not installed: apt install fio"
    assert "pip install 'offload[deepspeed]'" in reasons["deepspeed"]
    assert "No module named 'no_such_binding'" in reasons["uring-api"]


def test_blocks_are_random_and_written_to_the_end(path):
    content = path.read_bytes()
    assert len(content) == 64 << 20
    assert len(set(content[: 1 << 16])) == 256
    assert content[-PAGE:] != bytes(PAGE)


@pytest.mark.parametrize("pattern", ["read", "write", "mixed"])
def test_contenders_move_what_the_job_says(path, buffers, pattern):
    job = Job(pattern, 1 << 20, 2, 8)
    for contender in (OffloadEngine("threads", path, buffers), Aiofiles(path, buffers)):
        sample = contender.run(job)
        contender.close()
        assert sample.bytes_per_s > 0
        assert sample.cpu_s_per_gb >= 0
    assert [job.writes(number) for number in range(4)] == {
        "read": [False] * 4, "write": [True] * 4, "mixed": [False, True, False, True],
    }[pattern]  # fmt: skip


@pytest.mark.peers
def test_fio_is_asked_for_the_same_job(path):
    fio = io_contenders.Fio("fio", path, "--ioengine=libaio")
    assert fio.run(Job("mixed", 1 << 20, 2, 8)).bytes_per_s > 0


def test_among_the_fastest_the_one_with_the_least_processor_time_is_best():
    def standing(rate, cpu):
        return bench_io.Standing(None, 1, [Sample(rate, cpu)])

    fast, spare, slow = standing(100.0, 9.0), standing(98.0, 1.0), standing(50.0, 0.1)
    assert bench_io.best_of([slow, spare, fast]) is fast
    assert bench_io.champion_of([fast, spare, slow]) is spare
    assert bench_io.champion_of([fast, slow]) is fast


class Steady:
    """A contender whose rate follows from its number in flight and the round."""

    def __init__(self, name, side, rates):
        self.name, self.side, self.rates, self.jobs = name, side, rates, []

    def run(self, job):
        self.jobs.append(job)
        rate = self.rates[job.in_flight] * (1 + len(self.jobs) % 3 / 1000)
        return Sample(rate, 1.0 / rate)


def test_a_duel_lets_each_side_be_at_its_best():
    sizes = bench_io.Sizes(in_flight=(1, 4), duels=5)
    mine = Steady("mine", "offload", {1: 50.0, 4: 110.0})
    theirs = Steady("theirs", "peer", {1: 100.0, 4: 80.0})
    found = bench_io.duel(mine, theirs, "read", 8 << 20, sizes)
    assert (found.mine.in_flight, found.theirs.in_flight) == (4, 1)
    assert found.rate == pytest.approx(1.1, rel=0.01)
    assert len(mine.jobs) == len(theirs.jobs) == 10
    assert f"mine x4 against the peer theirs x1: {found.rate:.3f} of its rate" in str(found)
