"""Whether the directories that a user names can hold a store, before anything is made in them."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from offload.allocator.errors import ConfigError

_NETWORK = (
    "9p", "afs", "beegfs", "ceph", "cifs", "fuse.ceph", "fuse.glusterfs", "fuse.s3fs",
    "fuse.sshfs", "gfs2", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "ocfs2",
    "orangefs", "smb3", "smbfs",
)  # fmt: skip
_MOUNTS = Path("/proc/self/mountinfo")


def check_directories(directories: Sequence[Path]) -> list[tuple[Path, str]]:
    """What the user should know of the directories: (directory, notice).

    Raises:
        ConfigError: one is given twice, or a part of its path is a symbolic link.
    """
    problems = [problem for path in directories if (problem := _link_in(path)) is not None]
    problems += _repeated(directories)
    if problems:
        raise ConfigError(*problems)
    mounts = _MOUNTS.read_text() if _MOUNTS.exists() else ""
    return [*_on_network(directories, mounts), *_on_one_file_system(directories)]


def _link_in(path: Path) -> str | None:
    absolute = path.absolute()
    for part in (absolute, *absolute.parents):
        if os.path.islink(part):  # noqa: PTH114  (no error where a parent can't be searched)
            return (
                f"nvme: {path} goes through the symbolic link {part}, which could come to point "
                f"elsewhere: pass {absolute.resolve()}"
            )
    return None


def _repeated(directories: Sequence[Path]) -> list[str]:
    seen: set[Path] = set()
    problems: list[str] = []
    for path in directories:
        resolved = path.resolve()
        if resolved in seen:
            problems.append(f"nvme: {path} is given twice: name each directory once")
        seen.add(resolved)
    return problems


def _on_network(directories: Sequence[Path], mounts: str) -> Iterator[tuple[Path, str]]:
    for path in directories:
        kind = file_system_of(path.resolve(), mounts)
        if kind in _NETWORK:
            message = (
                f"is on {kind}, a network mount: training waits for the network, and a lost "
                "connection stops it; a local NVMe drive is what Offload is for"
            )
            yield path, message


def _on_one_file_system(directories: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    first: dict[int, Path] = {}
    for path in directories:
        device = _device(path)
        if device in first:
            message = (
                f"is on the same file system as {first[device]}: striping over both gains "
                "nothing; name directories on different drives"
            )
            yield path, message
        first.setdefault(device, path)


def _device(path: Path) -> int:
    """The device of the nearest directory that exists already."""
    absolute = path.absolute()
    for part in (absolute, *absolute.parents):
        with contextlib.suppress(OSError):
            return part.stat().st_dev
    return -1


def file_system_of(path: Path, mounts: str) -> str | None:
    """The type of the file system at ``path`` (absolute, no links).

    Args:
        mounts: the text of ``/proc/self/mountinfo`` (Linux's proc(5)); of several mounts on one
            point the last one counts.
    """
    best: tuple[int, str | None] = (-1, None)
    for line in mounts.splitlines():
        front, _, back = line.partition(" - ")
        point = Path(_unescaped(front.split()[4]))
        if path.is_relative_to(point) and len(point.parts) >= best[0]:
            best = (len(point.parts), back.split()[0])
    return best[1]


def _unescaped(text: str) -> str:
    """Blanks and backslashes stand as octal numbers in mount points."""
    for code in ("040", "011", "012", "134"):
        text = text.replace(f"\\{code}", chr(int(code, 8)))
    return text
