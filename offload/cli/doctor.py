"""``offload doctor``: facts about this machine, its measured links, and what to mend."""

import argparse
import dataclasses
import sys
from pathlib import Path

HELP = "examine this machine: facts, limits, measured links, and what to mend"
DESCRIPTION = """\
Examine this machine: facts, limits and measured links, each line ok, warn or fail
with the command that mends it. It takes less than 20 seconds and leaves nothing
behind. Exit code 1 if a line fails.

  offload doctor --nvme /data/nvme
  offload doctor --nvme /data/a /data/b -o machine.json"""

_COMPUTE_S = 6.0  # torch's import and the processor's rates


def add_directories(parser: argparse.ArgumentParser) -> None:
    """The directories to examine, given once or several times."""
    parser.add_argument(
        "--nvme",
        metavar="DIR",
        nargs="+",
        action="extend",
        type=Path,
        help="directories for the store; default: the current one",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    add_directories(parser)
    parser.add_argument("--json", action="store_true", help="findings and machine as JSON")
    parser.add_argument(
        "-o", "--machine", metavar="FILE", type=Path, help="write machine.json for the planner"
    )


def run(arguments: argparse.Namespace) -> int:
    """Examine, and print on stdout; progress goes to stderr.

    Raises:
        ConfigError: the machine can't be written to the file.
    """
    from offload.doctor.examine import diagnose
    from offload.doctor.progress import shown
    from offload.doctor.text import make_console, print_diagnosis, to_json
    from offload.tiers.machine import check_writable, write_machine
    from offload.tiers.probe.compute import add_compute
    from offload.tiers.probe.pace import Effort

    if arguments.machine is not None:
        check_writable(arguments.machine)  # before the work, not after it
    directories = arguments.nvme or [Path()]
    with shown() as progress:
        wanted = arguments.json or arguments.machine is not None
        effort = Effort()
        if wanted:
            seconds = max(effort.seconds - _COMPUTE_S, effort.seconds / 2)
            effort = dataclasses.replace(effort, seconds=seconds)
        diagnosis = diagnose(directories, effort=effort, progress=progress)
        if wanted:  # by the planner; it imports torch
            machine = add_compute(diagnosis.bench.machine, progress=progress)
            bench = dataclasses.replace(diagnosis.bench, machine=machine)
            diagnosis = dataclasses.replace(diagnosis, bench=bench)
    if arguments.json:
        print(to_json(diagnosis))
    else:
        print_diagnosis(diagnosis, make_console())
    if arguments.machine is not None:
        write_machine(diagnosis.bench.machine, arguments.machine)
        print(f"offload: wrote {arguments.machine}", file=sys.stderr)
    return int(diagnosis.count("fail") > 0)
