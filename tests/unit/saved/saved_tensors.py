"""What the tests of the tensor cache share: values, a slow drive, and looks into the cache."""

import threading

import torch

from offload.tiers.events import Stall
from offload.tiers.journal import Journal

NUMEL = 20_000
NBYTES = 4 * NUMEL
LEAVES_NBYTES = NBYTES // 2  # a limit beyond which one tensor leaves without holding pack up
PATIENCE_S = 60


class Waits(Journal):
    """Tells ``on_stall`` when the training thread is about to wait."""

    on_stall = staticmethod(lambda: None)

    def stall(self, *args):
        self.on_stall()
        return super().stall(*args)


class FakeWeights:
    """Stands for the weight swapper: notes what backward asked for."""

    def __init__(self):
        self.used = []

    def use(self, names):
        self.used += names


class Gate:
    """Holds the scratch file's reads or writes until it is opened."""

    def __init__(self, scratch, monkeypatch, call):
        self.begun, self._open = threading.Event(), threading.Event()
        whole = getattr(scratch.file, call)

        def held(*args):
            self.begun.set()
            assert self._open.wait(PATIENCE_S)
            whole(*args)

        monkeypatch.setattr(scratch.file, call, held)

    def open(self):
        self._open.set()


def values(seed, numel=NUMEL):
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def packed(cache, count):
    """Handles of ``count`` tensors that nobody else holds."""
    return [cache.pack(values(seed)) for seed in range(count)]


def residencies(handles):
    return [handle.part.unit.residency for handle in handles]


def blocks(scratch):
    return scratch.arena.stats().current_count


def settle(cache):
    """All transfers end, and the cache takes note."""
    cache.spiller.homes[0].tier.lanes.settle()
    cache.pack(torch.zeros(1))


def stalls(journal):
    return [event for event in journal.recorder.events if isinstance(event, Stall)]


def writes(journal):
    journal.recorder.flush()
    return [event.nbytes for event in journal.recorder.events if getattr(event, "src", "") == "host"
            and event.nbytes]  # fmt: skip
