"""Tiers with their budgets, the ways between them, and who steps: where bytes may go, how fast.

[Note: lanes and limits] A move takes seconds on each lane of its route, all at once: from a file to
a device they are file→host and host→device, for pinned buffers lie between. A memory node's bytes
cross its own lane and the device's bus. A limit is a sum over lanes that no phase can be shorter
than. A lane is a limit by itself; reads and writes of one medium are two limits,

    reads + k writes   and   writes + k reads   (k = 1 / g - 1)

where g is the share of its own rate at which each goes on while both are busy, as ``machine.json``
has it measured: ``a`` seconds of one alone and ``b <= a`` of the other take ``b / g + (a - b)``
together. Tiers on one medium share its limits.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from offload.allocator.errors import ConfigError
from offload.tiers.machine import Machine

COMPUTE = "compute"  # the lane of whoever computes forward and backward
CPU = "cpu"  # the lane of a processor that steps beside it


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepper:
    """Who can run the optimizer.

    Attributes:
        tier: where weights, gradients and states must be while it steps them.
        lane: what it keeps busy.
        s_per_byte: seconds for each byte that it reads or writes.
    """

    name: str
    tier: str
    lane: str
    s_per_byte: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A phase is no shorter than the weighted sum of the seconds of these lanes."""

    name: str
    lanes: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Where bytes may go and how fast; see [Note: lanes and limits].

    Attributes:
        compute: the tier that forward and backward work in.
        budgets: bytes of each tier.
        routes: seconds per byte on each lane, by (source, target).
    """

    compute: str
    budgets: Mapping[str, int]
    routes: Mapping[tuple[str, str], Mapping[str, float]]
    limits: tuple[Limit, ...]
    steppers: tuple[Stepper, ...]

    def route(self, source: str, target: str) -> Mapping[str, float]:
        """Seconds per byte by lane; nothing within a tier.

        Raises:
            ConfigError: there is no way.
        """
        if source == target:
            return {}
        try:
            return self.routes[source, target]
        except KeyError:
            raise ConfigError(
                f"no link leads from {source} to {target}: measure it with: "
                "offload doctor -o machine.json"
            ) from None

    @property
    def host_lane(self) -> str:
        """What the host's processor keeps busy."""
        return next((one.lane for one in self.steppers if one.tier == "host"), CPU)

    def stepper(self, name: str) -> Stepper:
        """The stepper of that name."""
        return next(one for one in self.steppers if one.name == name)

    def with_budget(self, tier: str, nbytes: int) -> "Network":
        """The same with another budget of one tier."""
        return dataclasses.replace(self, budgets={**self.budgets, tier: nbytes})

    def faster(self, lane: str, factor: float) -> "Network":
        """The same with one lane, or whoever steps on it, ``factor`` times as fast."""
        routes = {
            ends: {name: s / factor if name == lane else s for name, s in lanes.items()}
            for ends, lanes in self.routes.items()
        }
        steppers = tuple(
            dataclasses.replace(one, s_per_byte=one.s_per_byte / factor)
            if one.lane == lane
            else one
            for one in self.steppers
        )
        return dataclasses.replace(self, routes=routes, steppers=steppers)


def make_network(
    machine: Machine,
    budgets: Mapping[str, int],
    *,
    compute: str,
    steppers: Sequence[Stepper],
) -> Network:
    """The tiers of ``budgets`` on ``machine``.

    Args:
        budgets: bytes by tier; a tier without a budget is not used. ``host`` is always one.
        compute: the tier that forward and backward work in.

    Raises:
        ConfigError: a tier that the machine has not, or a link that was not measured: all at once.
    """
    lanes = _lanes(machine, budgets, compute)
    routes = {
        (source, target): _route(lanes, compute, source, target)
        for source in budgets
        for target in budgets
        if source != target
    }
    return Network(
        compute=compute,
        budgets=dict(budgets),
        routes=routes,
        limits=tuple(_limits(machine, lanes, steppers)),
        steppers=tuple(steppers),
    )


def _lanes(
    machine: Machine, budgets: Mapping[str, int], compute: str
) -> dict[tuple[str, str], float]:
    """Seconds per byte of each link: to and from host memory, and past it where measured."""
    problems: list[str] = []
    if "host" not in budgets:
        problems.append("the placement needs a budget of host: everything passes through it")
    lanes: dict[tuple[str, str], float] = {}
    for tier in budgets:
        for pair in ((tier, "host"), ("host", tier)) if tier != "host" else ():
            try:
                machine.tier(tier)
                lanes[pair] = 1 / machine.link(*pair).bytes_per_s
            except ConfigError as error:
                problems.extend(problem for problem in error.problems if problem not in problems)
    if problems:
        raise ConfigError(*problems)
    for link in machine.links:
        pair = link.source, link.target
        past = compute in pair and "host" not in pair and link.source != link.target
        if past and {*pair} <= budgets.keys():
            lanes[pair] = min(lanes.get(pair, 1 / link.bytes_per_s), 1 / link.bytes_per_s)
    return lanes


def lane_name(source: str, target: str) -> str:
    """How the lane of one link is called."""
    return f"{source} → {target}"


def _route(
    lanes: Mapping[tuple[str, str], float], compute: str, source: str, target: str
) -> dict[str, float]:
    """The direct lane if there is one, else over host memory; devices are behind their bus."""
    if "host" in {source, target}:
        return {lane_name(source, target): lanes[source, target]}
    into, out = (source, "host"), ("host", target)
    if (source, target) in lanes:
        bus = out if target == compute else into
        hops = [(source, target), bus]
    else:
        hops = [into, out]
    return {lane_name(*hop): lanes[hop] for hop in hops}


def _limits(
    machine: Machine, lanes: Mapping[tuple[str, str], float], steppers: Sequence[Stepper]
) -> Iterator[Limit]:
    for name in dict.fromkeys([COMPUTE, CPU, *(stepper.lane for stepper in steppers)]):
        yield Limit(name=name, lanes={name: 1.0})
    media: dict[str, list[str]] = {}
    for source, target in lanes:
        files = [one for one in (source, target) if machine.tier(one).kind == "file"]
        if not files:
            name = lane_name(source, target)
            yield Limit(name=name, lanes={name: 1.0})
        elif files[0] not in media.setdefault(machine.tier(files[0]).medium, []):
            media[machine.tier(files[0]).medium].append(files[0])
    for files in media.values():
        reads = [lane_name(*pair) for pair in lanes if pair[0] in files]
        writes = [lane_name(*pair) for pair in lanes if pair[1] in files]
        k, name = _hindrance(machine, files[0]), " and ".join(files)
        if k == 1.0:  # one thing at a time
            yield Limit(name=name, lanes=dict.fromkeys([*reads, *writes], 1.0))
            continue
        for what, first, second in (("reads", reads, writes), ("writes", writes, reads)):
            weights = {**dict.fromkeys(first, 1.0), **dict.fromkeys(second, k)}
            yield Limit(name=f"{what} of {name}", lanes=weights)


def _hindrance(machine: Machine, file: str) -> float:
    """``k`` of [Note: lanes and limits]; as if a drive did one thing at a time where unknown."""
    read = machine.link(file, "host").bytes_per_s
    write = machine.link("host", file).bytes_per_s
    try:
        both = 2 * machine.link(file, file).bytes_per_s
    except ConfigError:
        return 1.0
    share = min(max(both / (read + write), 0.5), 1.0)
    return 1 / share - 1
