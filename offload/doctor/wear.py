"""How much a drive has written, and how much endurance it has left."""

import json
import re
from dataclasses import dataclass
from typing import Any

from offload.allocator.units import format_nbytes
from offload.doctor.finding import Finding
from offload.tiers.filesystem import Disk
from offload.tiers.system import System

_UNIT_NBYTES = 512_000  # NVMe base specification 2.0, "Data Units Written": thousands of 512 bytes
_WORN_PERCENT = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class Wear:
    """What a drive tells of itself; None for what it doesn't.

    Attributes:
        written_nbytes: over its whole life.
        used_percent: of the endurance that its maker states; may exceed 100.
        spare_percent: reserve blocks that are left, and the threshold below which it is ill.
        warning: the drive's own critical warning, as a bit field.
    """

    written_nbytes: int | None
    used_percent: int | None
    spare_percent: int | None
    spare_threshold: int | None
    warning: int


def examine(disk: Disk, system: System) -> Finding:
    """Bytes written since the start of the kernel, and endurance where the drive tells."""
    booted = (
        f"{format_nbytes(disk.written_nbytes)} written since boot"
        if disk.written_nbytes is not None
        else "bytes written not told"
    )
    if disk.virtual:
        return Finding(
            subject="wear",
            value=booted,
            detail="a virtual disk keeps no record of wear: ask its host",
        )
    if disk.parts:
        parts = " ".join(f"/dev/{part}" for part in disk.parts)
        return Finding(
            subject="wear", value=booted, detail=f"ask each part: sudo smartctl -a {parts}"
        )
    found = read_wear(disk, system)
    if found is None:
        tool = _command(disk)
        return Finding(
            subject="wear",
            value=booted,
            detail=f"endurance unknown: the drive tells it to root, by: sudo {' '.join(tool)}",
        )
    return _judge(found, booted)


def _judge(wear: Wear, booted: str) -> Finding:
    value = booted
    if wear.written_nbytes is not None:
        value = f"{format_nbytes(wear.written_nbytes)} written in all, {booted}"
    told = []
    if wear.used_percent is not None:
        told.append(f"{wear.used_percent} % of its endurance used")
    if wear.spare_percent is not None:
        told.append(f"{wear.spare_percent} % of its spare blocks left")
    ill = wear.warning != 0 or (
        wear.spare_percent is not None
        and wear.spare_threshold is not None
        and wear.spare_percent < wear.spare_threshold
    )
    if ill:
        return Finding(
            subject="wear",
            value=value,
            status="fail",
            detail=", ".join(["the drive reports a critical warning", *told]),
            mend="copy what matters off this drive, and name another one with --nvme",
        )
    worn = wear.used_percent is not None and wear.used_percent >= _WORN_PERCENT
    return Finding(
        subject="wear",
        value=value,
        status="warn" if worn else "ok",
        detail=", ".join(told) or "the drive tells no endurance",
        mend="name a drive with more endurance with --nvme" if worn else "",
    )


def _command(disk: Disk) -> list[str]:
    if disk.name.startswith("nvme"):
        return ["nvme", "smart-log", "-o", "json", f"/dev/{disk.name}"]
    return ["smartctl", "-j", "-a", f"/dev/{disk.name}"]


def read_wear(disk: Disk, system: System) -> Wear | None:
    """The drive's own record, by ``nvme`` or ``smartctl``; None where neither may ask it."""
    commands = {tuple(_command(disk)): 0, ("smartctl", "-j", "-a", f"/dev/{_controller(disk)}"): 0}
    for command in commands:
        answer = system.run(command)
        try:
            document = json.loads(answer.text) if answer is not None else None
        except ValueError:
            continue
        if isinstance(document, dict) and (wear := _parse(document)) is not None:
            return wear
    return None


def _controller(disk: Disk) -> str:
    """``nvme0`` of ``nvme0n1``; other disks are their own controller."""
    match = re.fullmatch(r"(nvme\d+)n\d+", disk.name)
    return match[1] if match else disk.name


def _parse(document: dict[str, Any]) -> Wear | None:
    log = document.get("nvme_smart_health_information_log", document)

    def number(*names: str) -> int | None:
        for name in names:
            value = log.get(name)
            if isinstance(value, int):
                return value
            if isinstance(value, str) and value.isdigit():
                return int(value)
        return None

    used = number("percentage_used", "percent_used")
    if used is None and isinstance(endurance := document.get("endurance_used"), dict):
        used = endurance.get("current_percent")  # SATA, by smartctl 7.5
    units = number("data_units_written")
    if used is None and units is None:
        return None
    return Wear(
        written_nbytes=units * _UNIT_NBYTES if units is not None else None,
        used_percent=used,
        spare_percent=number("available_spare", "avail_spare"),
        spare_threshold=number("available_spare_threshold", "spare_thresh"),
        warning=number("critical_warning") or 0,
    )
