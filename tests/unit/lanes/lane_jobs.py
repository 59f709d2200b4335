"""What the tests of lanes share: a label, jobs that wait or fail, patience."""

import threading
import time

from offload.tiers.journal import Label

LABEL = Label("key", "weight", "file:/data", "host")
PATIENCE_S = 60  # far above any wait of a right implementation; a deadlock fails loudly


class Gate:
    """A job that holds its lane until it is opened."""

    def __init__(self, lane):
        self._entered, self._open = threading.Event(), threading.Event()
        self.transfer = lane.submit([self._wait], LABEL, 0)
        assert self._entered.wait(PATIENCE_S)

    def _wait(self):
        self._entered.set()
        assert self._open.wait(PATIENCE_S)

    def open(self):
        self._open.set()


def fail(error):
    raise error


def eventually(holds):
    """Whether ``holds`` comes true; threads are on their way to it."""
    until_s = time.monotonic() + PATIENCE_S
    while not holds() and time.monotonic() < until_s:
        time.sleep(1e-3)
    return holds()
