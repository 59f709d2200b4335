"""What ``gpu_check`` found: a line for each check, and one JSON file. Standard library only."""

import datetime as dt
import json
import re
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Check:
    """One thing that was checked."""

    group: str
    name: str
    result: str
    holds: bool
    seconds: float
    value: float | None = None  # a figure behind the result, where there is one
    target: str = ""


@dataclass(frozen=True)
class Outcome:
    """What one check found."""

    result: str
    holds: bool = True
    value: float | None = None
    target: str = ""


@dataclass
class Report:
    """What was checked, in order."""

    device: str
    machine: dict[str, Any]
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    only: str | None = None  # the group of checks to run; the others are passed over

    def run(self, group: str, name: str, check: Callable[[], Outcome]) -> None:
        """Run ``check`` and keep what it found; an error is a failed check, not the end."""
        if self.only not in (None, group):
            return
        began = time.perf_counter()
        try:
            outcome = check()
        except Exception as error:  # noqa: BLE001  told in the table
            outcome = Outcome(f"{type(error).__name__}: {error}", holds=False)
            self.notes.append(f"{group}, {name}: {traceback.format_exc()}")
            print(self.notes[-1], file=sys.stderr, flush=True)
        seconds = time.perf_counter() - began
        done = Check(
            group, name, outcome.result, outcome.holds, seconds, outcome.value, outcome.target
        )
        self.checks.append(done)
        print(_line(done), flush=True)

    @property
    def holds(self) -> bool:
        """Whether all checks hold."""
        return all(check.holds for check in self.checks)


def _line(check: Check) -> str:
    state = "ok  " if check.holds else "FAIL"
    result = check.result if len(check.result) < 200 else f"{check.result[:200]} …"
    return f"{state}  {check.group:<10}  {check.name:<34}  {check.seconds:7.1f} s  {result}"


def write(report: Report, folder: Path) -> Path:
    """Write the report under a name of its own; an earlier file is never touched."""
    folder.mkdir(parents=True, exist_ok=True)
    device = re.sub(r"[^a-z0-9]+", "-", report.device.lower()).strip("-")
    today = dt.datetime.now(tz=dt.UTC).date().isoformat()
    document = {
        "format": 1,
        "command": " ".join([f"tools/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "device": report.device,
        "date": today,
        "machine": report.machine,
        "checks": [asdict(check) for check in report.checks],
        "notes": report.notes,
    }
    text = json.dumps(document, indent=2) + "\n"
    for number in range(1, 1000):
        suffix = "" if number == 1 else f"-{number}"
        path = folder / f"gpu_check-{device}-{today}{suffix}.json"
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            continue
        return path
    raise FileExistsError(f"{folder} holds 999 results of {device} of {today} already")
