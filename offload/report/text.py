"""A report as text for a terminal of 80 columns, and as versioned JSON."""

import dataclasses
import json

from rich.console import Console
from rich.table import Table

from offload.allocator.units import format_nbytes, format_rate, format_seconds
from offload.report.model import Drive, Headline, Report

WIDTH = 80
FORMAT_VERSION = 1


def to_json(report: Report) -> str:
    """The figures as JSON; sizes in bytes, times in seconds."""
    return json.dumps({"format": FORMAT_VERSION, **dataclasses.asdict(report)}, indent=2)


def print_report(report: Report, console: Console | None = None) -> None:
    """Print the tables; colours only on a terminal, and never with ``NO_COLOR``."""
    console = console or Console(width=WIDTH, highlight=False)
    _print_headline(report.headline, console)
    _print_drive(report.drive, console)
    if len(report.buckets) > 1:
        console.print(_bucket_table(report))
    if report.lanes:
        console.print(_lane_table(report))
    if report.stalls:
        console.print(_stall_table(report))
    if report.tensors:
        console.print(_tensor_table(report))
    for notice in report.notices:
        console.print(f"note: {notice}", markup=False)
    if report.truncated:
        console.print("note: the record's last line was cut off and is left out")


def _print_headline(head: Headline, console: Console) -> None:
    starts = "" if head.starts == 1 else f", started {head.starts} times"
    console.print(f"{head.command}", markup=False, style="bold")
    console.print(f"{head.steps} steps{starts}; {head.status}")
    share = f" ({head.peak_nbytes / head.budget_nbytes:.0%})" if head.budget_nbytes else ""
    console.print(
        f"peak memory  {format_nbytes(head.peak_nbytes)} of a budget of "
        f"{format_nbytes(head.budget_nbytes)}{share}"
    )
    parts = (
        ("compute", head.compute_s),
        ("stall", head.stall_s),
        ("optimizer", head.optimizer_s),
        ("commit", head.commit_s),
    )
    split = " · ".join(f"{name} {format_seconds(value)}" for name, value in parts)
    console.print(f"step         {format_seconds(head.step_s)} = {split}")
    console.print(
        f"disk         {format_nbytes(head.read_nbytes)} read, "
        f"{format_nbytes(head.written_nbytes)} written per step"
    )


def _print_drive(drive: Drive, console: Console) -> None:
    """What the drive has to bear; nothing where nothing was written."""
    if drive.written_nbytes:
        budget = ""
        if drive.budget_nbytes is not None:
            budget = f" of a budget of {format_nbytes(drive.budget_nbytes)}"
        console.print(
            f"wear         {format_nbytes(drive.written_nbytes)} per step{budget}, "
            f"{format_nbytes(drive.activation_nbytes)} of it activations"
        )
        console.print(f"drive life   {_life(drive)}")
    console.print()


def _life(drive: Drive) -> str:
    if drive.life_steps is None or drive.life_s is None:
        return "unknown: pass its endurance, for example --nvme-endurance 600TB"
    days = drive.life_s / 86400
    span = f"{days / 365:.1f} years" if days > 730 else f"{days:.1f} days"
    return f"{drive.life_steps:,} steps, {span} of such training"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", width=WIDTH, title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < 2 else "right", no_wrap=index > 0)
    return table


def _bucket_table(report: Report) -> Table:
    table = _table("Batches up to", "inputs", "steps", "step", "waited", "read", "kept")
    for row in report.buckets:
        table.add_row(
            row.bucket,
            str(row.steps),
            format_seconds(row.step_s),
            format_seconds(row.stall_s),
            format_nbytes(row.read_nbytes),
            format_nbytes(row.kept_nbytes),
        )
    return table


def _lane_table(report: Report) -> Table:
    table = _table("Moved", "lane", "what", "transfers", "bytes", "busy", "rate")
    for row in report.lanes:
        table.add_row(
            row.lane,
            row.role,
            str(row.transfers),
            format_nbytes(row.nbytes),
            format_seconds(row.busy_s),
            format_rate(row.bytes_per_s),
        )
    return table


def _stall_table(report: Report) -> Table:
    table = _table("The training thread waited", "for", "because", "times", "in all")
    for row in report.stalls:
        table.add_row(row.role, row.reason, str(row.count), format_seconds(row.duration_s))
    return table


def _tensor_table(report: Report) -> Table:
    table = _table("Tensors that moved most", "tensor", "what", "transfers", "bytes", "waited")
    for row in report.tensors:
        table.add_row(
            row.key,
            row.role,
            str(row.transfers),
            format_nbytes(row.nbytes),
            format_seconds(row.stall_s),
        )
    return table
