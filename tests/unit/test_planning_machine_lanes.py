"""The lanes of a machine share its drives."""

import pytest

from offload.allocator.errors import ConfigError
from offload.swap.planning.machine_lanes import lanes_of
from offload.swap.planning.schedule import Medium
from offload.tiers.machine import Link, Machine, MachineTier, Processor


def test_lanes_of_a_machine_share_its_drives() -> None:
    lanes, media = lanes_of(
        machine(), [("file:/data", "host"), ("host", "file:/data"), ("host", "host")]
    )
    assert [lane.name for lane in lanes] == ["file:/data→host", "host→file:/data", "host→host"]
    assert [lane.bytes_per_s for lane in lanes] == [2e9, 1e9, 8e9]
    assert [lane.media for lane in lanes] == [("nvme0n1",), ("nvme0n1",), ()]
    assert media == (Medium(name="nvme0n1", width=pytest.approx(1.2)),)
    with pytest.raises(ConfigError, match="no tier 'device:0'"):
        lanes_of(machine(), [("host", "device:0")])


def machine() -> Machine:
    def tier(name: str, kind: str, medium: str) -> MachineTier:
        return MachineTier(
            name=name,
            kind=kind,
            capacity_nbytes=1 << 30,
            free_nbytes=1 << 30,
            align_nbytes=4096,
            medium=medium,
        )

    def link(source: str, target: str, rate: float) -> Link:
        return Link(
            source=source,
            target=target,
            block_nbytes=1 << 20,
            in_flight=4,
            bytes_per_s=rate,
            low_bytes_per_s=rate,
            high_bytes_per_s=rate,
            latency_s=1e-4,
            repeats=1,
        )

    drive = "file:/data"
    return Machine(
        kernel="6",
        processors=(Processor(name="cpu", model="a", cores=2, features=()),),
        tiers=(tier("host", "host", "memory"), tier(drive, "file", "nvme0n1")),
        links=(
            link("host", "host", 8e9),
            link(drive, "host", 2e9),
            link("host", drive, 1e9),
            link(drive, drive, 0.9e9),
        ),
    )
