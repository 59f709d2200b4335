"""Limits of the control groups that this process is in: its own and all above it.

Both versions are read, and both at once, as on machines that mount version 1 for memory beside
a version 2 tree. A container sees the part of the tree that is mounted into it: paths in
``/proc/self/cgroup`` are taken relative to the root of that mount. See
Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
"""

from dataclasses import dataclass
from pathlib import Path

from offload.tiers.filesystem import Mount, read_mounts
from offload.tiers.system import System, read_int, read_text

# Version 1 says "no limit" by the largest number of pages that a signed 64-bit count holds.
_UNLIMITED_NBYTES = 1 << 62


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupLimits:
    """The tightest limits that hold for this process; None where there is none.

    Attributes:
        memory_nbytes: page cache of files that the group wrote or read is counted too.
        memory_from: the file that says so.
        high_nbytes: version 2: where the kernel begins to slow the group down.
        cpus: cores' worth of time, such as 2.5.
    """

    memory_nbytes: int | None = None
    memory_from: Path | None = None
    high_nbytes: int | None = None
    cpus: float | None = None


def read_cgroup_limits(system: System) -> CgroupLimits:
    """The limits of every group from this process's own up to the root that it can see."""
    memory_groups = _groups(system, "memory")
    memory = [
        (limit, group / name)
        for group in memory_groups
        for name in ("memory.max", "memory.limit_in_bytes")
        if (limit := _nbytes(group / name)) is not None
    ]
    tightest = min(memory, default=(None, None))
    high = [
        limit for group in memory_groups if (limit := _nbytes(group / "memory.high")) is not None
    ]
    cpus = [quota for group in _groups(system, "cpu") if (quota := _cpus(group)) is not None]
    return CgroupLimits(
        memory_nbytes=tightest[0],
        memory_from=tightest[1],
        high_nbytes=min(high, default=None),
        cpus=min(cpus, default=None),
    )


def memory_limit_nbytes(system: System) -> int | None:
    """The hard limit on this process's memory, in bytes; None where there is none."""
    return read_cgroup_limits(system).memory_nbytes


def _groups(system: System, controller: str) -> list[Path]:
    """The folders of this process's groups that may limit ``controller``, own one first."""
    paths: dict[str, str] = {}
    for line in (system.proc_text("self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        for name in controllers.split(",") if controllers else ["2"]:
            paths[name] = path
    found: list[Path] = []
    for mount in read_mounts(system):
        version_2 = mount.fstype == "cgroup2"
        if not (version_2 or (mount.fstype == "cgroup" and controller in mount.options)):
            continue
        own = paths.get("2" if version_2 else controller)
        if own is not None:
            found += _upward(_under(system, mount), own, mount.root)
    return found


def _under(system: System, mount: Mount) -> Path:
    """Where a mount under ``/sys`` stands below the system's root for it."""
    target = Path(mount.target)
    return system.sys / target.relative_to("/sys") if target.is_relative_to("/sys") else target


def _upward(top: Path, own: str, root: str) -> list[Path]:
    """The group's folder and those above it, up to ``top``, as far as they are visible."""
    path = Path(own)
    inside = path.relative_to(root) if path.is_relative_to(root) else Path(own.lstrip("/"))
    folder = top / inside
    chain = [folder, *(up for up in folder.parents if up.is_relative_to(top))]
    return [group for group in chain if group.is_dir()]


def _nbytes(path: Path) -> int | None:
    limit = read_int(path)  # "max" is no number
    return limit if limit is not None and limit < _UNLIMITED_NBYTES else None


def _cpus(group: Path) -> float | None:
    quota, _, period = (read_text(group / "cpu.max") or "").partition(" ")
    if not quota:
        quota = str(read_int(group / "cpu.cfs_quota_us"))
        period = str(read_int(group / "cpu.cfs_period_us"))
    if not (quota.isdigit() and period.isdigit() and int(period)):
        return None  # "max", -1, or not told
    return int(quota) / int(period)
