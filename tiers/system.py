"""Facts that the kernel tells: processor, memory, kernel version.

Readers are pure functions of a ``System``: the roots of ``/proc`` and ``/sys`` and a way to run
tools, which tests replace by trees and answers of their own. What a machine does not tell is
``None``, never an error.
"""

import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

_TOOL_LIMIT_S = 4.0  # a tool that hangs on a sick device must not hang its caller


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolAnswer:
    """What a tool printed on stdout, and how it ended."""

    code: int
    text: str


Tool: TypeAlias = Callable[[Sequence[str]], ToolAnswer | None]


def run_tool(command: Sequence[str]) -> ToolAnswer | None:
    """The answer of an installed tool; None where it is missing, or silent for 4 s."""
    try:
        done = subprocess.run(
            list(command), capture_output=True, text=True, check=False, timeout=_TOOL_LIMIT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ToolAnswer(code=done.returncode, text=done.stdout)


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """Where facts are read from."""

    proc: Path = Path("/proc")
    sys: Path = Path("/sys")
    run: Tool = run_tool

    def proc_text(self, name: str) -> str | None:
        """The text of a file under ``/proc``, stripped."""
        return read_text(self.proc / name)

    def sys_text(self, name: str) -> str | None:
        """The text of a file under ``/sys``, stripped."""
        return read_text(self.sys / name)


def read_text(path: Path) -> str | None:
    """The text of ``path``, stripped; None where it can't be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def read_int(path: Path) -> int | None:
    """The number in ``path``; None where there is none."""
    text = read_text(path)
    try:
        return int(text) if text is not None else None
    except ValueError:
        return None


def fields(text: str | None) -> dict[str, str]:
    """``key: value`` lines as a mapping; the first of equal keys stands."""
    found: dict[str, str] = {}
    for line in (text or "").splitlines():
        key, colon, value = line.partition(":")
        if colon:
            found.setdefault(key.strip(), value.strip())
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpu:
    """The processor: ``usable`` counts the logical cores that this process may run on."""

    model: str
    logical: int
    usable: int
    features: tuple[str, ...]  # of those that matter to copies, checksums and optimizers


_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "asimd", "sve")


def read_cpu(system: System) -> Cpu:
    """The processor of ``/proc/cpuinfo``."""
    text = system.proc_text("cpuinfo")
    info = fields(text)
    logical = sum(line.startswith("processor") for line in (text or "").splitlines())
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return Cpu(
        model=info.get("model name") or info.get("Model") or "unknown",
        logical=logical or os.cpu_count() or 1,
        usable=len(os.sched_getaffinity(0)),
        features=tuple(name for name in _FEATURES if name in flags),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Main memory and swap, in bytes."""

    total_nbytes: int
    available_nbytes: int
    swap_nbytes: int
    swap_free_nbytes: int


def read_memory(system: System) -> Memory | None:
    """The figures of ``/proc/meminfo``."""
    info = fields(system.proc_text("meminfo"))

    def nbytes(key: str) -> int:
        number, _, _ = info.get(key, "0").partition(" ")
        return int(number) * 1024 if number.isdigit() else 0

    if nbytes("MemTotal") == 0:
        return None
    return Memory(
        total_nbytes=nbytes("MemTotal"),
        available_nbytes=nbytes("MemAvailable") or nbytes("MemFree"),
        swap_nbytes=nbytes("SwapTotal"),
        swap_free_nbytes=nbytes("SwapFree"),
    )


def read_kernel(system: System) -> str:
    """The kernel's release, such as ``6.8.0-31-generic``."""
    return system.proc_text("sys/kernel/osrelease") or os.uname().release


def kernel_version(release: str) -> tuple[int, int]:
    """(6, 8) of ``6.8.0-31-generic``; (0, 0) of what has no number."""
    major, _, rest = release.partition(".")
    minor = rest.partition(".")[0].partition("-")[0]
    if not (major.isdigit() and minor.isdigit()):
        return (0, 0)
    return int(major), int(minor)
