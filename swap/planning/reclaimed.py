"""What a step waits for memory that a hypervisor has taken back between two uses of it.

A virtual machine may report free huge pages to its host, which takes them back: Linux does so in
passes, two seconds apart (``mm/page_reporting.c``), each of which reports a part of what is free.
What comes back is slow. Memory is used again last in, first out, so only what a step lets go of and
takes again counts: a pass finds there what the step has free at that time. Where in a step passes
fall is not known, so each takes what it would on average. They are as many as every step of that
length sees; now and then one sees one more, short ones most often none.

Saved tensors count until only autograd holds them, as if all left for the drive then: of a step
whose saved tensors stay, less is counted than it waits for.
"""

from collections.abc import Mapping, Sequence

from offload.swap.planning.cost import Costs
from offload.swap.planning.program import Program, What
from offload.tiers.hostmem import HUGE_PAGE

_BETWEEN_S = 2.0  # passes: PAGE_REPORTING_DELAY


class _Free:
    """What a step has let go of, last in, first out, and how much of it the host has taken.

    Args:
        pass_nbytes: that one pass takes at most.
    """

    def __init__(self, pass_nbytes: int) -> None:
        self._pass_nbytes = pass_nbytes
        self._pieces: list[tuple[int, float]] = []  # bytes, and ``_taken`` as they became free
        self._nbytes = 0
        self._taken = 0.0  # of what has been free all the time, on average; above 1: all of it

    def let_pass(self, seconds: float) -> None:
        """Passes come, of which each finds everything, or takes as much as it can of it."""
        if self._nbytes:
            share = min(self._pass_nbytes / self._nbytes, 1.0)
            self._taken += share * seconds / _BETWEEN_S

    def give(self, nbytes: int) -> None:
        """So much is free now."""
        self._pieces.append((nbytes, self._taken))
        self._nbytes += nbytes

    def take(self, nbytes: int) -> float:
        """Use so much; bytes of it that the host has to bring back, on average."""
        missing = 0.0
        while nbytes and self._pieces:
            piece, since = self._pieces.pop()
            used = min(piece, nbytes)
            if used < piece:
                self._pieces.append((piece - used, since))
            missing += used * min(self._taken - since, 1.0)
            self._nbytes -= used
            nbytes -= used
        return missing + nbytes


class _Course:
    """The storages of a step, from huge pages alone, that come and go as time passes."""

    def __init__(self, program: Program, costs: Costs, computing_s: Sequence[float]) -> None:
        assert costs.reclaimed is not None
        self._program = program
        self._costs = costs
        self._computing_s = computing_s
        self._huge_nbytes = [nbytes // HUGE_PAGE * HUGE_PAGE for nbytes in program.storages]
        self._free = _Free(costs.reclaimed.size)
        self._passing_s = 0.0  # that the host has not seen yet
        self._passed_s = 0.0

    def step(self) -> dict[int, float]:
        """One step; seconds of waiting on average, by the number of the event."""
        waits_s: dict[int, float] = {}
        for number, (what, which) in enumerate(self._program.events):
            if what is What.COMPUTE:
                self._passing_s += self._computing_s[which]
            elif what is What.ALLOCATE:
                if waited_s := self._take(which):
                    waits_s[number] = waited_s
            elif what is What.FREE:  # if autograd has saved it, it leaves for the drive
                self._give(which)
        return waits_s

    def _take(self, storage: int) -> float:
        """Seconds of waiting for memory for ``storage``."""
        missing = 0.0
        if nbytes := self._huge_nbytes[storage]:
            self._pass()
            missing = self._free.take(nbytes)
        waited_s = missing * self._costs.reclaimed_s_per_byte
        self._passing_s += self._costs.fresh_s(self._program.storages[storage]) + waited_s
        return waited_s

    def _give(self, storage: int) -> None:
        if nbytes := self._huge_nbytes[storage]:
            self._pass()
            self._free.give(nbytes)

    def _pass(self) -> None:
        self._free.let_pass(self._passing_s)
        self._passed_s += self._passing_s
        self._passing_s = 0.0

    def take_passed_s(self) -> float:
        """Seconds that went by since the last call."""
        self._pass()
        passed_s, self._passed_s = self._passed_s, 0.0
        return passed_s


def reclaimed_s(
    program: Program, costs: Costs, computing_s: Sequence[float]
) -> Mapping[int, float]:
    """Seconds that allocations wait for the host, by the number of their event in ``program``.

    Args:
        computing_s: of each operation.
    """
    if costs.reclaimed is None:
        return {}
    course = _Course(program, costs, computing_s)
    course.step()  # leaves what the next one finds
    course.take_passed_s()
    waits_s = course.step()
    passes = course.take_passed_s() / _BETWEEN_S
    if passes < 1.0:
        return {}
    return {number: waited_s * int(passes) / passes for number, waited_s in waits_s.items()}
