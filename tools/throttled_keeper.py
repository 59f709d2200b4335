"""Keeps saved tensors behind a link of a given rate, in memory: what a bench compares."""

import math
import time
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from offload.swap.tokenwise.solve import Link


class Clock:
    """Seconds of compute and of waits: other processes don't count.

    One thread computes, so its CPU time is what an idle machine would take; a wait is not slept
    but added. ``wall`` makes it an ordinary clock with ordinary sleeps.
    """

    def __init__(self, *, wall: bool) -> None:
        self.wall = wall
        self._waited_s = 0.0

    def now_s(self) -> float:
        """The time."""
        return time.perf_counter() if self.wall else time.process_time() + self._waited_s

    def wait(self, seconds: float) -> None:
        """Let ``seconds`` pass."""
        if self.wall:
            time.sleep(seconds)
        else:
            self._waited_s += seconds


class _Stored:
    """A storage: when its write ends, once it was sent, and when its bytes will be back."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.memory = tensor.untyped_storage()
        self.nbytes = self.memory.nbytes()
        self.written_s: float | None = None
        self.back_s: float | None = None


class _Handle:
    def __init__(self, stored: _Stored, tensor: torch.Tensor) -> None:
        self.stored = stored
        self.tensor = tensor.detach()


class ThrottledKeeper:
    """Storages are written and read back once, in order, at ``bytes_per_s``.

    As in the tensor cache the newest ones stay, ``limit_nbytes`` of them, and the oldest is sent
    first. The bytes are in memory all the time; what is throttled is when they are away and back.
    ``window_nbytes`` may be on their way before whoever sends or asks for more waits. Reads are
    issued ahead, newest first, as backward asks for them.
    """

    def __init__(
        self,
        bytes_per_s: float,
        window_nbytes: int,
        limit_nbytes: int,
        weights: Sequence[torch.Tensor],
        clock: Clock,
    ) -> None:
        self._clock = clock
        self.bytes_per_s = bytes_per_s
        self.moved_nbytes = 0
        self.waited_s = 0.0
        self._window_s = window_nbytes / bytes_per_s
        self._weights = {weight.untyped_storage()._cdata for weight in weights}
        self._free_s = 0.0  # when the link has nothing left to do
        self._limit_nbytes = limit_nbytes
        self._staying: deque[weakref.ref[_Stored]] = deque()  # oldest first
        self._known: weakref.WeakValueDictionary[int, _Stored] = weakref.WeakValueDictionary()
        self._order: deque[weakref.ref[_Stored]] = deque()

    def forget_totals(self) -> None:
        """Count from now on."""
        self.moved_nbytes, self.waited_s = 0, 0.0

    def pack(self, tensor: torch.Tensor) -> Any:
        """Send a storage away, once however many views of it are saved."""
        memory = tensor.untyped_storage()
        if memory._cdata in self._weights or memory.nbytes() < 1 << 16:
            return tensor.detach()
        stored = self._known.get(memory._cdata)
        if stored is None or stored.back_s is not None:
            stored = _Stored(tensor)
            self._known[memory._cdata] = stored
            self._order.append(weakref.ref(stored))
            self._staying.append(weakref.ref(stored))
            self._send_oldest()
        return _Handle(stored, tensor)

    def _send_oldest(self) -> None:
        """Send what exceeds the limit."""
        living = [stored for ref in self._staying if (stored := ref()) is not None]
        excess = sum(stored.nbytes for stored in living) - self._limit_nbytes
        while excess > 0:
            oldest = living.pop(0)
            excess -= oldest.nbytes
            if oldest.back_s is None:
                oldest.written_s = self._move(oldest.nbytes)
                self._wait_until(self._free_s - self._window_s)
        self._staying = deque(map(weakref.ref, living))

    def unpack(self, packed: Any) -> torch.Tensor:
        """Wait until the bytes are back; ask for what was packed just before."""
        if isinstance(packed, torch.Tensor):
            return packed
        self._ask(packed.stored)
        while self._order and self._free_s - self._clock.now_s() < self._window_s:
            earlier = self._order.pop()()
            if earlier is not None:
                self._ask(earlier)
        assert packed.stored.back_s is not None
        self._wait_until(packed.stored.back_s)
        tensor: torch.Tensor = packed.tensor
        return tensor.detach()

    def prefetch(self, packed: Sequence[Any]) -> None:
        """Ask for these, as long as the window has room."""
        for one in packed:
            if self._free_s - self._clock.now_s() > self._window_s:
                return
            if isinstance(one, _Handle):
                self._ask(one.stored)

    def use_weights(self, weights: Sequence[torch.Tensor]) -> None:
        """Weights are in memory."""

    def borrow(self, nbytes: int) -> None:
        """Memory is not bounded here."""

    def links(self) -> Sequence[Link]:
        """Memory for what stays, and the one link, with room for everything."""
        return (
            Link(name="memory", bytes_per_s=math.inf, free_nbytes=float(self._limit_nbytes)),
            Link(name="throttled", bytes_per_s=self.bytes_per_s, free_nbytes=float(1 << 50)),
        )

    def _ask(self, stored: _Stored) -> None:
        if stored.back_s is not None:
            return
        now_s = self._clock.now_s()
        if stored.written_s is None or stored.written_s > now_s:  # still here
            stored.back_s = now_s
        else:
            stored.back_s = self._move(stored.nbytes)

    def _move(self, nbytes: int) -> float:
        """When the link, busy until ``_free_s``, has moved ``nbytes`` more."""
        begin_s = max(self._free_s, self._clock.now_s())
        self._free_s = begin_s + nbytes / self.bytes_per_s
        self.moved_nbytes += nbytes
        return self._free_s

    def _wait_until(self, until_s: float) -> None:
        left_s = until_s - self._clock.now_s()
        if left_s > 0:
            self.waited_s += left_s
            self._clock.wait(left_s)
