"""The events of a step under token-wise recompute, from those of the plain step.

As ``tokenwise.passes`` and ``tokenwise.rebuild`` do it: of what can be rebuilt, *heads* (the rows
before the cut) are saved in its place, and what rows are rebuilt from is kept beside them until the
block's backward is over. Backward rebuilds a part at a time, two at most; what that takes is
borrowed from the memory that saved tensors may have. The first forward of each block swaps all of
it whole, and at its end rebuilds rows and compares them.
"""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from offload.swap.planning.program import Event, Operation, Program, What
from offload.swap.planning.row_records import (
    COPY,
    NOT_COUNTED,
    BlockForward,
    BlockKind,
    Mark,
    RowPart,
    RowProgram,
    RowStep,
)
from offload.swap.tokenwise.buffers import layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a step does with the blocks of one kind.

    Attributes:
        cut: rows of each sequence that are swapped; None: all is swapped, and nothing recorded.
        learns: the first forward of each block swaps all, and rebuilds and compares the rows
            behind each of these cuts.
        rehearses: and rebuilds these once more, to measure it.
    """

    cut: int | None = None
    learns: tuple[int, ...] = ()
    rehearses: tuple[int, ...] = ()


class RowEvents:
    """Writes the events of steps; all of them name rows of the tables of one program.

    Args:
        program: of the plain step, with what can be rebuilt.
    """

    def __init__(self, program: Program) -> None:
        assert program.rows is not None
        self.rows: RowProgram = program.rows
        self.plain = program
        self._operations = {one: at for at, one in enumerate(program.operations)}
        self._storages = list(program.storages)
        self._uses = {names: at for at, names in enumerate(program.uses)}
        self._prefetches: dict[tuple[int, ...], int] = {}
        self._marks: dict[int, list[Mark]] = defaultdict(list)
        for mark in self.rows.marks:
            self._marks[mark.at].append(mark)

    def step(self, choices: Sequence[Choice]) -> tuple[Event, ...]:
        """The events of a step with one choice for each kind of blocks."""
        return tuple(_Step(self, choices).events(self.plain.events, self._marks))

    def program(self, events: tuple[Event, ...]) -> Program:
        """The program of a step with ``events``, which ``step`` gave, and all tables up to now."""
        return dataclasses.replace(
            self.plain,
            operations=tuple(self._operations),
            storages=tuple(self._storages),
            uses=tuple(self._uses),
            prefetches=tuple(self._prefetches),
            events=events,
        )

    # Rows of tables.

    def storage(self, nbytes: int) -> int:
        """One more."""
        self._storages.append(nbytes)
        return len(self._storages) - 1

    def size(self, storage: int) -> int:
        """Its bytes."""
        return self._storages[storage]

    def copying(self, nbytes: int) -> Event:
        """So many bytes are copied, or compared with others."""
        return self._computing(copying(nbytes))

    def scaled(self, step: RowStep, share: float) -> Event:
        """An operation on a share of the rows."""
        return self._computing(scaled(self.plain.operations[step.operation], step, share))

    def using(self, weights: tuple[str, ...]) -> Event:
        """Weights are read."""
        return Event(What.USE, self._uses.setdefault(weights, len(self._uses)))

    def prefetching(self, storages: tuple[int, ...]) -> Event:
        """Storages are needed soon."""
        which = self._prefetches.setdefault(storages, len(self._prefetches))
        return Event(What.PREFETCH, which)

    def _computing(self, operation: Operation) -> Event:
        which = self._operations.setdefault(operation, len(self._operations))
        return Event(What.COMPUTE, which)


def copying(nbytes: int) -> Operation:
    """So many bytes are copied."""
    return Operation(
        name="copy", kind="pointwise", flops=0, nbytes=2 * nbytes, rows=0, dtype="float32"
    )


def scaled(operation: Operation, step: RowStep, share: float) -> Operation:
    """``operation`` on a share of its rows."""
    fixed = min(step.fixed_nbytes, operation.nbytes)
    return dataclasses.replace(
        operation,
        flops=round(operation.flops * share),
        nbytes=fixed + round((operation.nbytes - fixed) * share),
    )


@dataclass(slots=True)
class _Pass:
    """A forward of a block whose rows are rebuilt, and its backward.

    Attributes:
        sources: storages that it holds, once each time that they were given in charge.
        heads: by target.
        living: targets that autograd still needs.
        rebuilt: storages that are whole again, by target.
    """

    forward: BlockForward
    kind: BlockKind
    cut: int
    before: "_Pass | None"
    sources: list[int] = field(default_factory=list)
    heads: dict[int, int] = field(default_factory=dict)
    living: set[int] = field(default_factory=set)
    rebuilt: dict[int, int] = field(default_factory=dict)
    over: bool = False

    def packed(self) -> list[int]:
        """What backward needs, in the order of need."""
        return [] if self.over else [*self.sources, *self.heads.values()]


@dataclass(slots=True)
class _Turn:
    """A part that is whole again, and the bytes borrowed for it."""

    of: _Pass
    part: RowPart
    nbytes: int


class _Step:
    """One step."""

    def __init__(self, tables: RowEvents, choices: Sequence[Choice]) -> None:
        self._tables = tables
        self._choices = choices
        self._forwards = tables.rows.forwards
        self._kinds = tables.rows.kinds
        self._held: Counter[int] = Counter()  # handles of storages
        self._seen: set[str] = set()
        self._passes: dict[int, _Pass] = {}  # by forward
        self._learning: dict[int, Choice] = {}  # by forward
        self._previous: _Pass | None = None
        self._turns: list[_Turn | None] = [None, None]
        self._last_turn = 0
        self._at: dict[int, list[tuple[str, int, int]]] = defaultdict(list)
        for number, forward in enumerate(self._forwards):
            self._begin_later(number, forward)

    def _begin_later(self, number: int, forward: BlockForward) -> None:
        """Note what happens to a forward, and when."""
        choice, first = self._choices[forward.kind], forward.block not in self._seen
        self._seen.add(forward.block)
        packed = forward.sources
        if choice.learns and first:
            self._learning[number] = choice
            packed = forward.externals if self._kinds[forward.kind].at_once else packed
        elif choice.cut is None or not self._kinds[forward.kind].targets:
            return
        self._at[forward.begin].append(("begin", number, 0))
        for one in packed:
            if one.storage != NOT_COUNTED:
                self._at[one.at].append(("pack", number, one.storage))
        self._at[forward.end].append(("end", number, 0))

    def events(
        self, plain: Sequence[Event], marks: Mapping[int, Sequence[Mark]]
    ) -> Iterator[Event]:
        """All of them, in order."""
        savings = self._tables.rows.savings
        for at in range(len(plain) + 1):
            for what, number, storage in self._at.get(at, ()):
                yield from self._act(what, number, storage)
            for mark in marks.get(at, ()):
                saving = savings[mark.saving]
                yield from self._mark(What(mark.what), saving.storage, saving.forward)
            if at < len(plain) and plain[at].what not in _SAVING:
                yield plain[at]

    def _act(self, what: str, number: int, storage: int) -> Iterator[Event]:
        forward = self._forwards[number]
        kind, choice = self._kinds[forward.kind], self._choices[forward.kind]
        if what == "begin":
            cut = kind.rows if choice.cut is None else choice.cut
            made = _Pass(forward, kind, cut, self._previous)
            self._passes[number] = self._previous = made
        elif what == "pack":
            self._passes[number].sources.append(storage)
            yield from self._hold(storage)
        else:
            yield Event(What.RECORD, kind.operations)
            block = self._passes[number]
            if number in self._learning:
                yield from self._learn(block, choice)
                yield from self._release(block)
            elif not block.living:
                yield from self._release(block)

    # What is saved.

    def _hold(self, storage: int) -> Iterator[Event]:
        if not self._held[storage]:
            yield Event(What.SAVE, storage)
        self._held[storage] += 1

    def _let_go(self, storage: int) -> Iterator[Event]:
        self._held[storage] -= 1
        if not self._held[storage]:
            yield Event(What.FORGET, storage)

    def _release(self, block: _Pass) -> Iterator[Event]:
        """Nobody needs what ``block`` has given in charge."""
        for storage in block.packed():
            yield from self._let_go(storage)
        block.over = True

    def _mark(self, what: What, storage: int, number: int) -> Iterator[Event]:
        block = self._passes.get(number)
        rebuilds = block is not None and number not in self._learning
        if block is None or not rebuilds or storage not in block.forward.targets:
            if what is What.SAVE:
                yield from self._hold(storage)
            elif what is What.FORGET:
                yield from self._let_go(storage)
            else:
                yield Event(What.UNSAVE, storage)
            return
        target = block.forward.targets.index(storage)
        if what is What.SAVE:
            yield from self._save_head(block, target)
        elif what is What.UNSAVE:
            if target not in block.rebuilt:
                yield from self._rebuild(block, _part_of(block.kind, target))
        else:
            yield from self._forget(block, target)

    def _save_head(self, block: _Pass, target: int) -> Iterator[Event]:
        block.living.add(target)
        if not block.cut or target in block.heads:
            return
        nbytes = block.kind.targets[target] * block.cut // block.kind.rows
        head = block.heads[target] = self._tables.storage(nbytes)
        yield Event(What.ALLOCATE, head)
        yield self._tables.copying(nbytes)
        yield from self._hold(head)
        yield Event(What.FREE, head)

    def _forget(self, block: _Pass, target: int) -> Iterator[Event]:
        """Autograd needs a target no more."""
        block.living.discard(target)
        yield from self._drop(block, target)
        for turn, held in enumerate(self._turns):
            if held is not None and held.of is block and not block.living & {*held.part.targets}:
                yield from self._end(turn)
        if not block.living:
            yield from self._release(block)

    def _drop(self, block: _Pass, target: int) -> Iterator[Event]:
        rebuilt = block.rebuilt.pop(target, None)
        if rebuilt is not None:
            yield Event(What.FREE, rebuilt)

    # Backward.

    def _rebuild(self, block: _Pass, part: RowPart) -> Iterator[Event]:
        pieces = [target for target in part.targets if target in block.living]
        yield from self._take_turn(block, part, pieces)
        for target in pieces:
            whole = block.rebuilt[target] = self._tables.storage(block.kind.targets[target])
            yield Event(What.ALLOCATE, whole)
        # What was given in charge twice is the same storage, so that its place does not matter.
        counted = block.forward.sources
        sources = [counted[at].storage for at in part.sources]
        sources = [storage for storage in sources if storage != NOT_COUNTED]
        heads = [block.heads[target] for target in pieces if target in block.heads]
        yield self._tables.prefetching((*sources, *heads))
        for source in sources:
            yield Event(What.UNSAVE, source)
        before = block.before.packed() if block.before is not None else []
        yield self._tables.prefetching((*block.packed(), *before))
        yield from self._use_weights(block.forward, part, block.kind)
        steps = part.behind_cut if block.cut else part.all_rows
        yield from self._execute(block, steps, 1 - block.cut / block.kind.rows)
        for head in heads:
            yield Event(What.UNSAVE, head)
            yield self._tables.copying(self._tables.size(head))

    def _use_weights(
        self, forward: BlockForward, part: RowPart, kind: BlockKind
    ) -> Iterator[Event]:
        weights = forward.weights[kind.parts.index(part)]
        if weights:
            yield self._tables.using(weights)

    def _execute(
        self, block: _Pass, steps: Sequence[RowStep], share: float, *, compared: bool = False
    ) -> Iterator[Event]:
        """The operations of a part, on a share of the rows."""
        fresh: list[int] = []
        for step in steps:
            for nbytes in step.fresh_nbytes:
                fresh.append(self._tables.storage(round(nbytes * share)))
                yield Event(What.ALLOCATE, fresh[-1])
            if step.operation != COPY:
                yield self._tables.scaled(step, share)
            else:
                yield self._tables.copying(sum(map(self._tables.size, fresh)))
            for target in step.taken:
                if compared:
                    yield Event(What.UNSAVE, block.forward.targets[target])
                yield self._tables.copying(round(block.kind.targets[target] * share))
            for number in step.done:
                yield Event(What.FREE, fresh[number])

    def _take_turn(self, block: _Pass, part: RowPart, pieces: Sequence[int]) -> Iterator[Event]:
        """As ``Rebuilder``: the turn of the part that ended last, else of the older one."""
        turn = self._last_turn
        if self._turns[turn] is not None:
            turn ^= 1
            yield from self._end(turn)
        self._last_turn = turn
        _, nbytes = layout([block.kind.targets[target] for target in pieces])
        self._turns[turn] = _Turn(block, part, nbytes)
        yield Event(What.BORROW, nbytes)

    def _end(self, turn: int) -> Iterator[Event]:
        held, self._turns[turn] = self._turns[turn], None
        if held is not None:
            for target in held.part.targets:
                yield from self._drop(held.of, target)
            yield Event(What.BORROW, -held.nbytes)

    # The first forward.

    def _learn(self, block: _Pass, choice: Choice) -> Iterator[Event]:
        for cuts, compared in ((choice.learns, True), (choice.rehearses, False)):
            for cut in cuts:
                held: set[int] = set()  # what the part before was rebuilt from is still there
                for part in block.kind.parts:
                    sources = [block.forward.sources[at].storage for at in part.sources]
                    for storage in sources:
                        if storage != NOT_COUNTED and storage not in held:
                            yield Event(What.UNSAVE, storage)
                    held = set(sources)
                    yield from self._use_weights(block.forward, part, block.kind)
                    share = 1 - cut / block.kind.rows
                    yield from self._execute(block, part.compared, share, compared=compared)


_SAVING = frozenset({What.SAVE, What.UNSAVE, What.FORGET})


def _part_of(kind: BlockKind, target: int) -> RowPart:
    return next(part for part in kind.parts if target in part.targets)
