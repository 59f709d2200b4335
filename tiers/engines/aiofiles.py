"""The portable engine: aiofiles, on an asyncio loop with a thread of its own.

It needs nothing but Python: it serves file systems without ``O_DIRECT`` (tmpfs, some overlays and
network mounts) through the page cache, and others by direct I/O.

[Note: a position for each request] A file object has one position, and a request is a seek and a
read or write. So each request in flight has a file object to itself; idle ones wait in a list
that only the loop's thread touches. They are opened by way of the descriptor, so that they reach
files without a name.

[Note: the end of the program] A run that just ends is closed by ``atexit``, when the executors of
the standard library take no more work and no thread can be started (Python 3.12). So the blocking
calls are made by threads of our own, all started with the engine.
"""

import asyncio
import errno
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, Future
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from offload.allocator.errors import ConfigError
from offload.tiers.engines.base import FileEngine, OpenFile
from offload.tiers.memory import memory_at

if TYPE_CHECKING:
    from aiofiles.threadpool.binary import AsyncFileIO

WORKERS = 8  # requests in flight at once

P = ParamSpec("P")
T = TypeVar("T")


class AiofilesEngine(FileEngine):
    """Requests become coroutines; the calling thread waits for its own.

    Raises:
        ConfigError: aiofiles is not installed.
    """

    name = "aiofiles"

    def __init__(self, file: OpenFile) -> None:
        check()
        self._path = file.path
        self._direct = file.direct_fd is not None
        self._idle: list[AsyncFileIO] = []
        self._workers = _DaemonThreads(WORKERS)
        self._loop = asyncio.new_event_loop()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="offload aiofiles", daemon=True
        )
        self._thread.start()

    def read(self, offset: int, address: int, nbytes: int) -> int:
        return self._call(self._read(offset, memory_at(address, nbytes)))

    def write(self, offset: int, address: int, nbytes: int) -> int:
        return self._call(self._write(offset, memory_at(address, nbytes)))

    def _call(self, request: Coroutine[Any, Any, int]) -> int:
        with self._lock:  # no request may be handed to a loop that is ending
            if self._closed:
                request.close()
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            moving = asyncio.run_coroutine_threadsafe(request, self._loop)
        return moving.result()

    async def _read(self, offset: int, target: memoryview) -> int:
        file = await self._take()
        try:
            await file.seek(offset)
            return await file.readinto(target) or 0
        finally:
            self._idle.append(file)

    async def _write(self, offset: int, source: memoryview) -> int:
        file = await self._take()
        try:
            await file.seek(offset)
            return int(await file.write(source))
        finally:
            self._idle.append(file)

    async def _take(self) -> "AsyncFileIO":
        """An idle file object, or one more ([Note: a position for each request])."""
        import aiofiles

        if self._idle:
            return self._idle.pop()
        return await aiofiles.open(
            self._path, "r+b", buffering=0, opener=self._open, executor=self._workers
        )

    def _open(self, path: str, flags: int) -> int:
        return os.open(path, flags | os.O_CLOEXEC | (os.O_DIRECT if self._direct else 0))

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            ended = asyncio.run_coroutine_threadsafe(self._end(), self._loop)
        ended.result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._workers.shutdown()

    async def _end(self) -> None:
        """Let requests in flight finish, then close every file object."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)
        for file in self._idle:
            await file.close()
        self._idle.clear()


class _DaemonThreads(Executor):
    """Runs calls on so many threads until ``shutdown`` ([Note: the end of the program])."""

    def __init__(self, count: int) -> None:
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"offload aiofiles {index}", daemon=True)
            for index in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(call(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001  (raised where the future is awaited)
                future.set_exception(error)

        self._calls.put(run)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        del wait, cancel_futures  # its owner ends when all has been done
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (run := self._calls.get()) is not None:
            run()
            del run  # it holds the memory of its request


def check() -> None:
    """Raise unless the engine can be used.

    Raises:
        ConfigError: aiofiles is not installed.
    """
    try:
        import aiofiles  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"the engine aiofiles needs a library that is missing ({error}): "
            "pip install 'offload[aio]', or choose io_engine=threads"
        ) from error
