"""The command line: one module per verb.

A verb is a module with ``HELP``, ``add_arguments(parser)`` and ``run(arguments) -> int``. One with
``TAKES_REST`` finds what stands behind ``--`` in ``arguments.rest``. Errors
that Offload raises on purpose become one message on stderr and their own exit code; a traceback
means a bug. Nothing here imports torch before a verb needs it.
"""

import argparse
import sys
from collections.abc import Sequence

import offload
from offload.allocator.errors import OffloadError
from offload.cli import bench, doctor, plan, report, run, tune

_VERBS = {
    "run": run,
    "plan": plan,
    "tune": tune,
    "report": report,
    "doctor": doctor,
    "bench": bench,
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``offload`` and all its verbs."""
    parser = argparse.ArgumentParser(
        prog="offload", description="Fine-tune models larger than the memory you own."
    )
    parser.add_argument("--version", action="version", version=offload.__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, module in _VERBS.items():
        verb = verbs.add_parser(
            name,
            help=module.HELP,
            description=module.DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(verb)
    return parser


def _parse(words: list[str]) -> argparse.Namespace:
    """Argparse itself loses words behind ``--`` where options stand before it."""
    rest: list[str] = []
    if words and hasattr(_VERBS.get(words[0]), "TAKES_REST") and "--" in words:
        at = words.index("--")
        words, rest = words[:at], words[at + 1 :]
    return build_parser().parse_args(words, argparse.Namespace(rest=rest))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code.

    0 done · 1 failed while running · 2 wrong usage or configuration · 3 does not fit the
    budget · 130 interrupted; ``run`` returns the script's own code.
    """
    arguments = _parse(list(sys.argv[1:] if argv is None else argv))
    try:
        return int(_VERBS[arguments.verb].run(arguments))
    except OffloadError as error:
        print(f"offload: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        kept = "; the store keeps the last finished step" if arguments.verb == "run" else ""
        print(f"offload: interrupted{kept}", file=sys.stderr)
        return 130
