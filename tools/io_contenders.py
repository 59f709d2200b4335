"""Who moves blocks in ``bench_io``: Offload's engines, and what they are measured against.

A contender moves ``count`` blocks of one size with so many in flight, between one file and memory
that is aligned and was filled with random bytes before, by direct I/O, so that no page cache has
a part in it. It tells the seconds and the processor seconds of that alone.
"""

import asyncio
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

from offload.allocator.errors import ConfigError
from offload.tiers.engines import deepspeed, kvikio
from offload.tiers.engines.registry import choose_engine
from offload.tiers.file import TierFile
from offload.tiers.journal import Journal, Label
from offload.tiers.lanes import Lane
from offload.tiers.memory import HostBuffer

Pattern: TypeAlias = Literal["read", "write", "mixed"]
Side: TypeAlias = Literal["offload", "peer", "candidate"]  # a candidate might become an engine
FIO_PATTERNS = {"read": "read", "write": "write", "mixed": "rw"}
URING_BINDING = "uring_api"
_LABEL = Label("", "", "", "")


@dataclass(frozen=True)
class Job:
    """``count`` blocks of ``block_nbytes`` at once ``in_flight``; mixed alternates."""

    pattern: Pattern
    block_nbytes: int
    in_flight: int
    count: int

    @property
    def nbytes(self) -> int:
        """Bytes moved in all."""
        return self.block_nbytes * self.count

    def writes(self, number: int) -> bool:
        """Whether block ``number`` is written, not read."""
        return self.pattern == "write" or (self.pattern == "mixed" and number % 2 == 1)


@dataclass(frozen=True)
class Sample:
    """What one job took."""

    bytes_per_s: float
    cpu_s_per_gb: float


class Contender(ABC):
    """Moves blocks of the file at ``path``."""

    side: ClassVar[Side] = "peer"

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.path = path

    @abstractmethod
    def run(self, job: Job) -> Sample:
        """Do ``job``."""

    def close(self) -> None:
        """Give everything back."""
        return


def timed(job: Job, move: Callable[[], object]) -> Sample:
    """The sample of a job that is done by ``move`` in this process."""
    cpu_s, began_s = time.process_time(), time.perf_counter()
    move()
    seconds = time.perf_counter() - began_s
    return Sample(job.nbytes / seconds, (time.process_time() - cpu_s) / (job.nbytes / 1e9))


class Buffers:
    """Huge-page-backed blocks of random bytes, kept for jobs of the same size."""

    def __init__(self) -> None:
        self._kept: list[HostBuffer] = []
        self._content = os.urandom(1 << 20)

    def take(self, count: int, nbytes: int) -> list[HostBuffer]:
        """``count`` buffers of ``nbytes``."""
        if self._kept and self._kept[0].nbytes != nbytes:
            self.release()
        while len(self._kept) < count:
            buffer = HostBuffer(nbytes)
            for at in range(0, nbytes, len(self._content)):
                buffer.view(at, len(self._content))[:] = self._content
            self._kept.append(buffer)
        return self._kept[:count]

    def release(self) -> None:
        """Give the memory back."""
        for buffer in self._kept:
            buffer.release()
        self._kept.clear()


class OffloadEngine(Contender):
    """An engine of Offload's as a tier uses it: a lane's workers call the file."""

    side = "offload"

    def __init__(self, name: str, path: Path, buffers: Buffers) -> None:
        super().__init__(f"offload {name}", path)
        self._file = TierFile(path.parent, path.name, choose_engine(name, path.parent).factory)
        self._buffers = buffers

    def run(self, job: Job) -> Sample:
        free = deque(self._buffers.take(job.in_flight, job.block_nbytes))
        lane = Lane("bench", job.in_flight, Journal())

        def move(number: int) -> None:
            buffer = free.popleft()
            call = self._file.write if job.writes(number) else self._file.read
            call(number * job.block_nbytes, buffer.address, job.block_nbytes)
            free.append(buffer)

        def work() -> None:
            moves = [partial(move, number) for number in range(job.count)]
            lane.submit(moves, _LABEL, job.nbytes).wait()

        try:
            return timed(job, work)
        finally:
            lane.close()

    def close(self) -> None:
        self._file.close()


class Fio(Contender):
    """fio, in a process of its own; its own figures of time and processor."""

    def __init__(self, name: str, path: Path, *options: str) -> None:
        super().__init__(name, path)
        if shutil.which("fio") is None:
            raise OSError("fio is not installed: apt install fio")
        self._options = options

    def run(self, job: Job) -> Sample:
        command = [
            "fio", "--name=bench", f"--filename={self.path}", f"--size={self.path.stat().st_size}",
            f"--io_size={job.nbytes}", f"--bs={job.block_nbytes}", f"--iodepth={job.in_flight}",
            f"--rw={FIO_PATTERNS[job.pattern]}", "--direct=1", "--allow_file_create=0",
            "--scramble_buffers=0",  # the same random bytes again, as everybody here
            "--output-format=json", *self._options,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        figures = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
        seconds = figures["job_runtime"] / 1e3
        moved = figures["read"]["io_bytes"] + figures["write"]["io_bytes"]
        cpu_s = (figures["usr_cpu"] + figures["sys_cpu"]) / 100 * seconds
        return Sample(moved / seconds, cpu_s / (moved / 1e9))


class DeepSpeedAio(Contender):
    """DeepSpeed's handle with its own page-locked tensors, a thread for each block in flight."""

    _MAX_LOCKED_NBYTES = 256 << 20

    def __init__(self, path: Path) -> None:
        import torch

        super().__init__("deepspeed aio", path)
        self._operator = deepspeed.load_operator()
        self._keeper = self._operator.aio_handle(1 << 20, 1, False, False, 1)
        self._locked = self._keeper.new_cpu_locked_tensor(
            self._MAX_LOCKED_NBYTES, torch.empty(0, dtype=torch.uint8)
        )
        self._locked.random_(256)

    def run(self, job: Job) -> Sample:
        handle = self._operator.aio_handle(1 << 20, 32, False, True, job.in_flight)

        def work() -> None:
            for number in range(job.count):
                at = number % job.in_flight * job.block_nbytes
                block = self._locked[at : at + job.block_nbytes]
                call = handle.async_pwrite if job.writes(number) else handle.async_pread
                if call(block, str(self.path), number * job.block_nbytes):
                    raise OSError(f"DeepSpeed refused block {number}")
            handle.wait()

        return timed(job, work)

    def close(self) -> None:
        self._keeper.free_cpu_locked_tensor(self._locked)


class Aiofiles(Contender):
    """aiofiles in one event loop, a file object for each block in flight, by direct I/O."""

    def __init__(self, path: Path, buffers: Buffers) -> None:
        import aiofiles

        super().__init__("aiofiles", path)
        self._aiofiles = aiofiles
        self._buffers = buffers

    def run(self, job: Job) -> Sample:
        return asyncio.run(self._run(job))

    async def _run(self, job: Job) -> Sample:
        numbers = itertools.count()
        files = [
            await self._aiofiles.open(self.path, "r+b", buffering=0, opener=_open_direct)
            for _ in range(job.in_flight)
        ]

        async def mover(file: Any, buffer: HostBuffer) -> None:
            view = buffer.view()
            while (number := next(numbers)) < job.count:
                await file.seek(number * job.block_nbytes)
                moved = await (file.write if job.writes(number) else file.readinto)(view)
                if moved != job.block_nbytes:
                    raise OSError(f"block {number} came short")

        buffers = self._buffers.take(job.in_flight, job.block_nbytes)
        cpu_s, began_s = time.process_time(), time.perf_counter()
        await asyncio.gather(*map(mover, files, buffers))
        seconds, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_s
        for file in files:
            await file.close()
        return Sample(job.nbytes / seconds, cpu_s / (job.nbytes / 1e9))


class UringBinding(Contender):
    """io_uring from one Python thread, by the PyPI package uring-api (a pre-release)."""

    side = "candidate"

    def __init__(self, path: Path, buffers: Buffers) -> None:
        import uring_api

        super().__init__("uring-api", path)
        self._ring = uring_api.Ring()
        self._fd = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        self._buffers = buffers

    def run(self, job: Job) -> Sample:
        views = [buffer.view() for buffer in self._buffers.take(job.in_flight, job.block_nbytes)]

        def work() -> None:
            numbers = iter(range(job.count))
            busy = sum(self._submit(job, view, numbers) for view in views)
            while busy:
                for done in self._ring.wait():
                    if done.result != job.block_nbytes:
                        raise OSError(f"io_uring moved {done.result} bytes of a block")
                    busy += self._submit(job, done.take_user_data(), numbers) - 1

        return timed(job, work)

    def _submit(self, job: Job, view: memoryview, numbers: Any) -> bool:
        number = next(numbers, None)
        if number is None:
            return False
        call = self._ring.prepare_write if job.writes(number) else self._ring.prepare_read
        call(self._fd, view, number * job.block_nbytes, user_data=view)
        self._ring.submit()
        return True

    def close(self) -> None:
        self._ring.close()
        os.close(self._fd)


def _open_direct(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC)


def contenders(path: Path, buffers: Buffers) -> tuple[list[Contender], list[str], list[str]]:
    """Everybody who can run here, who could not and why, and notes."""
    makers: dict[str, Callable[[], Contender]] = {
        "offload threads": lambda: OffloadEngine("threads", path, buffers),
        "offload aiofiles": lambda: OffloadEngine("aiofiles", path, buffers),
        "offload deepspeed": lambda: OffloadEngine("deepspeed", path, buffers),
        "fio": lambda: Fio("fio io_uring", path, "--ioengine=io_uring"),
        "fio fixed": lambda: Fio(
            "fio io_uring fixed", path, "--ioengine=io_uring", "--fixedbufs=1", "--registerfiles=1"
        ),
        "fio libaio": lambda: Fio("fio libaio", path, "--ioengine=libaio"),
        "deepspeed": lambda: DeepSpeedAio(path),
        "aiofiles": lambda: Aiofiles(path, buffers),
        "uring-api": lambda: UringBinding(_checked_binding(path), buffers),
    }
    notes = []
    try:
        kvikio.check()
        makers["offload kvikio"] = lambda: OffloadEngine("kvikio", path, buffers)
    except ConfigError as error:
        notes.append(f"kvikio has no part: {error}")
    ready, missing = [], []
    for name, make in makers.items():
        try:
            ready.append(make())
        except (ConfigError, ImportError, OSError) as error:
            missing.append(f"{name}: {error}")
    return ready, missing, notes


def _checked_binding(path: Path) -> Path:
    """Tried in a process of its own: bindings have died of illegal instructions."""
    code = f"import {URING_BINDING}; {URING_BINDING}.Ring().close()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"ended by signal {-done.returncode}"])[-1]
        raise OSError(f"no io_uring binding: {last}; pip install --pre uring-api")
    return path
