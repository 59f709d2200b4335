"""Which share of the rows a run will swap: the runtime's solver, fed with predicted times.

What a run measures of a block (forward, backward, rebuilding behind two cuts, copying heads, and
the links) is what its operations take on the machine; ``tokenwise.measure`` tells how the one
becomes the other, and ``tokenwise.solve`` what is best.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from offload.swap.planning.cost import Costs
from offload.swap.planning.program import Event, Program, What
from offload.swap.planning.row_events import copying, scaled
from offload.swap.planning.row_records import COPY, BlockKind, RowProgram, RowStep
from offload.swap.tokenwise.measure import Rebuilding
from offload.swap.tokenwise.plans import PROBES
from offload.swap.tokenwise.replay import cuts, measurable_cut
from offload.swap.tokenwise.solve import BlockCost, Link, less_room, step_s, thriftiest
from offload.swap.tokenwise.trials import ALIKE
from offload.tiers.pieces import PIECE_NBYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """Of blocks of one kind.

    Attributes:
        cut: rows of each sequence that are best swapped.
        room_for_all: whether memory and drive take what is saved if nothing is rebuilt.
        cost: what it was solved from.
    """

    cut: int
    room_for_all: bool
    cost: BlockCost


def solve_kind(program: Program, costs: Costs, number: int, links: Sequence[Link]) -> Solved:
    """What a run finds once it has measured all, for the kind of blocks with this number.

    Args:
        links: as ``links_of`` tells them.
    """
    rows = _rows_of(program)
    cost = _Measured(program, costs).cost(number)
    mine = [
        Link(
            name=link.name,
            bytes_per_s=link.bytes_per_s,
            free_nbytes=link.free_nbytes / rows.blocks,
        )
        for link in links
    ]
    best = thriftiest(cost, mine, list(cuts(rows.kinds[number].rows)), within=ALIKE)
    return Solved(cut=best.cut, room_for_all=math.isfinite(step_s(cost, mine, 1.0)), cost=cost)


def probed_cuts(rows: int) -> tuple[int, ...]:
    """The cuts that the first forward of a block measures, largest first."""
    return tuple(dict.fromkeys(measurable_cut(rows, alpha) for alpha in PROBES[:2]))


def links_of(
    program: Program, costs: Costs, *, memory_nbytes: int, drive_nbytes: int
) -> list[Link]:
    """Where saved bytes of blocks go, as a run measures it.

    Args:
        memory_nbytes: of saved tensors that may stay.
        drive_nbytes: that the drive takes of them.
    """
    seconds = max(
        costs.read_s(PIECE_NBYTES) + costs.read_latency_s,
        costs.write_s(PIECE_NBYTES) + costs.write_latency_s,
    )
    links = [
        Link(name="memory", bytes_per_s=math.inf, free_nbytes=float(memory_nbytes)),
        Link(name="drive", bytes_per_s=PIECE_NBYTES / seconds, free_nbytes=float(drive_nbytes)),
    ]
    return less_room(links, _outside_nbytes(program))


def _outside_nbytes(program: Program) -> int:
    """What is saved outside of blocks, from the first one on: logits, the loss."""
    rows = _rows_of(program)
    begin = min((forward.begin for forward in rows.forwards), default=0)
    saved = {
        rows.savings[mark.saving].storage
        for mark in rows.marks
        if mark.what == What.SAVE and mark.at >= begin and rows.savings[mark.saving].forward < 0
    }
    return sum(program.storages[storage] for storage in saved)


def _rows_of(program: Program) -> RowProgram:
    assert program.rows is not None
    return program.rows


class _Measured:
    """What a run would measure of the blocks of a program."""

    def __init__(self, program: Program, costs: Costs) -> None:
        self._program = program
        self._rows = _rows_of(program)
        self._costs = costs

    def cost(self, number: int) -> BlockCost:
        """Of one kind of blocks."""
        kind, costs = self._rows.kinds[number], self._costs
        forwards = [at for at, one in enumerate(self._rows.forwards) if one.kind == number]
        begins = self._backward_begins()
        one = self._rows.forwards[forwards[0]]
        forward_s = self._between(one.begin, one.end)
        # From the first rebuild of a block to that of the block before it.
        backward_s = min(
            (
                self._between(begins[at], begins[at - 1])
                for at in forwards
                if at in begins and at - 1 in begins
            ),
            default=2 * forward_s,
        )
        rebuilding = Rebuilding()
        for cut in probed_cuts(kind.rows):
            rebuilding.rebuild(cut, self._rebuild_s(kind, cut))
        overhead_s, rebuild_s = rebuilding.split_s(kind.rows)
        largest = max(kind.targets)
        heads_s = 2 * kind.target_nbytes / largest * self._copy_s(largest)
        return BlockCost(
            forward_s=forward_s,
            backward_s=backward_s,
            rebuild_s=rebuild_s,
            heads_s=heads_s,
            overhead_s=overhead_s + kind.operations * costs.hook_s,
            whole_nbytes=kind.whole_nbytes,
            target_nbytes=kind.target_nbytes,
        )

    def _backward_begins(self) -> dict[int, int]:
        """Events before the backward of each forward asks for the first of its targets."""
        found: dict[int, int] = {}
        for mark in self._rows.marks:
            saving = self._rows.savings[mark.saving]
            if mark.what == What.UNSAVE and saving.forward >= 0:
                targets = self._rows.forwards[saving.forward].targets
                if saving.storage in targets:
                    found.setdefault(saving.forward, mark.at)
        return found

    def _between(self, begin: int, end: int) -> float:
        return sum(map(self._seconds, self._program.events[begin:end]))

    def _seconds(self, event: Event) -> float:
        if event.what is What.COMPUTE:
            return self._costs.seconds(self._program.operations[event.which])
        if event.what is What.ALLOCATE:
            return self._costs.fresh_s(self._program.storages[event.which])
        return 0.0

    def _rebuild_s(self, kind: BlockKind, cut: int) -> float:
        share = 1 - cut / kind.rows
        steps: Iterable[RowStep] = (
            step for part in kind.parts for step in (part.behind_cut if cut else part.all_rows)
        )
        return sum(self._step_s(kind, step, share) for step in steps)

    def _step_s(self, kind: BlockKind, step: RowStep, share: float) -> float:
        fresh = [round(nbytes * share) for nbytes in step.fresh_nbytes]
        seconds = sum(map(self._costs.fresh_s, fresh))
        if step.operation == COPY:
            seconds += sum(map(self._copy_s, fresh))
        else:
            operation = self._program.operations[step.operation]
            seconds += self._costs.seconds(scaled(operation, step, share))
        return seconds + sum(self._copy_s(round(kind.targets[at] * share)) for at in step.taken)

    def _copy_s(self, nbytes: int) -> float:
        return self._costs.seconds(copying(nbytes))
