"""The model of a plan: from a training script, which runs until its first backward."""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from offload.allocator.errors import ConfigError, UnsupportedError
from offload.planner.script_memory import Held
from offload.planner.sources import Batch
from offload.swap.planning.program import Program
from offload.swap.state_precision import EXACT, Precision

_DECIDED = ("seq", "batch", "optim", "dtype", "method")


class TrainingScript:
    """A script in a child process, where its model has no bytes (``trace_script``).

    Args:
        given: the command's arguments: those that the script decides may not be given.
        precision: of what its optimizer keeps.
        rebuild_nbytes: the smallest storage that token-wise recompute would rebuild; None: it is
            not asked for.

    Attributes:
        held: what it holds beside the model.

    Raises:
        ConfigError: no such script, or options that it decides by itself.
        UnsupportedError: it can't be planned; with the end of what it said.
    """

    def __init__(
        self,
        path: Path,
        arguments: Sequence[str],
        *,
        given: argparse.Namespace,
        precision: Precision = EXACT,
        rebuild_nbytes: int | None = None,
    ) -> None:
        if not path.is_file():
            raise ConfigError(f"can't read the script {path}: no such file")
        decided = [name for name in _DECIDED if getattr(given, name) is not None]
        if decided:
            names = ", ".join(f"--{name}" for name in decided)
            raise ConfigError(
                f"{path.name} decides {names} by itself: pass its own arguments after --args"
            )
        if given.solve in {"seq", "batch"}:
            raise ConfigError(
                f"--solve {given.solve} needs a config.json: {path.name} decides its batch itself"
            )
        self.name = path.name
        self._program, self.held = _trace(path, arguments, precision, rebuild_nbytes)

    def longest(self) -> int | None:
        """Not known of a script."""
        return None

    def describe(self, _batch: Batch) -> str:
        """The work, for a title."""
        return f"{self._program.tokens} tokens a step"

    def trace(self, _batch: Batch) -> Program:
        """The program of its first step."""
        return self._program


def _trace(
    path: Path, arguments: Sequence[str], precision: Precision, rebuild_nbytes: int | None
) -> tuple[Program, Held]:
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "program.json"
        command = [sys.executable, "-m", "offload.planner.trace_script", str(out)]
        command += [precision.states, precision.masters]
        command += ["off" if rebuild_nbytes is None else str(rebuild_nbytes), str(path)]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        if not out.exists():
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()
            raise UnsupportedError(
                f"{path} was not planned: {said[-1] if said else f'exit code {done.returncode}'}"
            )
        content = json.loads(out.read_text())
    held = Held(nbytes=content["held"]["nbytes"], imports=tuple(content["held"]["imports"]))
    return Program.from_json(content["program"]), held
