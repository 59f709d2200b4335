"""Runs a peer's own test file, from the user's checkout of it, against our context.

The file is adapted in a temporary directory by a short list of replacements, and run by pytest in a
process of its own, with ``peer_stand_ins`` for what it imports of the peer. Whatever the peer has
changed since (a replacement that matches nothing, an unknown name) is an error, never a skip.
"""

import ast
import faulthandler
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

HERE = Path(__file__).parent
TIMEOUT_S = 280
WHOLE_TIMEOUT_S = 1200


def checkout_of(peer):
    """The checkout of ``peer`` that the environment names; the test is skipped without one."""
    variable = f"OFFLOAD_PEER_{peer.upper()}"
    named = os.environ.get(variable)
    if not named:
        pytest.skip(f"no checkout of {peer}: set {variable}")
    root = Path(named)
    assert root.is_dir(), f"{variable}: {root} is not a directory"
    return root


@dataclass(frozen=True)
class Change:
    """A replacement: a regular expression, what takes its place, and how often it must match."""

    pattern: str
    by: str
    least: int = 1


def adapted(text, changes):
    """``text`` with all ``changes`` made; each must match."""
    for change in changes:
        text, count = re.subn(change.pattern, change.by, text)
        assert count >= change.least, (
            f"the peer has changed: {change.pattern!r} matches {count} times, "
            f"not {change.least} times or more"
        )
    return text


def cases_in(text, classname=None):
    """The source of each test of a module, or of one of its classes, by name."""
    body = ast.parse(text).body
    if classname is not None:
        (found,) = [node for node in body if getattr(node, "name", "") == classname]
        body = found.body
    return {
        node.name: ast.get_source_segment(text, node)
        for node in body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


@dataclass(frozen=True)
class Case:
    """One item that ran; our context wrote ``moved_nbytes`` in it, ``notes`` tell a failure."""

    classname: str
    name: str
    outcome: str
    moved_nbytes: int
    notes: str


def run(directory, filename, text, arguments, search=()):
    """Run ``text`` as ``filename`` in ``directory``; every item that ran, and all have passed."""
    (directory / filename).write_text(text)
    done, cases = _run_pytest(directory, arguments, search, TIMEOUT_S, {})
    bad = [f"{case.name}: {case.outcome}\n{case.notes}" for case in cases
           if case.outcome != "passed"]  # fmt: skip
    assert not bad, "\n\n".join(bad)
    assert done.returncode == 0, done.stdout + done.stderr
    return cases


def run_whole(directory, path, around, search=()):
    """Run the file ``path`` as it is, ``around`` each test one of ``peer_stand_ins.AROUND``.

    Returns:
        Every item that ran, whatever became of it, by its class and name.
    """
    arguments = ["--noconftest", f"--rootdir={directory}", "-c", "pytest.ini", str(path)]
    settings = {"OFFLOAD_PEER_AROUND": around, "PYTHONDONTWRITEBYTECODE": "1"}
    faulthandler.cancel_dump_traceback_later()  # pytest's own limit: shorter than this may take
    _, cases = _run_pytest(directory, arguments, search, WHOLE_TIMEOUT_S, settings)
    return {(case.classname, case.name): case for case in cases}


def _run_pytest(directory, arguments, search, timeout_s, settings):
    """Run pytest in ``directory`` with ``peer_stand_ins``; how it ended, and what ran."""
    (directory / "pytest.ini").write_text("[pytest]\n")
    report = directory / "report.xml"
    report.unlink(missing_ok=True)
    paths = [str(HERE), *map(str, search)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "peer_stand_ins", "-p",
               "no:cacheprovider", f"--junitxml={report}", *arguments]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTEST_ADDOPTS": ""}
    done = subprocess.run(
        command, cwd=directory, env=environment | settings, capture_output=True, text=True,
        timeout=timeout_s, check=False,
    )  # fmt: skip
    assert report.exists(), done.stdout + done.stderr
    return done, [_case(each) for each in ET.parse(report).iter("testcase")]


def _case(element):
    outcome = next((each.tag for each in element if each.tag in {"failure", "error", "skipped"}),
                   "passed")  # fmt: skip
    moved = [each.get("value") for each in element.iter("property")
             if each.get("name") == "moved_nbytes"]  # fmt: skip
    notes = "\n".join(each.text or each.get("message") or "" for each in element
                      if each.tag == outcome)  # fmt: skip
    classname = element.get("classname").rpartition(".")[2]
    return Case(classname, element.get("name"), outcome, sum(map(int, moved)), notes)


def names_of(cases):
    """The functions that ran, without their parameters."""
    return {case.name.partition("[")[0] for case in cases}


def moved_in(cases):
    """The functions in which our context wrote bytes."""
    return names_of(case for case in cases if case.moved_nbytes)
