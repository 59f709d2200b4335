"""How high memory rises in each part of a step, and where a slower drive could make it too high.

[Note: a drive that hesitates] In the first pass nothing is fetched by the clock, so that what it
holds depends on times only by which writes have ended. Slower ones hold more, at most: gradients
up to their limit; and saved units, twice the limit of which (or one that is larger) may be in
memory where the usual drive leaves the limit, but for a unit that didn't fit. A pass on a slower
drive need be simulated only up to the last part that might not fit with that. The passes of
further micro-batches fetch by the clock, as later steps do: earlier, if the drive is slower, and up
to the same limits.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

from offload.swap.planning.compiled import Moment
from offload.swap.planning.sim_memory import Memory

PARTS = 64  # of a pass


class Parts:
    """The parts of a step's passes.

    Attributes:
        peaks_nbytes: of the parts that it has gone through.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.peaks_nbytes: list[int] = []

    def passes(
        self, moments: Sequence[Moment], count: int, parts: int | None
    ) -> Iterator[Iterable[Moment]]:
        """So many passes over ``moments``, up to a number of ``parts`` of all of them."""
        left = count * PARTS if parts is None else parts
        for _ in range(-(-left // PARTS)):
            yield chain.from_iterable(self.of(moments, min(left, PARTS)))
            left -= PARTS

    def of(self, moments: Sequence[Moment], parts: int) -> Iterator[Sequence[Moment]]:
        """So many parts of ``moments``, whose peaks are noted as a pass goes through them."""
        memory = self._memory
        size = -(-len(moments) // PARTS)
        for part in range(parts):
            peak_nbytes, peak_roles = memory.peak_nbytes, memory.peak_roles
            memory.restart_peak()
            yield moments[part * size : (part + 1) * size]
            self.peaks_nbytes.append(memory.peak_nbytes)
            if memory.peak_nbytes <= peak_nbytes:
                memory.peak_nbytes, memory.peak_roles = peak_nbytes, peak_roles

    def doubtful(self, more_nbytes: int, fits: Callable[[int], bool]) -> int:
        """How many parts there are up to the last one that might not fit with so much more."""
        peaks_nbytes = self.peaks_nbytes
        doubtful = (
            part
            for part in range(len(peaks_nbytes), 0, -1)
            if not fits(peaks_nbytes[part - 1] + more_nbytes)
        )
        return next(doubtful, 0)
