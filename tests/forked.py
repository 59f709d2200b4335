"""Processes for tests: forked from one that has imported torch already.

An import takes seconds, and is not what these tests are about. All else is as in any process: its
memory, threads, locks and files are its own, it dies alone, and ends as Python does. It can import
what the test can. The process that forks does nothing but import, so there is no thread that a fork
would lose. How Python starts, and what memory imports take, is a question for ordinary children.

A test that measures the process (its resident memory, its mappings, its threads) carries the marker
``own_process``: ``run_alone`` has pytest run it, with its fixtures, in such a process. What earlier
tests left to be collected, and the threads of theirs that still live, can't change what it finds.
"""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch", "torch._dynamo", "offload.attaching", "pytest", "hypothesis"]
)


class Forked:
    """A process that does what ``python *words`` does: a script, ``-m`` module or ``-c`` code.

    Args:
        cwd: the working directory; by default the one here.
        env: the environment; by default the one here, as it is now.
        merge: what it says on stderr is part of its output.

    Attributes:
        process: see ``multiprocessing.Process``.
        output: what it prints.
    """

    def __init__(
        self,
        *words: object,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        merge: bool = False,
    ) -> None:
        reading, writing = _CONTEXT.Pipe(duplex=False)
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed when it is collected)
        told = writing if merge else self._errors
        errors = Connection(os.dup(told.fileno()))  # which is how descriptors travel
        place, environment = str(cwd or Path.cwd()), dict(os.environ if env is None else env)
        self.process = _CONTEXT.Process(
            target=_run, args=([*map(str, words)], place, environment, writing, errors)
        )
        self.process.start()
        writing.close()
        errors.close()
        self.output = os.fdopen(os.dup(reading.fileno()))
        reading.close()

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self.process.pid is not None
        return self.process.pid

    def kill(self) -> None:
        """And wait until it is gone."""
        self.process.kill()
        self.process.join()
        self.output.close()
        self._errors.close()

    def wait(self) -> "subprocess.CompletedProcess[str]":
        """What it left, once it has ended."""
        with self.output, self._errors:
            text = self.output.read()
            self.process.join()
            self._errors.seek(0)
            code = self.process.exitcode
            assert code is not None
            return subprocess.CompletedProcess((), code, text, self._errors.read())

    def finish(self) -> str:
        """All that it prints, once it has ended in good order."""
        done = self.wait()
        assert done.returncode == 0, done.stderr
        return done.stdout


def python(
    *words: object, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run ``python *words``, as ``Forked`` does, to its end."""
    return Forked(*words, cwd=cwd, env=env).wait()


def _run(
    words: list[str],
    place: str,
    environment: dict[str, str],
    output: Connection,
    errors: Connection,
) -> None:
    for number, connection in ((1, output), (2, errors)):
        os.dup2(connection.fileno(), number)
        connection.close()
    os.chdir(place)
    os.environ.clear()
    os.environ.update(environment)
    if threads := environment.get("OMP_NUM_THREADS"):
        import torch  # was read when it was imported

        torch.set_num_threads(int(threads))
    try:
        _run_as_main(words)
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()


def _run_as_main(words: list[str]) -> None:
    match words:
        case ["-m", name, *arguments]:
            sys.argv = [name, *arguments]
            sys.path.insert(0, str(Path.cwd()))
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        case ["-c", code, *arguments]:
            sys.argv = ["-c", *arguments]
            sys.path.insert(0, "")
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        case [script, *_]:
            sys.argv = words
            sys.path.insert(0, str(Path(script).parent))
            runpy.run_path(script, run_name="__main__")


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
    # Plugins would be imported anew, with their assertions rewritten: longer than most tests take.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    words = ["-o", "addopts=", "-p", "no:cacheprovider", f"--rootdir={root}", f"{root}/{nodeid}"]
    sys.exit(pytest.main(words, plugins=[Alone(output)]))
