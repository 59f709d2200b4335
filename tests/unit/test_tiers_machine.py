"""``machine.json``: a round trip, queries of links, and every fault named at once."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.allocator.errors import ConfigError
from offload.tiers.inventory import take_inventory
from offload.tiers.machine import (
    ComputeRate,
    Link,
    Machine,
    MachineTier,
    Processor,
    check_writable,
    read_machine,
    write_machine,
)


def tier(name: str, kind: str = "host") -> MachineTier:
    return MachineTier(
        name=name, kind=kind, capacity_nbytes=1 << 40, free_nbytes=1 << 30, align_nbytes=4096,
        medium="made up",
    )  # fmt: skip


def link(source: str, target: str, block: int = 1 << 20, rate: float = 2e9) -> Link:
    return Link(
        source=source, target=target, block_nbytes=block, in_flight=4, bytes_per_s=rate,
        low_bytes_per_s=rate / 2, high_bytes_per_s=rate * 2, latency_s=1e-4, repeats=5,
    )  # fmt: skip


CPU = Processor(name="cpu", model="a processor", cores=8, features=("avx2",))
TIERS = (tier("host"), tier("file:/data", "file"), tier("device:0", "device"))
MEASURED = Machine(
    kernel="6.8.0",
    processors=(CPU,),
    tiers=TIERS,
    links=(
        link("host", "host", rate=1e10),
        link("host", "file:/data", 1 << 20, 1e9),
        link("host", "file:/data", 8 << 20, 3e9),
        link("host", "file:/data", 32 << 20, 2e9),
        link("file:/data", "host"),
        link("host", "device:0"),
        link("device:0", "host"),
    ),
)


@given(
    rates=st.lists(st.floats(1e6, 1e13), max_size=6),
    name=st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1),
    latency_s=st.floats(0, 1),
)
def test_a_machine_comes_back_as_it_was_written(
    rates: list[float], name: str, latency_s: float
) -> None:
    far = f"file:{name}"
    machine = Machine(
        kernel="6.8",
        processors=(CPU,),
        tiers=(tier("host"), tier(far, "file")),
        links=tuple(
            replace(link("host", far, block=4096 << index, rate=rate), latency_s=latency_s)
            for index, rate in enumerate(rates)
        ),
    )
    assert Machine.from_json(machine.to_json()) == machine


def test_the_fastest_measurement_tells_what_a_link_can_do() -> None:
    assert MEASURED.link("host", "file:/data").bytes_per_s == 3e9
    for asked, told in (
        (100, 1 << 20),
        (1 << 20, 1 << 20),
        (31 << 20, 8 << 20),
        (1 << 40, 1 << 25),
    ):
        assert MEASURED.link("host", "file:/data", block_nbytes=asked).block_nbytes == told


def test_links_that_nobody_measured_are_named_with_the_command_that_measures_them() -> None:
    MEASURED.check_measured()
    assert MEASURED.missing_links() == ()
    bare = replace(MEASURED, links=MEASURED.links[:2])
    assert bare.missing_links() == (
        ("file:/data", "host"),
        ("host", "device:0"),
        ("device:0", "host"),
    )
    with pytest.raises(ConfigError) as caught:
        bare.check_measured()
    assert len(caught.value.problems) == 3
    assert "file:/data → host was not measured" in caught.value.problems[0]
    assert "offload doctor --nvme /data -o machine.json" in caught.value.problems[0]
    with pytest.raises(ConfigError, match="device:0 → host was not measured"):
        bare.link("device:0", "host")
    with pytest.raises(ConfigError, match="no tier 'numa:3'; it has host, file:/data, device:0"):
        bare.link("host", "numa:3")


def test_rates_are_those_of_the_cpu_and_missing_ones_name_the_command() -> None:
    rate = ComputeRate(processor="cpu", work="matmul", dtype="float32", size=100, per_s=1e9)
    rates = (rate, replace(rate, size=10), replace(rate, processor="cuda:0", size=1))
    machine = replace(MEASURED, compute=rates)
    assert Machine.from_json(machine.to_json()) == machine
    assert machine.rates("matmul", "float32") == ((10, 1e9), (100, 1e9))
    with pytest.raises(ConfigError, match=r"attention in float32.*offload doctor -o machine\.json"):
        machine.rates("attention", "float32")
    with pytest.raises(ConfigError, match=r"compute\.0: 3 a second, by calls of 100: no matmul"):
        replace(machine, compute=(replace(rate, per_s=3.0),))


def changed(**changes: object) -> str:
    """The measured machine with values of its first link replaced; None takes one away."""
    document = json.loads(MEASURED.to_json())
    row = {**document["links"][0], **changes}
    document["links"][0] = {key: value for key, value in row.items() if value is not None}
    return json.dumps(document)


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"bytes_per_s": 7.2}, ["links.0: 7.2 bytes per second", "7 GB/s is 7e9"]),
        ({"bytes_per_s": "7GB/s"}, ["links.0.bytes_per_s", "valid number, not '7GB/s'"]),
        ({"latency_s": 80.0}, ["80 seconds is no latency", "80 us is 80e-6"]),
        (
            {"latency_s": None, "latency_us": 80},
            ["links.0.latency_s: missing", "links.0.latency_us: unknown key; did you mean 'latenc"],
        ),
        ({"low_bytes_per_s": 1.1e10}, ["low_bytes_per_s <= bytes_per_s"]),
        ({"target": "tape:0"}, ["links.0: 'tape:0' is no tier of this machine"]),
        ({"repeats": 0}, ["count from 1"]),
        ({"bytes_per_s": float("nan")}, ["links.0.bytes_per_s", "finite number"]),
        (
            {"source": "host", "target": "file:/data"},
            ["host → file:/data with 4 blocks of 1048576 bytes stands there 2 times"],
        ),
    ],
)
def test_wrong_links_are_refused(changes: dict[str, object], messages: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        Machine.from_json(changed(**changes))
    for message in messages:
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[1]", "not a machine"),
        ('{"tiers": []}', "has no 'format'"),
        ('{"format": 2}', "format 2 is not 1"),
        ('{"format": 1}', "kernel: missing\nprocessors: missing\ntiers: missing"),
        (MEASURED.to_json().replace('"kind": "file"', '"kind": "disk"'), "tiers.1.kind"),
        (MEASURED.to_json().replace("file:/data", "host"), "'host' stands there 2 times"),
        (MEASURED.to_json().replace(": 1073741824", ": -1"), "tiers.0: sizes are bytes"),
    ],
)
def test_what_is_no_machine_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_machine(path)
    assert all(problem.startswith(f"{path}: ") for problem in caught.value.problems)
    assert message in str(caught.value).replace(f"{path}: ", "")


def test_files_that_cannot_be_read_or_written_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"can't read the machine .*none\.json"):
        read_machine(tmp_path / "none.json")
    with pytest.raises(ConfigError, match=r"can't write the machine to .*inside: .*not exist"):
        write_machine(MEASURED, tmp_path / "missing" / "inside")
    with pytest.raises(ConfigError, match="it is a directory"):
        check_writable(tmp_path)
    with pytest.raises(ConfigError, match="can't write the machine"):
        write_machine(MEASURED, Path("/proc/self/status"))
    check_writable(tmp_path / "machine.json")
    assert list(tmp_path.iterdir()) == []
    write_machine(MEASURED, tmp_path / "machine.json")
    assert read_machine(tmp_path / "machine.json") == MEASURED


def test_the_inventory_of_this_machine_is_a_machine_without_links(tmp_path: Path) -> None:
    machine = take_inventory([tmp_path])
    assert Machine.from_json(machine.to_json()) == machine
    assert machine.processors[0].name == "cpu"
    assert 0 < machine.tier("host").free_nbytes <= machine.tier("host").capacity_nbytes
    assert machine.tier(f"file:{tmp_path.resolve()}").kind == "file"
    assert ("host", f"file:{tmp_path.resolve()}") in machine.missing_links()
