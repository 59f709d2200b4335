"""Engines around an engine: a slower link, a failing disk, a record of what was asked.

Wrappers compose, over any engine and so under any tier that moves by one, and serve a whole
training run through ``offload.tiers.engines.registry.wrapping``:

    link = Link(bytes_per_s=1e9, latency_s=100e-6)
    with wrapping(lambda engine: ThrottledEngine(engine, link)):
        engine = offload.attach(model, optimizer, nvme=directory)

[Note: one link] All requests of a throttled link share its rate: each books the time that its
bytes take after those booked before, then waits until its booking has passed. Bookings are made
under a lock and slept out without it, so requests overlap their latencies, never their bytes.
"""

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from errno import EIO, ENOSPC
from typing import Literal, TypeAlias

from offload.tiers.engines.base import FileEngine
from offload.tiers.hostmem import PAGE
from offload.tiers.memory import HostBuffer, memory_at

Verb: TypeAlias = Literal["read", "write"]


class WrapperEngine(FileEngine):
    """Passes everything on; the base of the wrappers."""

    def __init__(self, inner: FileEngine) -> None:
        self.inner = inner

    def read(self, offset: int, address: int, nbytes: int) -> int:
        return self.move("read", offset, address, nbytes)

    def write(self, offset: int, address: int, nbytes: int) -> int:
        return self.move("write", offset, address, nbytes)

    def move(self, verb: Verb, offset: int, address: int, nbytes: int) -> int:
        """One request of either direction."""
        call = self.inner.read if verb == "read" else self.inner.write
        return call(offset, address, nbytes)

    def close(self) -> None:
        self.inner.close()


class Link:
    """The rate and latency that requests share ([Note: one link]).

    Args:
        bytes_per_s: rate of all requests together.
        latency_s: added to each request.
        clock: seconds that never go back.
        sleep: waits for so many of the clock's seconds.
    """

    def __init__(
        self,
        *,
        bytes_per_s: float,
        latency_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        if not bytes_per_s > 0 or latency_s < 0:
            raise ValueError(
                f"a link of {bytes_per_s} bytes/s and {latency_s} s of latency can't be: "
                "the rate must be above 0 and the latency not below"
            )
        self._bytes_per_s, self._latency_s = bytes_per_s, latency_s
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._free_s = clock()  # when the bytes booked so far have passed

    def book(self, nbytes: int) -> float:
        """The clock's time at which ``nbytes`` more have passed."""
        with self._lock:
            self._free_s = max(self._free_s, self._clock()) + nbytes / self._bytes_per_s
            return self._free_s + self._latency_s

    def wait_until(self, time_s: float) -> None:
        """Sleep until the clock shows ``time_s``."""
        if (left_s := time_s - self._clock()) > 0:
            self._sleep(left_s)


class ThrottledEngine(WrapperEngine):
    """No faster than ``link``; engines given the same link share it."""

    name = "throttled"

    def __init__(self, inner: FileEngine, link: Link) -> None:
        super().__init__(inner)
        self.link = link

    def move(self, verb: Verb, offset: int, address: int, nbytes: int) -> int:
        booked_s = self.link.book(nbytes)
        moved = super().move(verb, offset, address, nbytes)
        self.link.wait_until(booked_s)
        return moved


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What an engine was asked: ``number`` counts the requests of its direction from 0."""

    verb: Verb
    number: int
    offset: int
    nbytes: int


class RecordingEngine(WrapperEngine):
    """Appends each request to ``requests``, which engines may share, then passes it on."""

    name = "recording"

    def __init__(self, inner: FileEngine, requests: list[Request]) -> None:
        super().__init__(inner)
        self.requests = requests
        self._count = _Counter()

    def move(self, verb: Verb, offset: int, address: int, nbytes: int) -> int:
        number = self._count(verb)
        self.requests.append(Request(verb=verb, number=number, offset=offset, nbytes=nbytes))
        return super().move(verb, offset, address, nbytes)


class FaultKind(Enum):
    """What goes wrong with a request; *part* is its first half, in whole pages."""

    SHORT = "a part is moved and counted"
    ERROR = "nothing is moved, the call fails"
    TORN = "a part is moved, the call fails"
    LOST = "a part is moved, the process is killed"
    FLIP = "all is moved, one bit of it wrong"
    STALL = "all is moved, late"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault: ``errno`` of the calls that fail, ``seconds`` of a stall, ``bit`` of a flip."""

    kind: FaultKind
    errno: int = EIO
    seconds: float = 0.001
    bit: int = 0  # counted around the bits of the request


DISK_FULL = Fault(kind=FaultKind.ERROR, errno=ENOSPC)

FaultPlan: TypeAlias = Callable[[Request], Fault | None]


def scripted(faults: Mapping[tuple[Verb, int], Fault]) -> FaultPlan:
    """Faults by direction and number of the request."""
    return lambda request: faults.get((request.verb, request.number))


class SeededFaults:
    """A share of all requests, chosen by ``seed``, suffers one of ``faults``."""

    def __init__(self, seed: int, share: float, *faults: Fault) -> None:
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self.share = share
        self.faults = faults
        self.met = 0

    def __call__(self, _request: Request) -> Fault | None:
        with self._lock:
            if self._random.random() >= self.share:
                return None
            self.met += 1
            return self._random.choice(self.faults)


class FaultyEngine(WrapperEngine):
    """Does to each request what ``plan`` says; ``sleep`` waits out a stall."""

    name = "faulty"

    def __init__(
        self,
        inner: FileEngine,
        plan: FaultPlan,
        *,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        super().__init__(inner)
        self._plan = plan
        self._sleep = sleep
        self._count = _Counter()

    def move(self, verb: Verb, offset: int, address: int, nbytes: int) -> int:
        request = Request(verb=verb, number=self._count(verb), offset=offset, nbytes=nbytes)
        fault = self._plan(request)
        if fault is None:
            return super().move(verb, offset, address, nbytes)
        if fault.kind is FaultKind.ERROR:
            raise OSError(fault.errno, os.strerror(fault.errno))
        if fault.kind is FaultKind.STALL:
            self._sleep(fault.seconds)
            return super().move(verb, offset, address, nbytes)
        if fault.kind is FaultKind.FLIP:
            return self._move_flipped(request, address, fault.bit)
        return self._move_part(request, address, fault)

    def _move_part(self, request: Request, address: int, fault: Fault) -> int:
        """Move the first half; a single page moves whole where that is no failure."""
        half = request.nbytes // 2 // PAGE * PAGE
        if fault.kind is FaultKind.SHORT:
            return super().move(request.verb, request.offset, address, half or request.nbytes)
        if half:
            super().move(request.verb, request.offset, address, half)
        if fault.kind is FaultKind.LOST:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(fault.errno, os.strerror(fault.errno))

    def _move_flipped(self, request: Request, address: int, bit: int) -> int:
        """The caller's memory stays as it is in a write: the wrong bit is in a copy."""
        offset, nbytes = request.offset, request.nbytes
        if request.verb == "read":
            moved = super().move("read", offset, address, nbytes)
            _flip(memory_at(address, moved), bit)
            return moved
        copy = HostBuffer(nbytes)
        try:
            copy.view(0, nbytes)[:] = memory_at(address, nbytes)
            _flip(copy.view(0, nbytes), bit)
            return super().move("write", offset, copy.address, nbytes)
        finally:
            copy.release()


def _flip(memory: memoryview, bit: int) -> None:
    if len(memory):
        byte, bit = divmod(bit % (8 * len(memory)), 8)
        memory[byte] ^= 1 << bit


class _Counter:
    """Numbers the requests of each direction from 0."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next: dict[Verb, int] = {"read": 0, "write": 0}

    def __call__(self, verb: Verb) -> int:
        with self._lock:
            number = self._next[verb]
            self._next[verb] += 1
            return number
