"""The facts of a ``Machine``: which tiers there are and how large; nothing is measured here."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from offload.tiers.cgroups import memory_limit_nbytes
from offload.tiers.filesystem import disk_behind, free_nbytes, mount_of, read_mounts
from offload.tiers.gpus import Gpu
from offload.tiers.hostmem import PAGE
from offload.tiers.machine import Machine, MachineTier, Processor
from offload.tiers.system import System, read_cpu, read_kernel, read_memory
from offload.tiers.topology import Node, read_topology

_DEVICE_ALIGN_NBYTES = 512  # of CUDA's own allocations


def take_inventory(
    directories: Sequence[Path], *, system: System | None = None, gpus: Sequence[Gpu] = ()
) -> Machine:
    """The machine's tiers and processors, without links.

    Args:
        directories: existing folders of the file tiers.
        system: where facts are read from.
        gpus: those that ``read_gpus`` found; asking for them takes a tool.

    Raises:
        OSError: a directory can't be read.
    """
    system = system or System()
    cpu = read_cpu(system)
    processors = [Processor(name="cpu", model=cpu.model, cores=cpu.usable, features=cpu.features)]
    processors += [
        Processor(name=f"cuda:{gpu.index}", model=gpu.name, cores=None, features=(gpu.capability,))
        for gpu in gpus
    ]
    nodes = [node for node in read_topology(system.sys).nodes if node.memory_nbytes]
    return Machine(
        kernel=read_kernel(system),
        processors=tuple(processors),
        tiers=(
            *_memory_tiers(system, pinned=bool(gpus)),
            *(_node_tier(node) for node in nodes if len(nodes) > 1),
            *(_device_tier(gpu) for gpu in gpus),
            *(_file_tier(directory, system) for directory in directories),
        ),
    )


def file_tier_name(directory: Path) -> str:
    """The name of the tier in ``directory``: one for each folder, however it is reached."""
    return f"file:{directory.resolve()}"


def _memory_tiers(system: System, *, pinned: bool) -> Iterator[MachineTier]:
    memory = read_memory(system)
    limit = memory_limit_nbytes(system)
    total = memory.total_nbytes if memory else 0
    available = memory.available_nbytes if memory else 0
    kinds = ("host", "pinned") if pinned else ("host",)
    for kind in kinds:
        yield MachineTier(
            name=kind,
            kind="pinned" if kind == "pinned" else "host",
            capacity_nbytes=min(total, limit or total),
            free_nbytes=min(available, limit or available),
            align_nbytes=PAGE,
            medium="memory",
        )


def _node_tier(node: Node) -> MachineTier:
    return MachineTier(
        name=f"numa:{node.index}",
        kind="numa",
        capacity_nbytes=node.memory_nbytes or 0,
        free_nbytes=node.free_nbytes or 0,
        align_nbytes=PAGE,
        medium={"dram": "memory", "cxl": "CXL memory", "other": "memory without cores"}[node.kind],
    )


def _device_tier(gpu: Gpu) -> MachineTier:
    return MachineTier(
        name=f"device:{gpu.index}",
        kind="device",
        capacity_nbytes=gpu.memory_nbytes,
        free_nbytes=gpu.free_nbytes,
        align_nbytes=_DEVICE_ALIGN_NBYTES,
        medium=gpu.name,
    )


def _file_tier(directory: Path, system: System) -> MachineTier:
    stats = os.statvfs(directory)
    mount = mount_of(directory.resolve(), read_mounts(system))
    disk = disk_behind(mount, system) if mount else None
    source = disk.name if disk else (mount.source if mount else "unknown")
    return MachineTier(
        name=file_tier_name(directory),
        kind="file",
        capacity_nbytes=stats.f_blocks * stats.f_frsize,
        free_nbytes=free_nbytes(directory),
        align_nbytes=PAGE,
        medium=f"{source} ({mount.fstype})" if mount else source,
    )
