"""The same machine with other rates."""

import dataclasses
import re
from collections.abc import Mapping

from offload.allocator.errors import ConfigError
from offload.allocator.units import parse_rate
from offload.tiers.machine import Link, Machine

_NAMES = ("nvme", "nvme-read", "nvme-write", "compute")


def parse_changes(text: str) -> dict[str, float]:
    """``"nvme=7GB/s,compute=2x"``: rates of the drive, and a factor for the processor.

    Raises:
        ConfigError: an unknown name, a rate without its unit, a factor without its x.
    """
    changes: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if name not in _NAMES or not equals:
            raise ConfigError(
                f"--what-if {part.strip()!r}: write one of {', '.join(_NAMES)} with its value, "
                "such as nvme=7GB/s or compute=2x"
            )
        try:
            changes[name] = _factor(value) if name == "compute" else parse_rate(value)
        except ValueError as error:
            raise ConfigError(f"--what-if {name}: {error}") from error
        if not changes[name] > 0:
            raise ConfigError(f"--what-if {name}={value}: must be above 0")
    return changes


def _factor(value: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)(x?)\s*", value)
    if match is None or not match.group(2):
        mend = f"write {match.group(1)}x" if match else "write 2x or 0.5x"
        raise ValueError(f"{value!r} is no factor: {mend}")
    return float(match.group(1))


def changed(machine: Machine, drive: str, changes: Mapping[str, float]) -> Machine:
    """``machine`` with ``changes``; the links of ``drive`` keep their shape over block sizes."""
    both = changes.get("nvme")
    factors = {
        (source, target): changes.get(name, both or now) / now
        for name, source, target in (("nvme-read", drive, "host"), ("nvme-write", "host", drive))
        for now in [machine.link(source, target).bytes_per_s]
    }
    factors[drive, drive] = min(factors.values())
    links = tuple(
        _scaled(link, factors.get((link.source, link.target), 1.0)) for link in machine.links
    )
    factor = changes.get("compute", 1.0)
    compute = tuple(
        dataclasses.replace(rate, per_s=rate.per_s * factor) for rate in machine.compute
    )
    return dataclasses.replace(machine, links=links, compute=compute)


def _scaled(link: Link, factor: float) -> Link:
    return dataclasses.replace(
        link,
        bytes_per_s=link.bytes_per_s * factor,
        low_bytes_per_s=link.low_bytes_per_s * factor,
        high_bytes_per_s=link.high_bytes_per_s * factor,
    )
