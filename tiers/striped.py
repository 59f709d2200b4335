"""Several files, each on a path of its own, as one: a tier's bytes striped over NVMe drives.

The places of all bytes are ``stripes``' arithmetic. Callers cut moves with ``pieces``, so that
each request lies on one path and waits in that path's own queue (``lanes`` [Note: a queue for each
path]); ``read`` and ``write`` take any range.
"""

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Self

from offload.allocator.errors import TierIOError
from offload.tiers.file import TierFile
from offload.tiers.health import PathHealth
from offload.tiers.hostmem import HUGE_PAGE, PAGE
from offload.tiers.pieces import Piece, cut
from offload.tiers.stripes import Stripes


class StripedFile:
    """Files of several paths in one address space; the interface of ``TierFile``.

    Args:
        files: one for each path; closed with this one.
        stripes: where each byte lies.
        health: is told of every request.

    Raises:
        ValueError: units are not whole pages, or not one weight for each file.
    """

    def __init__(self, files: Sequence[TierFile], stripes: Stripes, health: PathHealth) -> None:
        if stripes.unit_nbytes % PAGE or len(stripes.weights) != len(files):
            raise ValueError(
                f"{len(files)} files can't be striped by weights {stripes.weights} in units of "
                f"{stripes.unit_nbytes} bytes: give a weight each, and a multiple of {PAGE}"
            )
        self.files = tuple(files)
        self.stripes = stripes
        self.health = health
        self.label = " + ".join(file.label for file in files)
        self.nbytes = stripes.held_nbytes([file.nbytes for file in files])

    @property
    def direct(self) -> bool:
        """Whether every path takes ``O_DIRECT``."""
        return all(file.direct for file in self.files)

    @property
    def block_align(self) -> int:
        """Large blocks begin at a huge page, so that pieces are whole ones in memory too."""
        return HUGE_PAGE

    def pieces(self, offset: int, nbytes: int) -> list[Piece]:
        """The requests that move ``nbytes`` from ``offset`` on, each on one path."""
        return [
            piece
            for run in self.stripes.runs(offset, nbytes)
            for piece in cut(run.path, run.start, run.nbytes)
        ]

    def growth_nbytes(self) -> int:
        """Bytes by which the file can grow before the first of its paths is full."""
        whole = 1 << 40
        shares = [self.stripes.path_nbytes(path, whole) for path in range(len(self.files))]
        return min(
            file.growth_nbytes() * whole // share
            for file, share in zip(self.files, shares, strict=True)
        )

    def grow(self, nbytes: int) -> None:
        """Preallocate each path's share of ``nbytes`` in all; on an error none keeps more.

        Raises:
            CapacityError: a path has not enough room; names it.
        """
        if nbytes <= self.nbytes:
            return
        before = [file.nbytes for file in self.files]
        try:
            for path, file in enumerate(self.files):
                file.grow(self.stripes.path_nbytes(path, nbytes))
        except BaseException:
            for file, size in zip(self.files, before, strict=True):
                file.shrink(size)
            raise
        self.nbytes = nbytes

    def read(self, offset: int, address: int, nbytes: int) -> None:
        """Fill ``nbytes`` at ``address`` from ``offset``; blocks, without the GIL.

        Raises:
            TierIOError: a path failed; names it.
        """
        for run in self.stripes.runs(offset, nbytes):
            with self._watched(run.path, read_nbytes=run.nbytes):
                self.files[run.path].read(run.offset, address + run.start, run.nbytes)

    def write(self, offset: int, address: int, nbytes: int) -> None:
        """Write ``nbytes`` at ``address`` to ``offset``; blocks, without the GIL.

        Raises:
            TierIOError: a path failed; names it.
        """
        for run in self.stripes.runs(offset, nbytes):
            with self._watched(run.path, written_nbytes=run.nbytes):
                self.files[run.path].write(run.offset, address + run.start, run.nbytes)

    @contextmanager
    def _watched(
        self, path: int, *, read_nbytes: int = 0, written_nbytes: int = 0
    ) -> Iterator[None]:
        self.health.began(path)
        try:
            yield
        except BaseException as error:
            self.health.ended(path)
            if isinstance(error, TierIOError):
                raise self._failed(path, error) from error
            raise
        self.health.ended(path, read_nbytes=read_nbytes, written_nbytes=written_nbytes)

    def _failed(self, path: int, error: TierIOError) -> TierIOError:
        return TierIOError(
            error.errno,
            f"{error.strerror or error}; that is path {path + 1} of {len(self.files)}. The last "
            "commit is whole on all paths: mend this one and run the same command again",
        )

    def map(self, address: int, nbytes: int, offset: int, *, shared: bool) -> None:
        """Map ``nbytes`` at ``offset`` over the pages at ``address``, run by run.

        Raises:
            TierIOError: the kernel refused; for too many mappings, names the limit to raise.
        """
        for run in self.stripes.runs(offset, nbytes):
            try:
                self.files[run.path].map(address + run.start, run.nbytes, run.offset, shared=shared)
            except TierIOError as error:
                if error.errno != errno.ENOMEM:
                    raise
                raise TierIOError(
                    error.errno,
                    f"{error.strerror}: a striped model needs a mapping for every "
                    f"{self.stripes.unit_nbytes} bytes, and the kernel allows this process no "
                    "more of them: raise the limit with sysctl -w vm.max_map_count=1048576",
                ) from error

    def clear(self, offset: int, nbytes: int) -> None:
        """Make a range of whole pages read as zeros.

        Raises:
            TierIOError: a path failed; names it.
        """
        for run in self.stripes.runs(offset, nbytes):
            self.files[run.path].clear(run.offset, run.nbytes)

    def sync(self) -> None:
        """Make all written bytes durable, on every path.

        Raises:
            TierIOError: a path could not take them; names it.
        """
        for path, file in enumerate(self.files):
            try:
                file.sync()
            except TierIOError as error:
                raise self._failed(path, error) from error

    def uncache(self, offset: int, nbytes: int) -> None:
        """Drop clean cached pages of the range."""
        for run in self.stripes.runs(offset, nbytes):
            self.files[run.path].uncache(run.offset, run.nbytes)

    def stamp(self) -> bool:
        """Begin to tell, by ``is_stamped``, whether anything is written to any path."""
        return all(file.stamp() for file in self.files)

    def is_stamped(self) -> bool:
        """Whether nothing has been written since ``stamp``, by anyone in any way."""
        return all(file.is_stamped() for file in self.files)

    def close(self) -> None:
        """Close every file; mappings stay valid, reads and writes fail; once only."""
        for file in self.files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def open_striped(
    make: Sequence[Callable[[], TierFile]], stripes: Stripes, health: PathHealth
) -> StripedFile:
    """Open a file on each path, all of them or none.

    Raises:
        TierIOError: one can't be opened.
    """
    files: list[TierFile] = []
    try:
        for opened in make:
            files.append(opened())  # noqa: PERF401  (those opened so far are closed on an error)
        return StripedFile(files, stripes, health)
    except BaseException:
        for file in files:
            file.close()
        raise
