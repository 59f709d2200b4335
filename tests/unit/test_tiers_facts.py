"""Facts read from trees made by hand, and a glance at the real ones."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from doctor_systems import made, write

from offload.tiers.cgroups import memory_limit_nbytes, read_cgroup_limits
from offload.tiers.filesystem import (
    direct_alignment,
    disk_behind,
    links_in,
    mount_of,
    read_mounts,
)
from offload.tiers.gpus import count_nvidia_cards, read_gpus
from offload.tiers.system import (
    System,
    ToolAnswer,
    kernel_version,
    read_cpu,
    read_kernel,
    read_memory,
    run_tool,
)


def test_processor_memory_and_kernel(tmp_path: Path) -> None:
    cpuinfo = "processor : 0\nmodel name : A 9\nflags : sse avx2 avx512f\n\nprocessor : 1\n"
    meminfo = "MemTotal: 1000 kB\nMemAvailable: 400 kB\nSwapTotal: 8 kB\nSwapFree: 2 kB\n"
    system = made(
        tmp_path,
        {"cpuinfo": cpuinfo, "meminfo": meminfo, "sys/kernel/osrelease": "6.9.0-rc1\n"},
    )
    cpu, memory = read_cpu(system), read_memory(system)
    assert (cpu.model, cpu.logical, cpu.features) == ("A 9", 2, ("avx2", "avx512f"))
    assert memory is not None
    assert (memory.total_nbytes, memory.available_nbytes) == (1000 << 10, 400 << 10)
    assert (memory.swap_nbytes, memory.swap_free_nbytes) == (8 << 10, 2 << 10)
    assert kernel_version(read_kernel(system)) == (6, 9)


def test_what_is_not_told_is_none_and_never_an_error(tmp_path: Path) -> None:
    system = made(tmp_path)
    assert read_memory(system) is None
    assert read_cpu(system).model == "unknown"
    assert kernel_version("strange") == (0, 0)
    assert read_cgroup_limits(system).memory_nbytes is None
    assert read_mounts(system) == ()
    assert read_gpus(system) == ()
    assert count_nvidia_cards(system) == 0


def test_tools_answer_or_are_missing() -> None:
    assert run_tool(["sh", "-c", "echo hello; exit 3"]) == ToolAnswer(code=3, text="hello\n")
    assert run_tool(["no-such-tool-anywhere"]) is None


V2 = "30 1 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
V1 = (
    "35 31 0:31 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "32 31 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
)


def test_version_2_takes_the_tightest_limit_on_the_way_up(tmp_path: Path) -> None:
    system = made(
        tmp_path,
        {"self/cgroup": "0::/a/b\n", "self/mountinfo": V2},
        {
            "fs/cgroup/a/memory.max": "1000\n",
            "fs/cgroup/a/cpu.max": "150000 100000\n",
            "fs/cgroup/a/b/memory.max": "max\n",
            "fs/cgroup/a/b/memory.high": "900\n",
            "fs/cgroup/a/b/cpu.max": "max 100000\n",
            "fs/cgroup/other/memory.max": "5\n",
        },
    )
    limits = read_cgroup_limits(system)
    assert limits.memory_nbytes == 1000
    assert limits.memory_from == tmp_path / "sys/fs/cgroup/a/memory.max"
    assert limits.high_nbytes == 900
    assert limits.cpus == 1.5


def test_version_1_and_its_word_for_no_limit(tmp_path: Path) -> None:
    system = made(
        tmp_path,
        {"self/cgroup": "4:memory:/job\n1:cpu:/job\n0::/\n", "self/mountinfo": V1},
        {
            "fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "fs/cgroup/memory/job/memory.limit_in_bytes": "4096000\n",
            "fs/cgroup/cpu/job/cpu.cfs_quota_us": "-1\n",
            "fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
        },
    )
    assert memory_limit_nbytes(system) == 4096000
    assert read_cgroup_limits(system).cpus is None
    write(tmp_path / "sys", {"fs/cgroup/cpu/job/cpu.cfs_quota_us": "250000\n"})
    assert read_cgroup_limits(system).cpus == 2.5
    (tmp_path / "sys/fs/cgroup/memory/job/memory.limit_in_bytes").unlink()
    assert memory_limit_nbytes(system) is None


@pytest.mark.parametrize(
    ("own", "root"),
    [("/docker/123", "/docker/123"), ("/", "/"), ("/elsewhere/9", "/docker/123")],
)
def test_a_container_sees_its_own_part_of_the_tree(own: str, root: str, tmp_path: Path) -> None:
    system = made(
        tmp_path,
        {
            "self/cgroup": f"0::{own}\n",
            "self/mountinfo": f"30 1 0:26 {root} /sys/fs/cgroup ro - cgroup2 cgroup rw\n",
        },
        {"fs/cgroup/memory.max": "777\n"},
    )
    assert memory_limit_nbytes(system) == 777


MOUNTS = (
    "27 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw\n"
    "40 27 0:50 / /data rw - nfs4 server:/export rw,vers=4.2\n"
    "41 40 259:2 / /data/fast\\040disk ro,noatime master:3 slave:1 - xfs /dev/nvme0n1p2 rw\n"
    "42 27 0:60 /sub /pool rw - btrfs /dev/sda rw\n"
    "43 40 0:70 / /data rw - tmpfs tmpfs rw\n"
)


def test_the_deepest_and_latest_mount_is_the_one(tmp_path: Path) -> None:
    mounts = read_mounts(made(tmp_path, {"self/mountinfo": MOUNTS}))
    deep = mount_of(Path("/data/fast disk/x"), mounts)
    assert deep is not None
    assert (deep.fstype, deep.source, deep.read_only) == ("xfs", "/dev/nvme0n1p2", True)
    over = mount_of(Path("/data/other"), mounts)
    assert over is not None
    assert over.fstype == "tmpfs"
    plain = mount_of(Path("/database"), mounts)
    assert plain is not None
    assert (plain.fstype, plain.read_only) == ("ext4", False)
    assert mount_of(Path("/x"), ()) is None


def link(tree: Path, name: str, target: str) -> None:
    path = tree / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(tree / target)


def test_the_disk_behind_a_partition(tmp_path: Path) -> None:
    disk = "devices/pci0000:00/0000:01:00.0/nvme/nvme0/nvme0n1"
    system = made(
        tmp_path,
        {"self/mountinfo": MOUNTS},
        {
            f"{disk}/stat": "1 2 3 4 5 6 2000 8 9 10 11\n",
            f"{disk}/queue/rotational": "0\n",
            f"{disk}/device/model": "Fast 1TB  \n",
            f"{disk}/nvme0n1p2/partition": "2\n",
            "devices/pci0000:00/0000:01:00.0/current_link_speed": "16.0 GT/s PCIe\n",
            "devices/sda/queue/rotational": "1\n",
            "devices/sda/slaves/x/y": "",
        },
    )
    link(tmp_path / "sys", "dev/block/259:2", f"{disk}/nvme0n1p2")
    link(tmp_path / "sys", "class/block/sda", "devices/sda")
    mounts = read_mounts(system)
    fast = mount_of(Path("/data/fast disk"), mounts)
    assert fast is not None
    found = disk_behind(fast, system)
    assert found is not None
    assert (found.name, found.model, found.rotational) == ("nvme0n1", "Fast 1TB", False)
    assert found.written_nbytes == 2000 * 512
    assert found.pci is not None
    assert found.pci.name == "0000:01:00.0"
    pool = mount_of(Path("/pool"), mounts)  # btrfs: the device number is anonymous
    assert pool is not None
    slow = disk_behind(pool, system)
    assert slow is not None
    assert (slow.name, slow.rotational, slow.parts, slow.written_nbytes) == (
        "sda",
        True,
        ("x",),
        None,
    )
    remote = mount_of(Path("/data/other"), mounts)
    assert remote is not None
    assert disk_behind(remote, system) is None


def test_statx_tells_the_alignment_of_a_real_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4096))
    fd = os.open(path, os.O_RDWR)
    try:
        alignment = direct_alignment(fd)
    finally:
        os.close(fd)
    if alignment is not None:  # the file system decides whether it tells
        assert 4096 % alignment.offset_nbytes == 0
        assert alignment.memory_nbytes > 0
    with Path("/proc/self/status").open() as other:
        assert direct_alignment(other.fileno()) is None


def test_links_in_a_path_are_found(tmp_path: Path) -> None:
    (tmp_path / "real" / "inner").mkdir(parents=True)
    (tmp_path / "alias").symlink_to("real")
    assert links_in(tmp_path / "real" / "inner") == links_in(tmp_path)
    assert tmp_path / "alias" in links_in(tmp_path / "alias" / "inner")


SMI = """\
0, NVIDIA H100 PCIe, 550.54, 81559, 81000, 9.0, 3, 5, 16, 16
1, Odd, 550.54, [N/A], [N/A], 9.0, [N/A], [N/A], [N/A], [N/A]
"""


def test_gpus_as_the_driver_tells_them(tmp_path: Path) -> None:
    asked: list[Sequence[str]] = []

    def answer(command: Sequence[str]) -> ToolAnswer:
        asked.append(command)
        return ToolAnswer(code=0, text=SMI)

    first, odd = read_gpus(System(proc=tmp_path, sys=tmp_path, run=answer))
    assert asked[0][0] == "nvidia-smi"
    assert (first.name, first.memory_nbytes, first.capability) == (
        "NVIDIA H100 PCIe",
        81559 << 20,
        "sm_90",
    )
    assert (first.pcie_gen, first.pcie_gen_max, first.pcie_width) == (3, 5, 16)
    assert (odd.memory_nbytes, odd.pcie_gen, odd.pcie_width_max) == (0, None, None)
    broken = System(run=lambda _: ToolAnswer(code=9, text="couldn't communicate with the driver"))
    assert read_gpus(broken) == ()


def test_cards_without_a_driver_are_counted(tmp_path: Path) -> None:
    system = made(
        tmp_path,
        None,
        {
            "bus/pci/devices/0000:01:00.0/vendor": "0x10de\n",
            "bus/pci/devices/0000:01:00.0/class": "0x030200\n",
            "bus/pci/devices/0000:01:00.1/vendor": "0x10de\n",  # its sound
            "bus/pci/devices/0000:01:00.1/class": "0x040300\n",
            "bus/pci/devices/0000:02:00.0/vendor": "0x8086\n",
            "bus/pci/devices/0000:02:00.0/class": "0x030000\n",
        },
    )
    assert count_nvidia_cards(system) == 1
