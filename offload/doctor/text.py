"""The examination as text for a terminal of 80 columns, and as versioned JSON."""

import dataclasses
import json
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from offload.allocator.units import format_nbytes, format_rate, format_seconds
from offload.doctor.examine import Bench, Diagnosis
from offload.doctor.finding import Finding, Section
from offload.tiers.machine import Link

WIDTH = 80
FORMAT_VERSION = 1
_WIDTHS = (22, 13, 15, 16, 14)
_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def to_json(diagnosis: Diagnosis) -> str:
    """Findings and machine as JSON; sizes in bytes, times in seconds."""
    return json.dumps(
        {
            "format": FORMAT_VERSION,
            "ok": diagnosis.count("ok"),
            "warn": diagnosis.count("warn"),
            "fail": diagnosis.count("fail"),
            "measuring_s": diagnosis.bench.seconds,
            "sections": [dataclasses.asdict(section) for section in diagnosis.sections],
            "machine": dataclasses.asdict(diagnosis.bench.machine),
        },
        indent=2,
    )


def bench_to_json(bench: Bench) -> str:
    """Machine, links and failures as JSON; sizes in bytes, times in seconds."""
    return json.dumps({"format": FORMAT_VERSION, **dataclasses.asdict(bench)}, indent=2)


def make_console() -> Console:
    """Stdout, 80 columns; colours only on a terminal, and never with ``NO_COLOR``."""
    return Console(width=WIDTH, highlight=False)


def print_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    """The sections, the links, and one line that sums up."""
    for section in diagnosis.sections:
        _print_section(section, console)
    if diagnosis.bench.machine.links:
        print_links(diagnosis.bench.machine.links, console)
        console.print(f"measured in {format_seconds(diagnosis.bench.seconds)}", style="dim")
    warnings, failures = diagnosis.count("warn"), diagnosis.count("fail")
    console.print(f"\n{_count(warnings, 'warning')}, {_count(failures, 'failure')}", style="bold")


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def _print_section(section: Section, console: Console) -> None:
    console.print(section.title, style="bold", markup=False, soft_wrap=True)
    table = Table.grid(padding=(0, 1))
    table.add_column(width=5)
    table.add_column(width=16)
    table.add_column(width=WIDTH - 23, overflow="fold")
    for finding in section.findings:
        status = Text(f" {finding.status}", style=_STYLES[finding.status])
        table.add_row(status, Text(finding.subject), _told(finding))
    console.print(table)


def _told(finding: Finding) -> Text:
    told = Text(finding.value)
    if finding.detail:
        told.append(f"\n{finding.detail}", style="dim")
    if finding.mend:
        told.append(f"\n→ {finding.mend}", style="cyan")
    return told


def _spread(link: Link) -> str:
    """``-12% +3%``: the slowest and the fastest measurement beside the median."""
    return " ".join(
        f"{rate / link.bytes_per_s - 1:+.0%}"
        for rate in (link.low_bytes_per_s, link.high_bytes_per_s)
    )


def print_links(links: Sequence[Link], console: Console) -> None:
    """Under the name of each link, one row for each block size that was measured."""
    heads = ("block", "in flight", "median", "spread", "latency")
    console.print(Text("Links", style="bold") + Text(_columns(heads)[5:], style="dim"))
    ends = None
    for link in links:
        if (link.source, link.target) != ends:
            ends = (link.source, link.target)
            console.print(Text(f" {link.source} → {link.target}"), soft_wrap=True)
        row = (
            format_nbytes(link.block_nbytes),
            str(link.in_flight),
            format_rate(link.bytes_per_s),
            _spread(link),
            format_seconds(link.latency_s),
        )
        console.print(Text(_columns(row)))


def _columns(words: Sequence[str]) -> str:
    """Right-aligned columns, 80 characters in all."""
    return "".join(word.rjust(width) for word, width in zip(words, _WIDTHS, strict=True))
