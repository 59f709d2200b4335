"""Processes for tests that start many: forked from one that has imported torch already.

An import takes seconds, and is not what these tests are about. All else is as in any process: its
memory, threads, locks and files are its own, and it dies alone. The process that forks does nothing
but import, so there is no thread that a fork would lose. A forked process does not end as others
do, though: what is registered with ``atexit`` is not called.
"""

import multiprocessing
import os
import runpy
import sys
from multiprocessing.connection import Connection

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
