"""The machine as the planner sees it: tiers, measured links, processors; ``machine.json``.

``offload doctor -o machine.json`` writes it with measured links, a recorded run without. Sizes are
bytes, rates bytes per second, times seconds; a file that says otherwise is refused, with every
fault named at once.
"""

import dataclasses
import difflib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

from offload.allocator.errors import ConfigError
from offload.tiers.machine_faults import faults_of

if TYPE_CHECKING:
    from pydantic import ConfigDict, ValidationError

FORMAT_VERSION = 1

# What pydantic is told when a file is read: no guessing, no unknown keys.
_RULES: "ConfigDict" = {"extra": "forbid", "strict": True, "allow_inf_nan": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineTier:
    """A place that can hold bytes.

    Attributes:
        name: ``host``, ``pinned``, ``device:0``, ``numa:1`` or ``file:/data``.
        capacity_nbytes: what it holds in all, limits of control groups respected.
        free_nbytes: what nobody used when the machine was looked at.
        align_nbytes: of offsets and lengths.
        medium: what it is made of, such as ``nvme0n1 (ext4)``: tiers on one medium share it.
    """

    __pydantic_config__: ClassVar["ConfigDict"] = _RULES

    name: str
    kind: Literal["host", "pinned", "device", "numa", "file"]
    capacity_nbytes: int
    free_nbytes: int
    align_nbytes: int
    medium: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A directed link, measured with requests of ``block_nbytes``, ``in_flight`` at once.

    Attributes:
        bytes_per_s: the median of ``repeats`` measurements; ``low`` and ``high`` are the slowest
            and the fastest of them.
        latency_s: of one small request that finds the link idle.
    """

    __pydantic_config__: ClassVar["ConfigDict"] = _RULES

    source: str
    target: str
    block_nbytes: int
    in_flight: int
    bytes_per_s: float
    low_bytes_per_s: float
    high_bytes_per_s: float
    latency_s: float
    repeats: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    """What computes: ``cpu``, or ``cuda:0``; ``cores`` that this process may use."""

    __pydantic_config__: ClassVar["ConfigDict"] = _RULES

    name: str
    model: str
    cores: int | None
    features: tuple[str, ...]


Work: TypeAlias = Literal[
    "matmul",  # products of matrices: floating-point operations
    "thin matmul",  # the same with fewer than 32 rows or columns
    "attention",  # fused attention, forward: floating-point operations
    "attention backward",
    "pointwise",  # a sum: bytes read and written
    "heavy",  # an exponential for each element: bytes read and written
    "first touch",  # fresh memory: bytes that the kernel has to zero
    "reclaimed touch",  # the same where a hypervisor had taken it back; size: so much at once
    "optimizer",  # a fused AdamW by all threads: bytes read and written
    "optimizer thread",  # the same by one thread
    "bf16 states",  # bytes of float32 that one thread rounds to bfloat16 and widens again
    "8bit states",  # the same to and from 8 bits
    "masters",  # the same: split into two halves and put together, a gradient widened
    "checksum",  # bytes
    "dispatch",  # calls of the smallest kernels
    "moves",  # bytes that lanes move while computing loses a second by it
    "tiles",  # bytes that lanes move in a second of a streamed step of the optimizer
    "flush",  # flushes of what a commit makes durable
    "page reads",  # pages of a mapped file, first looked at; its size: how many they are apart
    "page writes",  # pages of a mapped file, zeroed and first written; its size likewise
    "gradients",  # gradients that leave memory, whatever their bytes
    "fetches",  # weights that come and go again, whatever their bytes
    "tile parts",  # parts of tiles that are laid out, written and published, but for the kernel
    "small steps",  # weights that are too small for tiles: stepped whole and stored
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeRate:
    """How fast a processor does one kind of work.

    Attributes:
        processor: ``cpu``, or ``cuda:0``.
        dtype: of the elements, such as ``float32``.
        size: of one call, in the unit of the work: operations, bytes or calls.
        per_s: so much of the work in a second.
    """

    __pydantic_config__: ClassVar["ConfigDict"] = _RULES

    processor: str
    work: Work
    dtype: str
    size: int
    per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Tiers, the measured links between them, and processors.

    A link from a file tier to itself is a copy through memory: as many bytes are read as are
    written, at once, and each counts once.

    Attributes:
        compute: rates of the processors; empty where nobody measured them.

    Raises:
        ConfigError: figures that contradict each other or stand in a wrong unit.
    """

    __pydantic_config__: ClassVar["ConfigDict"] = _RULES

    kernel: str
    processors: tuple[Processor, ...]
    tiers: tuple[MachineTier, ...]
    links: tuple[Link, ...] = ()
    compute: tuple[ComputeRate, ...] = ()
    format: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if problems := tuple(faults_of(self)):
            raise ConfigError(*problems)

    def tier(self, name: str) -> MachineTier:
        """The tier of that name.

        Raises:
            ConfigError: there is none; names those that are.
        """
        for tier in self.tiers:
            if tier.name == name:
                return tier
        known = ", ".join(tier.name for tier in self.tiers)
        raise ConfigError(f"this machine has no tier {name!r}; it has {known}")

    def link(self, source: str, target: str, *, block_nbytes: int | None = None) -> Link:
        """The measurement that tells most about moving blocks from ``source`` to ``target``.

        That is the fastest one; with ``block_nbytes``, the fastest of those with the largest
        block that is not larger (or else with the smallest block).

        Raises:
            ConfigError: the link was not measured.
        """
        measured = [link for link in self.links if (link.source, link.target) == (source, target)]
        if not measured:
            raise ConfigError(_not_measured(self.tier(source), self.tier(target)))
        if block_nbytes is not None:
            sizes = {link.block_nbytes for link in measured}
            size = max((size for size in sizes if size <= block_nbytes), default=min(sizes))
            measured = [link for link in measured if link.block_nbytes == size]
        return max(measured, key=lambda link: link.bytes_per_s)

    def rates(self, work: Work, dtype: str) -> tuple[tuple[int, float], ...]:
        """(size, rate) of the calls of ``work`` that were measured on the CPU, rising.

        Raises:
            ConfigError: none was.
        """
        found = sorted(
            (rate.size, rate.per_s)
            for rate in self.compute
            if (rate.processor, rate.work, rate.dtype) == ("cpu", work, dtype)
        )
        if not found:
            raise ConfigError(
                f"no rate of the CPU for {work} in {dtype} was measured; "
                "measure it with: offload doctor -o machine.json"
            )
        return tuple(found)

    def missing_links(self) -> tuple[tuple[str, str], ...]:
        """(source, target) of the links that a plan needs and nobody has measured.

        A copy within memory, and each file and device from memory and back.
        """
        measured = {(link.source, link.target) for link in self.links}
        needed = [
            pair
            for tier in self.tiers
            if tier.kind in {"device", "file"}
            for pair in (("host", tier.name), (tier.name, "host"))
        ]
        return tuple(pair for pair in (("host", "host"), *needed) if pair not in measured)

    def check_measured(self) -> None:
        """Raise unless every link that a plan needs has been measured.

        Raises:
            ConfigError: names all links that are missing and the command that measures them.
        """
        if missing := self.missing_links():
            raise ConfigError(
                *(_not_measured(self.tier(source), self.tier(target)) for source, target in missing)
            )

    def to_json(self) -> str:
        """The machine as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @staticmethod
    def from_json(text: str) -> "Machine":
        """The machine that ``to_json`` wrote.

        Raises:
            ConfigError: not JSON, another format, unknown or missing keys, wrong units: all
                faults at once.
        """
        try:
            document = json.loads(text)
        except ValueError as error:
            raise ConfigError(
                f"not JSON: {error}; write it anew with: offload doctor -o machine.json"
            ) from error
        if not isinstance(document, dict) or "format" not in document:
            raise ConfigError(
                "not a machine: it has no 'format'; write one with: offload doctor -o machine.json"
            )
        if document["format"] != FORMAT_VERSION:
            raise ConfigError(
                f"format {document['format']} is not {FORMAT_VERSION}, which this version reads: "
                "write it anew with: offload doctor -o machine.json"
            )
        return _decode(text)


def read_machine(path: Path) -> Machine:
    """The machine in the file ``path``.

    Raises:
        ConfigError: the file can't be read, or holds no valid machine.
    """
    try:
        return Machine.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"can't read the machine {path}: {error.strerror}") from error
    except ConfigError as error:
        raise ConfigError(*(f"{path}: {problem}" for problem in error.problems)) from error


def check_writable(path: Path) -> None:
    """Raise unless ``write_machine`` can write ``path``; what stands there stays.

    Raises:
        ConfigError: the file can't be written.
    """
    place = path if path.exists() else path.parent
    if not place.exists():
        reason = f"{place} does not exist"
    elif path.is_dir():
        reason = "it is a directory"
    elif not os.access(place, os.W_OK):
        reason = "this user may not write there"
    else:
        return
    raise ConfigError(f"can't write the machine to {path}: {reason}")


def write_machine(machine: Machine, path: Path) -> None:
    """Write ``machine.json``.

    Raises:
        ConfigError: the file can't be written.
    """
    check_writable(path)
    try:
        path.write_text(machine.to_json() + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"can't write the machine to {path}: {error.strerror}") from error


def _not_measured(source: MachineTier, target: MachineTier) -> str:
    file = next((tier for tier in (source, target) if tier.kind == "file"), None)
    where = f" --nvme {file.name.removeprefix('file:')}" if file else ""
    return (
        f"the link {source.name} → {target.name} was not measured; "
        f"measure it with: offload doctor{where} -o machine.json"
    )


def _decode(text: str) -> Machine:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(Machine).validate_json(text)
    except ValidationError as error:
        raise ConfigError(*_decoding_faults(error)) from error


def _decoding_faults(error: "ValidationError") -> Iterator[str]:
    known = sorted(
        field.name
        for kind in (Machine, MachineTier, Link, Processor, ComputeRate)
        for field in dataclasses.fields(kind)
    )
    for fault in error.errors():
        place = ".".join(map(str, fault["loc"]))
        if fault["type"] == "unexpected_keyword_argument":
            near = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1, cutoff=0.5)
            yield f"{place}: unknown key" + (f"; did you mean {near[0]!r}?" if near else "")
        elif fault["type"] == "missing":
            yield f"{place}: missing"
        elif isinstance(cause := fault.get("ctx", {}).get("error"), ConfigError):
            yield from cause.problems
        else:
            yield f"{place}: {fault['msg']}, not {fault['input']!r}"
