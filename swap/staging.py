"""Staging memory of the tiles in flight, within a bound."""

from offload.tiers.memory import HostBuffer


class Staging:
    """Buffers of the tiles in flight, used again: fresh pages would cost their zeroing.

    Args:
        limit_nbytes: bytes of all buffers; one, of any size, may always be taken.
    """

    def __init__(self, limit_nbytes: int) -> None:
        self.limit_nbytes = limit_nbytes
        self._free: list[HostBuffer] = []
        self._taken_nbytes = 0
        self._fresh: set[HostBuffer] = set()

    @property
    def landing_nbytes(self) -> int:
        """Bytes that are taken, but that the kernel may not have been asked for yet."""
        return sum(buffer.nbytes for buffer in self._fresh)

    @property
    def free_nbytes(self) -> int:
        """Bytes that are kept for the next tile."""
        return sum(buffer.nbytes for buffer in self._free)

    def take(self, nbytes: int) -> HostBuffer | None:
        """A buffer of at least ``nbytes``, or None while others hold the room."""
        for buffer in self._free:
            if buffer.nbytes >= nbytes:
                self._free.remove(buffer)
                self._taken_nbytes += buffer.nbytes
                return buffer
        while self._free and self._held_nbytes() + nbytes > self.limit_nbytes:
            self._free.pop().release()
        if self._taken_nbytes and self._held_nbytes() + nbytes > self.limit_nbytes:
            return None
        buffer = HostBuffer(max(nbytes, 1))
        self._taken_nbytes += buffer.nbytes
        self._fresh.add(buffer)
        return buffer

    def _held_nbytes(self) -> int:
        return self._taken_nbytes + self.free_nbytes

    def give_back(self, buffer: HostBuffer) -> None:
        """The tile is written: its buffer may be taken again."""
        self._taken_nbytes -= buffer.nbytes
        self._fresh.discard(buffer)
        self._free.append(buffer)

    def pass_on(self, buffer: HostBuffer) -> None:
        """The tile in ``buffer`` is being written; the next one takes the buffer from there."""
        self._fresh.discard(buffer)

    def close(self) -> None:
        """Return the memory of free buffers to the kernel; others may still be given back."""
        while self._free:
            self._free.pop().release()
