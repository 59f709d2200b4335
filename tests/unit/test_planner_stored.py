"""Measured machines that are kept: found again, never trusted blindly."""

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from offload.allocator.errors import ConfigError
from offload.planner.machines import find_machine
from offload.planner.stored import Calibrated, Care, calibrated, fingerprint, path_of
from offload.tiers.inventory import file_tier_name
from offload.tiers.machine import Machine
from offload.tiers.system import System

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "offload" / "machines"


@pytest.fixture
def drive(tmp_path: Path) -> Path:
    folder = tmp_path / "nvme"
    folder.mkdir()
    return folder


class Machines:
    """Makes up what would be measured: each time another rate."""

    def __init__(self, make: Callable[[Path, float], Machine]) -> None:
        self.make = make
        self.said: list[str] = []
        self.measured: list[Care] = []
        self.now = NOW

    def measure(self, directory: Path, care: Care) -> Machine:
        self.measured.append(care)
        return self.make(directory, 1e9 * len(self.measured))

    def get(self, directory: Path, *, care: Care = "quick", again: bool = False) -> Calibrated:
        return calibrated(
            directory, care=care, again=again, say=self.said.append, measure=self.measure,
            now=lambda: self.now,
        )  # fmt: skip


@pytest.fixture
def machines(made_up: Callable[[Path, float], Machine]) -> Machines:
    return Machines(made_up)


def rate_of(found: Calibrated, directory: Path) -> float:
    return found.machine.link("host", file_tier_name(directory)).bytes_per_s


def the_file(cache: Path) -> Path:
    (file,) = cache.iterdir()
    return file


def test_it_is_measured_once_and_then_found(cache: Path, drive: Path, machines: Machines) -> None:
    first = machines.get(drive)
    assert first.name == "this machine, measured just now"
    machines.now += timedelta(days=3, hours=2)
    second = machines.get(drive)
    assert machines.measured == ["quick"]
    assert rate_of(second, drive) == rate_of(first, drive)
    assert second.machine.compute == first.machine.compute
    assert second.name == "this machine, measured 3 days ago"
    assert machines.said == []
    document = json.loads(the_file(cache).read_text())
    assert document["measured"] == NOW.isoformat()
    assert document["fingerprint"] == fingerprint(drive, System())


def test_another_folder_of_the_same_drive_is_the_same_drive(
    cache: Path, drive: Path, machines: Machines
) -> None:
    machines.get(drive)
    other = drive / "other"
    other.mkdir()
    assert rate_of(machines.get(other), other) == 1e9
    assert machines.measured == ["quick"]
    assert len(list(cache.iterdir())) == 1


def test_free_bytes_are_those_of_now(cache: Path, drive: Path, machines: Machines) -> None:
    machines.get(drive)
    document = json.loads(the_file(cache).read_text())
    for tier in document["machine"]["tiers"]:
        tier["free_nbytes"] = 1
    the_file(cache).write_text(json.dumps(document))
    machine = machines.get(drive).machine
    assert machines.measured == ["quick"]
    assert all(tier.free_nbytes > 1 for tier in machine.tiers)


def test_asking_for_it_and_more_care_measure_again(
    cache: Path, drive: Path, machines: Machines
) -> None:
    machines.get(drive)
    assert rate_of(machines.get(drive, again=True), drive) == 2e9
    assert rate_of(machines.get(drive, care="full"), drive) == 3e9
    assert rate_of(machines.get(drive, care="full"), drive) == 3e9
    assert rate_of(machines.get(drive, care="quick"), drive) == 3e9  # more careful than asked for
    assert machines.measured == ["quick", "quick", "full"]
    assert cache.exists()


TEXTS = {"cut off": b'{"format": 1, "meas', "bytes": b"\xff\xfe\x00", "no mapping": b"[]"}
CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "version": lambda document: document.update(format=99),
    "machine": lambda document: document["fingerprint"].update(cpu="another"),
    "date": lambda document: document.update(measured="yesterday"),
    "no zone": lambda document: document.update(measured="2026-01-31T12:00:00"),
    "unit": lambda document: document["machine"]["links"][0].update(bytes_per_s=7.0),
    "no link": lambda document: document["machine"].update(links=[]),
    "no rates": lambda document: document["machine"].update(compute=[]),
}


def spoil(file: Path, how: str) -> None:
    if how in TEXTS:
        file.write_bytes(TEXTS[how])
        return
    document: dict[str, Any] = json.loads(file.read_text())
    CHANGES[how](document)
    file.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut off", "is damaged"), ("bytes", "can't be read"), ("no mapping", "is damaged"),
        ("version", "is of another version"), ("machine", "is of another machine"),
        ("date", "is damaged"), ("no zone", "is damaged"), ("unit", "is no rate of a link"),
        ("no link", "was not measured"), ("no rates", "no rates of the processor"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_told_and_measured_again(
    how: str, message: str, cache: Path, drive: Path, machines: Machines
) -> None:
    machines.get(drive)
    spoil(the_file(cache), how)
    assert rate_of(machines.get(drive), drive) == 2e9
    (said,) = machines.said
    assert message in said
    assert str(the_file(cache)) in said
    assert "measuring this machine again" in said
    assert rate_of(machines.get(drive), drive) == 2e9  # the file is whole again
    assert len(machines.said) == 1


@pytest.mark.parametrize(
    ("later", "message"),
    [(timedelta(days=31), "was written 31 days ago"), (timedelta(days=-1), "in the future")],
)
def test_an_old_file_is_measured_again(
    later: timedelta, message: str, cache: Path, drive: Path, machines: Machines
) -> None:
    machines.get(drive)
    machines.now += later
    assert rate_of(machines.get(drive), drive) == 2e9
    assert message in machines.said[0]
    assert cache.exists()


def test_a_cache_that_cannot_be_written_costs_only_time(
    tmp_path: Path, drive: Path, monkeypatch: pytest.MonkeyPatch, machines: Machines
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert rate_of(machines.get(drive), drive) == 1e9
    assert "can't keep the figures" in machines.said[-1]


def test_a_write_that_fails_leaves_the_old_file(
    cache: Path, drive: Path, monkeypatch: pytest.MonkeyPatch, machines: Machines
) -> None:
    machines.get(drive)
    before = the_file(cache).read_text()

    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        machines.get(drive, again=True)
    assert "No space left on device" in machines.said[-1]
    assert the_file(cache).read_text() == before


def test_what_rates_depend_on_names_the_file(
    cache: Path, drive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    few = path_of(fingerprint(drive, System()))
    assert few.parent == cache
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert path_of(fingerprint(drive, System())) != few
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", "/home/me")
    assert path_of({}).is_relative_to("/home/me/.cache/offload")
    assert os.environ["HOME"] == "/home/me"


def test_a_directory_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no directory: make it"):
        find_machine(None, [str(tmp_path / "none")], print)
    with pytest.raises(ConfigError, match="leave --machine laptop-16gb out"):
        find_machine("laptop-16gb", [], print, measure=True)
