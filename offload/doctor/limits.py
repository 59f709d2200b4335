"""What this process may use: resource limits and control groups."""

import re

from offload.allocator.units import format_nbytes
from offload.doctor.finding import Finding
from offload.tiers.cgroups import CgroupLimits, read_cgroup_limits
from offload.tiers.system import System, fields, read_memory

_FEW_FILES = 1024
_CAP_IPC_LOCK = 14  # include/uapi/linux/capability.h
_SHARE = 0.9  # of a control group's memory that a budget may take; page cache needs the rest


def examine_limits(system: System) -> tuple[Finding, ...]:
    """Resource limits, then control groups."""
    limits = read_cgroup_limits(system)
    return (locked_memory(system), open_files(system), cgroup_memory(system, limits), cores(limits))


def soft_limit(system: System, name: str) -> int | None:
    """The soft limit of a line of ``/proc/self/limits``; None for ``unlimited``."""
    pattern = rf"^{name}\s+(\S+)"
    match = re.search(pattern, system.proc_text("self/limits") or "", re.MULTILINE)
    return int(match[1]) if match and match[1].isdigit() else None


def locked_memory(system: System) -> Finding:
    """RLIMIT_MEMLOCK bounds ``mlock``, so how much memory can be kept from being swapped."""
    limit = soft_limit(system, "Max locked memory")
    if limit is None:
        return Finding(subject="locked memory", value="unlimited")
    capabilities = int(fields(system.proc_text("self/status")).get("CapEff", "0"), 16)
    if capabilities >> _CAP_IPC_LOCK & 1:
        return Finding(
            subject="locked memory",
            value=format_nbytes(limit),
            detail="this process has CAP_IPC_LOCK and is not bound by it",
        )
    return Finding(
        subject="locked memory",
        value=format_nbytes(limit),
        status="warn",
        detail="larger buffers can't be locked: transfers to a device fall back to pageable memory",
        mend="ulimit -l unlimited",
    )


def open_files(system: System) -> Finding:
    """Each file tier and each worker keeps descriptors open."""
    limit = soft_limit(system, "Max open files")
    few = limit is not None and limit < _FEW_FILES
    return Finding(
        subject="open files",
        value="unlimited" if limit is None else str(limit),
        status="warn" if few else "ok",
        detail="data loaders, stores and sockets share them" if few else "",
        mend="ulimit -n 4096" if few else "",
    )


def cgroup_memory(system: System, limits: CgroupLimits) -> Finding:
    """The hard limit on memory that a container or a service manager sets."""
    memory = read_memory(system)
    limit = limits.memory_nbytes
    if limit is None or (memory is not None and limit >= memory.total_nbytes):
        return Finding(subject="cgroup memory", value="no limit below the machine's memory")
    soft = (
        f"; the kernel slows the group down from {format_nbytes(limits.high_nbytes)} on"
        if limits.high_nbytes is not None
        else ""
    )
    return Finding(
        subject="cgroup memory",
        value=f"{format_nbytes(limit)} of the machine's "
        f"{format_nbytes(memory.total_nbytes) if memory else 'memory'}",
        status="warn",
        detail="whoever exceeds it is killed, and page cache of files counts too"
        f"{soft} ({limits.memory_from})",
        mend=f"offload run --budget host={int(limit * _SHARE) >> 20}MiB …",
    )


def cores(limits: CgroupLimits) -> Finding:
    """The quota of processor time."""
    if limits.cpus is None:
        return Finding(subject="cgroup CPU", value="no quota")
    return Finding(subject="cgroup CPU", value=f"{limits.cpus:g} cores' worth of time")
