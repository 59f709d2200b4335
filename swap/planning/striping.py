"""Several drives as the one that a plan sees: what a run stripes over them, and how fast that is.

Each path holds bytes in proportion to its rate, as ``tiers.stripes`` apportions them, and a move is
over when its slowest path is. Paths on one medium share what that reaches: a run measures all of
them at once when it makes its store, and finds each at its part.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from offload.allocator.errors import ConfigError
from offload.tiers.health import PathRates
from offload.tiers.machine import Link, Machine, MachineTier
from offload.tiers.stripes import weights_for

_AND = " + "  # between the names of drives


@dataclass(frozen=True, slots=True, kw_only=True)
class Striped:
    """A machine with a tier for all paths together.

    Attributes:
        drive: the name of that tier.
        weights: of each path: its share of the bytes is its weight over the sum.
    """

    machine: Machine
    drive: str
    weights: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Path:
    """A drive that holds some of the bytes.

    Attributes:
        load: what its medium moves of each byte, with that of other paths on it.
    """

    tier: MachineTier
    load: float


def joined(machines: Sequence[Machine]) -> Machine:
    """The first of ``machines``, which are one and the same, with the drives of the others.

    Each was measured with a drive of its own.
    """
    first, *others = machines
    for other in others:
        known = {tier.name for tier in first.tiers}
        drives = [tier for tier in other.tiers if tier.kind == "file" and tier.name not in known]
        names = {tier.name for tier in drives}
        links = [link for link in other.links if names & {link.source, link.target}]
        first = replace(first, tiers=(*first.tiers, *drives), links=(*first.links, *links))
    return first


def drives_of(drive: str) -> tuple[str, ...]:
    """The tiers that the tier ``drive`` is made of."""
    return tuple(drive.split(_AND))


def striped(machine: Machine, drives: Sequence[str]) -> Striped:
    """``machine`` with one more tier: a store that is striped over ``drives``.

    Raises:
        ConfigError: a tier that is no file, one that is named twice, or a link not measured.
    """
    tiers = [machine.tier(name) for name in drives]
    _check(tiers)
    sharing = Counter(tier.medium for tier in tiers)
    rates = [_rates(machine, tier, sharing[tier.medium]) for tier in tiers]
    weights = weights_for([rate.balanced_bytes_per_s for rate in rates])
    loads: Counter[str] = Counter()
    for tier, weight in zip(tiers, weights, strict=True):
        loads[tier.medium] += weight
    total = sum(weights)
    paths = [
        _Path(tier, loads[tier.medium] / total)
        for tier, weight in zip(tiers, weights, strict=True)
        if weight
    ]
    name = _AND.join(drives)
    together = replace(
        tiers[0],
        name=name,
        medium=name,
        capacity_nbytes=int(min(path.tier.capacity_nbytes / path.load for path in paths)),
        free_nbytes=int(min(path.tier.free_nbytes / path.load for path in paths)),
    )
    links = tuple(_links(machine, paths, name))
    with_it = replace(machine, tiers=(*machine.tiers, together), links=(*machine.links, *links))
    return Striped(machine=_rehearsed(with_it, drives[0], name), drive=name, weights=weights)


def _check(tiers: Sequence[MachineTier]) -> None:
    names = Counter(tier.name for tier in tiers)
    for tier in tiers:
        if names[tier.name] > 1:
            raise ConfigError(f"{tier.name} is named twice: name each directory once")
        if tier.kind != "file":
            raise ConfigError(f"{tier.name} is no directory of a drive, but of kind {tier.kind}")


def _rates(machine: Machine, tier: MachineTier, sharing: int) -> PathRates:
    return PathRates(
        read_bytes_per_s=machine.link(tier.name, "host").bytes_per_s / sharing,
        write_bytes_per_s=machine.link("host", tier.name).bytes_per_s / sharing,
    )


def _links(machine: Machine, paths: Sequence[_Path], name: str) -> Iterator[Link]:
    """To, from and within the tier ``name``, for each block size that was measured of all paths."""
    for to_host, from_host in ((True, False), (False, True), (True, True)):
        by_size: list[dict[int, Link]] = []
        for path in paths:
            drive = path.tier.name
            ends = (drive if to_host else "host", drive if from_host else "host")
            by_size.append(_fastest(machine, *ends))
        if not all(by_size):
            continue
        common = sorted(set[int].intersection(*(set(sizes) for sizes in by_size)))
        for links in [[sizes[size] for sizes in by_size] for size in common] or [
            [max(sizes.values(), key=lambda link: link.bytes_per_s) for sizes in by_size]
        ]:
            yield replace(
                max(links, key=lambda link: link.latency_s),
                source=name if to_host else "host",
                target=name if from_host else "host",
                in_flight=sum(link.in_flight for link in links),
                bytes_per_s=_together(paths, [link.bytes_per_s for link in links]),
                low_bytes_per_s=_together(paths, [link.low_bytes_per_s for link in links]),
                high_bytes_per_s=_together(paths, [link.high_bytes_per_s for link in links]),
            )


def _together(paths: Sequence[_Path], rates: Sequence[float]) -> float:
    """Bytes a second of all paths when each has its share of them."""
    return min(rate / path.load for path, rate in zip(paths, rates, strict=True))


def _fastest(machine: Machine, source: str, target: str) -> dict[int, Link]:
    """The best measurement of each block size; none where the link was not measured."""
    return {
        link.block_nbytes: machine.link(source, target, block_nbytes=link.block_nbytes)
        for link in machine.links
        if (link.source, link.target) == (source, target)
    }


def _rehearsed(machine: Machine, drive: str, together: str) -> Machine:
    """What a rehearsal has shown of tiles on one drive, of all of them."""
    one, all_of_them = (
        machine.link(name, "host").bytes_per_s + machine.link("host", name).bytes_per_s
        for name in (drive, together)
    )
    grown = all_of_them / one
    compute = tuple(
        replace(rate, per_s=rate.per_s * grown) if rate.work == "tiles" else rate
        for rate in machine.compute
    )
    return replace(machine, compute=compute)
