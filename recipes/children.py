"""Run a recipe in a child process and read its peak memory from the kernel."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

PR_SET_PDEATHSIG = 1
FORWARDED = (signal.SIGINT, signal.SIGTERM)


class ChildError(Exception):
    """A child failed; ``exit_code`` is what the parent should end with."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True)
class Finished:
    """A child that ended well: what it printed, and its peak resident set in bytes."""

    stdout: str
    peak_nbytes: int


def run_child(command: Sequence[str | Path]) -> Finished:
    """Run a Python script with its arguments; its stderr is ours.

    The child has a process group of its own: Ctrl-C and SIGTERM reach it once, through this
    process, and this process waits until it has ended. It dies with this process.

    Raises:
        ChildError: the child failed or was interrupted.
    """
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        process_group=0,
        preexec_fn=_die_with_parent(),  # noqa: PLW1509  (this process has one thread)
    )
    assert process.stdout is not None
    with _forwarding(process.pid), process.stdout:
        stdout = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # so that Popen waits no more
    name = Path(command[0]).name
    if process.returncode in (130, -signal.SIGINT):
        raise ChildError(f"{name} was interrupted; the same command goes on", 130)
    if process.returncode < 0:
        killer = signal.Signals(-process.returncode).name
        raise ChildError(f"{name} was ended by {killer}", 128 - process.returncode)
    if process.returncode:
        raise ChildError(f"{name} failed, see above", process.returncode)
    return Finished(stdout, usage.ru_maxrss * 1024)


@contextmanager
def _forwarding(pid: int) -> Iterator[None]:
    """Hand SIGINT and SIGTERM on to ``pid`` instead of heeding them."""

    def forward(number: int, _frame: FrameType | None) -> None:
        os.kill(pid, number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _die_with_parent() -> Callable[[], Any] | None:
    """What the child calls before exec, so that a killed parent leaves no child behind."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
