"""A trial: the user's script in a child process, for some steps, in a store that goes with it.

[Note: no trace of a trial] The child is ``offload run --stop-after``: it ends right behind its last
step, so that what a script writes at its end is never written. Its store and its record are in
the folders of the search. It has a process group of its own, which is killed when the trial is
over, for whatever reason: no helper process of the script goes on.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from offload.allocator.errors import BudgetError, ConfigError
from offload.allocator.units import format_nbytes
from offload.config import OffloadConfig
from offload.report.reader import read_run
from offload.swap.plan import fits_in_no_case, named_nbytes
from offload.tiers.events import Event, RunFinished, StepFinished
from offload.tuning.candidates import Candidate
from offload.tuning.search import Status, Trial

WARM_STEPS = 2  # the first learns, the second has grown
_PREFIX = "offload: "
_HINT = "offload: see it with"  # what ``offload run --record`` says in any case


class Trials:
    """Runs candidates; ``search`` calls it.

    Args:
        script: with its own arguments.
        base: the settings that the changes are made to.
        steps: of a trial, the warm-up included.
        folders: a temporary folder for each directory of the store.
    """

    def __init__(
        self,
        script: Sequence[str],
        base: OffloadConfig,
        *,
        steps: int,
        folders: Mapping[Path, Path],
    ) -> None:
        self._script = list(script)
        self._base = base
        self._steps = steps
        self._folders = folders
        self._home = next(iter(folders.values()))

    def __call__(self, candidate: Candidate, limit_s: float | None) -> Trial:
        """Run the script with a candidate's settings.

        Args:
            limit_s: of seconds, all in all.
        """
        config = candidate.config(self._base)
        settings = self._home / "settings.json"
        settings.write_text(json.dumps(self._settings(config)))
        began_s = time.monotonic()
        try:
            code = self._run(settings, limit_s)
            return self._judge(code, config, limit_s, wall_s=time.monotonic() - began_s)
        finally:
            for folder in self._folders.values():
                for part in ("store", "record"):
                    shutil.rmtree(folder / part, ignore_errors=True)

    def _settings(self, config: OffloadConfig) -> dict[str, object]:
        settings: dict[str, object] = config.model_dump(mode="json", exclude_unset=True)
        return settings | {
            "nvme": [str(self._folders[path] / "store") for path in config.nvme],
            "record": str(self._home / "record"),
            "resume": "never",
        }

    def _run(self, settings: Path, limit_s: float | None) -> int | None:
        """The exit code; None where the time was over."""
        command = [sys.executable, "-m", "offload", "run", "--config", str(settings)]
        command += ["--stop-after", str(self._steps), "--", *self._script]
        with (
            (self._home / "stdout").open("wb") as stdout,
            (self._home / "stderr").open("wb") as stderr,
            _group(command, stdout.fileno(), stderr.fileno()) as process,
        ):
            if not _ends(process, limit_s):
                return None
        return process.returncode

    def _judge(
        self, code: int | None, config: OffloadConfig, limit_s: float | None, *, wall_s: float
    ) -> Trial:
        events = self._events()
        steps = [event for event in events if isinstance(event, StepFinished)]
        peaks = [
            event.peak_nbytes for event in events if isinstance(event, StepFinished | RunFinished)
        ]
        peak = max(peaks, default=0)
        status, reason = self._status(code, len(steps), peak, config, limit_s)
        if status != "done":
            return Trial(
                status=status, reason=reason, steps=len(steps), peak_nbytes=peak, wall_s=wall_s
            )

        def median(name: str) -> float:
            return float(statistics.median(getattr(step, name) for step in steps[WARM_STEPS:]))

        return Trial(
            status="done",
            steps=len(steps),
            step_s=median("step_s"),
            compute_s=median("compute_s"),
            stall_s=median("stall_s"),
            optimizer_s=median("optimizer_s"),
            commit_s=median("commit_s"),
            read_nbytes=int(median("read_nbytes")),
            written_nbytes=int(median("written_nbytes")),
            peak_nbytes=peak,
            wall_s=wall_s,
        )

    def _events(self) -> Sequence[Event]:
        try:
            return read_run(self._home / "record").segments[-1]
        except ConfigError:
            return ()  # it ended before there was anything to record

    def _status(
        self,
        code: int | None,
        steps: int,
        peak_nbytes: int,
        config: OffloadConfig,
        limit_s: float | None,
    ) -> tuple[Status, str]:
        if code is None:
            return "too slow", f"not done after {limit_s:.0f} s, {steps} of {self._steps} steps"
        if code < 0:
            hint = ": out of memory?" if code == -signal.SIGKILL else ""
            return "failed", f"killed by {signal.Signals(-code).name}{hint}"
        if code:
            return self._refusal(code, steps, config)
        if steps < self._steps:
            return "ended early", f"the script ended after {steps} of {self._steps} steps"
        if peak_nbytes > (budget := config.budget["host"]):
            peak = f"peak {format_nbytes(peak_nbytes)} of {format_nbytes(budget)}"
            return "exceeds the budget", peak
        return "done", ""

    def _refusal(self, code: int, steps: int, config: OffloadConfig) -> tuple[Status, str]:
        said = self._said(code)
        if code != BudgetError.exit_code or steps:
            return "failed", said
        # A step in backward or in forward needs more than one between them, which may fit still.
        names = ("step_in_backward", "step_in_forward")
        if all(getattr(config, name) == getattr(self._base, name) for name in names):
            named = named_nbytes(said)
            if named is not None and fits_in_no_case(named, config.budget["host"]):
                return "never fits", said
        return "does not fit", said

    def _said(self, code: int) -> str:
        """The last words on stderr: Offload's, or the script's."""
        text = (self._home / "stderr").read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        while lines and lines[-1].startswith(_HINT):
            lines.pop()
        return lines[-1].removeprefix(_PREFIX) if lines else f"exit code {code}"


@contextlib.contextmanager
def _group(command: Sequence[str], stdout: int, stderr: int) -> Iterator["subprocess.Popen[bytes]"]:
    """A child in a process group of its own, of which nothing is left at the end."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        env=_environment(),
        start_new_session=True,
    )
    try:
        yield process
    finally:
        # It has not been waited for, so its number is still its own, and its group's.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _ends(process: "subprocess.Popen[bytes]", limit_s: float | None) -> bool:
    """Wait for the end of ``process``, without taking its exit code; False: it goes on."""
    handle = os.pidfd_open(process.pid)
    try:
        return bool(select.select([handle], [], [], limit_s)[0])
    finally:
        os.close(handle)


def _environment() -> dict[str, str]:
    """Without the settings of the user's: a trial has all of them in its file."""
    names = {f"OFFLOAD_{name.upper()}" for name in OffloadConfig.model_fields}
    return {name: value for name, value in os.environ.items() if name not in names}
