"""GPUDirect Storage: KvikIO's ``CuFile`` between a file and device memory, or host memory.

CUDA's addresses are unified, so an address tells by itself which memory it names. Device memory
is reached without a copy in host memory where the driver, the file system and the drive support
it, by KvikIO's own bounce buffers elsewhere, host memory by its POSIX path. KvikIO asks the CUDA
driver where an address lies, so even host memory needs the driver.
"""

import contextlib
import ctypes
import errno
import os
import re
import threading
from typing import Any

from offload.allocator.errors import ConfigError
from offload.tiers.engines.base import FileEngine, OpenFile
from offload.tiers.memory import memory_at

_DRIVER = "libcuda.so.1"
_CUDA_SUCCESS = 0
_MEMORY_TYPE_DEVICE, _POINTER_ATTRIBUTE_MEMORY_TYPE = 2, 2
_INSTEAD = "or choose io_engine=threads"


class _DeviceMemory:
    """Device memory as KvikIO takes it (the CUDA array interface, version 3)."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


class KvikioEngine(FileEngine):
    """One ``CuFile`` per file; KvikIO's own threads cut large requests.

    Raises:
        ConfigError: KvikIO, the CUDA driver or a device is missing.
        OSError: KvikIO can't open the file.
    """

    name = "kvikio"
    reaches_device = True

    def __init__(self, file: OpenFile) -> None:
        check()
        import kvikio

        _avoid_page_cache(kvikio.defaults)
        self._driver = ctypes.CDLL(_DRIVER)
        self._lock = threading.Lock()
        self._file: Any = kvikio.CuFile(file.path, "r+")
        self._fd = file.fd

    def read(self, offset: int, address: int, nbytes: int) -> int:
        left = os.fstat(self._fd).st_size - offset  # KvikIO raises where others come short
        nbytes = max(0, min(nbytes, left))
        if nbytes == 0:
            return 0
        return self._move("pread", offset, address, nbytes)

    def write(self, offset: int, address: int, nbytes: int) -> int:
        return self._move("pwrite", offset, address, nbytes)

    def _move(self, verb: str, offset: int, address: int, nbytes: int) -> int:
        file = self._file
        if file is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        try:
            return int(getattr(file, verb)(self._buffer(address, nbytes), nbytes, offset).get())
        except RuntimeError as error:
            raise OSError(_errno_of(error), f"KvikIO: {error}") from error

    def _buffer(self, address: int, nbytes: int) -> Any:
        kind = ctypes.c_uint(0)
        found = self._driver.cuPointerGetAttribute(
            ctypes.byref(kind), _POINTER_ATTRIBUTE_MEMORY_TYPE, ctypes.c_uint64(address)
        )
        # Memory that CUDA doesn't know is ordinary host memory: the call then fails.
        if found == _CUDA_SUCCESS and kind.value == _MEMORY_TYPE_DEVICE:
            return _DeviceMemory(address, nbytes)
        return memory_at(address, nbytes)

    def close(self) -> None:
        with self._lock:
            file, self._file = self._file, None
            self._fd = -1
        if file is not None:
            file.close()


def _avoid_page_cache(defaults: Any) -> None:
    """Direct I/O on KvikIO's POSIX path, in this process: no budget counts cached pages."""
    for setting in ("auto_direct_io_read", "auto_direct_io_write"):
        with contextlib.suppress(AttributeError, KeyError):  # an older KvikIO has none
            defaults.set(setting, True)


def _errno_of(error: RuntimeError) -> int:
    """The kernel's number that KvikIO tells in its message, such as ``EFBIG``; else ``EIO``."""
    for name in re.findall(r"\bE[A-Z]{3,}\b", str(error)):
        if hasattr(errno, name):
            return int(getattr(errno, name))
    for code, text in ((code, os.strerror(code)) for code in errno.errorcode):
        if text in str(error):
            return code
    return errno.EIO


def check() -> None:
    """Raise unless the engine can be used; the driver first, for the library is large.

    Raises:
        ConfigError: the CUDA driver, a device or KvikIO is missing.
    """
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError as error:
        raise ConfigError(
            f"the engine kvikio needs the NVIDIA driver, which this machine lacks ({error}): "
            f"install the driver, {_INSTEAD}"
        ) from error
    count = ctypes.c_int(0)
    code = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if code != _CUDA_SUCCESS or count.value == 0:
        raise ConfigError(
            f"the engine kvikio needs a CUDA device, and the driver finds none (CUDA error {code}, "
            f"{count.value} devices): see nvidia-smi, {_INSTEAD}"
        )
    try:
        import kvikio  # noqa: F401
    except Exception as error:
        # Not an ImportError alone: its loader of shared objects raises errors of its own.
        raise ConfigError(
            f"the engine kvikio needs a library that is missing ({error}): "
            f"pip install 'offload[gds]', {_INSTEAD}"
        ) from error
