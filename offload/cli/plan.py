"""``offload plan``: does it fit, how slow, bound by what, what to change."""

import argparse
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload.allocator.errors import BudgetError, ConfigError
from offload.allocator.units import parse_memory_nbytes
from offload.cli.script import read_script
from offload.config import OffloadConfig, make_config

if TYPE_CHECKING:
    from offload.planner.on_device import PlacementAnswer
    from offload.planner.refine import Recorded

HELP = "before the first step: does it fit, how slow, bound by what, what to change"
DESCRIPTION = """\
Tell what fine-tuning a model would need and how long a step would take, without
loading its weights. MODEL is a Hugging Face config.json, or its directory, or a
training script, which runs until its first backward (its own arguments after --args).

  offload plan checkpoints/llama --seq 2048 --budget host=8GiB --machine machine.json
  offload plan config.json --solve host
Exit code 3 if it does not fit, with the smallest change that would."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.add_argument("model", metavar="MODEL|script.py", type=Path, nargs="?")
    parser.add_argument("--seq", metavar="N", type=int, help="tokens of a sequence (default: 1024)")
    parser.add_argument(
        "--batch", metavar="N", type=int, help="sequences of one forward (default: 1)"
    )
    parser.add_argument(
        "--micro-batches",
        metavar="N",
        type=int,
        help="forwards of a step, each with its backward, that add up gradients (default: 1)",
    )
    parser.add_argument("--optim", metavar="O", help="adamw (default), adam, sgd, …")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--method", choices=["full", "lora"])
    parser.add_argument(
        "--budget",
        metavar="B",
        help="for example host=24GiB, or just 24GiB; with device=20GiB, and numa:1=64GiB, on a GPU",
    )
    parser.add_argument(
        "--nvme",
        metavar="DIR",
        action="append",
        default=[],
        help="the directory of the store; several, each after its own --nvme, are striped",
    )
    parser.add_argument("--commit", choices=["step", "never"], default="step")
    parser.add_argument(
        "--step-in-backward",
        action="store_true",
        help="step each parameter as soon as its gradient is complete",
    )
    parser.add_argument(
        "--step-in-forward",
        action="store_true",
        help="step each parameter in the next forward, right before its use",
    )
    parser.add_argument(
        "--state-precision",
        choices=["exact", "bf16", "8bit"],
        default="exact",
        help="of optimizer states in the store; all but exact round",
    )
    parser.add_argument(
        "--master-weights",
        choices=["none", "fp32"],
        default="none",
        help="fp32: bfloat16 weights are stepped in float32",
    )
    parser.add_argument(
        "--recompute",
        choices=["off", "tokenwise"],
        default="off",
        help="tokenwise: some token rows of what blocks save are swapped, the others rebuilt",
    )
    parser.add_argument(
        "--alpha", metavar="A", help="the share of rows that is swapped, 0 to 1, or auto (default)"
    )
    parser.add_argument(
        "--nvme-write-budget",
        metavar="SIZE",
        help="what a step may write to the drive, everything included, for example 2GiB",
    )
    parser.add_argument(
        "--machine",
        metavar="FILE|NAME",
        help="of offload doctor -o, or of the library (--machine list); default: this one, as it "
        "was measured last",
    )
    parser.add_argument(
        "--measure", action="store_true", help="measure this machine again, whatever is kept"
    )
    parser.add_argument(
        "--from",
        dest="recorded",
        metavar="RUN",
        type=Path,
        help="correct rates and memory by what a recorded run of this model has shown",
    )
    parser.add_argument(
        "--baseline",
        metavar="SIZE",
        help="resident set without a model, for example 400MiB; default: measured here",
    )
    parser.add_argument("--what-if", metavar="C", help="for example nvme=7GB/s,compute=2x")
    parser.add_argument(
        "--solve",
        choices=["seq", "batch", "host"],
        help="find the longest sequence, the largest batch, or the least memory",
    )
    parser.add_argument("--record", metavar="DIR", type=Path, help="events, for offload report")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=Path,
        help="with device= in --budget: the settings, as a file for offload run --config",
    )
    parser.add_argument("--explain", action="store_true", help="why each class went where")
    parser.add_argument("--json", action="store_true", help="the same figures as JSON")
    parser.add_argument(
        "--args", metavar="…", nargs=argparse.REMAINDER, default=[], help="the script's own"
    )


def run(arguments: argparse.Namespace) -> int:
    """Plan, and print on stdout; progress goes to stderr. 3 where it does not fit.

    Raises:
        ConfigError: wrong settings, no such model or machine, or one that lacks measurements.
        UnsupportedError: a model that can't be planned.
    """
    from offload.planner.text import refusal_to_json

    try:
        return _run(arguments)
    except BudgetError as error:
        if not arguments.json:
            raise
        print(refusal_to_json(str(error), error.needed_nbytes, error.budget_nbytes))
        return error.exit_code


def _run(arguments: argparse.Namespace) -> int:
    from offload.planner.asking import Asking
    from offload.planner.machines import find_machine, list_machines
    from offload.planner.on_device import split_budget
    from offload.planner.placement_text import placement_to_json, print_placement
    from offload.planner.text import print_answer, to_json

    if arguments.machine == "list":
        print(list_machines())
        return 0
    host, others = split_budget(arguments.budget)
    budget = _budget_of(host)
    _check_output(arguments.output, others)
    baseline_nbytes = _size("--baseline", arguments.baseline)
    _check_counts(arguments)
    recorded = _recorded_of(arguments)
    source = _source_of(arguments)
    name, machine, drive = find_machine(
        arguments.machine, arguments.nvme, _say, measure=arguments.measure
    )
    machine.check_measured()
    asking = Asking(
        arguments, source, name, machine, drive, budget, baseline_nbytes, recorded, _say
    )
    if others:
        placed = asking.place(others if budget is None else {"host": budget, **others})
        if arguments.output is not None:
            _write_settings(arguments, placed)
        if arguments.json:
            print(placement_to_json(placed))
        else:
            print_placement(placed, explain=arguments.explain)
        return 0
    answer = asking.answer()
    if arguments.json:
        print(to_json(answer))
    else:
        print_answer(answer, explain=arguments.explain)
    return 0


def _budget_of(text: str | None) -> int | None:
    if text is None:
        return None
    budget = make_config({}, budget=text).budget
    if "host" not in budget:
        raise ConfigError("--budget: host=SIZE bounds memory, for example host=24GiB")
    return budget["host"]


def _size(option: str, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return parse_memory_nbytes(text, unit="MiB")
    except ValueError as error:
        raise ConfigError(f"{option} {text}: {error}") from error


def _check_counts(arguments: argparse.Namespace) -> None:
    for name, least in (("seq", 2), ("batch", 1), ("micro_batches", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: at least {least}")


def _source_of(arguments: argparse.Namespace) -> Any:
    from offload.planner.asking import config_of
    from offload.planner.sources import HuggingFaceModel
    from offload.swap.state_precision import Precision

    path: Path | None = arguments.model
    if path is None:
        raise ConfigError("offload plan needs a model: a config.json, its directory, or a script")
    precision = Precision(states=arguments.state_precision, masters=arguments.master_weights)
    config = config_of(arguments)
    rebuild_nbytes = config.min_swap_nbytes if config.recompute == "tokenwise" else None
    if path.suffix == ".py":
        from offload.planner.scripts import TrainingScript

        read_script(path)
        return TrainingScript(
            path,
            arguments.args,
            given=arguments,
            precision=precision,
            rebuild_nbytes=rebuild_nbytes,
        )
    if arguments.args:
        raise ConfigError(f"--args {' '.join(arguments.args)}: {path} is no script")
    return HuggingFaceModel(
        path,
        dtype=arguments.dtype,
        method=arguments.method or "full",
        optimizer=arguments.optim or "adamw",
        precision=precision,
        rebuild_nbytes=rebuild_nbytes,
    )


def _recorded_of(arguments: argparse.Namespace) -> "Recorded | None":
    from offload.planner.refine import read_recorded

    return None if arguments.recorded is None else read_recorded(arguments.recorded)


def _check_output(path: Path | None, others: dict[str, int]) -> None:
    from offload.tuning.settings_file import check_output

    if path is None:
        return
    if "device" not in others:
        raise ConfigError(f"-o {path}: writes what a GPU steps: give --budget device=SIZE")
    check_output(path)


def _write_settings(arguments: argparse.Namespace, placed: "PlacementAnswer") -> None:
    """The settings with which ``attach`` comes nearest to the placement.

    Raises:
        ConfigError: nothing that attach does fits, or the file can't be written.
    """
    from offload.planner.on_device import settings_of
    from offload.tuning.settings_file import HEADER, commented, to_yaml, write_settings

    if placed.setting is None:
        raise ConfigError(
            f"-o {arguments.output}: attach steps nothing within these budgets, only a placement "
            "fits that it does not make yet; nothing was written"
        )
    given = {
        "nvme": tuple(arguments.nvme),
        "commit": arguments.commit,
        "state_precision": arguments.state_precision,
        "master_weights": arguments.master_weights,
    }
    chosen = {name: value for name, value in given.items() if value != _DEFAULTS.get(name, ())}
    config = OffloadConfig(**settings_of(placed), **chosen)
    notes = [
        f"{HEADER} plan, {datetime.now(UTC):%Y-%m-%d}:",
        f"#   {_command(arguments)}",
        *commented(placed.title),
        *commented(placed.machine_name),
        *commented(placed.setting.told),
    ]
    write_settings(arguments.output, to_yaml(notes, config))
    _say(f"wrote {arguments.output}")


_DEFAULTS = {"commit": "step", "state_precision": "exact", "master_weights": "none"}
_REPEATED = (
    "seq", "batch", "optim", "dtype", "method", "budget", "commit", "state_precision",
    "master_weights", "machine", "baseline", "what_if", "solve",
)  # fmt: skip


def _command(arguments: argparse.Namespace) -> str:
    words = ["offload", "plan", str(arguments.model)]
    for name in _REPEATED:
        if (value := getattr(arguments, name)) is not None and value != _DEFAULTS.get(name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    words += [word for path in arguments.nvme for word in ("--nvme", path)]
    words += ["-o", str(arguments.output)]
    return shlex.join(words + (["--args", *arguments.args] if arguments.args else []))


def _say(text: str) -> None:
    print(f"offload: {text}", file=sys.stderr)
