"""Processes for tests: forked from one that has imported torch already.

An import takes seconds, and is not what these tests are about. All else is as in any process: its
memory, threads, locks and files are its own, and it dies alone. The process that forks does nothing
but import, so there is no thread that a fork would lose. A forked process does not end as others
do, though: what is registered with ``atexit`` is not called.

A test that measures the process (its resident memory, its mappings, its threads) carries the marker
``own_process``: ``run_alone`` has pytest run it, with its fixtures, in such a process. What earlier
tests left to be collected, and the threads of theirs that still live, can't change what it finds.
"""

import contextlib
import multiprocessing
import os
import runpy
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch._dynamo", "offload.attaching"])


class Forked:
    """A process that runs the script that the first of ``words`` names as its main module.

    Attributes:
        process: see ``multiprocessing.Process``.
        output: what it prints.
    """

    def __init__(self, *words: str) -> None:
        reading, writing = _CONTEXT.Pipe(duplex=False)
        self.process = _CONTEXT.Process(target=_run, args=(words, writing))
        self.process.start()
        writing.close()
        self.output = os.fdopen(os.dup(reading.fileno()))
        reading.close()

    def kill(self) -> None:
        """And wait until it is gone."""
        self.process.kill()
        self.process.join()
        self.output.close()

    def finish(self) -> str:
        """All that it prints, once it has ended in good order."""
        with self.output:
            text = self.output.read()
        self.process.join()
        assert self.process.exitcode == 0
        return text


def _run(words: tuple[str, ...], output: Connection) -> None:
    os.dup2(output.fileno(), 1)
    output.close()
    sys.argv = list(words)
    runpy.run_path(words[0], run_name="__main__")


def run_alone(test: pytest.Function) -> None:
    """Have another process run ``test``, set up anew there; as here, it fails or is skipped."""
    reading, writing = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_run_test, args=(test.config.rootpath, test.nodeid, writing))
    process.start()
    writing.close()
    told: list[tuple[str, str]] = []
    with reading, contextlib.suppress(EOFError):
        while True:
            told.append(reading.recv())
    process.join()
    if failures := [text for outcome, text in told if outcome == "failed"]:
        pytest.fail("\n".join(failures), pytrace=False)
    if process.exitcode != 0:
        pytest.fail(f"its process ended with exit code {process.exitcode}", pytrace=False)
    for _, reason in told:
        pytest.skip(reason)


class Alone:
    """The plugin of the pytest in the other process: tells of what did not pass."""

    def __init__(self, output: Connection) -> None:
        self._output = output

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._output.send((report.outcome, report.longreprtext))
        elif report.skipped:
            assert isinstance(report.longrepr, tuple)
            self._output.send((report.outcome, report.longrepr[2].removeprefix("Skipped: ")))


def _run_test(root: Path, nodeid: str, output: Connection) -> None:
    os.chdir(root)
    os.environ.pop("PYTEST_ADDOPTS", None)  # where to write results, for example
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    words = ["-o", "addopts=", "-p", "no:cacheprovider", f"--rootdir={root}", f"{root}/{nodeid}"]
    sys.exit(pytest.main(words, plugins=[Alone(output)]))
