"""Interrupts in a destructor are delivered all the same."""

import signal
import sys
import threading

import pytest

from offload.interrupts import deliver_lost_interrupts


class Dying:
    def __init__(self, number):
        self.number = number

    def __del__(self):
        signal.raise_signal(self.number)


def terminate(number, _frame):
    raise SystemExit(128 + number)


@pytest.fixture(autouse=True)
def hook(monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    deliver_lost_interrupts()
    deliver_lost_interrupts()
    before = signal.signal(signal.SIGTERM, terminate)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_signal_that_meets_a_destructor_comes_later(number, error):
    Dying(number)
    with pytest.raises(error):
        threading.Event().wait(60)  # whatever the main thread does then


def test_other_errors_go_on_as_before(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: told.append(unraisable.exc_type))
    deliver_lost_interrupts()

    class Broken:
        def __del__(self):
            raise ValueError("broken")

    Broken()
    assert told == [ValueError]
