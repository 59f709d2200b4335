"""The plan: where each class of each kind of block goes, how long a step takes, what binds it."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from offload.swap.planning.placing.choices import (
    PHASES,
    Choice,
    Cost,
    Phase,
    Rules,
    add,
    class_nbytes,
    constant_cost,
    limit_seconds,
)
from offload.swap.planning.placing.network import Network
from offload.swap.planning.placing.work import Role, Work

FORMAT_VERSION = 2  # since 2 shares have no precision: the settings decide it


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A part of a class and its place.

    Attributes:
        where: a tier, or ``rebuild``.
        fraction: of the class, the same in each block of its kind; of what is rebuilt as a whole,
            the fraction of blocks.
        stepper: who steps it; None for what nobody steps.
    """

    where: str
    fraction: float
    stepper: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassPlacement:
    """One class of one kind of block.

    Attributes:
        kind: number of the kind; ``blocks`` of them are in the model.
        part: which of the saved ones, by name.
        nbytes: of one block, in the form in which it is kept.
        shares: their fractions are 1 together.
    """

    kind: int
    blocks: int
    role: Role
    part: str | None
    nbytes: int
    shares: tuple[Share, ...]

    def fraction(self, where: str) -> float:
        """Of the class, in one place."""
        return sum(share.fraction for share in self.shares if share.where == where)


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseTime:
    """How long a phase takes, and why.

    Attributes:
        lanes: seconds of each lane that works in it.
        bound_by: the limit that is reached.
    """

    name: Phase
    seconds: float
    lanes: Mapping[str, float]
    bound_by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TierUse:
    """The most that a tier holds, and when that is."""

    tier: str
    peak_nbytes: int
    budget_nbytes: int
    moment: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What the next GiB of a tier would save of a step; 0 where it does not bind."""

    tier: str
    s_per_gib: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where everything goes.

    Attributes:
        kinds: names of the kinds of blocks; ``order`` is the kind of each block.
        passes: micro-batches of a step.
        ahead: whether the next block's bytes are moved while one computes.
        staged: whether tiles of the step pass through host memory, whoever steps them.
        exposed_s: what nothing hides: the first fetch, the last gradients.
    """

    kinds: tuple[str, ...]
    order: tuple[int, ...]
    passes: int
    tokens: int
    ahead: bool
    staged: bool
    classes: tuple[ClassPlacement, ...]
    phases: tuple[PhaseTime, ...]
    exposed_s: float
    uses: tuple[TierUse, ...]
    prices: tuple[Price, ...]

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return sum(phase.seconds for phase in self.phases) + self.exposed_s

    @property
    def bound_by(self) -> str:
        """The limit that most of the step waits for."""
        seconds: dict[str, float] = {}
        for phase in self.phases:
            seconds[phase.bound_by] = seconds.get(phase.bound_by, 0.0) + phase.seconds
        return max(seconds, key=lambda name: seconds[name])

    @property
    def window_blocks(self) -> int:
        """Blocks whose streamed weights are on the compute tier at once."""
        return 1 + self.ahead

    def of(self, block: int, role: Role, part: str | None = None) -> tuple[Share, ...]:
        """The shares of one class of one block; none if it has no such class."""
        for one in self.classes:
            if (one.kind, one.role, one.part) == (self.order[block], role, part):
                return one.shares
        return ()

    def nbytes(self, role: Role, where: str) -> int:
        """Bytes of a class in one place, of all blocks, as they are kept."""
        found = (one for one in self.classes if one.role == role)
        return round(sum(one.blocks * one.nbytes * one.fraction(where) for one in found))

    def to_json(self) -> str:
        """The plan as versioned JSON."""
        fields = {"format": FORMAT_VERSION, "step_s": self.step_s, "bound_by": self.bound_by}
        return json.dumps({**fields, **dataclasses.asdict(self)}, indent=2)


def make_placement(
    work: Work,
    network: Network,
    rules: Rules,
    shares: Sequence[tuple[Choice, Cost, float]],
    prices: tuple[Price, ...],
) -> Placement:
    """The plan of these choices.

    Args:
        shares: each choice with its cost and the fraction of the class that has it.
    """
    total = add(
        [(1.0, constant_cost(work, network)), *((share, cost) for _, cost, share in shares)],
        work.ticks,
    )
    return Placement(
        kinds=tuple(kind.name for kind in work.kinds),
        order=work.order,
        passes=work.passes,
        tokens=work.tokens,
        ahead=rules.ahead,
        staged=rules.staged,
        classes=_classes(work, shares),
        phases=tuple(_phase(network, total, phase, ahead=rules.ahead) for phase in PHASES),
        exposed_s=total.exposed_s,
        uses=tuple(_use(work, network, total, tier) for tier in network.budgets),
        prices=prices,
    )


def _classes(
    work: Work, shares: Sequence[tuple[Choice, Cost, float]]
) -> tuple[ClassPlacement, ...]:
    grouped: dict[tuple[int, Role, int], list[Share]] = {}
    for choice, _, fraction in shares:
        found = grouped.setdefault((choice.kind, choice.role, choice.part), [])
        if fraction:
            found.append(Share(where=choice.where, fraction=fraction, stepper=choice.stepper))
    return tuple(
        ClassPlacement(
            kind=kind,
            blocks=work.order.count(kind),
            role=role,
            part=work.kinds[kind].saved[part].name if role == "saved" else None,
            nbytes=class_nbytes(work.kinds[kind], role, part),
            shares=tuple(found),
        )
        for (kind, role, part), found in grouped.items()
    )


def _phase(network: Network, total: Cost, phase: Phase, *, ahead: bool) -> PhaseTime:
    limits = limit_seconds(network, total.seconds, phase, ahead=ahead)
    seconds = max(limits)
    return PhaseTime(
        name=phase,
        seconds=seconds,
        lanes={
            lane: spent for (one, lane), spent in total.seconds.items() if one == phase and spent
        },
        bound_by=network.limits[limits.index(seconds)].name,
    )


def _use(work: Work, network: Network, total: Cost, tier: str) -> TierUse:
    held = total.held.get(tier)
    tick = 0 if held is None else int(held.argmax())
    return TierUse(
        tier=tier,
        peak_nbytes=0 if held is None else round(float(held[tick])),
        budget_nbytes=network.budgets[tier],
        moment=work.tick_name(tick),
    )
