"""What the training thread takes for each thing that moves, however small it is.

A gradient that leaves gets a home and a place in a queue, a weight that comes and goes has its
pages mapped and remapped, a stepped one is laid out, cut and published, a very small one is stored
by itself: work of the interpreter and of the kernel that no rate of bytes tells. So a model of many
weights of the least size that moves is trained, and the clock stands at the runtime's own seams. It
counts the processor's time of the training thread alone: how long that waits for lanes is what a
simulation of them tells.
"""

import statistics
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import offload
from offload.planner.rehearsal import FIXED

if TYPE_CHECKING:
    from collections.abc import Callable

    from offload.tiers.machine import Work

_WEIGHTS, _WIDTH = 32, 128  # of 64 KiB each
_SMALL = 2  # with each of them: those of a normalisation
_ROWS = 4
_LEAST_S = 1e-7  # no call takes less
_WARM, _REPEATS = 2, 4  # steps: of the first two, one has no states to read


class _Clock:
    """Adds up what this thread takes of the processor inside."""

    def __init__(self) -> None:
        self._began_s = 0.0
        self._depth = 0
        self.seconds = 0.0
        self.entered = 0  # but for those from inside

    def __enter__(self) -> None:
        if not self._depth:
            self.entered += 1
            self._began_s = time.thread_time()
        self._depth += 1

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self._depth -= 1
        if not self._depth:
            self.seconds += time.thread_time() - self._began_s

    def restart(self) -> None:
        """Forget what was."""
        self.seconds, self.entered = 0.0, 0

    def around(self, owner: object, name: str) -> None:
        """Run with each call of this method of ``owner``."""
        call: Callable[..., Any] = getattr(owner, name)

        def timed(*given: Any, **named: Any) -> Any:
            with self:
                return call(*given, **named)

        setattr(owner, name, timed)


def measure_fixed_costs(directory: Path, budget: str) -> dict["Work", float]:
    """How many a second: of gradients, weights, parts of tiles, and weights too small for these.

    Args:
        directory: for the store of the model.
        budget: that leaves it room.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a tile is stepped; products are of no account here
    try:
        return _measure(directory, budget)
    finally:
        torch.set_num_threads(threads)


def _measure(directory: Path, budget: str) -> dict["Work", float]:
    with offload.init(budget=budget, nvme=directory):
        model = nn.Sequential(*(layer for _ in range(_WEIGHTS) for layer in _layers()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    engine = offload.attach(model, optimizer)
    engine.keep_streaming()
    assert engine._optimizing is not None
    streamed = engine._optimizing.streamed
    leaving, moving, evicting, stepping, small = clocks = [_Clock() for _ in range(5)]
    engine.gradients.guard = leaving
    moving.around(engine.weights, "use")
    moving.around(engine.weights, "evict_streaming")
    evicting.around(engine.weights, "evict")
    stepping.around(streamed, "step")
    small.around(streamed, "_step_here")  # for all of them at once
    kernels_s = _kernels_s()
    taken: dict[Work, list[float]] = {work: [] for work in FIXED}
    for _ in range(_WARM + _REPEATS):
        for clock in clocks:
            clock.restart()
        model(torch.randn(_ROWS, _WIDTH)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        tiles_s = stepping.seconds - small.seconds - kernels_s
        taken["gradients"].append(leaving.seconds / leaving.entered)
        taken["fetches"].append(moving.seconds / evicting.entered)
        taken["tile parts"].append(tiles_s / _WEIGHTS)
        taken["small steps"].append(small.seconds / (_SMALL * _WEIGHTS))
    engine.detach()
    return {
        work: 1 / max(statistics.median(each[_WARM:]), _LEAST_S) for work, each in taken.items()
    }


def _layers() -> tuple[nn.Module, nn.Module]:
    return nn.Linear(_WIDTH, _WIDTH, bias=False), nn.LayerNorm(_WIDTH)


def _kernels_s() -> float:
    """Of the optimizer's own step on as many bytes, by one thread."""
    weights = [nn.Parameter(torch.zeros(_WIDTH, _WIDTH)) for _ in range(_WEIGHTS)]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    taken: list[float] = []
    for _ in range(_WARM + _REPEATS):
        began_s = time.thread_time()
        optimizer.step()
        taken.append(time.thread_time() - began_s)
    return statistics.median(taken[_WARM:])
