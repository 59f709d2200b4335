"""Each line of the doctor about the machine: ok, warn or fail, with what mends it."""

from dataclasses import replace
from pathlib import Path

import pytest
from doctor_systems import GIB, lines, made, tools, write

from offload.doctor import hardware, kernel, limits, software
from offload.tiers.cgroups import CgroupLimits
from offload.tiers.gpus import Gpu

# Hardware.

GPU = Gpu(
    index=0, name="A card", driver="550.54", memory_nbytes=80 * GIB, free_nbytes=79 * GIB,
    capability="sm_90", pcie_gen=3, pcie_gen_max=5, pcie_width=16, pcie_width_max=16,
)  # fmt: skip


def test_no_gpu_is_a_fact(tmp_path: Path) -> None:
    (line,) = hardware.examine_gpus(made(tmp_path), ())
    assert (line.status, line.value) == ("ok", "none")


def test_a_card_without_a_driver_is_a_warning(tmp_path: Path) -> None:
    card = "bus/pci/devices/0000:01:00.0"
    system = made(tmp_path, None, {f"{card}/vendor": "0x10de\n", f"{card}/class": "0x030200\n"})
    (line,) = hardware.examine_gpus(system, ())
    assert line.status == "warn"
    assert "1 NVIDIA card without a working driver" in line.value
    assert "nvidia-smi" in line.mend


def test_an_idle_link_is_told_and_a_narrow_one_is_a_warning(tmp_path: Path) -> None:
    idle, narrow = hardware.examine_gpus(
        made(tmp_path), (GPU, replace(GPU, index=1, pcie_width=4, pcie_gen=5))
    )
    assert (idle.status, idle.detail) == ("ok", "sm_90, PCIe 3 now, 5 under load, x16")
    assert narrow.status == "warn"
    assert "PCIe 5 x4 of x16" in narrow.detail
    assert narrow.mend


DMI = "\tType: DDR5\n\tConfigured Memory Speed: 4800 MT/s\n" * 2 + "\tType: Unknown\n"


def test_memory_modules_are_told_where_the_firmware_tells(tmp_path: Path) -> None:
    system = made(tmp_path, {"meminfo": "MemTotal: 33554432 kB\nMemAvailable: 1048576 kB\n"})
    line = hardware.memory(replace(system, run=tools(dmidecode=DMI)))
    assert line.value == "32.00 GiB, 1.00 GiB available"
    assert line.detail == "2 modules, DDR5, 4800 MT/s"
    assert "not installed" in hardware.memory(system).detail
    assert "root" in hardware.memory(replace(system, run=tools(dmidecode=""))).detail
    assert hardware.memory(made(tmp_path / "other")).status == "fail"


def test_nodes_and_cxl_devices(tmp_path: Path) -> None:
    base = "devices/system/node"
    tree = {
        f"{base}/node0/cpulist": "0-1\n",
        f"{base}/node0/distance": "10 20\n",
        f"{base}/node0/meminfo": "Node 0 MemTotal: 1048576 kB\nNode 0 MemFree: 524288 kB\n",
        f"{base}/node1/cpulist": "\n",
        f"{base}/node1/distance": "20 10\n",
        f"{base}/node1/meminfo": "Node 1 MemTotal: 2097152 kB\nNode 1 MemFree: 2097152 kB\n",
        "bus/cxl/devices/mem0/ram/size": "0x40000000\n",
        "bus/cxl/devices/mem0/numa_node": "0\n",
    }
    found = lines(hardware.examine_hardware(made(tmp_path, None, tree), ()))
    assert found["NUMA"].value == "2 nodes"
    assert found["node 0"].value == "dram, 1.00 GiB of memory, 512.00 MiB free, 2 CPUs"
    assert "distances 20 10" in found["node 1"].detail
    assert found["node 1"].value.endswith("0 CPUs")
    assert found["CXL mem0"].value == "1.00 GiB of memory"
    alone = lines(hardware.examine_hardware(made(tmp_path / "other"), ()))
    assert (alone["NUMA"].value, alone["CXL"].value) == ("one node", "no device")


# Kernel.


@pytest.mark.parametrize(
    ("release", "status", "detail", "mend"),
    [
        ("6.18.0", "ok", "has MADV_POPULATE, PAGEMAP_SCAN, weighted interleave", ""),
        ("6.8.0-31-generic", "ok", "has MADV_POPULATE, PAGEMAP_SCAN", ""),  # one node: no matter
        ("6.1.0", "warn", "no PAGEMAP_SCAN", "upgrade to Linux 6.7 or newer"),
        ("5.10.3", "warn", "no MADV_POPULATE", "upgrade to Linux 6.7 or newer"),
    ],
)
def test_kernel_features(release: str, status: str, detail: str, mend: str, tmp_path: Path) -> None:
    line = kernel.version(made(tmp_path, {"sys/kernel/osrelease": release}))
    assert (line.status, line.mend) == (status, mend)
    assert detail in line.detail


def test_weighted_interleave_matters_with_several_nodes(tmp_path: Path) -> None:
    nodes = {f"devices/system/node/node{index}/cpulist": "0\n" for index in (0, 1)}
    line = kernel.version(made(tmp_path, {"sys/kernel/osrelease": "6.8.0"}, nodes))
    assert (line.status, line.mend) == ("warn", "upgrade to Linux 6.9 or newer")


THP = "kernel/mm/transparent_hugepage"


@pytest.mark.parametrize(
    ("enabled", "defrag", "statuses"),
    [
        ("always [madvise] never", "always defer defer+madvise [madvise] never", ("ok", "ok")),
        ("[always] madvise never", "always [defer] defer+madvise madvise never", ("ok", "warn")),
        ("always madvise [never]", "always defer defer+madvise madvise [never]", ("warn", "warn")),
    ],
)
def test_huge_page_settings(
    enabled: str, defrag: str, statuses: tuple[str, str], tmp_path: Path
) -> None:
    system = made(tmp_path, None, {f"{THP}/enabled": enabled, f"{THP}/defrag": defrag})
    found = (kernel.huge_pages(system), kernel.huge_page_defrag(system))
    assert tuple(line.status for line in found) == statuses
    for line in found:
        assert line.mend.startswith("echo madvise | sudo tee /sys/") == (line.status == "warn")


def test_a_kernel_without_huge_pages(tmp_path: Path) -> None:
    line = kernel.huge_pages(made(tmp_path))
    assert (line.status, line.mend) == ("warn", "")


def test_overcommit_and_swap(tmp_path: Path) -> None:
    system = made(
        tmp_path,
        {
            "sys/vm/overcommit_memory": "2\n",
            "meminfo": "MemTotal: 100 kB\nSwapTotal: 1048576 kB\nSwapFree: 1024 kB\n",
        },
    )
    assert kernel.overcommit(system).mend == "sudo sysctl vm.overcommit_memory=0"
    assert kernel.swap(system).status == "warn"
    write(tmp_path / "proc", {"sys/vm/overcommit_memory": "1\n", "meminfo": "MemTotal: 100 kB\n"})
    assert kernel.overcommit(system).status == kernel.swap(system).status == "ok"


# Limits.

LIMITS = (
    "Max locked memory         {memlock}              8388608              bytes\n"
    "Max open files            {files}                20000                files\n"
)


def test_a_small_limit_on_locked_memory_is_a_warning_for_users_only(tmp_path: Path) -> None:
    text = LIMITS.format(memlock=8388608, files=1024)
    system = made(tmp_path, {"self/limits": text, "self/status": "CapEff:\t0000000000000000\n"})
    line = limits.locked_memory(system)
    assert (line.status, line.value, line.mend) == ("warn", "8.00 MiB", "ulimit -l unlimited")
    write(tmp_path / "proc", {"self/status": "CapEff:\t000001ffffffffff\n"})
    assert limits.locked_memory(system).status == "ok"
    write(tmp_path / "proc", {"self/limits": LIMITS.format(memlock="unlimited", files=256)})
    assert limits.locked_memory(system).value == "unlimited"
    assert limits.open_files(system).mend == "ulimit -n 4096"


def test_a_control_group_below_the_memory_is_told(tmp_path: Path) -> None:
    system = made(tmp_path, {"meminfo": f"MemTotal: {32 << 20} kB\n"})
    group = CgroupLimits(memory_nbytes=4 * GIB, memory_from=Path("/x/memory.max"), high_nbytes=GIB)
    line = limits.cgroup_memory(system, group)
    assert line.status == "warn"
    assert line.value == "4.00 GiB of the machine's 32.00 GiB"
    assert "slows the group down from 1.00 GiB on (/x/memory.max)" in line.detail
    assert line.mend == "offload run --budget host=3686MiB …"
    assert limits.cgroup_memory(system, CgroupLimits(memory_nbytes=64 * GIB)).status == "ok"
    assert limits.cgroup_memory(system, CgroupLimits()).status == "ok"
    assert limits.cores(CgroupLimits(cpus=1.5)).value == "1.5 cores' worth of time"


# Software.


def environment(versions: dict[str, str], *, libraries: str = "", programs: str = ""):
    return software.Environment(
        version=versions.get,
        has_library=libraries.split().__contains__,
        has_program=programs.split().__contains__,
    )


def test_missing_libraries_are_facts_and_unusable_ones_warnings() -> None:
    found = lines(software.examine_software(environment({"torch": "2.13.0"}), ()))
    assert {line.status for line in found.values()} == {"ok"}
    assert "pip install 'offload[gds]'" in found["kvikio-cu13"].detail
    versions = {"torch": "2.13.0", "deepspeed": "0.19", "kvikio-cu13": "26.10", "aiofiles": "25"}
    found = lines(software.examine_software(environment(versions), ()))
    assert (found["deepspeed"].status, found["deepspeed"].value) == ("warn", "0.19, not usable")
    assert "g++, ninja, libaio.so.1 missing" in found["deepspeed"].detail
    assert "libcuda.so.1 is missing" in found["kvikio-cu13"].detail
    able = environment(versions, libraries="libcuda.so.1 libaio.so.1", programs="g++ ninja")
    assert {line.status for line in software.examine_software(able, ())} == {"ok"}


def test_torch_must_be_there_and_able_to_use_the_gpu() -> None:
    missing = software.torch(environment({}), ())
    assert (missing.status, missing.mend) == ("fail", "pip install torch")
    assert software.torch(environment({"torch": "2.13.0+cpu"}), (GPU,)).status == "warn"
    assert software.torch(environment({"torch": "2.13.0+cu130"}), (GPU,)).status == "ok"


def test_the_real_environment_is_asked_without_imports() -> None:
    real = software.environment()
    assert real.version("torch")
    assert real.version("no-such-distribution") is None
    assert real.has_library("libc.so.6")
    assert not real.has_library("libnothing.so.9")
    assert real.has_program("sh")
