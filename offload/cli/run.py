"""``offload run``: an unmodified script within a memory budget."""

import argparse
import contextlib
import importlib.util
import json
import sys
from pathlib import Path

from offload.allocator.errors import ConfigError
from offload.cli.script import read_script
from offload.config import OffloadConfig, make_config

HELP = "run a training script, unmodified, within a memory budget"
DESCRIPTION = """\
Run a training script, unmodified, within a memory budget.

Options for Offload come before the script; everything after it is the script's own:
  offload run --budget host=4GiB --nvme /data/nvme train.py --lr 1e-4
  offload run --budget 4GiB -m package.train --lr 1e-4
Run the same command again to continue from the last finished step."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON with the same keys")
    parser.add_argument(
        "--budget",
        metavar="B",
        help="for example host=24GiB, device=10GiB,host=24GiB, or just 24GiB",
    )
    parser.add_argument(
        "--device",
        metavar="D",
        help="where the model computes, such as cuda (default: where its parameters are)",
    )
    parser.add_argument(
        "--nvme",
        metavar="DIR",
        action="append",
        help="directory of the store and of scratch; several, in a fixed order, are striped over",
    )
    parser.add_argument("--record", metavar="DIR", help="run directory for offload report")
    parser.add_argument("--resume", choices=["auto", "never", "must"], help="default: auto")
    parser.add_argument(
        "--device-arena",
        action="store_true",
        default=None,
        help="serve what steps compute from one planned segment of the GPU's memory",
    )
    parser.add_argument(
        "--commit",
        choices=["step", "never"],
        help="never: nothing is durable, half the room on the drive (default: step)",
    )
    parser.add_argument(
        "--io-engine", metavar="E", help="auto (default), threads, kvikio, deepspeed or aiofiles"
    )
    parser.add_argument(
        "--nvme-write-budget",
        metavar="SIZE",
        help="that a step may write to the drive, for example 2GiB; activations beyond it stay",
    )
    parser.add_argument(
        "--nvme-endurance",
        metavar="SIZE",
        help="that the drive's data sheet promises, for example 600TB: tells how long it lasts",
    )
    parser.add_argument(
        "--step-in-backward",
        action="store_true",
        default=None,
        help="step each parameter as soon as its gradient is complete; excludes gradient clipping",
    )
    parser.add_argument(
        "--step-in-forward",
        action="store_true",
        default=None,
        help="put the step off until the next forward, which it then overlaps with",
    )
    parser.add_argument(
        "--accumulation-steps",
        metavar="N",
        help="backward passes that make one step, with --step-in-backward (default: 1)",
    )
    parser.add_argument(
        "--optimizer-device",
        metavar="WHO",
        help="steps where the model computes on a device: host (default), device, auto, or the "
        "device's share, 0 to 1",
    )
    parser.add_argument(
        "--state-precision",
        choices=["exact", "bf16", "8bit"],
        help="bf16: float32 optimizer states are rounded at random to half their bytes, which "
        "changes results a little; 8bit: to a quarter, which changes them more (default: exact)",
    )
    parser.add_argument(
        "--master-weights",
        choices=["none", "fp32"],
        help="fp32: bfloat16 weights are stepped in float32, with float32 states; the store keeps "
        "the bits that they lack, 2 bytes a parameter (default: none)",
    )
    parser.add_argument(
        "--recompute",
        choices=["off", "tokenwise"],
        help="tokenwise: swap some token rows of what blocks save, rebuild the rest (default: off)",
    )
    parser.add_argument(
        "--alpha", metavar="A", help="the share of rows that is swapped, 0 to 1, or auto (default)"
    )
    parser.add_argument(
        "--stop-after",
        metavar="N",
        type=int,
        help="end the process right behind its Nth step; nothing that the script would do after "
        "it happens, and the same command goes on from there",
    )
    parser.add_argument(
        "-m",
        dest="module",
        nargs=argparse.REMAINDER,  # else a module's own --options would be taken for Offload's
        metavar="MODULE args…",
        help="run a module as a script",
    )
    parser.add_argument("script", nargs=argparse.REMAINDER, metavar="script.py args…")


def run(arguments: argparse.Namespace) -> int:
    """Check everything that can be checked, then run the script.

    Raises:
        ConfigError: wrong settings, no such script, or a record that belongs to another run.
    """
    config = make_config(
        Path(arguments.config) if arguments.config else None,
        budget=arguments.budget,
        device=arguments.device,
        device_arena=arguments.device_arena,
        nvme=arguments.nvme and ",".join(arguments.nvme),
        record=arguments.record,
        resume=arguments.resume,
        commit=arguments.commit,
        io_engine=arguments.io_engine,
        nvme_write_budget=arguments.nvme_write_budget,
        nvme_endurance=arguments.nvme_endurance,
        step_in_backward=arguments.step_in_backward,
        step_in_forward=arguments.step_in_forward,
        accumulation_steps=arguments.accumulation_steps,
        optimizer_device=arguments.optimizer_device,
        state_precision=arguments.state_precision,
        master_weights=arguments.master_weights,
        recompute=arguments.recompute,
        alpha=arguments.alpha,
    )
    if arguments.stop_after is not None and arguments.stop_after < 1:
        raise ConfigError(f"--stop-after {arguments.stop_after}: at least 1")
    rest = arguments.script[1:] if arguments.script[:1] == ["--"] else arguments.script
    if arguments.module is not None:
        target, argv = _module_of(arguments.module, arguments.script)
    elif rest:
        target, *argv = rest
        read_script(Path(target))
    else:
        raise ConfigError("offload run needs a script: offload run [options] script.py args…")
    _claim_record(config, [target, *argv])
    from offload.launcher import launch

    code = launch(
        config,
        target,
        argv,
        is_module=arguments.module is not None,
        stop_after=arguments.stop_after,
    )
    if config.record is not None:
        print(f"offload: see it with: offload report {config.record}", file=sys.stderr)
    return code


def _module_of(words: list[str], behind: list[str]) -> tuple[str, list[str]]:
    """The module of ``-m`` and its arguments; argparse puts ``--`` and what follows ``behind``."""
    if not words:
        raise ConfigError("-m needs the name of a module")
    name, argv = words[0], [*words[1:], *behind]
    _check_module(name)
    return name, argv[1:] if argv[:1] == ["--"] else argv


def _check_module(name: str) -> None:
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise ConfigError(f"no module named {name!r}")


def _claim_record(config: OffloadConfig, command: list[str]) -> None:
    """A record directory is this command's own, to be continued, or it is new."""
    if config.record is None:
        return
    note = config.record / "command.json"
    if note.exists():
        if (before := _command_in(note)) != command:
            raise ConfigError(
                f"{config.record} holds the record of another command: "
                f"{' '.join(before)}; pass another --record directory"
            )
        return
    try:
        config.record.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(command))
    except OSError as error:
        with contextlib.suppress(OSError):
            note.unlink()  # an empty one would be nobody's
        raise ConfigError(f"can't write to {config.record}: {error.strerror}") from error


def _command_in(note: Path) -> list[str]:
    try:
        words = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{note} can't be read ({error}), so whose record this is isn't known: pass another "
            "--record directory"
        ) from error
    return [str(word) for word in words] if isinstance(words, list) else [str(words)]
