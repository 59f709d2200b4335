"""A placement block by block and tick by tick: what is held where, what moves when, what is used.

Written down from the placement alone, by walking through the step, and not from the sums that the
solver works with: ``check`` holds the one against the other.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from offload.allocator.lifetimes import Lifetime
from offload.swap.planning.placing.choices import REBUILD
from offload.swap.planning.placing.network import Network
from offload.swap.planning.placing.placement import ClassPlacement, Placement, Share
from offload.swap.planning.placing.work import Work


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """``nbytes`` of ``tier`` from a first to a last tick, both included.

    Attributes:
        key: the class and the block.
        source: where what is only visiting came from; the tier itself for a home, ``made`` for
            what was computed there.
    """

    key: str
    tier: str
    nbytes: float
    first: int
    last: int
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """``nbytes`` on their way from tick ``issued`` on; there before ``due`` ends.

    Attributes:
        times: how often in a step: once for each micro-batch.
        exposed: nothing hides it.
    """

    key: str
    source: str
    target: str
    nbytes: float
    issued: int
    due: int
    times: int = 1
    exposed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """``key`` has to be on ``tier`` at ``tick``."""

    key: str
    tier: str
    nbytes: float
    tick: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """One step.

    Attributes:
        rebuilt: (kind of block, fraction, saved part) of each time that backward computes again.
    """

    holdings: tuple[Holding, ...]
    moves: tuple[Move, ...]
    uses: tuple[Use, ...]
    rebuilt: tuple[tuple[int, float, str | None], ...]

    def lifetimes(self, tier: str, *, align: int = 512) -> list[Lifetime]:
        """What has to be packed into an arena of ``tier`` (``allocator.bilevel``)."""
        return [
            Lifetime(
                key=f"{number}: {one.key}",
                nbytes=max(round(one.nbytes), 1),
                first_tick=one.first,
                last_tick=one.last,
                align=align,
            )
            for number, one in enumerate(self.holdings)
            if one.tier == tier
        ]


def schedule_of(placement: Placement, work: Work, network: Network) -> Schedule:
    """Every holding, move and use of a step."""
    walk = _Walk(placement, work, network)
    for one in placement.classes:
        for block in work.positions(one.kind):
            for number, share in enumerate(one.shares):
                walk.place(one, share, block, f"{_name(one)} {number} of block {block}")
    return Schedule(
        holdings=tuple(walk.holdings),
        moves=tuple(walk.moves),
        uses=tuple(walk.uses),
        rebuilt=tuple(walk.rebuilt),
    )


def _name(one: ClassPlacement) -> str:
    return one.role if one.part is None else f"{one.role} {one.part}"


class _Walk:
    """Writes down what one share of one block does in a step."""

    def __init__(self, placement: Placement, work: Work, network: Network) -> None:
        self.work, self.network = work, network
        self.here = network.compute
        self.ahead = int(placement.ahead)
        self.staged = placement.staged
        self.passes = placement.passes
        self.holdings: list[Holding] = []
        self.moves: list[Move] = []
        self.uses: list[Use] = []
        self.rebuilt: list[tuple[int, float, str | None]] = []

    def place(self, one: ClassPlacement, share: Share, block: int, key: str) -> None:
        nbytes = one.nbytes * share.fraction
        if one.role in {"frozen", "weights"}:
            slots = self.work.slots if one.role == "weights" else 1
            self._weights(share, block, key, nbytes, slots=slots)
        elif one.role == "gradients":
            self._gradients(share, block, key, nbytes)
        elif one.role == "states":
            self._home(share.where, key, nbytes, slots=self.work.slots)
        else:
            self._saved(one, share, block, key, nbytes)
        if share.stepper is not None:
            self._step(one, share, key, nbytes)

    def _weights(self, share: Share, block: int, key: str, nbytes: float, *, slots: int) -> None:
        self._home(share.where, key, nbytes, slots=slots)
        ticks = self.work.forward_tick(block), self.work.backward_tick(block)
        self.uses += [Use(key=key, tier=self.here, nbytes=nbytes, tick=tick) for tick in ticks]
        if share.where == self.here:
            return
        present = sorted({tick for use in ticks for tick in self._until(use)})
        for first, last in _stretches(present):
            self._hold(key, self.here, nbytes, first, last, source=share.where)
            exposed = bool(self.ahead) and block == 0 and first == 0
            move = Move(
                key=key,
                source=share.where,
                target=self.here,
                nbytes=nbytes,
                issued=first,
                due=next(tick for tick in ticks if first <= tick <= last),
            )
            self._move(move, exposed=exposed)

    def _until(self, use: int) -> range:
        """The ticks at which what is used at ``use`` is there: that one, and one to arrive in."""
        return range(max(use - self.ahead, 0), use + 1)

    def _gradients(self, share: Share, block: int, key: str, nbytes: float) -> None:
        made, end = self.work.backward_tick(block), self.work.step_tick
        begin = made if self.passes == 1 else 0
        if share.where == self.here:
            self._hold(key, self.here, nbytes, begin, end, source="made")
            if self.passes > 1:
                self._hold(key, self.here, nbytes, made, made, source="made")
            return
        last = made + self.ahead if block > 0 else made
        self._hold(key, self.here, nbytes, made, last, source="made")
        self._hold(key, share.where, nbytes, begin, end, source=self.here)
        move = Move(
            key=key, source=self.here, target=share.where, nbytes=nbytes, issued=made, due=last
        )
        self._move(move, exposed=bool(self.ahead) and block == 0)
        if self.passes > 1 and share.where != "host":
            back = Move(
                key=key,
                source=share.where,
                target="host",
                nbytes=nbytes,
                issued=made,
                due=made,
                times=self.passes - 1,
            )
            self.moves.append(back)

    def _saved(
        self, one: ClassPlacement, share: Share, block: int, key: str, nbytes: float
    ) -> None:
        made, used = self.work.forward_tick(block), self.work.backward_tick(block)
        self.uses.append(Use(key=key, tier=self.here, nbytes=nbytes, tick=used))
        reach = 0 if share.where == REBUILD else self.ahead
        there = {*range(made, made + reach + 1), *range(used - reach, used + 1)}
        stretches = list(_stretches(sorted(there)))
        if share.where == self.here or len(stretches) == 1:
            self._hold(key, self.here, nbytes, made, used, source="made")
            return
        for first, last in stretches:
            visiting = share.where != REBUILD and first != made
            source = share.where if visiting else "made"
            self._hold(key, self.here, nbytes, first, last, source=source)
        if share.where == REBUILD:
            self.rebuilt.append((one.kind, share.fraction, one.part))
            return
        self._hold(key, share.where, nbytes, made, used, source=self.here)
        out = (self.here, share.where, made, made + reach)
        back = (share.where, self.here, used - reach, used)
        for source, target, issued, due in (out, back):
            move = Move(
                key=key, source=source, target=target, nbytes=nbytes, issued=issued, due=due
            )
            self._move(move)

    def _step(self, one: ClassPlacement, share: Share, key: str, nbytes: float) -> None:
        assert share.stepper is not None
        tier, tick = self.network.stepper(share.stepper).tier, self.work.step_tick
        kind = self.work.kinds[one.kind]
        stepped = share.fraction * kind.stepped_nbytes(one.role)
        staging = "host" if self.staged or kind.recoded is not None else tier
        ways = [(share.where, staging, nbytes), (staging, tier, stepped)]
        if one.role != "gradients":
            ways += [(tier, staging, stepped), (staging, share.where, nbytes)]
            if self.work.commits and self.work.store not in {None, share.where}:
                assert self.work.store is not None
                ways.append((staging, self.work.store, nbytes))
        self.moves += [
            Move(key=key, source=source, target=target, nbytes=moved, issued=tick, due=tick)
            for source, target, moved in ways
            if source != target
        ]

    def _home(self, tier: str, key: str, nbytes: float, *, slots: int) -> None:
        """All the time, and in the store's slots whatever else holds it."""
        end, store = self.work.step_tick, self.work.store
        if store is not None:
            self._hold(key, store, slots * nbytes, 0, end, source=store)
        if tier != store:
            self._hold(key, tier, nbytes, 0, end, source=tier)

    def _hold(
        self, key: str, tier: str, nbytes: float, first: int, last: int, *, source: str
    ) -> None:
        self.holdings.append(
            Holding(key=key, tier=tier, nbytes=nbytes, first=first, last=last, source=source)
        )

    def _move(self, move: Move, *, exposed: bool = False) -> None:
        """Once for each pass, of which the one at a step's edge may be exposed."""
        if hidden := self.passes - exposed:
            self.moves.append(dataclasses.replace(move, times=hidden))
        if exposed:
            self.moves.append(dataclasses.replace(move, exposed=True))


def _stretches(ticks: list[int]) -> Iterator[tuple[int, int]]:
    """(first, last) of the runs of consecutive ticks."""
    first = last = ticks[0]
    for tick in ticks[1:]:
        if tick != last + 1:
            yield first, last
            first = tick
        last = tick
    yield first, last
