"""DeepSpeed's AIO handle: libaio with several requests in flight for each of our requests.

DeepSpeed moves bytes to and from its own page-locked memory only, and copies anything else
through a buffer that it makes anew for each request. So a request here passes through a small
page-locked buffer that is kept. Its results are read where the kernel leaves them
(``aioring``, [Note: results nobody looks at]); what did not move whole is repeated by a plain
call, which tells the count or the error.

[Note: a queue for each request] A handle runs one operation after another and its ``wait`` is for
all of them, so each request in flight has a handle to itself; idle ones wait in a list.
"""

import contextlib
import ctypes
import errno
import importlib.util
import os
import threading
import warnings
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload.allocator.errors import ConfigError
from offload.allocator.units import format_nbytes
from offload.tiers.engines.aioring import AioRing, ring_addresses
from offload.tiers.engines.base import FileEngine, OpenFile
from offload.tiers.hostmem import PAGE
from offload.tiers.memory import HostBuffer, memory_at

if TYPE_CHECKING:
    from collections.abc import Iterator

STAGING_NBYTES = 4 << 20
BLOCK_NBYTES = 512 << 10  # one AIO request
_INSTEAD = "or choose io_engine=threads"
_BUILD = 'python -c "from deepspeed.ops.op_builder import AsyncIOBuilder as B; B().load()"'
_OPS = ("pin_memory", "async_io")

_libc = ctypes.CDLL(None, use_errno=True)
_making = threading.Lock()  # rings are told apart by what appears while a handle is made


class DeepspeedEngine(FileEngine):
    """Direct I/O by DeepSpeed's handles ([Note: a queue for each request]).

    Raises:
        ConfigError: DeepSpeed, libaio or the compiled operator is missing, or the file system
            has no ``O_DIRECT``.
    """

    name = "deepspeed"

    def __init__(self, file: OpenFile) -> None:
        if file.direct_fd is None:
            raise ConfigError(
                "the engine deepspeed needs a file system with O_DIRECT: "
                f"pass another directory, {_INSTEAD}"
            )
        self._operator = load_operator()
        self._fd = file.direct_fd
        self._path = str(file.path)
        self._lock = threading.Lock()
        self._idle: list[_Queue] = []

    def read(self, offset: int, address: int, nbytes: int) -> int:
        left = os.fstat(self._fd).st_size - offset  # beyond the end DeepSpeed aborts the process
        done = 0
        with self._queue() as queue:
            while done < (whole := min(nbytes, left) // PAGE * PAGE):
                part = min(STAGING_NBYTES, whole - done)
                if not queue.read(self._path, offset + done, part):
                    break
                ctypes.memmove(address + done, queue.address, part)
                done += part
        if done:
            return done
        return os.preadv(self._fd, [memory_at(address, nbytes)], offset)

    def write(self, offset: int, address: int, nbytes: int) -> int:
        done = 0
        with self._queue() as queue:
            while done < nbytes:
                part = min(STAGING_NBYTES, nbytes - done)
                ctypes.memmove(queue.address, address + done, part)
                if not queue.write(self._path, offset + done, part):
                    break
                done += part
        if done:
            return done
        return os.pwritev(self._fd, [memory_at(address, nbytes)], offset)

    @contextlib.contextmanager
    def _queue(self) -> "Iterator[_Queue]":
        with self._lock:
            if self._fd < 0:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            queue = self._idle.pop() if self._idle else None
        queue = queue or _Queue(self._operator)
        try:
            yield queue
        finally:
            with self._lock:
                self._idle.append(queue)

    def close(self) -> None:
        with self._lock:
            self._fd = -1  # never a number that the next file opened by anyone may get
            queues, self._idle = self._idle, []
        for queue in queues:
            queue.close()


class _Queue:
    """A handle, its page-locked buffer and the rings of its contexts; one caller at a time."""

    def __init__(self, operator: Any) -> None:
        import torch

        _check_lockable(STAGING_NBYTES)
        depth = STAGING_NBYTES // BLOCK_NBYTES
        with _making:
            before = ring_addresses()
            self._handle = operator.aio_handle(BLOCK_NBYTES, depth, False, True, 1)
            self._rings = [AioRing(address) for address in ring_addresses() - before]
        if not self._rings:
            raise OSError(errno.ENOSYS, "DeepSpeed's handle made no AIO context")
        self._staging = self._handle.new_cpu_locked_tensor(
            STAGING_NBYTES, torch.empty(0, dtype=torch.uint8)
        )
        self.address: int = self._staging.data_ptr()

    def read(self, path: str, offset: int, nbytes: int) -> bool:
        """Whether all of the bytes came into the buffer."""
        return self._run(self._handle.async_pread, path, offset, nbytes)

    def write(self, path: str, offset: int, nbytes: int) -> bool:
        """Whether all of the buffer's first bytes were written."""
        return self._run(self._handle.async_pwrite, path, offset, nbytes)

    def _run(self, submit: Any, path: str, offset: int, nbytes: int) -> bool:
        if submit(self._staging[:nbytes], path, offset) != 0:
            return False  # nothing is in flight, and waiting would abort the process
        self._handle.wait()
        results = [result for ring in self._rings for result in ring.results()]
        return all(result >= 0 for result in results) and sum(results) == nbytes

    def close(self) -> None:
        self._handle.free_cpu_locked_tensor(self._staging)
        del self._staging, self._handle


def _check_lockable(nbytes: int) -> None:
    """DeepSpeed aborts the process where memory can't be locked: find out before it does."""
    buffer = HostBuffer(nbytes)
    try:
        if _libc.mlock(ctypes.c_void_p(buffer.address), ctypes.c_size_t(nbytes)):
            code = ctypes.get_errno()
            raise OSError(
                code,
                f"{os.strerror(code)} (can't lock {format_nbytes(nbytes)} of memory: raise the "
                f"limit with ulimit -l, {_INSTEAD})",
            )
    finally:
        buffer.release()


def check() -> None:
    """Raise unless the engine can be used; imports nothing.

    Raises:
        ConfigError: DeepSpeed is not installed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "the engine deepspeed needs a library that is missing (deepspeed): "
            f"pip install 'offload[deepspeed]', {_INSTEAD}"
        )


@lru_cache(maxsize=1)
def load_operator() -> Any:
    """DeepSpeed's AIO operator; never builds it, for that takes minutes.

    Raises:
        ConfigError: DeepSpeed, libaio or the compiled operator is missing.
    """
    check()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its imports warn of much that is not used here
        from deepspeed.git_version_info import installed_ops
        from deepspeed.ops.op_builder import AsyncIOBuilder

        builder = AsyncIOBuilder()
        if not builder.is_compatible(verbose=False):
            raise ConfigError(
                "the engine deepspeed needs libaio and its headers, which are missing: "
                f"apt install libaio-dev, {_INSTEAD}"
            )
        if not installed_ops.get("async_io", False):
            _check_built(_build_root())
        return builder.load(verbose=False)


def _build_root() -> Path:
    from torch.utils import cpp_extension

    return Path(cpp_extension._get_build_directory(_OPS[0], verbose=False)).parent


def _check_built(root: Path) -> None:
    """Raise unless both operators stand compiled under ``root`` and nobody is at work there.

    A build that was killed leaves a lock, and PyTorch then waits for it without an end.
    """
    for name in _OPS:
        if (lock := root / name / "lock").exists():
            raise ConfigError(
                f"DeepSpeed's operator {name} is being built, or a build of it was killed: wait "
                f"until it ends, or remove {lock}, {_INSTEAD}"
            )
        if not (root / name / f"{name}.so").exists():
            raise ConfigError(
                f"the engine deepspeed needs its compiled operator, {name}.so in {root / name}; "
                f"build it once, which takes some minutes: {_BUILD}, {_INSTEAD}"
            )
