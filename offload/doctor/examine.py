"""The whole examination: facts, measured links, the machine that they make."""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from offload.allocator.errors import CapacityError
from offload.doctor.finding import Finding, Section, Status
from offload.doctor.hardware import examine_hardware
from offload.doctor.kernel import examine_kernel
from offload.doctor.limits import examine_limits
from offload.doctor.software import Environment, environment, examine_software
from offload.doctor.storage import Examined, examine_directory
from offload.tiers.cgroups import read_cgroup_limits
from offload.tiers.gpus import Gpu, read_gpus
from offload.tiers.inventory import file_tier_name, take_inventory
from offload.tiers.machine import Machine
from offload.tiers.probe.links import Progress, Wanted, copy_threads, measure_links
from offload.tiers.probe.pace import Effort
from offload.tiers.system import System
from offload.tiers.topology import read_topology


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Measured links.

    Attributes:
        machine: tiers that could be used, and their links.
        failures: directories and tiers that could not be measured.
        seconds: that measuring took.
    """

    machine: Machine
    failures: tuple[Finding, ...]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What the doctor found: facts by section, and the links."""

    sections: tuple[Section, ...]
    bench: Bench

    def count(self, status: Status) -> int:
        """Findings of that status."""
        return sum(
            finding.status == status for section in self.sections for finding in section.findings
        )


def bench_links(
    directories: Sequence[Path],
    *,
    effort: Effort,
    progress: Progress = lambda _text: None,
    system: System | None = None,
) -> Bench:
    """Measure all links; a directory that can't be used is a failure, never an exception."""
    began_s = time.monotonic()
    system = system or System()
    progress("reading facts")
    examined = [examine_directory(directory, system) for directory in directories]
    gpus = read_gpus(system)
    bench = _measure(examined, gpus, _what_is_left(effort, began_s), progress, system)
    refused = [
        finding for each in examined for finding in each.findings if finding.status == "fail"
    ]
    return dataclasses.replace(bench, failures=(*refused, *bench.failures))


def diagnose(
    directories: Sequence[Path],
    *,
    effort: Effort,
    progress: Progress = lambda _text: None,
    system: System | None = None,
    env: Environment | None = None,
) -> Diagnosis:
    """Read the facts, then measure the links of what can be used.

    A directory that can't be used is a finding, never an exception.
    """
    began_s = time.monotonic()
    system = system or System()
    progress("reading facts")
    gpus = read_gpus(system)
    examined = [examine_directory(directory, system) for directory in directories]
    sections = [
        Section(title="Software", findings=examine_software(env or environment(), gpus)),
        Section(title="Machine", findings=examine_hardware(system, gpus)),
        Section(title="Kernel", findings=examine_kernel(system)),
        Section(title="Limits", findings=examine_limits(system)),
    ]
    sections += [
        Section(title=f"Storage in {each.directory.absolute()}", findings=each.findings)
        for each in examined
    ]
    bench = _measure(examined, gpus, _what_is_left(effort, began_s), progress, system)
    if bench.failures:
        sections.append(Section(title="Not measured", findings=bench.failures))
    return Diagnosis(sections=tuple(sections), bench=bench)


def _what_is_left(effort: Effort, began_s: float) -> Effort:
    """The effort less the time that slow tools took, such as a driver that had to wake up."""
    spent_s = time.monotonic() - began_s
    return dataclasses.replace(effort, seconds=max(effort.seconds - spent_s, effort.seconds / 4))


def _measure(
    examined: Sequence[Examined],
    gpus: Sequence[Gpu],
    effort: Effort,
    progress: Progress,
    system: System,
) -> Bench:
    # One tier for each folder, however often and by whatever path it was named.
    files = {file_tier_name(each.directory): each.directory for each in examined if each.usable}
    machine = take_inventory(tuple(files.values()), system=system, gpus=gpus)
    wanted = Wanted(
        files=files,
        nodes={
            node.index: node.cpus for node in read_topology(system.sys).nodes if node.memory_nbytes
        },
        devices=bool(gpus),
        threads=copy_threads(read_cgroup_limits(system).cpus),
    )
    try:
        measured = measure_links(
            wanted,
            available_nbytes=machine.tier("host").free_nbytes,
            effort=effort,
            progress=progress,
        )
    except CapacityError as error:
        too_full = Finding(
            subject="memory", value=str(error), status="fail", mend="ps aux --sort -rss | head"
        )
        return Bench(machine=machine, failures=(too_full,), seconds=0.0)
    return Bench(
        machine=dataclasses.replace(machine, links=measured.links),
        failures=tuple(
            Finding(subject=failure.tier, value=failure.message, status="fail")
            for failure in measured.failures
        ),
        seconds=measured.seconds,
    )
