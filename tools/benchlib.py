"""What every benchmark shares: arguments, the machine's facts, one table, one JSON file."""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

_WIDTH = 150  # of what is printed, but to a terminal, which has its own
_TEXT = 40  # characters that a cell may ask for; more are folded


@dataclass(frozen=True)
class Check:
    """One figure that is asked for, and whether it holds."""

    name: str
    value: float
    target: str
    holds: bool


@dataclass
class Result:
    """Rows of figures with their units, and checks."""

    title: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, **row: Any) -> None:
        """Add a row; names carry the unit (``_s``, ``_nbytes``, ``_bytes_per_s``)."""
        self.rows.append(row)

    def check(self, name: str, value: float, at_least: float) -> None:
        """A figure that must reach ``at_least``."""
        self.checks.append(Check(name, value, f">= {at_least}", value >= at_least))

    def at_most(self, name: str, value: float, most: float) -> None:
        """A figure that must not exceed ``most``."""
        self.checks.append(Check(name, value, f"<= {most}", value <= most))


def arguments(description: str, **defaults: Any) -> argparse.ArgumentParser:
    """The parser that every benchmark starts from."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--quick", action="store_true", help="small sizes: a check that it runs")
    parser.add_argument(
        "--nvme", type=Path, default=Path("runs/bench"), metavar="DIR", help="disk to measure"
    )
    parser.set_defaults(**defaults)
    return parser


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_nbytes": memory,
        "kernel": platform.release(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }


def median_of(repeats: int, measure: Callable[[], float]) -> float:
    """Median of ``repeats`` measurements after one warm-up."""
    measure()
    return statistics.median(measure() for _ in range(repeats))


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Where the median is that more values would lead to, with 95 % confidence or nearly so.

    By order alone: half of the values are below it, give or take what a coin would.
    """
    ordered, numel = sorted(values), len(values)
    below = max(int((numel - 1.96 * numel**0.5) / 2), 0)
    return ordered[below], ordered[numel - 1 - below]


def finish(result: Result, path: Path | None) -> int:
    """Print the table and checks, write the JSON; the exit code."""
    console = Console(width=shutil.get_terminal_size((_WIDTH, 24)).columns)
    for table in _tables(result, console.width):
        console.print(table)
    for check in result.checks:
        state = "holds" if check.holds else "DOES NOT HOLD"
        console.print(f"{check.name}: {check.value:.3g} ({check.target}) {state}")
    for note in result.notes:
        console.print(note)
    if path is not None:
        document = {
            "format": 1,
            "command": " ".join([f"tools/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
            "machine": machine(),
            "rows": result.rows,
            "checks": [asdict(check) for check in result.checks],
            "notes": result.notes,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=2) + "\n")
    return 0 if all(check.holds for check in result.checks) else 1


def _tables(result: Result, width: int) -> Iterator[Table]:
    """A line for each row; or, where these are too wide, for each figure, in parts that fit."""
    names = list(dict.fromkeys(name for row in result.rows for name in row))
    rows = [[_text(name, row.get(name)) for name in names] for row in result.rows]
    figures = [list(column) for column in zip(names, *rows, strict=True)]
    if _width(figures) <= width:
        yield _table(result.title, figures)
        return
    numbered = [[str(number), *row] for number, row in enumerate(rows, 1)]
    parts: list[list[list[str]]] = []
    for column in numbered:
        if not parts or _width([["", *names], *parts[-1], column]) > width:
            parts.append([])
        parts[-1].append(column)
    for part in parts:
        first, last = part[0][0], part[-1][0]
        which = f", {first} to {last} of {len(rows)}" if len(parts) > 1 else ""
        yield _table(result.title + which, [["", *names], *part])


def _table(title: str, columns: list[list[str]]) -> Table:
    """Columns with their heads."""
    table = Table(title=title)
    for head, *_ in columns:
        table.add_column(head, overflow="fold")
    for line in list(zip(*columns, strict=True))[1:]:
        table.add_row(*line)
    return table


def _width(columns: list[list[str]]) -> int:
    """Of a table of which nothing but long text is folded, lines and space included."""
    widths = [
        max(len(head), *(min(len(cell), _TEXT) for cell in cells)) for head, *cells in columns
    ]
    return 1 + sum(3 + width for width in widths)


def _text(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float | int) and not isinstance(value, bool):
        if name.endswith("nbytes"):
            return f"{value / 2**20:,.0f} MiB"
        if name.endswith("bytes_per_s"):
            return f"{value / 1e9:.2f} GB/s"
        return f"{value:.3g}" if isinstance(value, float) else str(value)
    return str(value)


def quantiles(values: Sequence[float]) -> str:
    """Lowest, median and highest, for a row."""
    return f"{min(values):.3g} / {statistics.median(values):.3g} / {max(values):.3g}"
