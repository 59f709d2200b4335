"""The lanes of a machine, with its measured rates, and what they share."""

from collections.abc import Sequence

from offload.allocator.errors import ConfigError
from offload.swap.planning.schedule import Lane, Medium
from offload.tiers.machine import Machine


def lane_name(source: str, target: str) -> str:
    """As a run's lanes are named."""
    return f"{source}→{target}"


def lanes_of(
    machine: Machine, links: Sequence[tuple[str, str]], *, block_nbytes: int | None = None
) -> tuple[tuple[Lane, ...], tuple[Medium, ...]]:
    """A lane for each (source, target), and the drives that they share.

    File tiers on one medium share it: as many lanes go at their full rates as the measurement of
    reads and writes at once says, and one where nobody took it.

    Args:
        machine: with measured links.
        links: pairs of its tiers' names.
        block_nbytes: of one request; by default the size at which the link was fastest.

    Raises:
        ConfigError: a tier that the machine does not have, a link that was not measured.
    """
    drives = {tier.name: tier.medium for tier in machine.tiers if tier.kind == "file"}
    lanes = []
    for source, target in links:
        link = machine.link(source, target, block_nbytes=block_nbytes)
        lanes.append(
            Lane(
                name=lane_name(source, target),
                source=source,
                target=target,
                bytes_per_s=link.bytes_per_s,
                latency_s=link.latency_s,
                media=tuple(
                    dict.fromkeys(drives[tier] for tier in (source, target) if tier in drives)
                ),
            )
        )
    used = dict.fromkeys(name for lane in lanes for name in lane.media)
    media = tuple(
        Medium(
            name=name,
            width=min(_width(machine, tier) for tier, drive in drives.items() if drive == name),
        )
        for name in used
    )
    return tuple(lanes), media


def _width(machine: Machine, drive: str) -> float:
    """How many of its two lanes a drive bears at their full rates: between 1 and 2."""
    try:
        both = 2 * machine.link(drive, drive).bytes_per_s
        read = machine.link(drive, "host").bytes_per_s
        write = machine.link("host", drive).bytes_per_s
    except ConfigError:
        return 1.0
    return min(max(2 * both / (read + write), 1.0), 2.0)
