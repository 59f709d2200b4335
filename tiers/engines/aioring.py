"""What the kernel said of finished AIO requests, read from the ring that it shares with us.

[Note: results nobody looks at] DeepSpeed's handle counts completions and ignores their results: a
request that failed or came short looks like any other. The kernel writes each result into the
context's ring (``struct aio_ring`` of Linux's ``fs/aio.c``), which is mapped into the process and
keeps events after they were fetched, until the ring comes round. So the results of the last few
requests can be read there, exactly and at no cost.
"""

import ctypes
import struct
from pathlib import Path

from offload.tiers.memory import memory_at

_HEADER = struct.Struct("8I")  # id, nr, head, tail, magic, two feature words, header's length
_EVENT = struct.Struct("QQqq")  # data, request, result, second result
_MAGIC = 0xA10A10A1
_NAME = "/[aio]"


def ring_addresses() -> set[int]:
    """Where the AIO contexts of this process have their rings."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {int(line.partition("-")[0], 16) for line in lines if _NAME in line}


class AioRing:
    """The ring at ``address``, followed from now on; one thread uses its context at a time.

    Raises:
        OSError: the kernel's ring has another form than the one known here.
    """

    def __init__(self, address: int) -> None:
        self._address = address
        _, self.events, _, self._seen, magic, _, _, length = self._header()
        if magic != _MAGIC or length != _HEADER.size:
            raise OSError(f"the AIO ring at {address:#x} has an unknown form (magic {magic:#x})")

    def _header(self) -> tuple[int, ...]:
        return _HEADER.unpack(memory_at(self._address, _HEADER.size))

    def results(self) -> list[int]:
        """Results of the requests that finished since the last call: bytes, or ``-errno``.

        At most ``events`` of them are remembered.
        """
        tail = self._header()[3]
        found = []
        while self._seen != tail:
            at = self._address + _HEADER.size + self._seen * _EVENT.size
            found.append(_EVENT.unpack(ctypes.string_at(at, _EVENT.size))[2])
            self._seen = (self._seen + 1) % self.events
        return found
