"""Each line of the doctor about directories, disks and their wear."""

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from doctor_systems import GIB, lines, made, tools, write

from offload.doctor import storage, wear
from offload.doctor.finding import Finding
from offload.tiers.filesystem import DirectAlignment, Disk, Mount
from offload.tiers.system import System


@pytest.fixture
def mounted(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of its own; the parameter is what ``mount`` takes."""
    place = tmp_path / "mounted"
    place.mkdir()
    subprocess.run(["mount", *request.param.split(), "none", place], check=True)
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_good_directory(tmp_path: Path) -> None:
    examined = storage.examine_directory(tmp_path, System())
    found = lines(examined.findings)
    assert examined.usable
    assert found["directory"].status == found["direct I/O"].status == "ok"
    assert "supported" in found["direct I/O"].value
    assert list(tmp_path.iterdir()) == []


def test_directories_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "linked" / "offload-store").parent.mkdir()
    (tmp_path / "linked" / "offload-store").symlink_to(tmp_path)
    for directory, value, mend in (
        (tmp_path / "none", "does not exist", f"mkdir -p {tmp_path}/none"),
        (tmp_path / "file", "is not a directory", "name a directory"),
        (tmp_path / "linked", "offload-store is one", f"rm {tmp_path}/linked/offload-store"),
    ):
        examined = storage.examine_directory(directory, System())
        (line,) = [line for line in examined.findings if line.status == "fail"]
        assert not examined.usable
        assert value in line.value
        assert mend in line.mend


@pytest.mark.parametrize("code", ["EACCES", "EPERM", "EDQUOT", "EIO"])
def test_refusals_of_the_kernel(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number = getattr(__import__("errno"), code)

    def refuse(**_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(storage, "tempfile", SimpleNamespace(TemporaryFile=refuse))
    (line,) = storage.examine_directory(tmp_path, System()).findings
    assert line.status == "fail"
    expected = {
        "EACCES": "by this user", "EPERM": "by this user", "EDQUOT": "full disk",
        "EIO": "Input/output error",
    }  # fmt: skip
    assert expected[code] in line.value
    assert line.mend


@pytest.mark.parametrize("mounted", ["-t tmpfs -o ro"], indirect=True)
def test_a_read_only_mount(mounted: Path) -> None:
    (line,) = storage.examine_directory(mounted, System()).findings
    assert line.value.endswith("is on a read-only mount")
    assert line.mend == f"sudo mount -o remount,rw {mounted}"


@pytest.mark.parametrize("mounted", ["-t tmpfs -o size=1m"], indirect=True)
def test_a_full_disk_and_memory_posing_as_one(mounted: Path) -> None:
    found = lines(storage.examine_directory(mounted, System()).findings)
    assert found["free space"].status == "fail"
    assert found["file system"].status == "warn"
    assert "it is memory" in found["file system"].detail
    with (mounted / "fill").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    examined = storage.examine_directory(mounted, System())
    assert not examined.usable


@pytest.mark.parametrize("mounted", ["-t ramfs"], indirect=True)
def test_a_file_system_without_direct_io_says_what_it_costs(mounted: Path) -> None:
    line = storage.direct_io(mounted)
    assert (line.status, line.value) == ("warn", "refused by the file system")
    assert "page cache" in line.detail
    assert line.mend


@pytest.mark.parametrize(
    ("fstype", "source", "detail"),
    [
        ("nfs4", "server:/export", "the network bounds every step"),
        ("9p", "share", "shared or remote"),
        ("overlay", "overlay", "writable layer of a container"),
    ],
)
def test_file_systems_that_are_no_local_disk(
    fstype: str, source: str, detail: str, tmp_path: Path
) -> None:
    mountinfo = f"27 1 0:99 / / rw - {fstype} {source} rw\n"
    system = made(tmp_path, {"self/mountinfo": mountinfo})
    examined = storage.examine_directory(tmp_path, system)
    line = lines(examined.findings)["file system"]
    assert examined.usable
    assert line.status == "warn"
    assert detail in line.detail
    assert line.mend


def test_a_link_in_the_path_fails(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "alias").symlink_to("real")
    line = lines(storage.examine_directory(tmp_path / "alias", System()).findings)["symbolic link"]
    assert (line.status, line.mend) == ("fail", f"--nvme {tmp_path.resolve()}/real")


def test_an_alignment_beyond_a_page_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coarse = DirectAlignment(memory_nbytes=4, offset_nbytes=65536)
    monkeypatch.setattr(storage, "direct_alignment", lambda _: coarse)
    assert storage.direct_io(tmp_path).status == "fail"
    monkeypatch.setattr(storage, "direct_alignment", lambda _: None)
    assert storage.direct_io(tmp_path).status == "ok"


DISK = Disk(
    name="nvme0n1", model="Fast", rotational=False, virtual=False, written_nbytes=GIB, pci=None,
    parts=(),
)  # fmt: skip
MOUNT = Mount(
    device="259:0", root="/", target="/data", fstype="xfs", source="/dev/nvme0n1",
    options=frozenset({"rw"}),
)  # fmt: skip


def test_disks(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "current_link_speed": "8.0 GT/s PCIe\n", "max_link_speed": "16.0 GT/s PCIe\n",
            "current_link_width": "4\n", "max_link_width": "4\n",
        },
    )  # fmt: skip
    assert storage.examine_disk(DISK).detail == "solid state"
    slow = storage.examine_disk(replace(DISK, pci=tmp_path))
    assert (slow.status, slow.detail) == ("warn", "PCIe 8.0 GT/s x4, and it could do 16.0 GT/s x4")
    write(tmp_path, {"current_link_speed": "16.0 GT/s PCIe\n"})
    assert storage.examine_disk(replace(DISK, pci=tmp_path)).detail == "PCIe 16.0 GT/s x4"
    assert storage.examine_disk(replace(DISK, rotational=True)).status == "warn"
    assert storage.examine_disk(replace(DISK, rotational=True, virtual=True)).status == "ok"
    assert (
        "sda, sdb" in storage.examine_disk(replace(DISK, name="md0", parts=("sda", "sdb"))).detail
    )
    assert storage.file_system(MOUNT, DISK).status == "ok"
    assert storage.file_system(None, None).value == "unknown"


# Wear.


def examine_wear(disk: Disk = DISK, **answers: str) -> Finding:
    return wear.examine(disk, System(run=tools(**answers)))


def nvme(**values: int) -> str:
    return json.dumps({"critical_warning": 0, "data_units_written": 1000, **values})


def test_wear_as_nvme_cli_tells_it() -> None:
    line = examine_wear(nvme=nvme(percent_used=3, avail_spare=100, spare_thresh=10))
    assert line.status == "ok"
    assert line.value == "488.28 MiB written in all, 1.00 GiB written since boot"
    assert line.detail == "3 % of its endurance used, 100 % of its spare blocks left"
    worn = examine_wear(nvme=nvme(percent_used=85))
    assert (worn.status, bool(worn.mend)) == ("warn", True)
    assert examine_wear(nvme=nvme(percent_used=85, critical_warning=4)).status == "fail"
    assert examine_wear(nvme=nvme(percent_used=1, avail_spare=5, spare_thresh=10)).status == "fail"


def test_wear_as_smartctl_tells_it() -> None:
    log = {"critical_warning": 0, "percentage_used": 7, "data_units_written": "2000"}
    line = examine_wear(smartctl=json.dumps({"nvme_smart_health_information_log": log}))
    assert "7 % of its endurance used" in line.detail
    sata = json.dumps({"endurance_used": {"current_percent": 12}})
    assert "12 %" in examine_wear(replace(DISK, name="sda"), smartctl=sata).detail


def test_wear_that_is_not_told_names_the_command_that_would() -> None:
    unknown = examine_wear()
    assert (unknown.status, unknown.value) == ("ok", "1.00 GiB written since boot")
    assert "sudo nvme smart-log -o json /dev/nvme0n1" in unknown.detail
    for answer in ("no permission", "[]", "{}"):
        assert "endurance unknown" in examine_wear(nvme=answer).detail
    assert "sudo smartctl -j -a /dev/sda" in examine_wear(replace(DISK, name="sda")).detail
    assert "ask its host" in examine_wear(replace(DISK, virtual=True)).detail
    assert "/dev/sda /dev/sdb" in examine_wear(replace(DISK, parts=("sda", "sdb"))).detail
