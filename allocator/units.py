"""Sizes, rates and times: between the words that people write and the numbers we keep."""

import math
import re
from fractions import Fraction

_BINARY = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5}
_NUMBER = r"\d+(?:\.\d+)?"
_PATTERN = re.compile(rf"\s*({_NUMBER})\s*(?:([KMGTP])(i?))?B?\s*", re.IGNORECASE)
_BARE = re.compile(rf"\s*({_NUMBER})\s*")

LEAST_MEMORY_NBYTES = 1 << 20  # a smaller size of memory was meant in another unit
_LARGE = 100  # a number of MiB rather than of GiB


def parse_nbytes(value: str | int) -> int:
    """Bytes of ``"24GiB"`` (1024s), ``"1.5 GB"`` (1000s) or a plain number of bytes.

    For what is named in bytes; ``parse_size`` reads what people write a unit with.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise ValueError(f"a size can't be negative: {value}")
        return value
    match = _PATTERN.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"{value!r} is not a size: write 24GiB, 1.5GB, 512MiB or bytes")
    number, prefix, binary = match.groups(default="")
    scale: int = (1024 if binary else 1000) ** _BINARY[prefix.upper()]
    return round(Fraction(number) * scale)


def parse_size(value: str | int, *, unit: str | None = None) -> int:
    """As ``parse_nbytes``, where a plain number below a MiB lacks its unit; 0 needs none.

    Args:
        unit: that such a number most likely was to have; by default GiB, or MiB for a large one.

    Raises:
        ValueError: also a size that lacks its unit; tells what it probably was to be.
    """
    nbytes = parse_nbytes(value)
    meant = _with_unit(value, unit)
    if meant is None or nbytes >= LEAST_MEMORY_NBYTES:
        return nbytes
    raise ValueError(f"{nbytes} bytes are hardly meant; a size has a unit: {meant}, or {nbytes}B?")


def parse_memory_nbytes(value: str | int, *, unit: str | None = None) -> int:
    """As ``parse_size``, of memory that is to hold something: no less than a MiB is meant.

    Raises:
        ValueError: also less than that; tells what it probably was to be.
    """
    nbytes = parse_nbytes(value)
    if nbytes >= LEAST_MEMORY_NBYTES:
        return nbytes
    meant = _with_unit(value, unit)
    mend = f"a size has a unit: {meant}?" if meant else "write 1MiB or more"
    raise ValueError(f"{nbytes} bytes of memory hold nothing; {mend}")


def _with_unit(value: str | int, unit: str | None) -> str | None:
    """What a plain number was probably to be; None for 0, and for what has its unit."""
    match = _BARE.fullmatch(str(value))
    if match is None or not (number := Fraction(match.group(1))):
        return None
    return f"{match.group(1)}{unit or ('MiB' if number >= _LARGE else 'GiB')}"


def format_nbytes(nbytes: int) -> str:
    """``1.50 GiB``: binary units, three significant digits or the exact bytes below 1 KiB."""
    if abs(nbytes) < 1024:
        return f"{nbytes} B"
    power = min(int(math.log(abs(nbytes), 1024)), 5)
    return f"{nbytes / 1024**power:.2f} {'KMGTP'[power - 1]}iB"


def parse_rate(value: str | float) -> float:
    """Bytes per second of ``"7GB/s"`` or a plain number.

    Raises:
        ValueError: anything else, and text without its unit; tells what it probably was to be.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    size, _, time = (part.strip() for part in str(value).partition("/"))
    bare = bool(_BARE.fullmatch(size))
    if time == "s" and not bare:
        return float(parse_nbytes(size))
    mend = "write 7GB/s or 900MiB/s"
    if time in ("", "s") and _PATTERN.fullmatch(size):
        mend = f"write {size}{'GB' if bare else ''}/s"
    raise ValueError(f"{value!r} is not a rate: {mend}")


def format_rate(bytes_per_s: float) -> str:
    """``2.81 GB/s``: decimal units, as disks and links are sold."""
    if bytes_per_s < 1e3:
        return f"{bytes_per_s:.0f} B/s"
    power = min(int(math.log10(bytes_per_s) / 3), 4)
    return f"{bytes_per_s / 1000**power:.2f} {'kMGT'[power - 1]}B/s"


def format_seconds(seconds: float) -> str:
    """``12.3 s``, ``45.6 ms`` or ``7.8 us``: three significant digits."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if abs(seconds) >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"
