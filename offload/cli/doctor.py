"""``offload doctor``: facts about this machine, its measured links, and what to mend."""

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from offload.allocator.errors import ConfigError

if TYPE_CHECKING:
    from offload.doctor.examine import Diagnosis
    from offload.doctor.finding import Finding
    from offload.tiers.machine import Machine
    from offload.tiers.probe.links import Progress

HELP = "examine this machine: facts, limits, measured links, and what to mend"
DESCRIPTION = """\
Examine this machine: facts, limits and measured links, each line ok, warn or fail
with the command that mends it. It takes less than 20 seconds and leaves nothing
behind. Exit code 1 if a line fails.

  offload doctor --nvme /data/nvme
  offload doctor --nvme /data/a /data/b -o machine.json --rehearse"""

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
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="with -o or --json: also train a small model in the first directory, for what only "
        "training shows; a minute more",
    )


def run(arguments: argparse.Namespace) -> int:
    """Examine, and print on stdout; progress goes to stderr.

    Raises:
        ConfigError: the machine can't be written to the file, or nobody wants what is measured.
    """
    from offload.doctor.examine import diagnose
    from offload.doctor.progress import shown
    from offload.doctor.text import make_console, print_diagnosis, to_json
    from offload.tiers.machine import check_writable, write_machine
    from offload.tiers.probe.pace import Effort

    wanted = arguments.json or arguments.machine is not None
    if arguments.rehearse and not wanted:
        raise ConfigError("--rehearse measures for the planner: give -o machine.json, or --json")
    if arguments.machine is not None:
        check_writable(arguments.machine)  # before the work, not after it
    directories = arguments.nvme or [Path()]
    with shown() as progress:
        effort = Effort()
        if wanted:
            seconds = max(effort.seconds - _COMPUTE_S, effort.seconds / 2)
            effort = dataclasses.replace(effort, seconds=seconds)
        diagnosis = diagnose(directories, effort=effort, progress=progress)
        if wanted:  # by the planner; it imports torch
            diagnosis = _for_planner(
                diagnosis, directories, rehearse=arguments.rehearse, progress=progress
            )
    if arguments.json:
        print(to_json(diagnosis))
    else:
        print_diagnosis(diagnosis, make_console())
    if arguments.machine is not None:
        write_machine(diagnosis.bench.machine, arguments.machine)
        print(f"offload: wrote {arguments.machine}", file=sys.stderr)
    return int(diagnosis.count("fail") > 0)


def _for_planner(
    diagnosis: "Diagnosis", directories: Sequence[Path], *, rehearse: bool, progress: "Progress"
) -> "Diagnosis":
    """With the rates of processors and, if asked for, of a rehearsal; and a line about each."""
    from offload.doctor.finding import Finding, Section
    from offload.tiers.probe.compute import add_compute
    from offload.tiers.probe.cuda import add_devices
    from offload.tiers.probe.reclaim import add_reclaimed

    machine = add_compute(diagnosis.bench.machine, progress=progress)
    machine, failures = add_devices(machine, progress=progress)
    failed: tuple[Finding, ...] = ()
    if rehearse:
        progress("looking whether free memory is taken back")
        machine, failed = _rehearsed(add_reclaimed(machine), directories, progress)
    findings = (
        *_rates(machine),
        *(Finding(subject=name, value=why, status="fail") for name, why in failures.items()),
        *(failed or _rehearsal(machine)),
        *_reclaimed(machine),
    )
    return dataclasses.replace(
        diagnosis,
        sections=(*diagnosis.sections, Section(title="For the planner", findings=findings)),
        bench=dataclasses.replace(diagnosis.bench, machine=machine),
    )


def _rehearsed(
    machine: "Machine", directories: Sequence[Path], progress: "Progress"
) -> "tuple[Machine, tuple[Finding, ...]]":
    """The machine with the rates of a rehearsal, or the line that tells why it has none."""
    from offload.allocator.errors import OffloadError
    from offload.doctor.finding import Finding
    from offload.planner.rehearsal import add_rehearsal
    from offload.tiers.inventory import file_tier_name

    measured = {link.source for link in machine.links}
    usable = [each for each in directories if file_tier_name(each) in measured]
    try:
        if not usable:
            raise ConfigError("it needs a directory whose links were measured")
        progress(f"rehearsing some steps of a small model in {usable[0]}")
        return add_rehearsal(machine, usable[0], file_tier_name(usable[0])), ()
    except OffloadError as error:
        return machine, (Finding(subject="rehearsal", value=str(error), status="fail"),)


def _rates(machine: "Machine") -> "Iterator[Finding]":
    """What the best product of matrices reached on each processor, by type."""
    from offload.doctor.finding import Finding

    for processor in machine.processors:
        best: dict[str, float] = {}
        for rate in machine.compute:
            if (rate.processor, rate.work) == (processor.name, "matmul"):
                best[rate.dtype] = max(best.get(rate.dtype, 0.0), rate.per_s)
        if best:
            told = [f"{dtype} {_flops(per_s)}" for dtype, per_s in best.items()]
            yield Finding(subject=processor.name, value=f"matmul: {', '.join(told)}")


def _flops(per_s: float) -> str:
    return f"{per_s / 1e12:.1f} TFLOP/s" if per_s >= 1e12 else f"{per_s / 1e9:.1f} GFLOP/s"


def _reclaimed(machine: "Machine") -> "Iterator[Finding]":
    """That free memory is taken back, if it is."""
    from offload.allocator.units import format_nbytes, format_rate
    from offload.doctor.finding import Finding

    for rate in machine.compute:
        if rate.work == "reclaimed touch":
            yield Finding(
                subject="free memory",
                value=f"taken back by the hypervisor, {format_nbytes(rate.size)} at once",
                status="warn",
                detail=f"huge pages that were free for seconds come again at "
                f"{format_rate(rate.per_s)}, which steps that take seconds wait for; "
                "THP_MEM_ALLOC_ENABLE=0 in the environment gives torch small ones",
            )


def _rehearsal(machine: "Machine") -> "Iterator[Finding]":
    """What a rehearsal found; or what a prediction lacks without one."""
    from offload.allocator.units import format_rate
    from offload.doctor.finding import Finding
    from offload.planner.rehearsal import FIXED, RECODED, REHEARSED

    found = {rate.work: rate.per_s for rate in machine.compute if rate.work in REHEARSED}
    if "flush" not in found:
        yield Finding(
            subject="rehearsal",
            value="not measured",
            status="warn",
            detail="what lanes and computing take from each other, and what a flush takes, only "
            "training shows: predictions without it are the faster ones",
            mend="offload doctor --rehearse -o machine.json",
        )
        return
    told = [f"{found['flush']:,.0f} flushes/s", f"tiles {format_rate(found['tiles'])}"]
    if "moves" in found:
        told.append(f"computing loses a second by {format_rate(found['moves'])[:-2]} moved")
    if "page reads" in found:
        told.append(f"{found['page reads']:,.0f} first looks at pages/s")
    if "page writes" in found:
        told.append(f"{found['page writes']:,.0f} first writes to pages/s")
    told += [f"{found[work]:,.0f} {work}/s" for work in FIXED if work in found]
    told += [f"{work} {format_rate(found[work])}" for work in RECODED if work in found]
    yield Finding(subject="rehearsal", value=", ".join(told))
