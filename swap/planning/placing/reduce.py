"""From a traced program to the work of its blocks.

[Note: stages] A step is cut where the model begins to use the weights of another block, the modules
that repeat in a list; what stands before, between and behind blocks is a stage of its own. In
backward a stage begins when its weights are read back or its first gradient is complete. A weight
belongs to the last stage that uses it whole: a tied head has it, its table only looks rows up.

[Note: what can be rebuilt] Of what a block saves, what came in from the stage before, attention's
output and random masks are sources; everything else follows from them by operations on each row
alone (``swap.tokenwise`` proves that of a real block, this takes it for granted) and costs what
those operations took in forward. Attention's output can be rebuilt only whole. Where attention is
no single kernel, or what was saved can't be told apart, it is all or nothing for each block.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from offload.swap.planning.placing.work import BlockWork, Recoded, SavedPart
from offload.swap.planning.program import Operation, Program, StateForm, What
from offload.swap.planning.sim_pieces import SteppedWeight, stepped_weights
from offload.swap.states import SMALL_NUMEL

_SAME_TIME = 0.1  # blocks that differ less are one kind
_RANDOM = frozenset({"native_dropout", "bernoulli_", "rand", "randn", "rand_like", "randn_like"})
_OPEN_ATTENTION = frozenset({"bmm", "_softmax", "baddbmm"})


@dataclass(slots=True)
class _Stage:
    """What was seen of one stage."""

    name: str
    block: bool
    forward_s: float = 0.0
    backward_s: float = 0.0
    forward_peak: int = 0
    backward_peak: int = 0
    operations: list[Operation] = field(default_factory=list)
    saved: list[int] = field(default_factory=list)  # storages
    weights: set[str] = field(default_factory=set)


def reduce_program(
    program: Program,
    seconds: Callable[[Operation], float],
    recoding_s: Callable[[StateForm, int], float],
) -> tuple[tuple[BlockWork, ...], tuple[int, ...]]:
    """(kinds, order) of the blocks of ``program``; equal blocks are one kind.

    Args:
        seconds: of one operation, on the processor that computes.
        recoding_s: of the host, for so many numbers that change from a form and back.
    """
    stages = list(_Cutting(program, seconds, recoding_s).stages())
    members: list[list[BlockWork]] = []
    order: list[int] = []
    for stage in stages:
        number = next((at for at, kind in enumerate(members) if _alike(stage, kind[0])), None)
        if number is None:
            number = len(members)
            members.append([])
        members[number].append(stage)
        order.append(number)
    return tuple(_kind_of(alike) for alike in members), tuple(order)


def _alike(one: BlockWork, other: BlockWork) -> bool:
    """Whether both hold the same bytes, and take the same time but for what is at their edges."""
    return _bytes_of(one) == _bytes_of(other) and all(
        math.isclose(mine, its, rel_tol=_SAME_TIME)
        for mine, its in zip(_times_of(one), _times_of(other), strict=True)
    )


def _bytes_of(work: BlockWork) -> tuple[object, ...]:
    parts = tuple(
        (part.name, part.nbytes, part.rebuild_s is None, part.rowwise) for part in work.saved
    )
    weights = work.trained_nbytes, work.frozen_nbytes, work.gradients_nbytes, work.states_nbytes
    return *weights, work.recoded, parts


def _times_of(work: BlockWork) -> tuple[float, ...]:
    return work.forward_s, work.backward_s, *(part.rebuild_s or 0.0 for part in work.saved)


def _kind_of(alike: Sequence[BlockWork]) -> BlockWork:
    """Its times are their mean; workspaces the largest, for small leftovers add up."""
    first = alike[0]
    if len(alike) == 1:
        return first
    forward_s, backward_s, *rebuild_s = (
        sum(times) / len(alike) for times in zip(*map(_times_of, alike), strict=True)
    )
    return replace(
        first,
        name=_general(first.name),
        forward_s=forward_s,
        backward_s=backward_s,
        saved=tuple(
            part if part.rebuild_s is None else replace(part, rebuild_s=seconds)
            for part, seconds in zip(first.saved, rebuild_s, strict=True)
        ),
        forward_workspace_nbytes=max(one.forward_workspace_nbytes for one in alike),
        backward_workspace_nbytes=max(one.backward_workspace_nbytes for one in alike),
    )


def _general(name: str) -> str:
    """``layers.3`` as one of many: ``layers.*``."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


class _Cutting:
    """Walks through the events once."""

    def __init__(
        self,
        program: Program,
        seconds: Callable[[Operation], float],
        recoding_s: Callable[[StateForm, int], float],
    ) -> None:
        self._program = program
        self._recoding_s = recoding_s
        sizes = {weight.name: weight.nbytes for weight in program.census.weights}
        self._numels = {name: size // program.itemsizes[name] for name, size in sizes.items()}
        self._stepped: Mapping[str, SteppedWeight] = {}
        if program.stepping is not None:
            self._stepped = stepped_weights(program.stepping, sizes, self._numels)
        self._seconds = [seconds(operation) for operation in program.operations]
        self._blocks = block_names([weight.name for weight in program.census.weights])
        self._names = [weight.name for weight in program.census.weights]
        self._stages: list[_Stage] = []
        self._numbers: dict[str, int] = {}
        self._owners: dict[str, int] = {}
        self._lookups: dict[str, int] = {}
        self._producers: dict[int, tuple[int, int]] = {}  # storage: (stage, place in its forward)
        self._fresh: list[int] = []  # storages whose operation is not told yet
        self._saved: set[int] = set()
        self._living: set[int] = set()
        self._unsaved_nbytes = 0

    def stages(self) -> Iterator[BlockWork]:
        """The work of each, in the order of forward."""
        current, forward = -1, True
        for what, which in self._program.events:
            if forward and what in {What.UNSAVE, What.GRADIENT}:
                forward, current = False, len(self._stages) - 1
            if what in {What.USE, What.LOOKUP, What.GRADIENT}:
                current = self._enter(what, which, current, forward=forward)
            if current < 0 and what in {What.COMPUTE, What.ALLOCATE, What.SAVE}:
                current = self._stage("before", block=False)
            if what is What.COMPUTE:
                self._compute(which, current, forward=forward)
            self._count(what, which, current, forward=forward)
        for name in self._names:
            self._owners.setdefault(name, self._lookups.get(name, 0))
        for number, stage in enumerate(self._stages):
            yield self._work(number, stage)

    def _enter(self, what: What, which: int, current: int, *, forward: bool) -> int:
        if what is What.USE:
            names: tuple[str, ...] = self._program.uses[which]
        elif what is What.LOOKUP:
            names = (self._program.lookups[which].weight,)
        else:
            names = (self._names[which],)
        if not forward:
            known = [self._owners[name] for name in names if name in self._owners]
            return min([current, *known])
        blocks = {self._blocks[name] for name in names}
        block = next(iter(blocks)) if len(blocks) == 1 else None
        if block is not None:
            current = self._stage(block, block=True)
        elif current < 0 or self._stages[current].block:
            current = self._stage(self._outside(names[0]), block=False)
        owners = self._owners if what is What.USE else self._lookups
        owners.update(dict.fromkeys(names, current))
        return current

    def _outside(self, weight: str) -> str:
        """A name of its own for what stands outside of blocks, if need be with a suffix."""
        name = weight.rpartition(".")[0] or weight
        while name in self._numbers:
            name += " again"
        return name

    def _stage(self, name: str, *, block: bool) -> int:
        if name not in self._numbers:
            self._numbers[name] = len(self._stages)
            self._stages.append(_Stage(name=name, block=block))
        return self._numbers[name]

    def _compute(self, which: int, current: int, *, forward: bool) -> None:
        stage = self._stages[current]
        if not forward:
            stage.backward_s += self._seconds[which]
            return
        for storage in self._fresh:
            self._producers[storage] = current, len(stage.operations)
        self._fresh.clear()
        stage.operations.append(self._program.operations[which])
        stage.forward_s += self._seconds[which]

    def _count(self, what: What, which: int, current: int, *, forward: bool) -> None:
        """Storages that come, go, and are saved; the most that lives and is not saved."""
        if what not in _STORAGES:
            return
        nbytes = self._program.storages[which]
        before = which in self._living and which not in self._saved
        if what is What.ALLOCATE:
            self._living.add(which)
            self._fresh.append(which)
        elif what is What.FREE:
            self._living.discard(which)
        elif what is What.SAVE:
            self._saved.add(which)
            if forward:
                self._stages[current].saved.append(which)
        else:
            self._saved.discard(which)
        after = which in self._living and which not in self._saved
        self._unsaved_nbytes += nbytes * (after - before)
        if current >= 0:
            stage = self._stages[current]
            if forward:
                stage.forward_peak = max(stage.forward_peak, self._unsaved_nbytes)
            else:
                stage.backward_peak = max(stage.backward_peak, self._unsaved_nbytes)

    def _work(self, number: int, stage: _Stage) -> BlockWork:
        frozen = 0
        trained: dict[str, int] = {}
        states: dict[str, int] = {}
        stepping = self._program.stepping
        for weight in self._program.census.weights:
            if self._owners[weight.name] != number:
                continue
            if weight.trainable:
                trained[weight.name] = weight.nbytes
                sizes = stepping.states_nbytes.get(weight.name, ()) if stepping else ()
                states[weight.name] = sum(sizes)
            else:
                frozen += weight.nbytes
        saved = tuple(self._parts(number, stage))
        rebuilt = any(part.rebuild_s is not None for part in saved)
        return BlockWork(
            name=stage.name,
            trained_nbytes=sum(trained.values()),
            frozen_nbytes=frozen,
            gradients_nbytes=sum(trained.values()),
            states_nbytes=sum(states.values()),
            recoded=self._recoded(trained, states),
            saved=saved,
            forward_s=stage.forward_s,
            backward_s=stage.backward_s,
            forward_workspace_nbytes=stage.forward_peak,
            backward_workspace_nbytes=max(
                stage.backward_peak, stage.forward_peak if rebuilt else 0
            ),
        )

    def _recoded(self, trained: Mapping[str, int], states: Mapping[str, int]) -> Recoded | None:
        """As ``tile_parts`` makes it of a tile; small weights are stepped whole, as they are."""
        stepping = self._program.stepping
        by_tile = stepping.by_tile if stepping is not None else frozenset()
        recoded = {
            name: self._stepped[name]
            for name in trained
            if name in by_tile and self._numels[name] > SMALL_NUMEL
        }
        if not recoded:
            return None
        numels = self._numels
        weights = {name: one.weight_nbytes * numels[name] for name, one in recoded.items()}
        widened = {name: one.states_nbytes * numels[name] for name, one in recoded.items()}
        weights_nbytes = sum({**trained, **weights}.values())
        return Recoded(
            weights_nbytes=weights_nbytes,
            gradients_nbytes=weights_nbytes,
            states_nbytes=sum({**states, **widened}.values()),
            seconds=sum(
                self._recoding_s(form, count * numels[name])
                for name, one in recoded.items()
                for form, count in one.recoded().items()
            ),
        )

    def _parts(self, number: int, stage: _Stage) -> Iterator[SavedPart]:
        """See [Note: what can be rebuilt]."""
        nbytes: dict[str, int] = defaultdict(int)
        last = -1  # the last operation that a rebuilt row needs
        for storage in stage.saved:
            group, place = self._group(number, stage, storage)
            nbytes[group] += self._program.storages[storage]
            if group == "rows":
                last = max(last, place)
        seconds = dict(zip(self._program.operations, self._seconds, strict=True))
        attention_s = rows_s = 0.0
        for place, operation in enumerate(stage.operations):
            if operation.kind == "attention":
                attention_s += seconds[operation]
            elif place <= last:
                rows_s += seconds[operation]
        rowwise = not any(operation.name in _OPEN_ATTENTION for operation in stage.operations)
        for group, rebuild_s in (("inputs", None), ("attention", attention_s), ("rows", rows_s)):
            if nbytes[group]:
                yield SavedPart(
                    name=group,
                    nbytes=nbytes[group],
                    rebuild_s=rebuild_s,
                    rowwise=rowwise and group == "rows",
                )

    def _group(self, number: int, stage: _Stage, storage: int) -> tuple[str, int]:
        producer, place = self._producers.get(storage, (-1, -1))
        if producer != number or not stage.block:
            return "inputs", place
        operation = stage.operations[place]
        if operation.kind == "attention":
            return "attention", place
        return ("inputs" if operation.name in _RANDOM else "rows"), place


_STORAGES = frozenset({What.ALLOCATE, What.FREE, What.SAVE, What.FORGET})


def block_names(names: Sequence[str]) -> dict[str, str | None]:
    """The block of each weight by its name, such as ``layers.3``; None outside of any list.

    Of nested lists the one with the most entries counts.
    """
    entries: dict[str, set[str]] = defaultdict(set)
    for name in names:
        for prefix, index in _numbered(name):
            entries[prefix].add(index)
    found: dict[str, str | None] = {}
    for name in names:
        lists = [one for one in _numbered(name) if len(entries[one[0]]) > 1]
        best = max(lists, key=lambda one: len(entries[one[0]]), default=None)
        found[name] = None if best is None else ".".join(filter(None, best))
    return found


def _numbered(name: str) -> Iterator[tuple[str, str]]:
    """(list, index) of each number in a dotted name."""
    parts = name.split(".")
    for at, part in enumerate(parts[:-1]):
        if part.isdigit():
            yield ".".join(parts[:at]), part
