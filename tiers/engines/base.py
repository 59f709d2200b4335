"""The contract of a file engine: it moves whole pages between one open file and memory.

An engine is made for one file and called from the worker threads of the lanes, several at once.
The lanes give it concurrency and order; an engine that keeps requests of its own in flight cuts
a call into them. Its callers guarantee whole pages at page boundaries, repeat what came short,
and turn errors into ``TierIOError``; an engine only moves bytes and tells how many.

``offload.tiers.testing.EngineContract`` holds the suite that every engine and wrapper passes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeAlias


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A file that an engine is made for.

    Attributes:
        fd: buffered descriptor, through the page cache.
        direct_fd: ``O_DIRECT`` descriptor; None where the file system refuses it.
    """

    fd: int
    direct_fd: int | None

    @property
    def path(self) -> Path:
        """A path that opens the same file, even one that has no name any more."""
        return Path(f"/proc/self/fd/{self.fd}")


class FileEngine(ABC):
    """Moves bytes of one file; safe to call from several threads at once."""

    name: ClassVar[str]
    reaches_device: ClassVar[bool] = False
    """Whether an address may lie in device memory too (CUDA's addresses are unified)."""

    @abstractmethod
    def read(self, offset: int, address: int, nbytes: int) -> int:
        """Fill memory at ``address`` from ``offset``; blocks, without the GIL.

        Returns:
            Bytes read: fewer than ``nbytes`` if the request came short, 0 at the end of the file.

        Raises:
            OSError: the kernel or the library reported an error.
        """

    @abstractmethod
    def write(self, offset: int, address: int, nbytes: int) -> int:
        """Write memory at ``address`` to ``offset``; blocks, without the GIL.

        Returns:
            Bytes written: fewer than ``nbytes`` if the request came short.

        Raises:
            OSError: the kernel or the library reported an error.
        """

    def close(self) -> None:
        """Give back what the engine opened; safe to call twice, later calls raise ``OSError``.

        The file's descriptors are not the engine's own.
        """
        return


EngineFactory: TypeAlias = Callable[[OpenFile], FileEngine]
