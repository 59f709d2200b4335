"""Measured machines, kept for each machine and drive, so that a plan need not measure for seconds.

[Note: what is kept] Rates: of the links, by block size, and of the processor. They hold for the
same processor, memory, drive and torch, by as many threads; these facts are the *fingerprint*, and
name the file. What changes by the hour, such as free bytes, is read anew each time. A file that is
damaged, of another version or older than thirty days is told of and measured again.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, TypeAlias

from offload.allocator.errors import ConfigError
from offload.tiers.filesystem import disk_behind, mount_of, read_mounts
from offload.tiers.gpus import read_gpus
from offload.tiers.inventory import file_tier_name, take_inventory
from offload.tiers.machine import Machine
from offload.tiers.system import System, read_cpu, read_memory

# Since 2 it holds the rates of GPUs, since 3 fresh memory by its size, since 4 looks at pages.
FORMAT_VERSION = 4
FRESH = timedelta(days=30)
_AHEAD = timedelta(minutes=5)  # a clock that was set back a little

Care: TypeAlias = Literal["quick", "full"]
Say: TypeAlias = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """This machine with measured rates.

    Attributes:
        measured: when.
        now: when it was asked for.
    """

    machine: Machine
    measured: datetime
    now: datetime

    @property
    def name(self) -> str:
        """For people: which machine, and how old its figures are."""
        return f"this machine, measured {_age(self.now - self.measured)}"


def calibrated(
    directory: Path,
    *,
    care: Care,
    again: bool,
    say: Say,
    measure: Callable[[Path, Care], Machine],
    system: System | None = None,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Calibrated:
    """This machine with the drive of ``directory``: as it is kept, or measured and kept.

    Args:
        directory: exists.
        care: figures that were measured more quickly than this are measured again.
        again: measure whatever is kept.
        say: is told what is measured, and what is wrong with a kept file.
        measure: measures the machine.
        now: replaced by tests.

    Raises:
        ConfigError: it can't be measured.
    """
    system = system or System()
    facts = fingerprint(directory, system)
    path = path_of(facts)
    if not again:
        try:
            kept = _read(path, facts, directory, system, now())
        except _UnusableError as error:
            say(f"{path} {error}: measuring this machine again")
            kept = None
        if kept is not None and (care == "quick" or kept[1] == "full"):
            return kept[0]
    machine = measure(directory, care)
    measured = now()
    try:
        _write(path, facts, directory, machine, care, measured)
    except OSError as error:
        say(f"can't keep the figures in {path} ({error.strerror}): the next plan measures again")
    return Calibrated(machine=machine, measured=measured, now=measured)


def fingerprint(directory: Path, system: System) -> dict[str, Any]:
    """What rates depend on: the file is named by it."""
    cpu, memory = read_cpu(system), read_memory(system)
    mount = mount_of(directory.resolve(), read_mounts(system))
    disk = disk_behind(mount, system) if mount else None
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = None
    return {
        "cpu": cpu.model,
        "cores": cpu.usable,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "memory_gib": round(memory.total_nbytes / (1 << 30)) if memory else None,  # kernels differ
        "gpus": [gpu.name for gpu in read_gpus(system)],
        "drive": None
        if mount is None
        else {
            "file_system": mount.fstype,
            "disk": disk.name if disk else mount.source,
            "model": disk.model if disk else None,
        },
        "torch": torch,
    }


def path_of(facts: Mapping[str, Any]) -> Path:
    """The file of the machine with that fingerprint (XDG Base Directory Specification 0.8)."""
    given = Path(os.environ.get("XDG_CACHE_HOME") or "")
    cache = given if given.is_absolute() else Path("~/.cache").expanduser()
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return cache / "offload" / "machines" / f"{digest[:16]}.json"


class _UnusableError(Exception):
    """Why a kept file is measured again."""


def _read(
    path: Path, facts: Mapping[str, Any], directory: Path, system: System, now: datetime
) -> tuple[Calibrated, Care] | None:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise _UnusableError(f"can't be read ({error})") from error
    try:
        document = json.loads(text)
        if document["format"] != FORMAT_VERSION:
            raise _UnusableError("is of another version of Offload")
        measured = datetime.fromisoformat(document["measured"])
        age = now - measured
        care: Care = "full" if document["care"] == "full" else "quick"
        if document["fingerprint"] != facts:
            raise _UnusableError("is of another machine")
        kept = Machine.from_json(json.dumps(document["machine"]))
        machine = _as_now(kept, document["drive"], directory, system)
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise _UnusableError(f"is damaged ({error})") from error
    if not -_AHEAD <= age <= FRESH:
        raise _UnusableError(f"was written {_age(age)}")
    return Calibrated(machine=machine, measured=measured, now=now), care


def _as_now(kept: Machine, drive: str, directory: Path, system: System) -> Machine:
    """The tiers as they are now, with the rates that were kept."""
    name = file_tier_name(directory)
    fresh = take_inventory([directory], system=system, gpus=read_gpus(system))

    def renamed(end: str) -> str:
        return name if end == drive else end

    machine = dataclasses.replace(
        fresh,
        links=tuple(
            dataclasses.replace(link, source=renamed(link.source), target=renamed(link.target))
            for link in kept.links
        ),
        compute=kept.compute,
    )
    machine.check_measured()
    if not machine.compute:
        raise ConfigError("it has no rates of the processor")
    return machine


def _write(
    path: Path,
    facts: Mapping[str, Any],
    directory: Path,
    machine: Machine,
    care: Care,
    measured: datetime,
) -> None:
    """Whole or not at all: another process may read it, or write it, meanwhile."""
    document = {
        "format": FORMAT_VERSION,
        "measured": measured.isoformat(timespec="seconds"),
        "care": care,
        "fingerprint": facts,
        "drive": file_tier_name(directory),
        "machine": dataclasses.asdict(machine),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=path.stem, suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(document, indent=2) + "\n")
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _age(age: timedelta) -> str:
    seconds = age.total_seconds()
    if seconds < -_AHEAD.total_seconds():
        return "in the future"
    for size, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {unit}{'s' * (count > 1)} ago"
    return "just now"
