"""Memory cgroups, version 1 or 2: a hard limit that the kernel enforces, page cache included."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")


class CgroupUnavailableError(RuntimeError):
    """No memory cgroup can be made here; the message names the reason."""


@dataclass(frozen=True)
class Finished:
    """How a command in a cgroup ended."""

    returncode: int
    killed: bool  # by the kernel, for exceeding the limit
    peak_nbytes: int  # the cgroup's peak usage, page cache included
    stdout: str
    stderr: str


class MemoryCgroup:
    """A new cgroup with a limit of ``limit_nbytes``; removed on exit.

    Raises:
        CgroupUnavailableError: neither version's hierarchy is writable.
    """

    def __init__(self, name: str, limit_nbytes: int) -> None:
        self.limit_nbytes = limit_nbytes
        self.version, parent = _hierarchy()
        self.path = parent / f"{name}-{os.getpid()}"

    def __enter__(self) -> Self:
        self.path.mkdir()
        if self.version == 1:
            self._set("memory.limit_in_bytes", self.limit_nbytes)
        else:
            self._set("memory.max", self.limit_nbytes)
            if (self.path / "memory.swap.max").exists():
                self._set("memory.swap.max", 0)
        return self

    def _set(self, name: str, value: int) -> None:
        (self.path / name).write_text(str(value))

    def run(self, command: Sequence[str], **options: object) -> Finished:
        """Run a command inside; it joins the cgroup before it starts."""
        joiner = (
            "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid())); "
            "os.execvp(sys.argv[2], sys.argv[2:])"
        )
        procs = str(self.path / "cgroup.procs")
        done = subprocess.run(  # type: ignore[call-overload]
            [sys.executable, "-c", joiner, procs, *command],
            capture_output=True, text=True, check=False, **options,
        )  # fmt: skip
        return Finished(
            returncode=done.returncode,
            killed=done.returncode in (-9, 137),
            peak_nbytes=self.peak_nbytes(),
            stdout=done.stdout,
            stderr=done.stderr,
        )

    def peak_nbytes(self) -> int:
        """Peak usage so far."""
        for name in ("memory.max_usage_in_bytes", "memory.peak"):
            if (self.path / name).exists():
                return int((self.path / name).read_text())
        return 0

    def __exit__(self, *exc_info: object) -> None:
        self.path.rmdir()


def _hierarchy() -> tuple[int, Path]:
    if (_V1 / "memory.limit_in_bytes").exists() and os.access(_V1, os.W_OK):
        return 1, _V1
    if (_V2 / "cgroup.subtree_control").exists() and os.access(_V2, os.W_OK):
        controllers = (_V2 / "cgroup.subtree_control").read_text().split()
        if "memory" in controllers:
            return 2, _V2
    raise CgroupUnavailableError("no writable memory cgroup (version 1 or 2) on this machine")
