"""From the chain that a block's rows are rebuilt by to plain records of what that takes.

As ``tokenwise.replay`` executes it: what products write straight to its place takes no memory of
its own, other rows are copied there, a source is copied where its rows are not one stretch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from offload.swap.planning.row_records import COPY, BlockKind, RowPart, RowStep
from offload.swap.tokenwise.analyse import Chain, Target
from offload.swap.tokenwise.program import Node, Value
from offload.swap.tokenwise.replay import writing_out
from offload.swap.tokenwise.rows import Axis

How: TypeAlias = Literal["behind_cut", "all_rows", "compared"]


def kind_of(chain: Chain, operations: Sequence[int]) -> BlockKind:
    """What rebuilding the targets of ``chain`` takes.

    Args:
        operations: of the traced step, one for each node of the chain's program.
    """
    program = chain.program
    if not chain.targets:
        reasons = "; ".join(dict.fromkeys(chain.whole.values()))
        why = f"none of its saved tensors can be rebuilt row by row: {reasons}"
        return BlockKind(rows=program.rows, whole_nbytes=chain.whole_nbytes, why=why)
    saved = {slot.storage for slot in program.slots}
    values = program.values
    return BlockKind(
        rows=program.rows,
        operations=len(program.nodes),
        targets=tuple(target.nbytes for target in chain.targets),
        parts=tuple(_part(chain, roots, operations) for roots in _parts(chain)),
        whole_nbytes=chain.whole_nbytes,
        at_once=all(
            values[source].kind == "external" or values[source].storage in saved
            for source in chain.sources
        ),
    )


def part_values(chain: Chain) -> list[list[int]]:
    """The values that the operations of each part read, in the order of ``BlockKind.parts``."""
    return [
        [value for index in _nodes_of(chain, roots) for value in chain.program.nodes[index].refs()]
        for roots in _parts(chain)
    ]


def _parts(chain: Chain) -> list[list[int]]:
    """The roots of each part."""
    parts: dict[int, list[int]] = {}
    for target in sorted(chain.targets, key=lambda target: target.part):
        parts.setdefault(target.part, []).append(target.root)
    return list(parts.values())


def _nodes_of(chain: Chain, roots: Sequence[int]) -> list[int]:
    """The operations behind some of the targets, in order."""
    needed, found = set(roots), list[int]()
    for index in reversed(chain.nodes):
        node = chain.program.nodes[index]
        if needed.intersection(node.outs):
            found.append(index)
            needed.update(node.refs())
    return found[::-1]


def _part(chain: Chain, roots: Sequence[int], operations: Sequence[int]) -> RowPart:
    nodes = _nodes_of(chain, roots)
    read = {value for index in nodes for value in chain.program.nodes[index].refs()} | set(roots)
    sources = [at for at, value in enumerate(chain.sources) if value in read]

    def steps(how: How) -> tuple[RowStep, ...]:
        walk = _Walk(chain, how)
        for at in sources:
            walk.start_from(chain.sources[at])
        for index in nodes:
            walk.execute(chain.program.nodes[index], operations[index])
        return walk.steps()

    numbers = {target.root: at for at, target in enumerate(chain.targets)}
    return RowPart(
        targets=tuple(numbers[root] for root in roots),
        sources=tuple(sources),
        behind_cut=steps("behind_cut"),
        all_rows=steps("all_rows"),
        compared=steps("compared"),
    )


@dataclass(slots=True)
class _Draft:
    operation: int
    fixed_nbytes: int = 0
    fresh_nbytes: list[int] = field(default_factory=list)
    done: list[int] = field(default_factory=list)
    taken: list[int] = field(default_factory=list)


class _Walk:
    """Follows results that take memory from where they are made to their last use."""

    def __init__(self, chain: Chain, how: How) -> None:
        self._chain = chain
        self._values = chain.program.values
        self._how = how
        self._targets = {target.root: at for at, target in enumerate(chain.targets)}
        self._drafts: list[_Draft] = []
        self._holds: dict[int, int] = {}  # by value: the fresh result that holds it
        self._last: list[int] = []  # by fresh result: the step that needs it last

    def start_from(self, source: int) -> None:
        """Rows of a source are taken."""
        value, axis = self._values[source], self._chain.axes[source]
        if axis is not None and not self._is_stretch(value, axis):
            self._drafts.append(_Draft(COPY))
            self._make(source, value.nbytes)

    def execute(self, node: Node, operation: int) -> None:
        """One more operation."""
        refs = node.refs()
        fixed = sum(self._values[one].nbytes for one in refs if self._chain.axes.get(one) is None)
        draft = _Draft(operation, fixed)
        self._drafts.append(draft)
        for value in refs:
            self._use(value)
        bases = {} if node.mutated else {self._values[one].storage: one for one in refs}
        for out in node.outs:
            base = bases.get(self._values[out].storage)
            if base is not None:  # a view
                if base in self._holds:
                    self._holds[out] = self._holds[base]
            elif out in self._targets:
                self._complete(out, node, draft)
            else:
                self._make(out, self._values[out].nbytes)

    def _complete(self, out: int, node: Node, draft: _Draft) -> None:
        """The rows of a target: written straight to their place, or copied there."""
        target: Target = self._chain.targets[self._targets[out]]
        value = self._values[out]
        if self._how == "compared":
            draft.taken.append(self._targets[out])
            self._make(out, value.nbytes)
            return
        stretch = _is_row_major(value) and self._is_stretch(value, target.axis)
        if stretch and target.axis.outer == 1 and writing_out(node.op) is not None:
            return
        draft.taken.append(self._targets[out])
        self._make(out, value.nbytes)
        if stretch:
            del self._holds[out]  # what follows reads the copy

    def _make(self, value: int, nbytes: int) -> None:
        self._holds[value] = len(self._last)
        self._last.append(len(self._drafts) - 1)
        self._drafts[-1].fresh_nbytes.append(nbytes)

    def _use(self, value: int) -> None:
        if value in self._holds:
            self._last[self._holds[value]] = len(self._drafts) - 1

    def _is_stretch(self, value: Value, axis: Axis) -> bool:
        """Whether some last rows of all sequences lie side by side, in the tensor's own order."""
        if axis.outer > 1:
            return False
        step = value.stride[axis.dim]
        return self._how == "all_rows" or not any(
            size > 1 and stride > step
            for size, stride in zip(value.shape, value.stride, strict=True)
        )

    def steps(self) -> tuple[RowStep, ...]:
        """All of them."""
        for number, last in enumerate(self._last):
            self._drafts[last].done.append(number)
        return tuple(
            RowStep(
                operation=draft.operation,
                fixed_nbytes=draft.fixed_nbytes,
                fresh_nbytes=tuple(draft.fresh_nbytes),
                done=tuple(draft.done),
                taken=tuple(draft.taken),
            )
            for draft in self._drafts
        )


def _is_row_major(value: Value) -> bool:
    passed = [math.prod(value.shape[dim + 1 :]) for dim in range(len(value.shape))]
    pairs = zip(value.shape, value.stride, passed, strict=True)
    return all(size == 1 or stride == expected for size, stride, expected in pairs)
