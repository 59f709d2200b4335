"""The machine of a plan: this one, one that was measured, or one of the library."""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from offload.allocator.errors import ConfigError
from offload.allocator.units import format_nbytes, format_rate, parse_nbytes
from offload.doctor.finding import Finding
from offload.planner.stored import Calibrated, Care, calibrated
from offload.swap.planning.striping import joined, striped
from offload.tiers.hostmem import PAGE
from offload.tiers.inventory import file_tier_name
from offload.tiers.machine import (
    ComputeRate,
    Link,
    Machine,
    MachineTier,
    Processor,
    Work,
    read_machine,
)

_BLOCK_NBYTES = 32 << 20
_FREE = 0.9  # of memory: the rest is the system's


def find_machine(
    given: str | None, nvme: Sequence[str], say: Callable[[str], None], *, measure: bool = False
) -> tuple[str, Machine, str]:
    """(name, machine, name of the drive's tier).

    Args:
        given: a file or a name of the library; None: this machine, as it is kept or measured now.
        nvme: the directories of the store; by default the machine's fastest drive.
        measure: this machine, whatever is kept.

    Raises:
        ConfigError: no such machine, or one without such a drive.
    """
    if given is None:
        directories = [Path(one) for one in nvme or (".",)]
        found = [this_machine(one, care="quick", again=measure, say=say) for one in directories]
        machine = joined([one.machine for one in found])
        return found[0].name, *_with_drive(machine, [file_tier_name(one) for one in directories])
    if measure:
        raise ConfigError(f"--measure measures this machine: leave --machine {given} out")
    if Path(given).exists() or Path(given).suffix == ".json":
        machine = read_machine(Path(given))
        if nvme:
            return given, *_with_drive(machine, [_measured(machine, given, one) for one in nvme])
        return given, machine, _drive_of(machine)
    names = list(_library()["machines"])
    if given not in names:
        near = difflib.get_close_matches(given, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"--machine {given!r} is no file, and none of the library: {', '.join(names)}{hint}"
        )
    if len(nvme) > 1:
        raise ConfigError(
            f"--nvme {', '.join(nvme)}: {given} has one drive; give --machine a file of "
            "offload doctor -o, which measures several"
        )
    machine = library_machine(given)
    return given, machine, _drive_of(machine)


def _measured(machine: Machine, file: str, directory: str) -> str:
    """The name of the tier of ``directory``."""
    name = file_tier_name(Path(directory))
    drives = [tier.name for tier in machine.tiers if tier.kind == "file"]
    if name not in drives:
        found = ", ".join(drives) or "no drive"
        raise ConfigError(
            f"--nvme {directory}: {file} has {found}, not {name}; measure that with: "
            f"offload doctor --nvme {directory} -o {file}"
        )
    return name


def _with_drive(machine: Machine, drives: Sequence[str]) -> tuple[Machine, str]:
    """The machine with a tier for ``drives``, and the name of that."""
    if len(drives) == 1:
        return machine, machine.tier(drives[0]).name
    found = striped(machine, drives)
    return found.machine, found.drive


def _drive_of(machine: Machine) -> str:
    drives = [tier.name for tier in machine.tiers if tier.kind == "file"]
    if not drives:
        raise ConfigError(
            "this machine has no drive: measure one with: offload doctor --nvme DIR -o machine.json"
        )
    measured = [name for name in drives if not _misses(machine, name)]
    return max(measured or drives, key=lambda name: _rate(machine, name))


def _misses(machine: Machine, drive: str) -> bool:
    return any(drive in pair for pair in machine.missing_links())


def _rate(machine: Machine, drive: str) -> float:
    return 0.0 if _misses(machine, drive) else machine.link(drive, "host").bytes_per_s


def this_machine(
    directory: Path, *, care: Care, again: bool, say: Callable[[str], None]
) -> Calibrated:
    """The machine that this runs on, with the drive of ``directory``; ``stored.calibrated``.

    Raises:
        ConfigError: it can't be measured.
    """

    def measure(directory: Path, care: Care) -> Machine:
        from offload.doctor.examine import bench_links
        from offload.planner.rehearsal import add_rehearsal
        from offload.tiers.probe import compute, cuda, pace, reclaim

        say(f"measuring this machine and {directory.resolve()}: some seconds")
        effort = pace.QUICK if care == "quick" else pace.Effort()
        bench = bench_links([directory], effort=effort)
        if bench.failures:
            raise ConfigError(
                *(f"can't measure {directory}: {_told(one)}" for one in bench.failures),
                "or name another directory with --nvme, or a machine of --machine list",
            )
        machine, failures = cuda.add_devices(compute.add_compute(bench.machine))
        for name, why in failures.items():
            say(f"{name} could not be measured: {why}")
        if care == "full":
            say("rehearsing some steps of a small model")
            machine = reclaim.add_reclaimed(machine)
            machine = add_rehearsal(machine, directory, file_tier_name(directory))
        return machine

    if not directory.is_dir():
        raise ConfigError(f"{directory} is no directory: make it, or name another with --nvme")
    return calibrated(directory, care=care, again=again, say=say, measure=measure)


def _told(failure: Finding) -> str:
    mend = f"; mend it with: {failure.mend}" if failure.mend else ""
    return f"{failure.subject}: {failure.value}{mend}"


@cache
def _library() -> dict[str, Any]:
    text = files("offload.planner").joinpath("machines.yaml").read_text(encoding="utf-8")
    library: dict[str, Any] = yaml.safe_load(text)
    return library


def list_machines() -> str:
    """The machines of the library, one a line, and where their figures come from."""
    library = _library()
    lines = []
    for name, parts in library["machines"].items():
        drive = library["drives"][parts["drive"]]
        gpu = f", {library['gpus'][parts['gpu']]['model']}" if "gpu" in parts else ""
        lines.append(
            f"{name:17} {library['processors'][parts['processor']]['model']}, "
            f"{format_nbytes(parse_nbytes(parts['memory']))}, {parts['drive']} "
            f"({format_rate(drive['read'])} read){gpu}"
        )
    kinds = (library["processors"], library["drives"], library["gpus"])
    sources = dict.fromkeys(part["source"] for kind in kinds for part in kind.values())
    return "\n".join([*lines, "", "Published figures of:", *sources])


def library_machine(name: str) -> Machine:
    """The machine ``name`` of the library, of which nothing is measured."""
    library = _library()
    parts = library["machines"][name]
    cpu = library["processors"][parts["processor"]]
    drive = library["drives"][parts["drive"]]
    gpu = library["gpus"][parts["gpu"]] if "gpu" in parts else None
    file = f"file:{parts['drive']}"
    processors = [
        Processor(name="cpu", model=cpu["model"], cores=cpu["cores"], features=()),
        *([Processor(name="cuda:0", model=gpu["model"], cores=None, features=())] if gpu else []),
    ]
    host_nbytes, file_nbytes = parse_nbytes(parts["memory"]), parse_nbytes(drive["capacity"])
    tiers = [_tier("host", host_nbytes, int(host_nbytes * _FREE), "memory")]
    tiers.append(_tier(file, file_nbytes, file_nbytes, parts["drive"]))
    if gpu:
        memory = parse_nbytes(gpu["memory"])
        tiers.append(_tier("device:0", memory, memory, gpu["model"]))
    return Machine(
        kernel="published specifications",
        processors=tuple(processors),
        tiers=tuple(tiers),
        links=tuple(_links(library, cpu, drive, gpu, file)),
        compute=(*_rates(library, cpu), *(_gpu_rates(library, gpu) if gpu else ())),
    )


def _tier(name: str, capacity_nbytes: int, free_nbytes: int, medium: str) -> MachineTier:
    kinds = {"host": "host", "device:0": "device"}
    return MachineTier(
        name=name,
        kind=kinds.get(name, "file"),  # type: ignore[arg-type]
        capacity_nbytes=capacity_nbytes,
        free_nbytes=free_nbytes,
        align_nbytes=PAGE,
        medium=medium,
    )


def _links(
    library: Mapping[str, Any],
    cpu: Mapping[str, Any],
    drive: Mapping[str, Any],
    gpu: Mapping[str, Any] | None,
    file: str,
) -> Iterator[Link]:
    share, latency_s = library["sustained"], library["software"]["latency_s"]
    # A copy reads and writes each byte.
    yield _link("host", "host", cpu["bytes_per_s"] * share["memory"] / 2, 1e-6)
    yield _link(file, "host", drive["read"] * share["drive"], latency_s)
    yield _link("host", file, drive["write"] * share["drive"], latency_s)
    if gpu is not None:
        bus = library["buses"][gpu["bus"]] * share["bus"]
        yield _link("host", "device:0", bus, 1e-5)
        yield _link("device:0", "host", bus, 1e-5)


def _link(source: str, target: str, bytes_per_s: float, latency_s: float) -> Link:
    return Link(
        source=source,
        target=target,
        block_nbytes=_BLOCK_NBYTES,
        in_flight=4,
        bytes_per_s=bytes_per_s,
        low_bytes_per_s=bytes_per_s,
        high_bytes_per_s=bytes_per_s,
        latency_s=latency_s,
        repeats=1,
    )


def _rates(library: Mapping[str, Any], cpu: Mapping[str, Any]) -> Iterator[ComputeRate]:
    share, software = library["sustained"], library["software"]
    flops, memory = cpu["flops"], cpu["bytes_per_s"] * share["memory"]
    core = min(software["core_bytes_per_s"], memory)
    rates: dict[Work, float] = {
        "matmul": flops * share["matmul"],
        "thin matmul": flops * share["matmul"] / 2,
        "attention": flops * share["attention"],
        "attention backward": flops * share["attention"],
        "pointwise": memory,
        "heavy": memory * share["heavy"],
        "optimizer": memory,
        "optimizer thread": core,
    }
    for dtype in ("float32", "bfloat16"):
        for work, per_s in rates.items():
            yield ComputeRate(processor="cpu", work=work, dtype=dtype, size=1 << 20, per_s=per_s)
    others: dict[Work, float] = {
        "first touch": software["first_touch_bytes_per_s"],
        "checksum": software["checksum_bytes_per_s"],
        "dispatch": software["calls_per_s"],
    }
    for work, per_s in others.items():
        yield ComputeRate(processor="cpu", work=work, dtype="float32", size=1, per_s=per_s)


def _gpu_rates(library: Mapping[str, Any], gpu: Mapping[str, Any]) -> Iterator[ComputeRate]:
    share = library["sustained"]
    memory = gpu["bytes_per_s"] * share["memory"]
    for dtype, flops in gpu["flops"].items():
        rates: dict[Work, float] = {
            "matmul": flops * share["matmul"],
            "thin matmul": flops * share["matmul"] / 2,
            "attention": flops * share["attention"],
            "attention backward": flops * share["attention"],
            "pointwise": memory,
            "heavy": memory,  # what takes a CPU long hides behind a GPU's memory
            "optimizer": memory,
        }
        for work, per_s in rates.items():
            yield ComputeRate(processor="cuda:0", work=work, dtype=dtype, size=1 << 20, per_s=per_s)
