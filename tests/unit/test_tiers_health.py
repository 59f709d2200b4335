"""A path that has become slow is reported, and no other: in virtual time."""

import threading

import pytest

from offload.tiers.health import STRIKES, WINDOW_S, PathHealth, PathRates

START = PathRates(read_bytes_per_s=1e9, write_bytes_per_s=5e8)


class Paths:
    """Paths that move bytes at given speeds, on a clock of their own."""

    def __init__(self, count=2, start=START):
        self.now_s = 0.0
        self.reports = []
        self.start = start
        self.health = PathHealth([start] * count, self.reports.append, lambda: self.now_s)

    def move(self, speeds, seconds, *, read_nbytes=8 << 20, written_nbytes=0):
        """Requests of the same size on each path, all at once, for so long."""
        end_s = self.now_s + seconds
        due = []
        for path, speed in enumerate(speeds):
            self.health.began(path)
            due.append(self.now_s + self._needed_s(speed, read_nbytes, written_nbytes))
        while self.now_s < end_s:
            path = due.index(min(due))
            self.now_s = due[path]
            self.health.ended(path, read_nbytes=read_nbytes, written_nbytes=written_nbytes)
            self.health.began(path)
            due[path] = self.now_s + self._needed_s(speeds[path], read_nbytes, written_nbytes)
        for path in range(len(speeds)):
            self.health.ended(path)

    def _needed_s(self, speed, read_nbytes, written_nbytes):
        return self.start.duration_s(read_nbytes, written_nbytes) / speed


LONG_S = (STRIKES + 1) * WINDOW_S


def test_healthy_paths_are_not_reported():
    paths = Paths()
    paths.move([1.0, 0.9], 10 * LONG_S)
    paths.move([1.3, 0.7], 10 * LONG_S, read_nbytes=0, written_nbytes=8 << 20)
    assert paths.reports == []


def test_a_slow_path_is_reported_once_with_its_rates():
    paths = Paths()
    paths.move([1.0, 1.0], LONG_S)
    paths.move([1.0, 0.25], 5 * LONG_S)
    (report,) = paths.reports
    assert report.path == 1
    assert report.bytes_per_s == pytest.approx(0.25e9, rel=0.05)
    assert report.start_bytes_per_s == pytest.approx(1e9)


def test_the_mix_of_reads_and_writes_is_what_the_rate_is_held_against():
    paths = Paths()
    paths.move([0.2, 1.0], LONG_S, read_nbytes=4 << 20, written_nbytes=4 << 20)
    (report,) = paths.reports
    assert report.path == 0
    assert report.start_bytes_per_s == pytest.approx(2 / (1 / 1e9 + 1 / 5e8))
    assert report.bytes_per_s == pytest.approx(report.start_bytes_per_s * 0.2, rel=0.05)


def test_a_short_dip_is_forgiven():
    paths = Paths()
    for _ in range(20):
        paths.move([1.0, 0.1], (STRIKES - 1) * WINDOW_S)
        paths.move([1.0, 1.0], 2 * WINDOW_S)
    assert paths.reports == []


def test_a_busy_machine_blames_no_path():
    paths = Paths(count=3)
    paths.move([0.1, 0.12, 0.09], 5 * LONG_S)
    assert paths.reports == []


def test_faster_than_at_the_start_is_no_measure_for_the_others():
    """A write into the page cache beside a healthy drive."""
    paths = Paths()
    paths.move([10.0, 0.9], 5 * LONG_S)
    assert paths.reports == []


def test_a_path_that_recovers_and_fails_again_is_reported_again():
    paths = Paths()
    for _ in range(2):
        paths.move([1.0, 0.2], LONG_S)
        paths.move([1.0, 1.0], LONG_S)
    assert [report.path for report in paths.reports] == [1, 1]


def test_a_path_that_moves_nothing_at_all_is_slow():
    paths = Paths()
    paths.health.began(1)
    paths.move([1.0], LONG_S)
    (report,) = paths.reports
    assert (report.path, report.bytes_per_s) == (1, 0)
    assert report.start_bytes_per_s == pytest.approx(START.balanced_bytes_per_s)


def test_a_path_a_thousand_times_slower_is_slow():
    paths = Paths()
    paths.move([1.0, 0.001], 3 * LONG_S)
    assert [report.path for report in paths.reports] == [1]


def test_a_path_alone_has_nothing_to_be_compared_with():
    paths = Paths()
    paths.move([0.1], 5 * LONG_S)
    assert paths.reports == []


def test_idle_time_is_nobody_s_fault():
    paths = Paths()
    for _ in range(5 * STRIKES):
        paths.move([1.0, 1.0], WINDOW_S)
        paths.now_s += 1000
    assert paths.reports == []


def test_requests_beside_each_other_count_their_time_once():
    paths = Paths()
    for path in (0, 1):
        for _ in range(4):
            paths.health.began(path)
    paths.now_s = 4 * WINDOW_S
    for path in (0, 1):
        for _ in range(4):  # each a quarter of what the path moves meanwhile
            paths.health.ended(path, read_nbytes=int(WINDOW_S * 1e9))
    assert paths.reports == []


def test_it_is_told_by_many_threads():
    health = PathHealth([START, START], lambda slow: None)

    def work(path):
        for _ in range(2000):
            health.began(path)
            health.ended(path, read_nbytes=1)

    threads = [threading.Thread(target=work, args=(index % 2,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert health._in_flight == [0, 0]
