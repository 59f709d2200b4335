"""How fast each of several paths is: a short measurement at the start of a new striped store.

All paths are measured at the same time, as they will be used, so that two that share a drive or a
link are found to have half of it each. Each writes random bytes to an unlinked file for
``DURATION_S``, then reads them back for as long: direct requests, several in flight.
"""

import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from offload.tiers.file import TierFile
from offload.tiers.health import PathRates
from offload.tiers.memory import HostBuffer

DURATION_S = 0.15
_REQUEST_NBYTES = 4 << 20
_IN_FLIGHT = 2
_FILE_NBYTES = 32 << 20

Measure: TypeAlias = Callable[[Sequence[Path]], Sequence[PathRates]]


class _Probe:
    """One path while it is measured, by several threads at once."""

    def __init__(self, directory: Path) -> None:
        self.file = TierFile(directory, None)
        self.error: BaseException | None = None
        self._lock = threading.Lock()
        self._issued = 0
        self.begin(reading=False)

    def begin(self, *, reading: bool) -> None:
        """The next phase: a new count."""
        requests = _FILE_NBYTES // _REQUEST_NBYTES
        # Never more than was written: the rest of the file reads as zeros, too fast.
        self._places = min(self._issued, requests) if reading else requests
        self._reading = reading
        self._issued = 0
        self.moved_nbytes = 0
        self.busy_s = 0.0

    def run(self, start: threading.Barrier, buffer: HostBuffer) -> None:
        """Move bytes for ``DURATION_S``, at least one request."""
        start.wait()
        began_s = time.perf_counter()
        try:
            self._move(buffer)
            while time.perf_counter() - began_s < DURATION_S:
                self._move(buffer)
            if not self._reading and not self.file.direct:
                self.file.sync()  # what only reached the page cache is not written yet
        except BaseException as error:  # noqa: BLE001  (raised on the calling thread)
            self.error = error
        with self._lock:
            self.busy_s = max(self.busy_s, time.perf_counter() - began_s)

    def _move(self, buffer: HostBuffer) -> None:
        with self._lock:
            offset = self._issued % self._places * _REQUEST_NBYTES
            self._issued += 1
        move = self.file.read if self._reading else self.file.write
        move(offset, buffer.address, _REQUEST_NBYTES)
        with self._lock:
            self.moved_nbytes += _REQUEST_NBYTES


def measure_paths(directories: Sequence[Path]) -> tuple[PathRates, ...]:
    """What each directory's disk reads and writes while the others do too.

    Raises:
        CapacityError: a disk has no room for the few MiB of the measurement.
        TierIOError: a disk failed.
    """
    probes: list[_Probe] = []
    content = HostBuffer(_REQUEST_NBYTES)
    content.view()[:] = os.urandom(_REQUEST_NBYTES)  # some drives are faster on zeros
    targets = [HostBuffer(_REQUEST_NBYTES) for _ in range(len(directories) * _IN_FLIGHT)]
    try:
        for directory in directories:
            probes.append(_Probe(directory))
            probes[-1].file.grow(_FILE_NBYTES)
        writes = _phase(probes, [content] * len(targets), reading=False)
        for probe in probes:
            probe.file.sync()
            probe.file.uncache(0, _FILE_NBYTES)
        reads = _phase(probes, targets, reading=True)
    finally:
        for probe in probes:
            probe.file.close()
        for buffer in (content, *targets):
            buffer.release()
    return tuple(
        PathRates(read_bytes_per_s=read, write_bytes_per_s=write)
        for read, write in zip(reads, writes, strict=True)
    )


def _phase(
    probes: Sequence[_Probe], buffers: Sequence[HostBuffer], *, reading: bool
) -> list[float]:
    """Bytes per second of each path, all at once in one direction."""
    for probe in probes:
        probe.begin(reading=reading)
    start = threading.Barrier(len(buffers))
    threads = [
        threading.Thread(
            target=probes[index % len(probes)].run,
            args=(start, buffer),
            name=f"offload probe {index}",
            daemon=True,
        )
        for index, buffer in enumerate(buffers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for probe in probes:
        if probe.error is not None:
            raise probe.error
    return [probe.moved_nbytes / probe.busy_s for probe in probes]
