"""``offload tune``: a measured search for the settings of a script."""

import argparse
import ast
import contextlib
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from offload.allocator.errors import (
    BudgetError,
    ConfigError,
    OffloadError,
    UnsupportedError,
)
from offload.allocator.units import format_nbytes
from offload.cli.script import read_script
from offload.config import OffloadConfig, make_config

if TYPE_CHECKING:
    from offload.tiers.machine import Machine
    from offload.tuning.search import Found
    from offload.tuning.text import Outcome

HELP = "a measured search for a script's settings; writes them to a file"
DESCRIPTION = """\
Find the settings that make a script's steps shortest, by running it. Each candidate runs
in a child process, for --steps steps, in a store of its own that is removed; the process
ends right behind its last step, so what the script does at its end never happens. What
it writes during its steps is written: pass it arguments that send that elsewhere.

  offload tune train.py --steps 8 --budget host=8GiB --nvme /data/nvme -- --lr 1e-4
  offload run --config offload.yaml train.py --lr 1e-4
What you set is not searched; nor is anything that changes results (--lossy) or gives up
durable steps (--volatile). Exit code 3 if it does not fit the budget."""

TAKES_REST = True
_LEAST_STEPS = 3  # two for the warm-up, one to measure
_LEAST_ROOM_NBYTES = 64 << 20
_CALLS = frozenset({"attach", "init", "initialize", "load_pretrained"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.add_argument("script", metavar="script.py", type=Path)
    parser.add_argument(
        "--steps", metavar="N", type=int, default=8, help="of each trial (default: 8, least: 3)"
    )
    parser.add_argument("--config", metavar="FILE", help="settings to start from")
    parser.add_argument("--budget", metavar="B", help="for example host=24GiB, or just 24GiB")
    parser.add_argument("--device", metavar="D", help="where the model computes, such as cuda")
    parser.add_argument(
        "--nvme",
        metavar="DIR",
        action="append",
        help="directory of the store; with several, each is tried alone, too",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=Path,
        default=Path("offload.yaml"),
        help="where the best settings go (default: offload.yaml)",
    )
    parser.add_argument(
        "--lossy", action="store_true", help="also try what changes results: rounded states"
    )
    parser.add_argument(
        "--volatile", action="store_true", help="also try commit: never, which keeps no step"
    )
    parser.add_argument(
        "--measure", action="store_true", help="measure the machine again, whatever is kept"
    )
    parser.add_argument("--json", action="store_true", help="the same figures as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Search, write the settings, and print on stdout; progress goes to stderr.

    Raises:
        ConfigError: wrong usage, or a script that ends before its last step.
        BudgetError: nothing fits.
        OffloadError: nothing works.
    """
    if arguments.steps < _LEAST_STEPS:
        raise ConfigError(
            f"--steps {arguments.steps}: at least {_LEAST_STEPS}, for two are the warm-up"
        )
    from offload.tuning.settings_file import check_output, write_settings

    _check_script(arguments.script)
    check_output(arguments.output)
    base = _base(arguments)
    from offload.tuning.folders import trial_folders
    from offload.tuning.text import print_outcome, to_json, to_yaml

    with _ended_by_signals(), trial_folders(base.nvme) as folders:
        outcome = _search(arguments, base, folders)
    write_settings(arguments.output, to_yaml(outcome))
    if arguments.json:
        print(to_json(outcome))
    else:
        print_outcome(outcome)
    return 0


def _search(
    arguments: argparse.Namespace, base: OffloadConfig, folders: Mapping[Path, Path]
) -> "Outcome":
    from offload.planner.machines import this_machine
    from offload.tuning.candidates import combine, list_candidates
    from offload.tuning.predicting import check_drive, make_predictor, predict_all
    from offload.tuning.search import search
    from offload.tuning.text import Outcome
    from offload.tuning.trials import Trials

    _check_room(base)
    machines: dict[Path, Machine] = {}
    for path in base.nvme:
        calibrated = this_machine(path, care="full", again=arguments.measure, say=_say)
        machines[path] = calibrated.machine
    predictor = make_predictor(arguments.script, arguments.rest, base, machines, _say)
    if predictor is not None:
        check_drive(predictor, base)
    candidates = list_candidates(
        base,
        steps=arguments.steps,
        engines=tuple(_engines()),
        lossy=arguments.lossy,
        volatile=arguments.volatile,
    )
    script = [str(arguments.script), *arguments.rest]
    found = search(
        candidates,
        Trials(script, base, steps=arguments.steps, folders=folders),
        combine=combine,
        say=_say,
    )
    best = found.best
    if best is None:
        raise _nothing_worked(found, arguments, base)
    tried = [one.candidate for one in found.others]
    cpu, host = calibrated.machine.processors[0], calibrated.machine.tier("host")
    return Outcome(
        command=_command(arguments),
        machine=f"{calibrated.name}: {cpu.model}, {cpu.cores} cores, "
        f"{format_nbytes(host.capacity_nbytes)}; {', '.join(_media(machines))}",
        steps=arguments.steps,
        found=found,
        predicted=predict_all(predictor, base, tried),
        best=best,
        config=best.candidate.config(base),
        file=str(arguments.output),
        when=datetime.now(UTC),
    )


def _media(machines: "Mapping[Path, Machine]") -> Iterator[str]:
    from offload.tiers.inventory import file_tier_name

    for path, machine in machines.items():
        tier = machine.tier(file_tier_name(path))
        yield f"{path} on {tier.medium}"


def _nothing_worked(
    found: "Found", arguments: argparse.Namespace, base: OffloadConfig
) -> OffloadError:
    from offload.swap.plan import named_nbytes

    failure = found.baseline.failure
    assert failure is not None
    name = arguments.script.name
    if failure.status == "ended early" and not failure.steps:
        return UnsupportedError(
            f"{name} trains nothing: it ended without a step of an optimizer whose parameters are "
            "those of a module that it calls"
        )
    if failure.status == "ended early":
        least = f": --steps {failure.steps}" if failure.steps >= _LEAST_STEPS else ""
        return ConfigError(
            f"{name} ended by itself after {failure.steps} of {arguments.steps} steps: give it "
            f"more to do, or ask for fewer{least}"
        )
    if failure.status in {"does not fit", "never fits"}:
        budget = base.budget["host"]
        needed = named_nbytes(failure.reason) or budget
        return BudgetError(
            f"{name} fits with no setting: {failure.reason}",
            needed_nbytes=needed,
            budget_nbytes=budget,
        )
    return OffloadError(f"{name} {failure.status} with every setting: {failure.reason}")


# What is checked before anything runs.


def _base(arguments: argparse.Namespace) -> OffloadConfig:
    """The user's settings; budget and directories are decided once, for all trials."""
    from offload.runtime import DEFAULT_DIRECTORY, default_budget

    config = make_config(
        Path(arguments.config) if arguments.config else None,
        budget=arguments.budget,
        device=arguments.device,
        nvme=arguments.nvme and ",".join(arguments.nvme),
    )
    budget = dict(config.budget)
    if "host" not in budget:
        budget["host"] = default_budget() >> 20 << 20
        _say(f"no budget was given: host={budget['host'] >> 20}MiB, most of what is free now")
    paths = tuple(path.absolute() for path in config.nvme or (DEFAULT_DIRECTORY,))
    given = {name: getattr(config, name) for name in config.model_fields_set}
    return OffloadConfig(**{**given, "budget": budget, "nvme": paths})


def _check_script(path: Path) -> None:
    """A Python file that leaves Offload to the trials: one that attaches opens its own store.

    Raises:
        ConfigError: it is no such file.
    """
    if called := sorted(set(_own_calls(read_script(path)))):
        raise ConfigError(
            f"{path} calls offload.{called[0]} itself, on a store of its own: tune takes the plain "
            "script, as offload run does"
        )


def _own_calls(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "offload":
            yield from (alias.name for alias in node.names if alias.name in _CALLS)
        elif (
            isinstance(node, ast.Attribute)
            and node.attr in _CALLS
            and isinstance(node.value, ast.Name)
            and node.value.id == "offload"
        ):
            yield node.attr


def _check_room(base: OffloadConfig) -> None:
    from offload.tiers.filesystem import free_nbytes

    for path in base.nvme:
        if (free := free_nbytes(path)) < _LEAST_ROOM_NBYTES:
            raise BudgetError(
                f"{path} has {format_nbytes(free)} free, a trial takes "
                f"{format_nbytes(_LEAST_ROOM_NBYTES)} at least: free some of it, or name another "
                "directory with --nvme",
                needed_nbytes=_LEAST_ROOM_NBYTES,
                budget_nbytes=free,
            )


def _engines() -> Iterator[str]:
    """I/O engines that have what they need here."""
    from offload.tiers.engines.registry import ENGINES, check_engine

    for name in ENGINES:
        with contextlib.suppress(ConfigError):
            check_engine(name)
            yield name


# How it ends.


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Signals end the process by an exception meanwhile: trials are killed, stores removed."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, _leave) for number in heard}  # nohup ignores one
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _leave(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _command(arguments: argparse.Namespace) -> str:
    words = ["offload", "tune", str(arguments.script), "--steps", str(arguments.steps)]
    for option, value in (("--config", arguments.config), ("--budget", arguments.budget)):
        words += [option, value] if value else []
    words += [word for path in arguments.nvme or () for word in ("--nvme", path)]
    words += ["--device", arguments.device] if arguments.device else []
    words += [f"--{name}" for name in ("lossy", "volatile") if getattr(arguments, name)]
    words += ["--", *arguments.rest] if arguments.rest else []
    return shlex.join(words)


def _say(text: str) -> None:
    print(f"offload: {text}", file=sys.stderr)
