"""What blocks of one kind cost: measured in every forward and backward, the shortest time counts.

The first executions are cold and others are disturbed, so each figure is the least that was seen.
Blocks that execute equal programs share their figures. On a device they come late, and only those
that are known count: see ``timing`` [Note: time of a device].
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from offload.swap.tokenwise.analyse import Chain
from offload.swap.tokenwise.solve import BlockCost


@dataclass(slots=True)
class Rebuilding:
    """Figures of one chain; of another, which rebuilds other tensors, they tell nothing.

    Attributes:
        rebuild_s: rebuilding the rows behind a cut, by cut.
        heads_s_per_row: copying one row of every target out of its tensor, and back.
    """

    rebuild_s: dict[int, float] = field(default_factory=dict)
    heads_s_per_row: float = math.inf
    _heads_estimated: bool = True

    def rebuild(self, cut: int, seconds: float) -> None:
        """The rows behind ``cut`` were rebuilt in so long."""
        self.rebuild_s[cut] = min(seconds, self.rebuild_s.get(cut, math.inf))

    def heads(self, rows: int, seconds: float) -> None:
        """So many rows were copied out of their tensors and back; an estimate counts no more."""
        if rows and self._heads_estimated:
            self._heads_estimated = False
            self.heads_s_per_row = seconds / rows
        elif rows:
            self.heads_s_per_row = min(self.heads_s_per_row, seconds / rows)

    def estimate_heads(self, rows: int, seconds: float) -> None:
        """As ``heads``, from a copy made to measure it: until the real thing was measured."""
        if self._heads_estimated:
            self.heads_s_per_row = min(self.heads_s_per_row, seconds / rows)

    @property
    def known(self) -> bool:
        """Whether there is a figure of each kind."""
        return bool(self.rebuild_s) and math.isfinite(self.heads_s_per_row)

    def tells(self, cuts: Iterable[int]) -> bool:
        """Whether the rebuild behind each of ``cuts`` was measured."""
        return self.rebuild_s.keys() >= set(cuts)

    def split_s(self, rows: int) -> tuple[float, float]:
        """What rebuilding takes however few the rows, and what all rows take besides."""
        fewest, most = max(self.rebuild_s), min(self.rebuild_s)
        if fewest == most:
            return 0.0, self.rebuild_s[most] * rows / (rows - most)
        more_s = max(self.rebuild_s[most] - self.rebuild_s[fewest], 0.0)
        all_s = more_s / (fewest - most) * rows
        return max(self.rebuild_s[fewest] - all_s * (rows - fewest) / rows, 0.0), all_s


@dataclass(slots=True)
class Measurements:
    """Figures of one program.

    Attributes:
        forward_s: a forward that was not recorded.
        recorded_s: a forward that was, with ``record_s`` taken off.
        record_s: recording one forward, as far as the times of forwards contain it.
    """

    forward_s: float = math.inf
    recorded_s: float = math.inf
    backward_s: float = math.inf
    record_s: float = math.inf
    _rebuilding: dict[frozenset[int], Rebuilding] = field(default_factory=dict)

    def of(self, chain: Chain) -> Rebuilding:
        """What rebuilding the targets of ``chain`` takes."""
        targets = frozenset(target.storage for target in chain.targets)
        return self._rebuilding.setdefault(targets, Rebuilding())

    def forward(self, seconds: float) -> None:
        """A forward took so long, without packing; nobody recorded it."""
        self.forward_s = min(self.forward_s, seconds)

    def recorded_forward(self, seconds: float) -> None:
        """A forward took so long, without packing, while it was recorded."""
        self.recorded_s = min(self.recorded_s, seconds - self._own_s)

    def backward(self, seconds: float) -> None:
        """A backward took so long, without waits and rebuilding."""
        self.backward_s = min(self.backward_s, seconds)

    def recording(self, seconds: float) -> None:
        """Recording a forward took so long of its time."""
        self.record_s = min(self.record_s, seconds)

    def cost(self, chain: Chain) -> BlockCost | None:
        """The figures as the solver takes them; ``None`` as long as there are too few.

        Before backward is measured it is taken to last twice as long as forward.
        """
        forward_s = min(self.forward_s, self.recorded_s)
        rebuilding, rows = self.of(chain), chain.program.rows
        if not rebuilding.known or math.isinf(forward_s):
            return None
        overhead_s, all_s = rebuilding.split_s(rows)
        measured = math.isfinite(self.backward_s)
        return BlockCost(
            forward_s=forward_s,
            backward_s=self.backward_s if measured else 2 * forward_s,
            rebuild_s=all_s,
            heads_s=rebuilding.heads_s_per_row * rows,
            overhead_s=overhead_s + self._recording_s(forward_s),
            whole_nbytes=chain.whole_nbytes,
            target_nbytes=chain.target_nbytes,
        )

    def _recording_s(self, forward_s: float) -> float:
        """What recording takes in all: it may also hold up a device, which is idle meanwhile."""
        held_up_s = self.recorded_s - forward_s if math.isfinite(self.recorded_s) else 0.0
        return self._own_s + held_up_s

    @property
    def _own_s(self) -> float:
        return self.record_s if math.isfinite(self.record_s) else 0.0
