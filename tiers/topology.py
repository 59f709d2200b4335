"""The machine's memory nodes and CXL devices, as sysfs tells them.

Pure reading: nothing is changed, nothing is measured, and nothing that is missing is an error. A
container, a machine with one node and a firmware without an HMAT all give a ``Topology``; what
could not be learnt is named in ``Topology.unknown``.

Sources: Linux Documentation/admin-guide/mm/numaperf.rst (``access0``: MiB/s and nanoseconds),
Documentation/ABI/stable/sysfs-devices-node, ABI/testing/sysfs-bus-cxl,
ABI/testing/sysfs-kernel-mm-memory-tiers.
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from offload.allocator.errors import ConfigError
from offload.allocator.units import format_nbytes, format_rate

_MIB = 1 << 20
_NS = 1e-9
# The first that a machine has: the nearest initiators of any kind, then the nearest processors.
_ACCESS_CLASSES = ("access0", "access1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A NUMA node. What sysfs does not tell is ``None`` (or empty).

    Attributes:
        kind: ``dram`` has CPUs; ``cxl`` lies in a CXL window of physical memory; ``other`` has
            neither, such as HBM, persistent memory, or CXL memory whose bus can't be read.
        distances: (node, distance) pairs; 10 is local.
        initiators: the nodes whose accesses the four HMAT figures below are about.
        tier: the kernel's memory tier; a lower number is faster memory.
        movable: whether all its memory is ``ZONE_MOVABLE``, which refuses long-term pins.
    """

    index: int
    kind: Literal["dram", "cxl", "other"]
    cpus: tuple[int, ...] = ()
    memory_nbytes: int | None = None
    free_nbytes: int | None = None
    distances: tuple[tuple[int, int], ...] = ()
    initiators: tuple[int, ...] = ()
    read_bytes_per_s: float | None = None
    write_bytes_per_s: float | None = None
    read_latency_s: float | None = None
    write_latency_s: float | None = None
    tier: int | None = None
    movable: bool | None = None

    @property
    def pin_warning(self) -> str | None:
        """Why memory of this node should not be registered with a GPU as it is, or None."""
        if not self.movable:
            return None
        return (
            f"all memory of node {self.index} is ZONE_MOVABLE, which refuses long-term pins: "
            "registering it with a GPU fails or moves its pages to other nodes. Bring it online "
            "as kernel memory: daxctl reconfigure-device --mode=system-ram --no-movable DEVICE, "
            "or write online_kernel to the state of its blocks "
            f"(/sys/devices/system/node/node{self.index}/memory*/state)"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CxlDevice:
    """A CXL memory device; ``near_node`` is the node of the processors that it is plugged into."""

    name: str
    volatile_nbytes: int | None
    persistent_nbytes: int | None
    near_node: int | None
    serial: str | None
    firmware: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CxlRegion:
    """A range of physical memory that one or more CXL devices back."""

    name: str
    start: int
    nbytes: int
    ways: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """Nodes by ascending index, CXL devices and regions by name, and what is not known."""

    nodes: tuple[Node, ...] = ()
    cxl_devices: tuple[CxlDevice, ...] = ()
    cxl_regions: tuple[CxlRegion, ...] = ()
    unknown: tuple[str, ...] = ()

    def node(self, index: int) -> Node:
        """The node of that index.

        Raises:
            ConfigError: there is none; the message names those that hold memory.
        """
        for node in self.nodes:
            if node.index == index:
                return node
        known = ", ".join(str(node.index) for node in self.nodes if node.memory_nbytes)
        raise ConfigError(
            f"memory node {index} does not exist: this machine has memory on nodes "
            f"{known or 'unknown'}; choose one of them"
        )

    def to_json(self) -> str:
        """The topology as versioned JSON."""
        return json.dumps({"format": 1, **dataclasses.asdict(self)}, indent=2)

    def lines(self) -> Iterator[str]:
        """One line of text for each node, device, warning and unknown."""
        for node in self.nodes:
            yield _node_line(node)
        for device in self.cxl_devices:
            nbytes = device.volatile_nbytes
            size = "size unknown" if nbytes is None else format_nbytes(nbytes)
            yield f"cxl device {device.name}: {size} volatile, near node {device.near_node}"
        yield from (warning for node in self.nodes if (warning := node.pin_warning))
        yield from self.unknown


def read_topology(root: Path = Path("/sys")) -> Topology:
    """What the sysfs mounted at ``root`` tells; never raises for what is missing."""
    folder = root / "devices/system/node"
    regions = tuple(_regions(root))
    unknown: list[str] = []
    indexes = sorted(_numbered(folder, "node"))
    if not indexes:
        unknown.append(
            f"{folder} has no nodes (a kernel without NUMA, or a container that hides sysfs): "
            "nodes, distances and their memory are unknown"
        )
    tiers = _memory_tiers(root)
    windows = [*_windows(root), *((one.start, one.start + one.nbytes) for one in regions)]
    with_memory = _list_of(folder / "has_memory")
    normal = _list_of(folder / "has_normal_memory")
    block_nbytes = _number(root / "devices/system/memory/block_size_bytes", 16)
    nodes = []
    for index in indexes:
        node = _read_node(folder / f"node{index}", index, indexes)
        if node.kind != "dram" and _in_windows(folder / f"node{index}", block_nbytes, windows):
            node = dataclasses.replace(node, kind="cxl")
        movable = None
        if with_memory is not None and normal is not None:
            movable = index in with_memory and index not in normal
        nodes.append(dataclasses.replace(node, tier=tiers.get(index), movable=movable))
    if len(nodes) > 1 and any(node.read_bytes_per_s is None for node in nodes):
        missing = ", ".join(str(node.index) for node in nodes if node.read_bytes_per_s is None)
        unknown.append(
            f"the firmware's HMAT gives no bandwidth or latency for node {missing}: "
            "measure it, or the published figures of its kind are assumed"
        )
    return Topology(
        nodes=tuple(nodes),
        cxl_devices=tuple(_devices(root)),
        cxl_regions=regions,
        unknown=tuple(unknown),
    )


def parse_list(text: str) -> tuple[int, ...]:
    """The numbers of a kernel list such as ``0-3,8``.

    Raises:
        ValueError: anything else.
    """
    numbers: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return tuple(numbers)


def _read_node(folder: Path, index: int, indexes: list[int]) -> Node:
    cpus = _list_of(folder / "cpulist") or ()
    total, free = _meminfo(folder / "meminfo")
    distances = (_text(folder / "distance") or "").split()
    pairs = zip(indexes, map(int, distances), strict=True) if len(distances) == len(indexes) else ()
    node = Node(
        index=index,
        kind="dram" if cpus else "other",
        cpus=cpus,
        memory_nbytes=total,
        free_nbytes=free,
        distances=tuple(pairs),
    )
    return _with_hmat(node, folder)


def _with_hmat(node: Node, folder: Path) -> Node:
    """The node with its figures from the firmware's HMAT, where there are some."""
    for name in _ACCESS_CLASSES:
        access = folder / name / "initiators"
        if access.is_dir():
            return dataclasses.replace(
                node,
                initiators=tuple(sorted(_numbered(access, "node"))),
                read_bytes_per_s=_scaled(access / "read_bandwidth", _MIB),
                write_bytes_per_s=_scaled(access / "write_bandwidth", _MIB),
                read_latency_s=_scaled(access / "read_latency", _NS),
                write_latency_s=_scaled(access / "write_latency", _NS),
            )
    return node


def _in_windows(node: Path, block_nbytes: int | None, windows: list[tuple[int, int]]) -> bool:
    """Whether the node's first block of memory lies in a CXL window."""
    blocks = _numbered(node, "memory")
    if not blocks or not block_nbytes:
        return False
    start = min(blocks) * block_nbytes
    return any(low <= start < high for low, high in windows)


def _memory_tiers(root: Path) -> dict[int, int]:
    folder = root / "devices/virtual/memory_tiering"
    return {
        node: tier
        for tier in _numbered(folder, "memory_tier")
        for node in _list_of(folder / f"memory_tier{tier}" / "nodelist") or ()
    }


def _windows(root: Path) -> Iterator[tuple[int, int]]:
    """The ranges of physical addresses that root decoders send to CXL."""
    for decoder in _cxl(root, "decoder"):
        if _text(decoder / "devtype") not in {"cxl_decoder_root", None}:
            continue
        start, nbytes = _number(decoder / "start"), _number(decoder / "size")
        if start is not None and nbytes:
            yield start, start + nbytes


def _regions(root: Path) -> Iterator[CxlRegion]:
    for region in _cxl(root, "region"):
        start, nbytes = _number(region / "resource"), _number(region / "size")
        if start is not None and nbytes:
            ways = _number(region / "interleave_ways")
            yield CxlRegion(name=region.name, start=start, nbytes=nbytes, ways=ways)


def _devices(root: Path) -> Iterator[CxlDevice]:
    for device in _cxl(root, "mem"):
        near = _number(device / "numa_node")
        yield CxlDevice(
            name=device.name,
            volatile_nbytes=_number(device / "ram/size"),
            persistent_nbytes=_number(device / "pmem/size"),
            near_node=None if near is not None and near < 0 else near,
            serial=_text(device / "serial"),
            firmware=_text(device / "firmware_version"),
        )


def _cxl(root: Path, prefix: str) -> list[Path]:
    """The devices of the CXL bus that are named ``prefix`` and a number (decoders have two)."""
    try:
        entries = sorted((root / "bus/cxl/devices").iterdir())
    except OSError:
        return []
    return [
        entry
        for entry in entries
        if entry.name.startswith(prefix) and entry.name.removeprefix(prefix)[:1].isdigit()
    ]


def _numbered(folder: Path, prefix: str) -> list[int]:
    """The numbers of the entries named ``prefix`` and a number; empty where unreadable."""
    try:
        names = [entry.name.removeprefix(prefix) for entry in folder.glob(f"{prefix}[0-9]*")]
    except OSError:
        return []
    return [int(name) for name in names if name.isdigit()]


def _meminfo(path: Path) -> tuple[int | None, int | None]:
    """Bytes of memory and free bytes, from lines such as ``Node 0 MemFree: 123 kB``."""
    found: dict[str, int] = {}
    for line in (_text(path) or "").splitlines():
        words = line.split()
        if len(words) >= 4 and words[3].isdigit():
            found[words[2].rstrip(":")] = int(words[3]) * 1024
    return found.get("MemTotal"), found.get("MemFree")


def _list_of(path: Path) -> tuple[int, ...] | None:
    text = _text(path)
    try:
        return None if text is None else parse_list(text)
    except ValueError:
        return None


def _scaled(path: Path, unit: float) -> float | None:
    """A figure of the HMAT in base units; firmware writes 0 for what it does not know."""
    number = _number(path)
    return number * unit if number else None


def _number(path: Path, base: int = 0) -> int | None:
    text = _text(path)
    try:
        return None if text is None else int(text, base)
    except ValueError:
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def _node_line(node: Node) -> str:
    size = "size unknown" if node.memory_nbytes is None else format_nbytes(node.memory_nbytes)
    parts = [f"node {node.index}: {node.kind}, {size}, {len(node.cpus)} CPUs"]
    if node.read_bytes_per_s is not None:
        parts.append(f"reads {format_rate(node.read_bytes_per_s)}")
    if node.read_latency_s is not None:
        parts.append(f"latency {node.read_latency_s / _NS:.0f} ns")
    if node.tier is not None:
        parts.append(f"memory tier {node.tier}")
    return ", ".join(parts)
