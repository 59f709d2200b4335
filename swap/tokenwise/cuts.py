"""Where a block may be cut: what is rebuilt behind each cut, and whether that was found right.

[Note: verified cuts] A cut is used only after the rows behind it were rebuilt once and compared
with what was saved. A storage that differs is swapped whole at that cut; it becomes a source
there, so that what comes after it is rebuilt from its saved rows and gets its own comparison.

[Note: refused cuts] Whether bits are equal depends on the cut: libraries take another kernel for
few rows. So several cuts are tried, and the one behind which most bytes are right says what is
rebuilt, and what is swapped whole; a cut that loses more than that is refused. The fewer rows
there are, the less they are like the whole: what lies beyond a refused cut is refused, too, and
of what lies between it and the last right one only the nearer half is hoped for. So each attempt
that fails halves what is left to try.
"""

from dataclasses import dataclass

from offload.swap.tokenwise.analyse import Chain, find_chain
from offload.swap.tokenwise.program import Program
from offload.swap.tokenwise.replay import Replay, cuts


@dataclass(frozen=True, slots=True)
class Tried:
    """A cut with what is rebuilt behind it.

    Attributes:
        failed: why each storage whose rows differ there is swapped whole.
        verified: all that is rebuilt was compared, and is right.
    """

    replay: Replay
    failed: dict[int, str]
    verified: bool = False

    @property
    def chain(self) -> Chain:
        """What is rebuilt, and how."""
        return self.replay.chain

    @property
    def settled(self) -> bool:
        """Whether there is nothing left to compare."""
        return self.verified or not self.chain.targets

    @property
    def failed_nbytes(self) -> int:
        """Bytes that are swapped whole because rows differ there."""
        return sum(self.chain.program.storage_nbytes[storage] for storage in self.failed)


class Cuts:
    """The cuts of one program that were tried, and those that may be used.

    Args:
        min_nbytes: smaller storages are swapped whole.

    Attributes:
        rows: this cut swaps all of them.
        chosen: the cut that says what is rebuilt, once that is settled.
    """

    def __init__(self, program: Program, *, min_nbytes: int) -> None:
        self.rows = program.rows
        self.chosen: Tried | None = None
        self._program = program
        self._min_nbytes = min_nbytes
        self._full = find_chain(program, min_nbytes=min_nbytes)
        self._tried: dict[int, Tried] = {}

    @property
    def chain(self) -> Chain:
        """What is rebuilt; as long as that is not settled, what may be."""
        return self.chosen.chain if self.chosen is not None else self._full

    def at(self, cut: int) -> Tried:
        """What is rebuilt behind ``cut``, as far as that is known."""
        if cut not in self._tried:
            failed = dict(self.chosen.failed) if self.chosen is not None else {}
            self._tried[cut] = Tried(Replay(self.chain, cut), failed)
        return self._tried[cut]

    def verify(self, cut: int) -> None:
        """All that is rebuilt behind ``cut`` was compared, and is right."""
        self._tried[cut] = Tried(self._tried[cut].replay, self._tried[cut].failed, verified=True)

    def fail(self, cut: int, failed: dict[int, str]) -> None:
        """These storages were compared, and differ."""
        failed = self._tried[cut].failed | failed
        chain = find_chain(self._program, min_nbytes=self._min_nbytes, failed=failed)
        self._tried[cut] = Tried(Replay(chain, cut), failed)

    def right(self) -> list[int]:
        """Cuts behind which everything that may be rebuilt is right, ascending."""
        return sorted(cut for cut, one in self._tried.items() if one.verified and not one.failed)

    def choose(self, cut: int | None = None) -> None:
        """What is right behind ``cut`` is rebuilt from now on.

        By default that is the one, of all that were tried, behind which most bytes are right.
        """
        if cut is None:
            settled = [cut for cut, one in self._tried.items() if one.settled]
            cut = max(settled, key=lambda cut: (self._tried[cut].chain.target_nbytes, cut))
        self.chosen = self._tried[cut]

    def verified(self) -> list[int]:
        """Cuts that are known to be right, ascending."""
        targets = self.chain.targets
        return sorted(
            cut for cut, one in self._tried.items() if one.verified and one.chain.targets == targets
        )

    def refused(self) -> list[int]:
        """Cuts behind which something differs that is to be rebuilt, ascending."""
        given_up = self.chosen.failed if self.chosen is not None else {}
        return sorted(cut for cut, one in self._tried.items() if one.failed.keys() - given_up)

    def usable(self) -> list[int]:
        """Cuts to choose from, ascending; the last one swaps all rows: [Note: refused cuts]."""
        grid, verified, refused = cuts(self.rows), self.verified(), self.refused()
        if not refused:
            return list(grid)
        near = [cut for cut in verified if cut < refused[0]]
        hoped = (grid.index(near[-1]) + grid.index(refused[0])) // 2 + 1 if near else 0
        return sorted({*grid[:hoped], *verified, self.rows})
