"""What the tests of gradients share: a disk that can be held up, values, and twins in memory."""

import math
import threading

import torch
from torch import nn

from offload.tiers.events import Move, Stall
from offload.tiers.journal import Journal

SHAPE = (128, 128)  # float32: MIN_NBYTES exactly
PATIENCE_S = 60
PLENTY = 1 << 40


class Waits(Journal):
    """Tells ``on_stall`` when the training thread is about to wait."""

    on_stall = staticmethod(lambda: None)

    def stall(self, *args):
        self.on_stall()
        return super().stall(*args)


class Gate:
    """Holds the scratch file's writes, before or after they touch the disk, until it is opened."""

    def __init__(self, scratch, monkeypatch, when):
        self.begun, self._open = threading.Event(), threading.Event()
        whole = scratch.file.write

        def write(*args):
            if when == "before":
                self._hold()
            whole(*args)
            if when == "after":
                self._hold()

        monkeypatch.setattr(scratch.file, "write", write)

    def _hold(self):
        self.begun.set()
        assert self._open.wait(PATIENCE_S)

    def open(self):
        self._open.set()


def values(seed, shape=SHAPE, scale=1.0, dtype=torch.float32):
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return made.to(dtype)


def backward(parameter, gradient, **options):
    """A backward pass whose gradient is ``gradient``."""
    (parameter * gradient).sum().backward(**options)


def stalls(journal):
    return [event for event in journal.recorder.events if isinstance(event, Stall)]


def left_alone(swapper, parameter):
    swapper.drain()
    return not swapper.homes and swapper.home_of(parameter) is None


CHUNK = 1 << 14
SHAPES = [(128, 160), (20_480,), (3, 7000), (5, 5), (70, 300)]  # the fourth stays in memory
NBYTES = 4 * sum(math.prod(shape) for shape in SHAPES if math.prod(shape) > 25)


class Twins:
    """Parameters whose gradients are in scratch, and the same ones in memory."""

    def __init__(self, swapper, dtypes=(torch.float32,) * 5, scale=1.0):
        self.swapper = swapper
        self.scale = scale
        self.filed, self.plain = (
            [nn.Parameter(torch.zeros(s, dtype=d)) for s, d in zip(SHAPES, dtypes, strict=True)]
            for _ in range(2)
        )
        for index, parameter in enumerate(self.filed):
            swapper.watch(f"p{index}", parameter)
        self.backward(0)

    def backward(self, seed, change=lambda gradient: gradient):
        for parameters in (self.filed, self.plain):
            losses = [
                (one * change(values(seed + at, one.shape, self.scale, one.dtype))).sum()
                for at, one in enumerate(parameters)
            ]
            torch.autograd.backward(losses, [torch.ones_like(loss) for loss in losses])
        self.swapper.drain()

    def both(self, call):
        """What ``call`` says of either list, gradients being the same before and after."""
        self.assert_equal()
        outcomes = []
        for parameters in (self.filed, self.plain):
            try:
                outcomes.append(call(parameters))
            except RuntimeError as error:
                outcomes.append(str(error))
        self.assert_equal()
        mine, twin = outcomes
        if isinstance(twin, torch.Tensor):
            assert same_bits(mine, twin)
        else:
            assert mine == twin
        return twin

    def assert_equal(self):
        for mine, twin in zip(self.filed, self.plain, strict=True):
            assert (mine.grad is None) == (twin.grad is None)
            assert twin.grad is None or same_bits(mine.grad, twin.grad)
            if (home := self.swapper.home_of(mine)) is not None:
                home.shed()
                assert same_bits(mine.grad, twin.grad)


def same_bits(mine, twin):
    if mine.dtype != twin.dtype or mine.shape != twin.shape:
        return False
    as_bytes = [one.detach().clone().reshape(-1).view(torch.uint8) for one in (mine, twin)]
    return torch.equal(*as_bytes)


def moved(journal, call):
    """Bytes of gradients that ``call`` read and wrote."""
    events = journal.recorder.events
    before = len(events)
    call()
    moves = [event for event in events[before:] if isinstance(event, Move)]
    assert {move.role for move in moves} <= {"gradient"}
    read = sum(move.nbytes for move in moves if move.dst == "host")
    return read, sum(move.nbytes for move in moves if move.src == "host")
