"""A directory for the store: can it be written, on what does it lie, how worn is the drive."""

import errno
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from offload.allocator.units import format_nbytes
from offload.doctor import wear
from offload.doctor.finding import Finding
from offload.tiers.filesystem import (
    IN_MEMORY,
    NETWORK,
    OVERLAY,
    Disk,
    Mount,
    direct_alignment,
    disk_behind,
    free_nbytes,
    links_in,
    mount_of,
    read_mounts,
)
from offload.tiers.hostmem import PAGE
from offload.tiers.system import System, read_text

STORE = "offload-store"  # the folder that a run makes inside the directory
_LEAST_NBYTES = 1 << 30  # less than this is called full: no model's states fit
_LITTLE_NBYTES = 32 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """A directory's findings, and whether its links can be measured."""

    directory: Path
    findings: tuple[Finding, ...]
    usable: bool


def examine_directory(directory: Path, system: System) -> Examined:
    """All that can be told of ``directory`` without measuring."""
    writable = _writable(directory)
    if writable.status == "fail":
        return Examined(directory=directory, findings=(writable,), usable=False)
    real = directory.resolve()
    mount = mount_of(real, read_mounts(system))
    disk = disk_behind(mount, system) if mount else None
    findings = [writable, *_links(directory), file_system(mount, disk), direct_io(directory)]
    findings.append(free_space(directory))
    if disk is not None:
        findings += [examine_disk(disk), wear.examine(disk, system)]
    usable = all(finding.status != "fail" for finding in findings)
    return Examined(directory=directory, findings=tuple(findings), usable=usable)


def _writable(directory: Path) -> Finding:
    """Whether a file can be made there; nothing is left behind."""
    subject = "directory"
    try:
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        reason, mend = _refusal(directory, error)
        return Finding(
            subject=subject, value=f"{directory} {reason}", status="fail", detail="", mend=mend
        )
    return Finding(subject=subject, value=f"{directory} is writable")


def _refusal(directory: Path, error: OSError) -> tuple[str, str]:
    """Why no file can be made in ``directory``, and the command that mends it."""
    if not directory.exists():
        return "does not exist", f"mkdir -p {directory}"
    if not directory.is_dir():
        return "is not a directory", "name a directory with --nvme"
    if error.errno == errno.EROFS:
        return "is on a read-only mount", f"sudo mount -o remount,rw {_mount_point(directory)}"
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return "is on a full disk", f"du -xh {directory} | sort -h | tail"
    if error.errno in {errno.EACCES, errno.EPERM}:
        return "can't be written by this user", f"sudo chown {os.getuid()} {directory}"
    return f"can't be written: {error.strerror}", "name another directory with --nvme"


def _mount_point(directory: Path) -> Path:
    real = directory.resolve()
    return next((up for up in (real, *real.parents) if up.is_mount()), real)


def _links(directory: Path) -> tuple[Finding, ...]:
    """Symbolic links: the store refuses them in its path, and its own folder to be one."""
    store = directory / STORE
    if store.is_symlink():
        return (
            Finding(
                subject="symbolic link",
                value=f"{store} is one",
                status="fail",
                detail="the store refuses it: somebody else may decide where the link leads",
                mend=f"rm {store}",
            ),
        )
    links = links_in(directory)
    if not links:
        return ()
    return (
        Finding(
            subject="symbolic link",
            value=f"{links[0]} leads to {links[0].resolve()}",
            status="fail",
            detail="the store refuses it: whoever may change the link moves the store",
            mend=f"--nvme {directory.resolve()}",
        ),
    )


def file_system(mount: Mount | None, disk: Disk | None) -> Finding:
    """The type of the file system, and what it costs where it is no local disk."""
    subject = "file system"
    if mount is None:
        return Finding(subject=subject, value="unknown", detail="no mount was found for it")
    value = f"{mount.fstype} on {mount.source}, mounted at {mount.target}"
    elsewhere = "--nvme with a directory on a local NVMe drive"
    if mount.fstype in NETWORK:
        return Finding(
            subject=subject,
            value=value,
            status="warn",
            detail="shared or remote: the network bounds every step, and a pause of the server "
            "stalls training",
            mend=elsewhere,
        )
    if mount.fstype in IN_MEMORY:
        return Finding(
            subject=subject,
            value=value,
            status="warn",
            detail="it is memory: what is swapped there counts against the machine's memory "
            "and is lost when it restarts",
            mend=elsewhere,
        )
    if mount.fstype in OVERLAY:
        return Finding(
            subject=subject,
            value=value,
            status="warn",
            detail="the writable layer of a container: lost with it, and slower to extend",
            mend="mount a volume of the host, such as docker run -v /data/nvme:/data/nvme",
        )
    if disk is None:
        return Finding(subject=subject, value=value, detail="no block device is visible behind it")
    return Finding(subject=subject, value=value)


def direct_io(directory: Path) -> Finding:
    """Whether the page cache can be passed by, and the alignment that this asks for."""
    subject = "direct I/O"
    with tempfile.TemporaryFile(dir=directory) as file:
        fd = file.fileno()
        try:
            os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_DIRECT))
        except OSError:
            return Finding(
                subject=subject,
                value="refused by the file system",
                status="warn",
                detail="every byte passes the page cache: more CPU time, one more copy, and the "
                "cache competes with the budget for memory",
                mend="--nvme with a directory on ext4 or XFS",
            )
        os.ftruncate(fd, PAGE)
        alignment = direct_alignment(fd)
    if alignment is None:
        return Finding(
            subject=subject,
            value=f"supported, alignment not told; Offload aligns to {PAGE} bytes",
        )
    value = (
        f"supported, alignment {alignment.offset_nbytes} bytes on disk, "
        f"{alignment.memory_nbytes} in memory"
    )
    if max(alignment.offset_nbytes, alignment.memory_nbytes) > PAGE:
        return Finding(
            subject=subject,
            value=value,
            status="fail",
            detail=f"Offload aligns to {PAGE} bytes: its requests would be refused",
            mend=f"format with a block size of at most {PAGE} bytes",
        )
    return Finding(subject=subject, value=value)


def free_space(directory: Path) -> Finding:
    """Room that is left, with the training that it suffices for."""
    free = free_nbytes(directory)
    full, little = free < _LEAST_NBYTES, free < _LITTLE_NBYTES
    # fp32 weights and AdamW's two states in two alternating slots, and a gradient.
    parameters = free / (2 * 12 + 4)
    return Finding(
        subject="free space",
        value=format_nbytes(free),
        status="fail" if full else "warn" if little else "ok",
        detail="enough to train about "
        f"{parameters / 1e9:.1f} billion parameters with AdamW in float32",
        mend=f"du -xh {directory} | sort -h | tail" if little else "",
    )


def examine_disk(disk: Disk) -> Finding:
    """The drive and, for NVMe, its PCIe link."""
    value = f"{disk.name}{f', {disk.model}' if disk.model else ''}"
    if disk.parts:
        return Finding(subject="disk", value=value, detail=f"made of {', '.join(disk.parts)}")
    if disk.virtual:
        return Finding(
            subject="disk", value=value, detail="virtual: only measuring tells what it can do"
        )
    if disk.rotational:
        return Finding(
            subject="disk",
            value=value,
            status="warn",
            detail="it rotates: about 200 MB/s, where an NVMe drive moves several GB/s",
            mend="--nvme with a directory on an NVMe drive",
        )
    return _pcie(disk, value)


def _pcie(disk: Disk, value: str) -> Finding:
    if disk.pci is None:
        return Finding(subject="disk", value=value, detail="solid state")
    now, most = (
        [read_text(disk.pci / f"{which}_link_{what}") or "" for what in ("speed", "width")]
        for which in ("current", "max")
    )
    link = f"PCIe {now[0].removesuffix(' PCIe')} x{now[1]}"
    if now == most or not all(most):
        return Finding(subject="disk", value=value, detail=link)
    return Finding(
        subject="disk",
        value=value,
        status="warn",
        detail=f"{link}, and it could do {most[0].removesuffix(' PCIe')} x{most[1]}",
        mend="move the drive to a slot with all its lanes",
    )
