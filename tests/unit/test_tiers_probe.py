"""Probing: time that is kept on a virtual clock, and real files with a tiny effort."""

import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from open_files import open_files

from offload.allocator.errors import CapacityError, TierIOError
from offload.planner.rehearsal import REHEARSED
from offload.swap.planning.cost import FRESH_NBYTES
from offload.tiers import mempolicy
from offload.tiers.file import TierFile
from offload.tiers.hostmem import HUGE_PAGE, PAGE
from offload.tiers.machine import Work
from offload.tiers.probe import compute, files, memory
from offload.tiers.probe.compute import measure_compute
from offload.tiers.probe.links import Measured, Wanted, copy_threads, measure_links
from offload.tiers.probe.pace import Effort, Pace, Route, measure_route

TINY = Effort(
    seconds=1.0, blocks=(64 << 10, 256 << 10), in_flight=2, repeats=3, repeat_nbytes=1 << 20,
    file_nbytes=2 << 20, memory_nbytes=8 << 20,
)  # fmt: skip
ROOM_NBYTES = 1 << 30


class VirtualLink:
    """A link of constant speed on a clock of its own."""

    def __init__(self, bytes_per_s: float, latency_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self.latency_s = latency_s
        self.now_s = 0.0
        self.moves: list[tuple[int, int]] = []

    def clock(self) -> float:
        return self.now_s

    def move(self, block_nbytes: int, count: int) -> None:
        self.moves.append((block_nbytes, count))
        self.now_s += self.latency_s + block_nbytes * count / self.bytes_per_s

    def route(self, effort: Effort) -> Route:
        return Route(
            source="host", target="far", blocks=effort.blocks, in_flight=effort.in_flight,
            move=self.move,
        )  # fmt: skip


def probe(link: VirtualLink, effort: Effort, routes: int = 2) -> list[float]:
    """Measure the link ``routes`` times in a row; how long each took."""
    pace = Pace(seconds=effort.seconds, clock=link.clock)
    route = link.route(effort)
    pace.cases = routes * route.cases
    took = []
    for _ in range(routes):
        began_s = link.now_s
        assert measure_route(route, effort, pace)
        took.append(link.now_s - began_s)
    return took


@given(
    bytes_per_s=st.floats(1e5, 1e12),
    latency_s=st.floats(0, 2.0),
    seconds=st.floats(0.1, 20.0),
    routes=st.integers(1, 6),
)
def test_the_time_is_kept_by_links_of_any_speed(
    bytes_per_s: float, latency_s: float, seconds: float, routes: int
) -> None:
    link = VirtualLink(bytes_per_s, latency_s)
    effort = Effort(seconds=seconds)
    probe(link, effort, routes)
    # What may come on top: of each route one page, and the fewest of the smallest blocks.
    first = 2 * latency_s + (PAGE + effort.in_flight * effort.blocks[0]) / bytes_per_s
    assert link.now_s <= seconds + routes * first + 1e-6


def test_a_fast_link_is_measured_with_every_block_and_all_repeats() -> None:
    link, effort = VirtualLink(5e9, 1e-4), Effort(seconds=10.0)
    pace = Pace(seconds=10.0, clock=link.clock)
    pace.cases = 4
    links = measure_route(link.route(effort), effort, pace)
    assert [one.block_nbytes for one in links] == list(effort.blocks)
    assert {one.repeats for one in links} == {effort.repeats}
    for one in links:
        assert one.low_bytes_per_s <= one.bytes_per_s <= one.high_bytes_per_s
        assert one.bytes_per_s == pytest.approx(5e9, rel=0.05)
        assert one.latency_s == pytest.approx(1e-4, rel=0.05)
    assert max(block * count for block, count in link.moves) <= effort.repeat_nbytes
    assert all(count >= effort.in_flight for block, count in link.moves if block > PAGE)


def test_a_slow_link_is_measured_with_small_blocks_only() -> None:
    link, effort = VirtualLink(4 << 20, 0.0), Effort(seconds=8.0)  # 4 MiB/s
    pace = Pace(seconds=8.0, clock=link.clock)
    pace.cases = 4
    links = measure_route(link.route(effort), effort, pace)
    assert [one.block_nbytes for one in links] == [1 << 20]
    assert link.now_s <= 9.0


def test_a_link_that_takes_all_the_time_is_still_told_once() -> None:
    link, effort = VirtualLink(1 << 20, 0.0), Effort(seconds=0.5)
    pace = Pace(seconds=0.5, clock=link.clock)
    pace.cases = 4
    (one,) = measure_route(link.route(effort), effort, pace)
    assert one.repeats == 1
    assert one.bytes_per_s == pytest.approx(1 << 20)


def measure(directory: Path, effort: Effort = TINY, **files_: Path) -> Measured:
    wanted = Wanted(files={"file:x": directory, **files_}, nodes={}, devices=False, threads=2)
    return measure_links(wanted, available_nbytes=ROOM_NBYTES, effort=effort)


def test_a_real_directory_is_measured_both_ways_and_nothing_stays(tmp_path: Path) -> None:
    threads = set(threading.enumerate())
    steps: list[str] = []
    held: list[str] = []

    def progress(step: str) -> None:
        steps.append(step)
        held.extend(open_files(tmp_path))

    wanted = Wanted(files={"file:x": tmp_path}, nodes={}, devices=False, threads=2)
    measured = measure_links(wanted, available_nbytes=ROOM_NBYTES, effort=TINY, progress=progress)
    assert measured.failures == ()
    ends = [(link.source, link.target, link.in_flight) for link in measured.links]
    assert ends[:2] == [("host", "host", 1), ("host", "host", 2)]
    ways = (("host", "file:x", 2), ("file:x", "host", 2), ("file:x", "file:x", 2))
    assert set(ends[2:]) == set(ways)
    assert all(link.bytes_per_s > 0 and link.repeats >= 1 for link in measured.links)
    assert "host → file:x" in steps
    assert list(tmp_path.iterdir()) == []
    assert set(threading.enumerate()) <= threads
    assert held
    assert open_files(tmp_path) == []


def test_the_file_stays_within_its_bound_and_holds_random_bytes(tmp_path: Path) -> None:
    pace = Pace(seconds=5.0, clock=lambda: 0.0)
    pace.cases = files.count_cases(TINY)
    with files.open_file(tmp_path, "file:x", TINY, pace) as (write, read, _):
        write.move(256 << 10, 40)  # five times round the file
        probe_file = write.move.__self__._tier.file  # type: ignore[attr-defined]
        read.prepare()
        read.move(256 << 10, 8)
        assert len(set(open_files(tmp_path))) == 1
        facts = os.fstat(probe_file.fd)
        assert facts.st_size == TINY.file_nbytes
        assert facts.st_blocks * 512 < 2 * TINY.file_nbytes
        assert facts.st_nlink == 0
        head = os.pread(probe_file.fd, 4096, 0)
        assert len(set(head)) > 200


def test_reading_and_writing_at_once_counts_each_byte_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("write", "read"):
        monkeypatch.setattr(TierFile, name, spy(calls, name))
    pace = Pace(seconds=5.0, clock=lambda: 0.0)
    with files.open_file(tmp_path, "file:x", TINY, pace) as (_, _, copy):
        calls.clear()
        copy.move(64 << 10, 6)
    assert (copy.source, copy.target) == ("file:x", "file:x")
    assert sorted(calls) == ["read"] * 6 + ["write"] * 6


@pytest.fixture
def without_direct_io(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "ramfs"
    place.mkdir()
    subprocess.run(["mount", "-t", "ramfs", "none", place], check=True)
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_without_direct_io_each_write_is_flushed_and_each_read_uncached(
    without_direct_io: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(files, "free_nbytes", lambda _: ROOM_NBYTES)  # this one tells none
    for name in ("write", "sync", "uncache", "read"):
        monkeypatch.setattr(TierFile, name, spy(calls, name))
    pace = Pace(seconds=5.0, clock=lambda: 0.0)
    with files.open_file(without_direct_io, "file:x", TINY, pace) as (write, read, _):
        calls.clear()
        write.prepare()
        write.move(64 << 10, 1)
        read.prepare()
        read.move(64 << 10, 1)
    assert calls == ["write", "sync", "sync", "uncache", "read"]


def spy(calls: list[str], name: str) -> Any:
    whole = getattr(TierFile, name)

    def call(*arguments: Any) -> Any:
        calls.append(name)
        return whole(*arguments)

    return call


def test_filling_ends_when_its_time_is_over(tmp_path: Path) -> None:
    ticks = iter(range(1000))
    pace = Pace(seconds=10.0, clock=lambda: float(next(ticks)))
    pace.cases = files.count_cases(TINY)
    with files.open_file(tmp_path, "file:x", TINY, pace) as (write, _, _):
        # Two pieces of 256 KiB were enough for the larger block as well, at two in flight.
        held = os.fstat(write.move.__self__._tier.file.fd).st_size  # type: ignore[attr-defined]
        assert TINY.in_flight * TINY.blocks[0] <= held < TINY.file_nbytes
        assert write.blocks[0] == TINY.blocks[0]


def test_without_time_the_smallest_call_of_each_kind_of_work_is_measured() -> None:
    rates = measure_compute(0.0)
    for dtype in ("float32", "bfloat16"):
        works = [rate.work for rate in rates if rate.dtype == dtype]
        assert len(works) == len(set(works))
        expected = set(get_args(Work)) - {*REHEARSED, "reclaimed touch"}
        once = {"first touch", "checksum", "dispatch"}
        assert set(works) == (expected if dtype == "float32" else expected - once)
    assert all(rate.per_s > 0 and rate.processor == "cpu" for rate in rates)


def test_types_that_nobody_asked_for_are_not_measured() -> None:
    assert {rate.dtype for rate in measure_compute(0.0, dtypes=["float32"])} == {"float32"}


def test_fresh_memory_has_a_rate_for_small_results_and_for_large_ones() -> None:
    sizes = [
        rate.size
        for rate in measure_compute(60.0, dtypes=["float32"])
        if rate.work == "first touch"
    ]
    assert min(sizes) == FRESH_NBYTES
    assert max(sizes) >= 32 * HUGE_PAGE
    assert sum(FRESH_NBYTES < size <= 2 * HUGE_PAGE for size in sizes) >= 2  # where pages change


@pytest.mark.parametrize(("longer_s", "shorter_s", "found_s"), [(3.0, 1.0, 2.0), (1.0, 1.5, 0.05)])
def test_what_one_call_takes_beyond_another(
    longer_s: float, shorter_s: float, found_s: float
) -> None:
    now_s = 0.0

    def taking(seconds: float) -> Callable[[], None]:
        def call() -> None:
            nonlocal now_s
            now_s += seconds

        return call

    found = compute._difference(taking(longer_s), taking(shorter_s), lambda: now_s)
    assert found == pytest.approx(found_s)


@pytest.mark.parametrize("verb", ["read", "write"])
def test_a_disk_that_fails_is_named_and_the_others_go_on(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sick").mkdir()
    (tmp_path / "well").mkdir()
    whole = getattr(TierFile, verb)

    def sometimes(file: TierFile, offset: int, address: int, nbytes: int) -> None:
        if file.directory.name == "sick":
            raise TierIOError(5, f"{verb} failed: the disk is gone")
        whole(file, offset, address, nbytes)

    monkeypatch.setattr(TierFile, verb, sometimes)
    threads = set(threading.enumerate())
    wanted = Wanted(
        files={"file:sick": tmp_path / "sick", "file:well": tmp_path / "well"},
        nodes={}, devices=False, threads=1,
    )  # fmt: skip
    measured = measure_links(wanted, available_nbytes=ROOM_NBYTES, effort=TINY)
    ((tier, message),) = [(one.tier, one.message) for one in measured.failures]
    assert tier == "file:sick"
    assert "the disk is gone" in message
    assert ("file:well", "host") in {(link.source, link.target) for link in measured.links}
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert set(threading.enumerate()) <= threads


def test_a_full_disk_and_a_missing_directory_are_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = measure(tmp_path / "missing")
    assert "can't open scratch in" in missing.failures[0].message
    monkeypatch.setattr(files, "free_nbytes", lambda _: 300 << 10)
    full = measure(tmp_path)
    assert "300.00 KiB free, measuring needs 512.00 KiB (524288 bytes)" in full.failures[0].message
    assert {link.target for link in full.links} == {"host"}


def test_too_little_memory_is_told_before_anything_is_opened(tmp_path: Path) -> None:
    wanted = Wanted(files={"file:x": tmp_path}, nodes={}, devices=False, threads=1)
    with pytest.raises(CapacityError, match=r"10.00 MiB of memory are available, .* 64.00 MiB"):
        measure_links(wanted, available_nbytes=10 << 20, effort=TINY)


def test_little_memory_leaves_out_the_large_blocks(tmp_path: Path) -> None:
    effort = replace(TINY, blocks=(64 << 10, 8 << 20), file_nbytes=32 << 20)
    wanted = Wanted(files={"file:x": tmp_path}, nodes={}, devices=False, threads=1)
    measured = measure_links(wanted, available_nbytes=64 << 20, effort=effort)
    assert {link.block_nbytes for link in measured.links if link.target == "file:x"} == {64 << 10}


def test_copies_between_nodes_copy_every_byte_of_a_repeat() -> None:
    pace = Pace(seconds=1.0, clock=lambda: 0.0)
    cpus = tuple(os.sched_getaffinity(0))
    with memory.open_node_copy(TINY, 0, 0, cpus, pace) as (route,):
        assert (route.source, route.target) == ("numa:0", "numa:0")
        route.move(memory.COPY_NBYTES, len(cpus))
        route.move(PAGE, 1)
    assert set(os.sched_getaffinity(0)) == set(cpus)  # of this thread, untouched


def test_memory_that_lands_elsewhere_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def placement(_address: int, nbytes: int) -> mempolicy.Placement:
        quarter = nbytes // 4
        return mempolicy.Placement(
            nbytes_by_node={0: quarter, 7: nbytes - quarter}, absent_nbytes=0, huge_nbytes=None
        )

    monkeypatch.setattr(mempolicy, "placement", placement)
    pace = Pace(seconds=1.0, clock=lambda: 0.0)
    with (
        pytest.raises(TierIOError, match="asked node 0, got 75 % node 7, 25 % node 0"),
        memory.open_node_copy(TINY, 0, 0, (), pace),
    ):
        pass


def test_a_node_that_does_not_exist_is_a_failure_of_its_links() -> None:
    wanted = Wanted(files={}, nodes={0: (0,), 1000: ()}, devices=False, threads=1)
    measured = measure_links(wanted, available_nbytes=ROOM_NBYTES, effort=TINY)
    assert {failure.tier for failure in measured.failures} == {"numa:1000", "numa:0"}
    assert all("memory node 1000" in failure.message for failure in measured.failures)


@pytest.mark.gpu
def test_a_real_device_is_measured_pageable_and_pinned() -> None:
    wanted = Wanted(files={}, nodes={}, devices=True, threads=1)
    measured = measure_links(wanted, available_nbytes=ROOM_NBYTES, effort=Effort(seconds=5.0))
    assert measured.failures == ()
    assert {(link.source, link.target) for link in measured.links} >= {
        ("host", "device:0"), ("device:0", "host"), ("pinned", "device:0"), ("device:0", "pinned"),
    }  # fmt: skip


def test_threads_of_a_copy_respect_a_quota() -> None:
    cores = len(os.sched_getaffinity(0))
    assert copy_threads(None) == cores
    assert copy_threads(0.5) == 1
    assert copy_threads(1000.0) == cores
