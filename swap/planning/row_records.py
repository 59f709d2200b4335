"""Which saved bytes of a step can be rebuilt from few rows, and how: records beside a program.

Written by ``row_tracing`` with the runtime's own analysis (``tokenwise.analyse``), read by
``row_events`` and ``row_alpha``. Nothing here knows torch. Sizes are those of all rows: behind a
cut there are fewer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

NOT_COUNTED = -1  # in place of a storage: its bytes are a weight's, or not of the step
COPY = -1  # in place of an operation: what is fresh, or taken, is copied there


class Saving(NamedTuple):
    """A storage that autograd saves, by one forward of a block.

    Attributes:
        storage: as a program numbers it.
        forward: of a block, by its place in ``RowProgram.forwards``; -1: outside of all.
    """

    storage: int
    forward: int


class Mark(NamedTuple):
    """A moment of a saving.

    Attributes:
        at: events of the program before it.
        what: ``SAVE``, ``UNSAVE`` or ``FORGET``, as ``program.What``.
        saving: by its place in ``RowProgram.savings``.
    """

    at: int
    what: int
    saving: int


class Packed(NamedTuple):
    """A storage that rows are rebuilt from is given in charge when there were ``at`` events."""

    storage: int
    at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RowStep:
    """One operation that rebuilds rows.

    Attributes:
        operation: of the program, on all rows; or ``COPY``.
        fixed_nbytes: of what it moves, however few the rows: weights.
        fresh_nbytes: of each result that takes memory of its own. Such results are counted from 0
            on, through all steps of a part.
        done: results that nothing needs after it.
        taken: targets of the kind that it completes, where that takes a copy, or a comparison.
    """

    operation: int
    fixed_nbytes: int = 0
    fresh_nbytes: tuple[int, ...] = ()
    done: tuple[int, ...] = ()
    taken: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPart:
    """Targets that are rebuilt together (``tokenwise.analyse.Target``).

    Attributes:
        targets: by their place in ``BlockKind.targets``.
        sources: by their place in ``BlockForward.sources``.
        behind_cut: how rows behind a cut are rebuilt.
        all_rows: how all rows are.
        compared: how they are rebuilt to be compared with what was saved.
    """

    targets: tuple[int, ...]
    sources: tuple[int, ...]
    behind_cut: tuple[RowStep, ...]
    all_rows: tuple[RowStep, ...]
    compared: tuple[RowStep, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockKind:
    """Blocks that do the same.

    Attributes:
        rows: tokens of one sequence.
        operations: of a forward, each of which is recorded.
        targets: bytes of each storage that can be rebuilt.
        whole_nbytes: what is swapped whatever the cut, sources included.
        at_once: one forward tells all that is compared; else the second does.
        why: nothing is rebuilt.
    """

    rows: int
    operations: int = 0
    targets: tuple[int, ...] = ()
    parts: tuple[RowPart, ...] = ()
    whole_nbytes: int = 0
    at_once: bool = True
    why: str = ""

    @property
    def target_nbytes(self) -> int:
        """What can be rebuilt, all rows."""
        return sum(self.targets)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockForward:
    """One forward of one block.

    Attributes:
        block: its name.
        kind: by its place in ``RowProgram.kinds``.
        begin, end: events of the program before it, and until its end.
        targets: the storages of the kind's targets.
        sources: what its rows are rebuilt from, in the order in which that is given in charge.
        externals: what came from outside: the first forward gives it in charge until its end.
        weights: which each part reads.
    """

    block: str
    kind: int
    begin: int
    end: int
    targets: tuple[int, ...] = ()
    sources: tuple[Packed, ...] = ()
    externals: tuple[Packed, ...] = ()
    weights: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RowProgram:
    """The blocks of one step.

    Attributes:
        blocks: how many the model has.
    """

    blocks: int
    kinds: tuple[BlockKind, ...]
    forwards: tuple[BlockForward, ...]
    savings: tuple[Saving, ...]
    marks: tuple[Mark, ...]

    @staticmethod
    def from_fields(fields: Mapping[str, Any]) -> "RowProgram":
        """What JSON has made of the fields."""
        return RowProgram(
            blocks=fields["blocks"],
            kinds=tuple(map(_kind, fields["kinds"])),
            forwards=tuple(map(_forward, fields["forwards"])),
            savings=tuple(Saving(*saving) for saving in fields["savings"]),
            marks=tuple(Mark(*mark) for mark in fields["marks"]),
        )


def _kind(fields: Mapping[str, Any]) -> BlockKind:
    parts = tuple(map(_part, fields["parts"]))
    return BlockKind(**{**fields, "targets": tuple(fields["targets"]), "parts": parts})


def _part(fields: Mapping[str, Any]) -> RowPart:
    return RowPart(
        targets=tuple(fields["targets"]),
        sources=tuple(fields["sources"]),
        **{name: _steps(fields[name]) for name in ("behind_cut", "all_rows", "compared")},
    )


def _steps(steps: Sequence[Mapping[str, Any]]) -> tuple[RowStep, ...]:
    return tuple(
        RowStep(
            operation=step["operation"],
            fixed_nbytes=step["fixed_nbytes"],
            **{name: tuple(step[name]) for name in ("fresh_nbytes", "done", "taken")},
        )
        for step in steps
    )


def _forward(fields: Mapping[str, Any]) -> BlockForward:
    packed = {
        name: tuple(Packed(*one) for one in fields[name]) for name in ("sources", "externals")
    }
    weights = tuple(map(tuple, fields["weights"]))
    targets = tuple(fields["targets"])
    return BlockForward(**{**fields, **packed, "weights": weights, "targets": targets})
