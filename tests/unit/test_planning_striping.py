"""Predictions of stores that are striped over several drives."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planning_models import BASELINE, DRIVE, MIB, Model, machine, settings, trace
from real_runs import both, check_moved

import offload
from offload.allocator.errors import BudgetError, ConfigError
from offload.planner.machines import find_machine
from offload.swap.homes import SPARE_NBYTES
from offload.swap.planning.cost import Costs
from offload.swap.planning.predict import least_budget, predict
from offload.swap.planning.striping import drives_of, joined, striped
from offload.swap.planning.whatif import changed
from offload.tiers.hostmem import HUGE_PAGE, PAGE
from offload.tiers.machine import Machine, write_machine

PROGRAM = trace()
GB = 1e9


def with_drives(*rates: float, media: str = "", free_nbytes: int = 1 << 40) -> Machine:
    """The usual machine with drives ``file:/0``, ... that read and write so fast.

    ``media`` names the medium of each, by one letter.
    """
    made = machine()
    before = made.tier(DRIVE)
    tiers = tuple(
        dataclasses.replace(
            before,
            name=f"file:/{number}",
            medium=media[number] if media else f"drive {number}",
            free_nbytes=free_nbytes,
            capacity_nbytes=1 << 41,
        )
        for number in range(len(rates))
    )
    ends = {DRIVE: "", "host": "host"}
    read = made.link(DRIVE, "host")
    copy = dataclasses.replace(read, target=DRIVE)
    links = tuple(
        dataclasses.replace(
            link,
            source=ends[link.source] or f"file:/{number}",
            target=ends[link.target] or f"file:/{number}",
            **dict.fromkeys(
                ("low_bytes_per_s", "bytes_per_s", "high_bytes_per_s"),
                rate / 2 if link.source == link.target else rate,
            ),
        )
        for number, rate in enumerate(rates)
        for link in (*made.links, copy)
        if DRIVE in {link.source, link.target}
    )
    host = tuple(tier for tier in made.tiers if tier.name != DRIVE)
    rest = tuple(link for link in made.links if DRIVE not in {link.source, link.target})
    return dataclasses.replace(made, tiers=(*host, *tiers), links=(*rest, *links))


def names(count: int) -> list[str]:
    return [f"file:/{number}" for number in range(count)]


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_striped_run_moves_the_bytes_that_are_predicted(
    tmp_path: Path, in_backward: bool
) -> None:
    stores = [tmp_path / "a", tmp_path / "b"]
    real, virtual = both(PROGRAM, stores, step_in_backward=in_backward)
    check_moved(real, virtual, in_backward=in_backward)


@pytest.mark.parametrize("paths", [1, 2])
def test_extents_are_as_large_as_those_of_a_store(tmp_path: Path, paths: int) -> None:
    stores = [tmp_path / str(number) for number in range(paths)]
    engine = offload.attach(Model(), None, budget="host=8GiB", nvme=stores)
    tier = engine.weights.store.tier
    one = dataclasses.replace(settings(1), align_nbytes=HUGE_PAGE if paths > 1 else PAGE)
    for nbytes in (0, 1, PAGE, PAGE + 1, (16 << 20) - 1, 16 << 20, (16 << 20) + 1, 77 << 20):
        assert one.extent_nbytes(nbytes) == tier.extent_nbytes(nbytes)
    engine.detach()


def test_bytes_go_by_the_rate_of_each_path_and_rates_add_up() -> None:
    found = striped(with_drives(3 * GB, 1 * GB), names(2))
    assert found.weights == (3, 1)
    assert found.drive == "file:/0 + file:/1"
    assert drives_of(found.drive) == ("file:/0", "file:/1")
    for pair in ((found.drive, "host"), ("host", found.drive)):
        assert found.machine.link(*pair).bytes_per_s == pytest.approx(4 * GB)
    assert found.machine.link(found.drive, found.drive).bytes_per_s == pytest.approx(2 * GB)
    # Three of four bytes are on the first: it is full first.
    assert found.machine.tier(found.drive).free_nbytes == pytest.approx((1 << 40) * 4 / 3, rel=1e-6)
    found.machine.check_measured()


def test_directories_of_one_drive_are_no_faster_than_it_is() -> None:
    found = striped(with_drives(2 * GB, 2 * GB, media="aa"), names(2))
    assert found.weights == (1, 1)
    assert found.machine.link(found.drive, "host").bytes_per_s == pytest.approx(2 * GB)
    assert found.machine.tier(found.drive).free_nbytes == 1 << 40
    three = striped(with_drives(2 * GB, 2 * GB, 1 * GB, media="aab"), names(3))
    assert three.weights == (1, 1, 1)
    assert three.machine.link(three.drive, "host").bytes_per_s == pytest.approx(3 * GB)


@given(st.lists(st.floats(0.05, 20), min_size=2, max_size=5))
def test_no_path_is_faster_than_it_was_measured(rates: list[float]) -> None:
    found = striped(with_drives(*(rate * GB for rate in rates)), names(len(rates)))
    together = found.machine.link(found.drive, "host").bytes_per_s
    total = sum(found.weights)
    for rate, weight in zip(rates, found.weights, strict=True):
        assert together * weight / total <= rate * GB * (1 + 1e-9)
    assert together >= max(rates) * GB * (1 - 1e-9)  # at least as fast as the best one alone
    assert together <= sum(rates) * GB * (1 + 1e-9)


def test_a_second_drive_makes_what_the_drive_bounds_faster_and_moves_as_much() -> None:
    made = with_drives(0.2 * GB, 0.2 * GB)
    alone = predict(PROGRAM, made, dataclasses.replace(settings(360), drive="file:/0"), BASELINE)
    found = striped(made, names(2))
    drive = dataclasses.replace(settings(360), drive=found.drive, align_nbytes=HUGE_PAGE)
    both_drives = predict(PROGRAM, found.machine, drive, BASELINE)
    assert alone.bound_by == "drive"
    assert 0.45 * alone.step_s < both_drives.step_s < 0.7 * alone.step_s
    one, two = alone.last.finished, both_drives.last.finished
    assert (two.read_nbytes, two.written_nbytes) == (one.read_nbytes, one.written_nbytes)
    slower = changed(found.machine, found.drive, {"nvme": 0.1 * GB})
    assert predict(PROGRAM, slower, drive, BASELINE).step_s > both_drives.step_s


def test_what_a_rehearsal_found_of_one_drive_grows_with_the_drives() -> None:
    one = with_drives(2 * GB, 2 * GB)
    tiles = dataclasses.replace(one.compute[0], work="tiles", dtype="float32", size=1, per_s=1.5e9)
    rehearsed = dataclasses.replace(one, compute=(*one.compute, tiles))
    found = striped(rehearsed, names(2))
    assert Costs(rehearsed, "file:/0").both_bytes_per_s == pytest.approx(1.5e9)
    assert Costs(found.machine, found.drive).both_bytes_per_s == pytest.approx(3e9)


def test_a_drive_that_is_too_small_is_named_with_all_of_them() -> None:
    found = striped(with_drives(3 * GB, 1 * GB, free_nbytes=9 * MIB), names(2))
    drive = dataclasses.replace(settings(400), drive=found.drive)
    with pytest.raises(BudgetError, match=r"file:/0 \+ file:/1 has 12.00 MiB free"):
        predict(PROGRAM, found.machine, drive, BASELINE)


def test_saved_activations_leave_room_for_records_on_each_drive() -> None:
    program = trace(length=1024)
    roomy = striped(with_drives(GB, GB), names(2))
    drive = dataclasses.replace(settings(1), drive=roomy.drive)
    least = least_budget(program, roomy.machine, drive, BASELINE)
    assert least.drive.activations_nbytes > 2 * MIB
    free_nbytes = -(-least.drive.nbytes // 2) + SPARE_NBYTES
    enough = striped(with_drives(GB, GB, free_nbytes=free_nbytes), names(2))
    assert predict(program, enough.machine, least.settings, BASELINE).drive == least.drive
    less = striped(with_drives(GB, GB, free_nbytes=free_nbytes - MIB), names(2))
    found = predict(program, less.machine, least.settings, BASELINE)
    assert found.drive.activations_nbytes < least.drive.activations_nbytes


def test_machines_that_were_measured_with_one_drive_each_are_joined() -> None:
    both_drives = with_drives(3 * GB, 1 * GB)
    each = [
        dataclasses.replace(
            both_drives,
            tiers=tuple(tier for tier in both_drives.tiers if tier.name != other),
            links=tuple(
                link for link in both_drives.links if other not in {link.source, link.target}
            ),
        )
        for other in ("file:/1", "file:/0")
    ]
    assert joined(each) == both_drives


def test_several_directories_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "machine.json"
    write_machine(with_drives(3 * GB, 1 * GB), file)
    _, found, drive = find_machine(str(file), ["/0", "/1"], print)
    assert drive == "file:/0 + file:/1"
    assert found.tier(drive).kind == "file"
    _, _, alone = find_machine(str(file), ["/1"], print)
    assert alone == "file:/1"
    with pytest.raises(ConfigError, match="file:/1 is named twice"):
        find_machine(str(file), ["/1", "/1"], print)
    with pytest.raises(ConfigError, match="laptop-16gb has one drive; give --machine a file"):
        find_machine("laptop-16gb", ["/0", "/1"], print)
    with pytest.raises(ConfigError, match="host is no directory of a drive, but of kind host"):
        striped(found, ["host", "file:/0"])
