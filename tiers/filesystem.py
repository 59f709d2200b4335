"""What stands behind a directory: its mount, the block device, the alignment of direct I/O."""

import ctypes
import os
import re
from dataclasses import dataclass
from pathlib import Path

from offload.tiers.system import System, read_int, read_text

NETWORK = frozenset(
    {
        *("9p", "afs", "beegfs", "ceph", "cifs", "gpfs", "lustre", "nfs", "nfs4", "smb3", "smbfs"),
        *("virtiofs", "wekafs", "fuse.glusterfs", "fuse.s3fs", "fuse.sshfs", "fuse.rclone"),
    }
)
OVERLAY = frozenset({"overlay", "aufs", "fuse.fuse-overlayfs"})
IN_MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs"})

_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000
_STATX_NBYTES = 256
_MASK_AT, _MEMORY_AT, _OFFSET_AT = 0, 0x98, 0x9C  # struct statx, include/uapi/linux/stat.h

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """One line of ``/proc/self/mountinfo``.

    Attributes:
        device: ``major:minor``; major 0 means that no block device stands behind it.
        root: the part of the file system that is mounted.
        options: of the mount and of the file system.
    """

    device: str
    root: str
    target: str
    fstype: str
    source: str
    options: frozenset[str]

    @property
    def read_only(self) -> bool:
        """Whether nothing can be written through this mount."""
        return "ro" in self.options


def read_mounts(system: System) -> tuple[Mount, ...]:
    """All mounts that this process sees, in the order they were made."""
    lines = (system.proc_text("self/mountinfo") or "").splitlines()
    return tuple(mount for line in lines if (mount := _parse_mount(line)) is not None)


def _parse_mount(line: str) -> Mount | None:
    words = line.split()
    try:
        dash = words.index("-", 6)  # any number of optional fields stand before it
        fstype, source, fs_options = words[dash + 1 : dash + 4]
    except ValueError:
        return None
    return Mount(
        device=words[2],
        root=_unescape(words[3]),
        target=_unescape(words[4]),
        fstype=fstype,
        source=_unescape(source),
        options=frozenset(words[5].split(",") + fs_options.split(",")),
    )


def _unescape(text: str) -> str:
    """The kernel writes a blank as a backslash and ``040``."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def mount_of(directory: Path, mounts: tuple[Mount, ...]) -> Mount | None:
    """The mount that an absolute, resolved ``directory`` is on: the deepest, the last made."""
    on = [mount for mount in mounts if directory.is_relative_to(mount.target)]
    return max(enumerate(on), key=lambda each: (len(each[1].target), each[0]))[1] if on else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A whole block device, such as ``nvme0n1``.

    Attributes:
        rotational: what the kernel believes; virtual disks often claim to rotate.
        virtual: a virtual machine's disk: what it is made of is not visible here.
        written_nbytes: by this kernel, since it started.
        pci: folder of the PCI device in ``/sys``, for its link's speed and width.
        parts: the disks below a RAID, an encrypted or a logical volume.
    """

    name: str
    model: str | None
    rotational: bool
    virtual: bool
    written_nbytes: int | None
    pci: Path | None
    parts: tuple[str, ...]


_SECTOR_NBYTES = 512  # of /sys/block/*/stat, whatever the disk's own sectors are
_SECTORS_WRITTEN = 6  # column; Documentation/block/stat.rst


def disk_behind(mount: Mount, system: System) -> Disk | None:
    """The disk that a mount lies on; None where no block device is visible."""
    link = system.sys / "dev" / "block" / mount.device
    if not link.exists():  # btrfs and others: an anonymous device, but the source names one
        name = Path(mount.source).name
        link = system.sys / "class" / "block" / name
        if not mount.source.startswith("/dev/") or not link.exists():
            return None
    folder = link.resolve()
    if (folder / "partition").exists():
        folder = folder.parent
    return _read_disk(folder)


def _read_disk(folder: Path) -> Disk:
    stat = (read_text(folder / "stat") or "").split()
    parts = folder / "slaves"
    pci = next((up for up in folder.parents if (up / "current_link_speed").exists()), None)
    return Disk(
        name=folder.name,
        model=read_text(folder / "device" / "model"),
        rotational=read_int(folder / "queue" / "rotational") == 1,
        virtual=folder.name.startswith(("vd", "xvd")) or _is_virtual(folder),
        written_nbytes=(
            int(stat[_SECTORS_WRITTEN]) * _SECTOR_NBYTES if len(stat) > _SECTORS_WRITTEN else None
        ),
        pci=pci,
        parts=tuple(sorted(part.name for part in parts.iterdir())) if parts.is_dir() else (),
    )


def _is_virtual(folder: Path) -> bool:
    vendor = read_text(folder / "device" / "vendor") or ""
    return vendor.upper() in {"QEMU", "VMWARE", "MSFT", "GOOGLE", "VBOX"}


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectAlignment:
    """Alignment of direct I/O, in bytes: of addresses in memory, and of offsets and lengths."""

    memory_nbytes: int
    offset_nbytes: int


def direct_alignment(fd: int) -> DirectAlignment | None:
    """What ``statx(STATX_DIOALIGN)`` tells of an open regular file (Linux 6.1).

    None where the kernel or the file system doesn't tell, or direct I/O isn't supported.
    """
    call = getattr(_libc, "statx", None)
    buffer = (ctypes.c_ubyte * _STATX_NBYTES)()
    if call is None or call(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, buffer):
        return None

    def number(at: int) -> int:
        return int.from_bytes(bytes(buffer[at : at + 4]), "little")

    if not number(_MASK_AT) & _STATX_DIOALIGN or number(_OFFSET_AT) == 0:
        return None
    return DirectAlignment(memory_nbytes=number(_MEMORY_AT), offset_nbytes=number(_OFFSET_AT))


def free_nbytes(directory: Path) -> int:
    """Bytes that a process without privileges may still write there.

    Raises:
        OSError: the directory can't be read.
    """
    stats = os.statvfs(directory)
    return stats.f_bavail * stats.f_frsize


def links_in(path: Path) -> tuple[Path, ...]:
    """The symbolic links among the components of ``path``, outermost first."""
    absolute = Path(os.path.abspath(path))  # noqa: PTH100  Path.resolve would follow the links
    return tuple(part for part in (*reversed(absolute.parents), absolute) if part.is_symlink())
