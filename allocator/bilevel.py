"""The bi-level memory plan of a trace: inside one repeated block, then over all blocks.

[Note: two levels] A training step repeats its blocks: a layer's forward, a layer's backward. MEMO
(arXiv 2407.12117) packs the buffers that live and die within a block once, and then
the step, where each block is one pseudo-buffer of that size, beside all that outlives a block.
Here

- blocks are found in the trace itself: ticks at which the same sizes come and go, in runs of
  equal blocks (``repeats``). Where in its period a block begins is chosen so that the fewest
  bytes of short life cross its borders;
- equal blocks are one problem, solved once, whatever run they are of;
- what comes in one block and goes in one other, as saved activations do, or at one tick, as
  gradients that stay do, is a pseudo-buffer, too: a *bundle*, whose buffers all live at once;
- a pseudo-buffer takes its peak for as long as any of its buffers lives. Where that puts a tick
  above the bound of the whole trace, and it holds more there than its buffers do, it is *opened*:
  they take part in the second level by themselves. Those are few: the ones at the step's peak.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias

from offload.allocator.extent import Extent, align_up
from offload.allocator.lifetimes import (
    Lifetime,
    LiveBytes,
    Packing,
    check_keys,
    granule_of,
    live_peak_nbytes,
)
from offload.allocator.packing import Placement, place
from offload.allocator.repeats import Run, find_runs

_Form: TypeAlias = tuple[tuple[int, int, int, int], ...]  # bytes, first and last moment, alignment


_APART_COUNT = 1000
"""So many buffers that cross blocks are worth a second try, without bundles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockKind:
    """One block problem and its solution.

    Attributes:
        count: blocks of this kind in the step.
        buffers: of one block, that live within it.
        nbytes: of its pseudo-buffer.
        lower_bound_nbytes: no packing of these buffers is smaller.
    """

    count: int
    buffers: int
    nbytes: int
    lower_bound_nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Addresses of a whole trace.

    Attributes:
        packing: of all its lifetimes.
        kinds: the block problems, in the order of their first blocks.
        opened: blocks and bundles whose buffers took part in the second level by themselves.
        outer: buffers and pseudo-buffers of the second level.
    """

    packing: Packing
    kinds: tuple[BlockKind, ...]
    opened: int
    outer: int

    @property
    def peak_nbytes(self) -> int:
        """Bytes of the arena."""
        return self.packing.peak_nbytes

    @property
    def lower_bound_nbytes(self) -> int:
        """No plan has a smaller peak."""
        return self.packing.lower_bound_nbytes

    @property
    def gap(self) -> float:
        """How far the peak is above the bound, as a share of it."""
        return self.packing.gap


def plan_memory(lifetimes: Sequence[Lifetime]) -> MemoryPlan:
    """Offsets for a trace in two levels; see [Note: two levels]. Deterministic.

    Args:
        lifetimes: in the order of allocation, those of one tick among themselves, too.

    Raises:
        ValueError: a key comes twice.
    """
    check_keys(lifetimes)
    bound = live_peak_nbytes(lifetimes)
    blocks, crossing = _split(lifetimes)
    solved: dict[_Form, Placement] = {}
    for block in blocks:
        if block.form not in solved:
            solved[block.form] = place(block.relative())
    groups = [block.group(solved[block.form]) for block in blocks]
    bundles, single = _bundle(lifetimes, blocks, crossing)
    level = _second_level(lifetimes, bound, [*groups, *bundles], single)
    if level.peak_nbytes > bound and len(crossing) <= _APART_COUNT:
        apart = _second_level(lifetimes, bound, groups, crossing)
        level = min(level, apart, key=lambda one: one.peak_nbytes)
    return MemoryPlan(
        packing=Packing(
            extents={
                life.key: Extent(level.offsets[index], life.nbytes)
                for index, life in enumerate(lifetimes)
            },
            peak_nbytes=align_up(level.peak_nbytes, granule_of(lifetimes)),
            lower_bound_nbytes=level.lower_bound_nbytes,
        ),
        kinds=tuple(
            BlockKind(
                count=sum(block.form == form for block in blocks),
                buffers=len(form),
                nbytes=placement.peak_nbytes,
                lower_bound_nbytes=placement.lower_bound_nbytes,
            )
            for form, placement in solved.items()
        ),
        opened=level.opened,
        outer=level.outer,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """Buffers that live within one block: by position, and as any block of its kind has them."""

    members: tuple[int, ...]
    form: _Form
    first_tick: int
    last_tick: int

    def relative(self) -> list[Lifetime]:
        return [Lifetime("", *buffer) for buffer in self.form]

    def group(self, placement: Placement) -> "_Group":
        align = max(align for *_, align in self.form)  # what it holds is aligned as it is
        ticks = self.first_tick, self.last_tick
        return _Group(
            members=self.members,
            offsets=placement.offsets,
            pseudo=Lifetime("", placement.peak_nbytes, *ticks, align),
            wasteful=(ticks,),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Buffers that one pseudo-buffer stands for, and where they are in it.

    Attributes:
        wasteful: first and last of the ticks at which it may hold more than its buffers need.
    """

    members: tuple[int, ...]
    offsets: tuple[int, ...]
    pseudo: Lifetime
    wasteful: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Level:
    """The second level, solved: offsets of all buffers by position; see ``MemoryPlan``."""

    offsets: dict[int, int]
    peak_nbytes: int
    lower_bound_nbytes: int
    opened: int
    outer: int


def _second_level(
    lifetimes: Sequence[Lifetime], bound: int, groups: Sequence[_Group], single: Sequence[int]
) -> _Level:
    """Pack the groups and what is in none; a group that wastes bytes at a full tick is opened."""
    live = LiveBytes([*(lifetimes[index] for index in single), *(one.pseudo for one in groups)])
    outer, closed = list(single), []
    for group in groups:
        if max((live.most_during(*ticks) for ticks in group.wasteful), default=0) > bound:
            outer += group.members
        else:
            closed.append(group)
    placement = place([*(lifetimes[index] for index in outer), *(one.pseudo for one in closed)])
    offsets = dict(zip(outer, placement.offsets, strict=False))
    for group, base in zip(closed, placement.offsets[len(outer) :], strict=True):
        for index, offset in zip(group.members, group.offsets, strict=True):
            offsets[index] = base + offset
    return _Level(
        offsets=offsets,
        peak_nbytes=placement.peak_nbytes,
        lower_bound_nbytes=bound if closed else placement.lower_bound_nbytes,
        opened=len(groups) - len(closed),
        outer=len(outer) + len(closed),
    )


def _bundle(
    lifetimes: Sequence[Lifetime], blocks: Sequence[_Block], crossing: Sequence[int]
) -> tuple[list[_Group], list[int]]:
    """Groups of what comes in one block and goes in one later block or tick; all others.

    The buffers of a bundle all live at once, so they lie one behind the other.
    """
    starts = [block.first_tick for block in blocks]

    def block_at(tick: int) -> int | None:
        number = bisect_right(starts, tick) - 1
        return number if number >= 0 and tick <= blocks[number].last_tick else None

    bundles: dict[tuple[int, str, int], list[int]] = {}
    single: list[int] = []
    for index in crossing:
        life = lifetimes[index]
        born, died = block_at(life.first_tick), block_at(life.last_tick)
        if born is None or born == died:
            single.append(index)
        else:
            end = ("tick", life.last_tick) if died is None else ("block", died)
            bundles.setdefault((born, *end), []).append(index)
    return [_stacked(lifetimes, members) for members in bundles.values()], single


def _stacked(lifetimes: Sequence[Lifetime], members: Sequence[int]) -> _Group:
    lives = [lifetimes[index] for index in members]
    align = max(life.align for life in lives)
    *offsets, nbytes = accumulate((align_up(life.nbytes, align) for life in lives), initial=0)
    come = [life.first_tick for life in lives]
    go = [life.last_tick for life in lives]
    return _Group(
        members=tuple(members),
        offsets=tuple(offsets),
        pseudo=Lifetime("", nbytes, min(come), max(go), align),
        wasteful=((min(come), max(come) - 1), (min(go) + 1, max(go))) if len(lives) > 1 else (),
    )


def _split(lifetimes: Sequence[Lifetime]) -> tuple[list[_Block], list[int]]:
    """The blocks, and the positions of all that lives in more than one, or in none."""
    timeline = _Timeline(lifetimes)
    ranges = [
        moments for run in find_runs(timeline.tokens()) for moments in timeline.blocks_of(run)
    ]
    members: list[list[int]] = [[] for _ in ranges]
    starts = [moments.start for moments in ranges]
    crossing = []
    for index, (first, last) in enumerate(timeline.spans):
        number = bisect_right(starts, first) - 1
        if number >= 0 and last < ranges[number].stop:
            members[number].append(index)
        else:
            crossing.append(index)
    blocks = []
    for moments, inside in zip(ranges, members, strict=True):
        if inside:
            lives = [lifetimes[index] for index in inside]
            spans = [timeline.spans[index] for index in inside]
            blocks.append(
                _Block(
                    members=tuple(inside),
                    form=tuple(
                        (life.nbytes, first - moments.start, last - moments.start, life.align)
                        for life, (first, last) in zip(lives, spans, strict=True)
                    ),
                    first_tick=min(life.first_tick for life in lives),
                    last_tick=max(life.last_tick for life in lives),
                )
            )
    return blocks, crossing


class _Timeline:
    """A trace by its *moments*: the ticks at which something comes or goes, numbered."""

    def __init__(self, lifetimes: Sequence[Lifetime]) -> None:
        self._lifetimes = lifetimes
        ticks = {life.first_tick for life in lifetimes} | {life.last_tick for life in lifetimes}
        moment = {tick: number for number, tick in enumerate(sorted(ticks))}
        self.spans = [(moment[life.first_tick], moment[life.last_tick]) for life in lifetimes]
        self.moments = len(moment)

    def tokens(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """The sizes that come and those that go, by moment."""
        come: list[list[int]] = [[] for _ in range(self.moments)]
        go: list[list[int]] = [[] for _ in range(self.moments)]
        for life, (first, last) in zip(self._lifetimes, self.spans, strict=True):
            come[first].append(life.nbytes)
            go[last].append(life.nbytes)
        return [(tuple(born), tuple(sorted(died))) for born, died in zip(come, go, strict=True)]

    def blocks_of(self, run: Run) -> Iterator[range]:
        """Moments of each block of ``run``, from where the fewest short-lived bytes cross."""
        middle = run.start + (run.end - run.start) // run.period // 2 * run.period
        at = min(middle, run.end - run.period)
        changes = [0] * (run.period + 1)  # of the bytes that cross a border before each moment
        for life, (first, last) in zip(self._lifetimes, self.spans, strict=True):
            begin, stop = max(first + 1, at), min(last + 1, at + run.period)
            if last - first < run.period and begin < stop:
                changes[begin - at] += life.nbytes
                changes[stop - at] -= life.nbytes
        cost = list(accumulate(changes[:-1]))
        shifts = ((at - run.start + number) % run.period for number in range(run.period))
        _, shift = min(zip(cost, shifts, strict=True))
        for start in range(run.start + shift, run.end - run.period + 1, run.period):
            yield range(start, start + run.period)
