"""``offload bench``: measurements alone."""

import argparse
import sys
from pathlib import Path

from offload.cli.doctor import add_directories

HELP = "measure this machine: links"
DESCRIPTION = "Measure this machine, by the code that moves bytes in a run."
_LINKS = """\
Measure every link in both directions: copies within memory, memory and files (direct
I/O, random bytes, never the page cache), memory and CUDA devices.

  offload bench links --nvme /data/nvme"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    links = subjects.add_parser(
        "links",
        help="every link of this machine, in both directions",
        description=_LINKS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_directories(links)
    links.add_argument("--json", action="store_true", help="the same figures as JSON")
    links.add_argument("--quick", action="store_true", help="a few seconds, smaller sizes")


def run(arguments: argparse.Namespace) -> int:
    """Measure, and print on stdout; progress goes to stderr. 1 where something failed."""
    from offload.doctor.examine import bench_links
    from offload.doctor.progress import shown
    from offload.doctor.text import bench_to_json, make_console, print_links
    from offload.tiers.probe.pace import QUICK, Effort

    with shown() as progress:
        bench = bench_links(
            arguments.nvme or [Path()],
            effort=QUICK if arguments.quick else Effort(),
            progress=progress,
        )
    if arguments.json:
        print(bench_to_json(bench))
    else:
        print_links(bench.machine.links, make_console())
    for failure in bench.failures:
        mend = f": {failure.mend}" if failure.mend else ""
        print(f"offload: {failure.subject}: {failure.value}{mend}", file=sys.stderr)
    return int(bool(bench.failures))
