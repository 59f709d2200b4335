"""What is wrong with the figures of a machine: they contradict each other, or have another unit."""

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offload.tiers.machine import Link, Machine

# A figure beyond these was written in another unit.
_SLOWEST_BYTES_PER_S, _FASTEST_BYTES_PER_S = 1e4, 1e14
_LONGEST_S = 60.0
_SLOWEST_PER_S, _FASTEST_PER_S = 1e2, 1e16  # of any work
_COUNTED = {  # one by one
    "flush", "page reads", "page writes", "gradients", "fetches", "tile parts", "small steps"
}  # fmt: skip
_SLOWEST_COUNTED_PER_S = 1e-1


def faults_of(machine: "Machine") -> Iterator[str]:
    """Each fault, with the place where it stands."""
    names = Counter(tier.name for tier in machine.tiers)
    for name, count in names.items():
        if count > 1:
            yield f"tiers: {name!r} stands there {count} times"
    for place, tier in _placed("tiers", machine.tiers):
        if min(tier.capacity_nbytes, tier.free_nbytes) < 0 or tier.align_nbytes < 1:
            yield f"{place}: sizes are bytes and can't be negative"
    measured = Counter(
        (link.source, link.target, link.block_nbytes, link.in_flight) for link in machine.links
    )
    for (source, target, block_nbytes, in_flight), count in measured.items():
        if count > 1:
            yield (
                f"links: {source} → {target} with {in_flight} blocks of {block_nbytes} bytes "
                f"stands there {count} times"
            )
    for place, link in _placed("links", machine.links):
        yield from _faults_of_link(place, link, set(names))
    yield from _faults_of_rates(machine)


def _faults_of_rates(machine: "Machine") -> Iterator[str]:
    for place, rate in _placed("compute", machine.compute):
        slowest = _SLOWEST_COUNTED_PER_S if rate.work in _COUNTED else _SLOWEST_PER_S
        if rate.size < 1 or not slowest <= rate.per_s <= _FASTEST_PER_S:
            yield f"{place}: {rate.per_s:g} a second, by calls of {rate.size}: no {rate.work} does"


def _placed(name: str, records: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    return ((f"{name}.{index}", record) for index, record in enumerate(records))


def _faults_of_link(place: str, link: "Link", tiers: set[str]) -> Iterator[str]:
    for end in (link.source, link.target):
        if end not in tiers:
            yield f"{place}: {end!r} is no tier of this machine; it has {', '.join(sorted(tiers))}"
    if min(link.block_nbytes, link.in_flight, link.repeats) < 1:
        yield f"{place}: block_nbytes, in_flight and repeats count from 1"
    rates = (link.low_bytes_per_s, link.bytes_per_s, link.high_bytes_per_s)
    for rate in rates:
        if not _SLOWEST_BYTES_PER_S <= rate <= _FASTEST_BYTES_PER_S:
            yield (
                f"{place}: {rate:g} bytes per second is no rate of a link: "
                "rates are in bytes per second, 7 GB/s is 7e9"
            )
    if sorted(rates) != list(rates):
        yield f"{place}: low_bytes_per_s <= bytes_per_s <= high_bytes_per_s does not hold"
    if not 0 <= link.latency_s <= _LONGEST_S:
        yield (
            f"{place}: {link.latency_s:g} seconds is no latency of a link: "
            "latencies are in seconds, 80 us is 80e-6"
        )
