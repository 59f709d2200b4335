"""What each choice costs: bytes of every tier at every tick, seconds of every lane in every phase.

[Note: the time model] A step has the phases forward, backward and step. In each, compute and all
moves go on side by side, so that it takes as long as its slowest limit; what can't be hidden comes
on top: the first block's weights before forward, the last gradients after backward. That presumes
room on the compute tier for one block ahead: its weights while the one before computes, and what
this one saved while the next computes (MEMO's two rounding buffers, SIGMOD'25, section 4). Without
that room (``ahead=False``) nothing hides: compute and each lane take their turns. It is the bound
that list schedules with prefetching approach (FlexGen, ICML'23, section 4.3; LLM-Viewer's roofline
with more lanes), not a schedule: latency, the first requests of a phase and the memory bandwidth
that copies take from compute are left out.

[Note: who steps what] Of a block's trained elements a share is stepped by each stepper. Their
weights, gradients and states come from wherever they are to the stepper's tier, and weights and
states go back. So each choice of these classes names its stepper, and the shares of the classes of
one stepper agree. Where a form has to be changed on the way (``Recoded``), or where tiles are put
together in host memory in any case (``Rules.staged``), the way leads through host memory.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from offload.swap.planning.placing.network import COMPUTE, Network, Stepper
from offload.swap.planning.placing.work import STEPPED, BlockWork, Role, Work

Phase: TypeAlias = Literal["forward", "backward", "step"]
PHASES: tuple[Phase, ...] = ("forward", "backward", "step")
REBUILD = "rebuild"  # a place that holds nothing: backward computes it again
Bytes: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One place for one class of one kind of block.

    Attributes:
        kind: of the block.
        role: the class; ``part`` tells which of the saved ones.
        where: a tier, or ``rebuild``.
        stepper: who steps it; None for what nobody steps.
        whole: it holds for all of a block's bytes or none.
    """

    kind: int
    role: Role
    where: str
    part: int = 0
    stepper: str | None = None
    whole: bool = False


@dataclass(slots=True)
class Cost:
    """What a choice takes when all of the class is placed so.

    Attributes:
        held: by tier, bytes at each tick.
        seconds: by phase and lane.
        exposed_s: what nothing hides.
    """

    ticks: int
    held: dict[str, Bytes] = field(default_factory=dict)
    seconds: dict[tuple[Phase, str], float] = field(default_factory=lambda: defaultdict(float))
    exposed_s: float = 0.0

    def hold(self, tier: str, nbytes: float, first: int, last: int) -> None:
        """``nbytes`` more of ``tier`` from tick ``first`` to ``last``, both included."""
        if nbytes and first <= last:
            if tier not in self.held:
                self.held[tier] = np.zeros(self.ticks)
            self.held[tier][first : last + 1] += nbytes

    def move(self, phase: Phase, route: Mapping[str, float], nbytes: float) -> None:
        """``nbytes`` over every lane of ``route``."""
        for lane, s_per_byte in route.items():
            self.seconds[phase, lane] += nbytes * s_per_byte


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What a plan may do.

    Attributes:
        ahead: whether there is room for one block ahead; see [Note: the time model].
        rebuild: whether backward may compute saved tensors again.
        homes: by role, the tiers that may hold it; all where the role is missing.
        recoded_homes: the tiers that may hold recoded states; None: those of all states.
        steppers: names of those who may step; all where empty.
        even: whether each stepper has the same share of every kind of block.
        shares: by stepper, the share that it steps of every kind; free where it is missing.
        staged: whether tiles are put together in host memory, whoever steps them.
        grain: shares are multiples of ``1 / grain``; None: any.
    """

    ahead: bool = True
    rebuild: bool = True
    homes: Mapping[Role, tuple[str, ...]] = field(default_factory=dict)
    recoded_homes: tuple[str, ...] | None = None
    steppers: tuple[str, ...] = ()
    even: bool = False
    shares: Mapping[str, float] = field(default_factory=dict)
    staged: bool = False
    grain: int | None = None

    def tiers(self, role: Role, kind: BlockWork, network: Network) -> tuple[str, ...]:
        """That may hold ``role`` of ``kind``."""
        allowed = self.homes.get(role)
        if role == "states" and kind.recoded is not None and self.recoded_homes is not None:
            allowed = self.recoded_homes
        return tuple(tier for tier in network.budgets if allowed is None or tier in allowed)

    def stepping(self, network: Network) -> tuple[Stepper, ...]:
        """Who may step."""
        return tuple(
            one for one in network.steppers if not self.steppers or one.name in self.steppers
        )


def choices_of(work: Work, network: Network, rules: Rules) -> Iterator[Choice]:
    """Every choice there is, in an order that is always the same."""
    for at, kind in enumerate(work.kinds):
        if kind.frozen_nbytes:
            for tier in rules.tiers("frozen", kind, network):
                yield Choice(kind=at, role="frozen", where=tier)
        for role in stepped_roles(kind):
            for stepper in rules.stepping(network):
                for tier in rules.tiers(role, kind, network):
                    yield Choice(kind=at, role=role, where=tier, stepper=stepper.name)
        for number, part in enumerate(kind.saved):
            for tier in rules.tiers("saved", kind, network):
                yield Choice(kind=at, role="saved", where=tier, part=number)
            if rules.rebuild and part.rebuild_s is not None:
                whole = not part.rowwise
                yield Choice(kind=at, role="saved", where=REBUILD, part=number, whole=whole)


def stepped_roles(kind: BlockWork) -> list[Role]:
    """The classes of a kind that the optimizer touches."""
    return [role for role in STEPPED if class_nbytes(kind, role)]


def class_nbytes(kind: BlockWork, role: Role, part: int = 0) -> int:
    """Of one block of ``kind``, in the form in which it is kept."""
    sizes = {
        "frozen": kind.frozen_nbytes,
        "weights": kind.trained_nbytes,
        "gradients": kind.gradients_nbytes,
        "states": kind.states_nbytes,
    }
    return kind.saved[part].nbytes if role == "saved" else sizes[role]


def constant_cost(work: Work, network: Network) -> Cost:
    """What every plan takes: compute, workspaces, what is there all the time, the store, forms."""
    cost = Cost(work.ticks)
    for tier, nbytes in work.fixed_nbytes.items():
        cost.hold(tier, nbytes, 0, work.step_tick)
    for block, number in enumerate(work.order):
        kind = work.kinds[number]
        forward, backward = work.forward_tick(block), work.backward_tick(block)
        cost.hold(network.compute, kind.forward_workspace_nbytes, forward, forward)
        cost.hold(network.compute, kind.backward_workspace_nbytes, backward, backward)
        cost.seconds["forward", COMPUTE] += work.passes * kind.forward_s
        cost.seconds["backward", COMPUTE] += work.passes * kind.backward_s
        if kind.recoded is not None:
            cost.seconds[stepping_phase(work), network.host_lane] += kind.recoded.seconds
        if work.store is not None:
            durable = kind.frozen_nbytes + work.slots * kind.trained_nbytes
            cost.hold(work.store, durable, 0, work.step_tick)
    return cost


def cost_of(choice: Choice, work: Work, network: Network, rules: Rules) -> Cost:
    """What ``choice`` takes for all blocks of its kind."""
    cost = Cost(work.ticks)
    kind = work.kinds[choice.kind]
    for block in work.positions(choice.kind):
        if choice.role in {"frozen", "weights"}:
            _weights(cost, choice, kind, block, work, network, rules)
        elif choice.role == "gradients":
            _gradients(cost, choice, kind.gradients_nbytes, block, work, network, rules)
        elif choice.role == "states":
            _states(cost, choice, kind.states_nbytes, work)
        else:
            _saved(cost, choice, kind, block, work, network, rules)
        if choice.stepper is not None:
            _step(cost, choice, kind, work, network, rules)
    return cost


def _weights(
    cost: Cost,
    choice: Choice,
    kind: BlockWork,
    block: int,
    work: Work,
    network: Network,
    rules: Rules,
) -> None:
    nbytes = kind.frozen_nbytes if choice.role == "frozen" else kind.trained_nbytes
    home = choice.where
    if home != work.store:
        cost.hold(home, nbytes, 0, work.step_tick)
    if home != network.compute:
        route = network.route(home, network.compute)
        for first, last in visits(work, block, ahead=rules.ahead):
            cost.hold(network.compute, nbytes, first, last)
        exposed = block == 0 and rules.ahead
        cost.exposed_s += nbytes * max(route.values()) if exposed else 0.0
        cost.move("forward", route, (work.passes - exposed) * nbytes)
        if block < work.blocks - 1:  # the last one is still there
            cost.move("backward", route, work.passes * nbytes)


def _gradients(
    cost: Cost,
    choice: Choice,
    nbytes: int,
    block: int,
    work: Work,
    network: Network,
    rules: Rules,
) -> None:
    assert choice.stepper is not None
    home, here, passes = choice.where, network.compute, work.passes
    stepper = network.stepper(choice.stepper)
    made = work.backward_tick(block)
    first = made if passes == 1 else 0  # what earlier passes added up is there from the start
    if home == here:
        cost.hold(here, nbytes, first, work.step_tick)
        if passes > 1:
            cost.hold(here, nbytes, made, made)
    else:
        route = network.route(here, home)
        cost.hold(here, nbytes, made, made + (rules.ahead and block > 0))
        cost.hold(home, nbytes, first, work.step_tick)
        exposed = block == 0 and rules.ahead
        cost.exposed_s += nbytes * max(route.values()) if exposed else 0.0
        cost.move("backward", route, (passes - exposed) * nbytes)
        if passes > 1:  # the host adds them up: two reads and a write
            cost.move("backward", network.route(home, "host"), (passes - 1) * nbytes)
            host = next((one for one in network.steppers if one.tier == "host"), stepper)
            adding = 3 * (passes - 1) * nbytes * host.s_per_byte
            cost.seconds["backward", host.lane] += adding


def _states(cost: Cost, choice: Choice, nbytes: int, work: Work) -> None:
    if work.store is not None:
        cost.hold(work.store, work.slots * nbytes, 0, work.step_tick)
    if choice.where != work.store:
        cost.hold(choice.where, nbytes, 0, work.step_tick)


def _step(
    cost: Cost, choice: Choice, kind: BlockWork, work: Work, network: Network, rules: Rules
) -> None:
    """The optimizer reads and, but for gradients, changes it; see [Note: who steps what]."""
    assert choice.stepper is not None
    stepper, home, phase = network.stepper(choice.stepper), choice.where, stepping_phase(work)
    writes = choice.role != "gradients"
    kept, stepped = class_nbytes(kind, choice.role), kind.stepped_nbytes(choice.role)
    staged = rules.staged or kind.recoded is not None
    staging = "host" if staged else stepper.tier
    cost.seconds[phase, stepper.lane] += (1 + writes) * stepped * stepper.s_per_byte
    cost.move(phase, network.route(home, staging), kept)
    cost.move(phase, network.route(staging, stepper.tier), stepped)
    if writes:
        cost.move(phase, network.route(stepper.tier, staging), stepped)
        cost.move(phase, network.route(staging, home), kept)
        if work.commits and work.store not in {None, home}:
            assert work.store is not None
            cost.move(phase, network.route(staging, work.store), kept)


def _saved(
    cost: Cost,
    choice: Choice,
    kind: BlockWork,
    block: int,
    work: Work,
    network: Network,
    rules: Rules,
) -> None:
    part, here = kind.saved[choice.part], network.compute
    forward, backward = work.forward_tick(block), work.backward_tick(block)
    stay = joined((forward, forward), (backward, backward))
    if choice.where != REBUILD:
        stay = joined((forward, forward + rules.ahead), (backward - rules.ahead, backward))
    if choice.where == here or len(stay) == 1:
        cost.hold(here, part.nbytes, forward, backward)
        return
    for first, last in stay:
        cost.hold(here, part.nbytes, first, last)
    if choice.where == REBUILD:
        assert part.rebuild_s is not None
        cost.seconds["backward", COMPUTE] += work.passes * part.rebuild_s
    else:
        cost.hold(choice.where, part.nbytes, forward, backward)
        cost.move("forward", network.route(here, choice.where), work.passes * part.nbytes)
        cost.move("backward", network.route(choice.where, here), work.passes * part.nbytes)


def visits(work: Work, block: int, *, ahead: bool) -> list[tuple[int, int]]:
    """(first, last) ticks at which the streamed weights of ``block`` are on the compute tier."""
    forward, backward = work.forward_tick(block), work.backward_tick(block)
    return joined((max(forward - ahead, 0), forward), (backward - ahead, backward))


def joined(one: tuple[int, int], other: tuple[int, int]) -> list[tuple[int, int]]:
    """The two spans, or one where they touch: what is needed again at once stays."""
    if other[0] <= one[1] + 1:
        return [(one[0], other[1])]
    return [one, other]


def stepping_phase(work: Work) -> Phase:
    """The phase that the optimizer's work belongs to."""
    return "backward" if work.step_in_backward else "step"


def limit_seconds(
    network: Network, seconds: Mapping[tuple[Phase, str], float], phase: Phase, *, ahead: bool
) -> list[float]:
    """What each of the network's limits makes of ``phase``, at least.

    Without room ahead, compute does not go on beside moves in forward and backward.
    """
    compute = 0.0 if ahead or phase == "step" else seconds.get((phase, COMPUTE), 0.0)
    found = []
    for limit in network.limits:
        total = sum(
            weight * seconds.get((phase, lane), 0.0) for lane, weight in limit.lanes.items()
        )
        found.append(total if COMPUTE in limit.lanes else total + compute)
    return found


def add(costs: Sequence[tuple[float, Cost]], ticks: int) -> Cost:
    """The sum of costs, each so many times."""
    total = Cost(ticks)
    for share, cost in costs:
        for tier, held in cost.held.items():
            total.held[tier] = total.held.get(tier, 0.0) + share * held
        for key, seconds in cost.seconds.items():
            total.seconds[key] += share * seconds
        total.exposed_s += share * cost.exposed_s
    return total
