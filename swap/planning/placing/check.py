"""The one checker that every placement passes.

It trusts nothing that the solver says: it walks through the step (``schedule``), adds up bytes and
seconds anew, and compares.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping

from offload.allocator.lifetimes import Packing
from offload.allocator.lifetimes import check as check_packing
from offload.swap.planning.placing.choices import PHASES, REBUILD, Phase, stepped_roles
from offload.swap.planning.placing.network import COMPUTE, Network
from offload.swap.planning.placing.placement import ClassPlacement, Placement
from offload.swap.planning.placing.schedule import Move, Schedule, schedule_of
from offload.swap.planning.placing.work import Work

# Of a budget or a time: what the solver's tolerances and sums of fractions may come to.
TOLERANCE = 1e-7


def check(
    placement: Placement,
    work: Work,
    network: Network,
    *,
    packings: Mapping[str, Packing] | None = None,
) -> None:
    """Raise unless the placement keeps every promise.

    Every byte is placed exactly once; no tier is above its budget at any tick; every use is
    preceded by its fetch; phases are as long as predicted; and where a tier's addresses are given,
    no two living extents overlap.

    Args:
        packings: addresses by tier, of the lifetimes that ``schedule_of`` gives.

    Raises:
        ValueError: tells all that is wrong.
    """
    if problems := list(_misplaced(placement, work, network)):
        raise ValueError("\n".join(problems))
    schedule = schedule_of(placement, work, network)
    problems = [
        *_over_budget(schedule, work, network),
        *_late(schedule),
        *_mistimed(placement, schedule, work, network),
    ]
    if problems:
        raise ValueError("\n".join(problems))
    for tier, packing in (packings or {}).items():
        check_packing(packing, schedule.lifetimes(tier))


def _misplaced(placement: Placement, work: Work, network: Network) -> Iterator[str]:
    expected: dict[tuple[int, str, str | None], int] = {}
    for number, kind in enumerate(work.kinds):
        sizes = {
            "weights": kind.trained_nbytes,
            "gradients": kind.gradients_nbytes,
            "states": kind.states_nbytes,
        }
        expected |= {(number, role, None): sizes[role] for role in stepped_roles(kind)}
        if kind.frozen_nbytes:
            expected[number, "frozen", None] = kind.frozen_nbytes
        expected |= {(number, "saved", part.name): part.nbytes for part in kind.saved}
    found = {(one.kind, one.role, one.part): one.nbytes for one in placement.classes}
    if found != expected or len(placement.classes) != len(expected):
        yield f"classes are {found}, and should be {expected}"
    stepping = {None, *(one.name for one in network.steppers)}
    for one in placement.classes:
        whole = math.fsum(share.fraction for share in one.shares)
        if abs(whole - 1) > TOLERANCE or any(share.fraction < 0 for share in one.shares):
            yield f"{_name(one)}: shares of {whole} in all, each byte goes to one place"
        for share in one.shares:
            if share.where not in network.budgets and (one.role, share.where) != ("saved", REBUILD):
                yield f"{_name(one)}: {share.where} is no place for it"
            if share.stepper not in stepping:
                yield f"{_name(one)}: {share.stepper} steps it, nobody of that name can"
    yield from _disagreeing(placement)


def _disagreeing(placement: Placement) -> Iterator[str]:
    """Classes of a kind of which one stepper would step different shares."""
    by_kind: dict[int, dict[str | None, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for one in placement.classes:
        if one.role in {"weights", "gradients", "states"}:
            for share in one.shares:
                stepped = by_kind[one.kind][share.stepper]
                stepped[one.role] = stepped.get(one.role, 0.0) + share.fraction
    for kind, steppers in by_kind.items():
        roles = {one.role for one in placement.classes if one.kind == kind} - {"saved", "frozen"}
        for stepper, found in steppers.items():
            shares = [found.get(role, 0.0) for role in roles]
            if max(shares) - min(shares) > TOLERANCE:
                yield f"kind {kind}: {stepper} would step {found}"


def held_nbytes(schedule: Schedule, work: Work, network: Network) -> dict[str, list[float]]:
    """Bytes of each tier at each tick."""
    held = {tier: [0.0] * work.ticks for tier in network.budgets}
    for tier, nbytes in work.fixed_nbytes.items():
        held[tier] = [float(nbytes)] * work.ticks
    for block, number in enumerate(work.order):
        kind = work.kinds[number]
        held[network.compute][work.forward_tick(block)] += kind.forward_workspace_nbytes
        held[network.compute][work.backward_tick(block)] += kind.backward_workspace_nbytes
    for one in schedule.holdings:
        for tick in range(one.first, one.last + 1):
            held[one.tier][tick] += one.nbytes
    return held


def _over_budget(schedule: Schedule, work: Work, network: Network) -> Iterator[str]:
    for tier, at in held_nbytes(schedule, work, network).items():
        budget = network.budgets[tier]
        most = max(at)
        if most > budget + TOLERANCE * max(budget, 1 << 20):
            yield (
                f"{tier} holds {most:.0f} bytes in {work.tick_name(at.index(most))}, "
                f"its budget is {budget}"
            )


def _late(schedule: Schedule) -> Iterator[str]:
    """Uses of what is not there, or was not fetched, and fetches from where nothing is."""
    there = defaultdict(list)
    for one in schedule.holdings:
        there[one.key, one.tier].append(one)
    arrivals = defaultdict(list)
    for move in schedule.moves:
        arrivals[move.key, move.target].append(move)
        held = there[move.key, move.source]
        leaves = any(one.first <= move.issued and move.due <= one.last for one in held)
        if not leaves and not _staged(move, schedule):
            yield f"{move.key} leaves {move.source} at tick {move.issued}, and is not there"
    for use in schedule.uses:
        now = [one for one in there[use.key, use.tier] if one.first <= use.tick <= one.last]
        if not now:
            yield f"{use.key} is used on {use.tier} at tick {use.tick}, and is not there"
        elif now[0].source not in {use.tier, "made"} and not any(
            now[0].first <= move.issued <= move.due <= use.tick
            for move in arrivals[use.key, use.tier]
        ):
            yield f"{use.key} is used on {use.tier} at tick {use.tick}, and was not fetched"


def _staged(move: Move, schedule: Schedule) -> bool:
    """Whether the optimizer has what leaves: it was brought to it in the same tick."""
    return any(
        one.key == move.key and one.target == move.source and one.issued == move.issued
        for one in schedule.moves
    )


def _mistimed(
    placement: Placement, schedule: Schedule, work: Work, network: Network
) -> Iterator[str]:
    seconds, exposed_s = lane_seconds(placement, schedule, work, network)
    if not math.isclose(exposed_s, placement.exposed_s, rel_tol=TOLERANCE, abs_tol=1e-12):
        yield f"{exposed_s} s are exposed, the plan says {placement.exposed_s}"
    for said, least in zip(
        placement.phases, phase_seconds(seconds, placement, network), strict=True
    ):
        if not math.isclose(least, said.seconds, rel_tol=TOLERANCE, abs_tol=1e-12):
            yield f"{said.name} takes {least} s, the plan says {said.seconds}"


def phase_seconds(
    seconds: Mapping[tuple[Phase, str], float], placement: Placement, network: Network
) -> list[float]:
    """How long each phase takes with these seconds of lanes."""
    found = []
    for phase in PHASES:
        computing = seconds.get((phase, COMPUTE), 0.0)
        if phase == "step" or placement.ahead:
            computing = 0.0
        least = 0.0
        for limit in network.limits:
            spent = math.fsum(
                by * seconds.get((phase, lane), 0.0) for lane, by in limit.lanes.items()
            )
            least = max(least, spent if COMPUTE in limit.lanes else spent + computing)
        found.append(least)
    return found


def lane_seconds(
    placement: Placement, schedule: Schedule, work: Work, network: Network
) -> tuple[dict[tuple[Phase, str], float], float]:
    """Seconds of each lane in each phase, and what is exposed."""
    seconds: dict[tuple[Phase, str], float] = defaultdict(float)
    exposed_s = 0.0
    for move in schedule.moves:
        route = network.route(move.source, move.target)
        if move.exposed:
            exposed_s += move.nbytes * max(route.values(), default=0.0)
            continue
        for lane, s_per_byte in route.items():
            seconds[_phase(move, work, network), lane] += move.times * move.nbytes * s_per_byte
    for number in work.order:
        kind = work.kinds[number]
        seconds["forward", COMPUTE] += work.passes * kind.forward_s
        seconds["backward", COMPUTE] += work.passes * kind.backward_s
    for which, fraction, name in schedule.rebuilt:
        part = next(part for part in work.kinds[which].saved if part.name == name)
        seconds["backward", COMPUTE] += work.passes * fraction * (part.rebuild_s or 0.0)
    _add_stepping(seconds, placement, work, network)
    return seconds, exposed_s


def _add_stepping(
    seconds: dict[tuple[Phase, str], float], placement: Placement, work: Work, network: Network
) -> None:
    """What the optimizer takes, and what changes forms for it."""
    stepping: Phase = "backward" if work.step_in_backward else "step"
    for one in placement.classes:
        for share in one.shares:
            if share.stepper is None:
                continue
            stepper = network.stepper(share.stepper)
            nbytes = one.blocks * one.nbytes * share.fraction
            touched = one.blocks * share.fraction * work.kinds[one.kind].stepped_nbytes(one.role)
            touched *= 1 if one.role == "gradients" else 2
            seconds[stepping, stepper.lane] += touched * stepper.s_per_byte
            if one.role == "gradients" and share.where != network.compute:
                adder = next((s for s in network.steppers if s.tier == "host"), stepper)
                added = 3 * (work.passes - 1) * nbytes
                seconds["backward", adder.lane] += added * adder.s_per_byte
    for number in work.order:
        recoded = work.kinds[number].recoded
        seconds[stepping, network.host_lane] += recoded.seconds if recoded is not None else 0.0


def _phase(move: Move, work: Work, network: Network) -> Phase:
    """What leaves the compute tier belongs to when it leaves, what comes to when it is used."""
    tick = move.issued if move.source == network.compute else move.due
    if tick >= work.step_tick:
        return "backward" if work.step_in_backward else "step"
    return "forward" if tick < work.blocks else "backward"


def _name(one: ClassPlacement) -> str:
    return f"kind {one.kind}, {one.role}" + (f" {one.part}" if one.part else "")
