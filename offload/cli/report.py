"""``offload report``: what a run did with its memory and its time."""

import argparse
from pathlib import Path

HELP = "show what a recorded run did with its memory and time"
DESCRIPTION = "Show what a run, recorded with --record DIR, did with its memory and time."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.add_argument("run", type=Path, metavar="RUN", help="the run directory")
    parser.add_argument("--json", action="store_true", help="the same figures as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Read the record and print it on stdout.

    Raises:
        ConfigError: no record there, or one of another version.
    """
    from offload.report.model import summarise
    from offload.report.reader import read_run
    from offload.report.text import print_report, to_json

    report = summarise(read_run(arguments.run))
    if arguments.json:
        print(to_json(report))
    else:
        print_report(report)
    return 0
