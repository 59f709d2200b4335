"""Processor, memory, nodes of memory, GPUs."""

import re
from collections.abc import Sequence

from offload.allocator.units import format_nbytes, format_rate
from offload.doctor.finding import Finding
from offload.tiers.gpus import Gpu, count_nvidia_cards
from offload.tiers.system import System, read_cpu, read_memory
from offload.tiers.topology import Node, Topology, read_topology


def examine_hardware(system: System, gpus: Sequence[Gpu]) -> tuple[Finding, ...]:
    """What the machine is made of."""
    topology = read_topology(system.sys)
    return (
        cpu(system),
        memory(system),
        *nodes(topology),
        *cxl(topology),
        *examine_gpus(system, gpus),
    )


def cpu(system: System) -> Finding:
    """The processor, its cores and the instructions that matter."""
    found = read_cpu(system)
    usable = f"{found.usable} of {found.logical} cores usable"
    return Finding(
        subject="CPU",
        value=f"{found.model}, {usable}",
        detail=", ".join(found.features) or "no vector instructions told",
    )


def memory(system: System) -> Finding:
    """Size, what is available, and how fast it is where the firmware tells."""
    found = read_memory(system)
    if found is None:
        return Finding(
            subject="memory",
            value="unknown",
            status="fail",
            detail=f"{system.proc}/meminfo can't be read, so no budget can be checked",
            mend="mount -t proc proc /proc",
        )
    return Finding(
        subject="memory",
        value=f"{format_nbytes(found.total_nbytes)}, "
        f"{format_nbytes(found.available_nbytes)} available",
        detail=_memory_modules(system),
    )


def _memory_modules(system: System) -> str:
    """``8 modules, DDR5, 4800 MT/s``, or why that is unknown."""
    answer = system.run(["dmidecode", "-t", "memory"])
    if answer is None:
        return "modules and speed unknown: dmidecode is not installed"
    speeds = re.findall(
        r"^\s*Configured (?:Memory|Clock) Speed: (\d+ \S+)", answer.text, re.MULTILINE
    )
    kinds = re.findall(r"^\s*Type: (\S*DDR\S*)", answer.text, re.MULTILINE)
    if not speeds:
        return "modules and speed unknown: as root, sudo dmidecode -t memory may tell"
    kind = f"{kinds[0]}, " if kinds else ""
    return f"{len(speeds)} modules, {kind}{' and '.join(sorted(set(speeds)))}"


def nodes(topology: Topology) -> tuple[Finding, ...]:
    """Nodes of memory, with what the firmware says of their speed."""
    if len(topology.nodes) < 2:
        return (Finding(subject="NUMA", value="one node"),)
    count = Finding(
        subject="NUMA", value=f"{len(topology.nodes)} nodes", detail="; ".join(topology.unknown)
    )
    return (count, *(_node(node) for node in topology.nodes))


def _node(node: Node) -> Finding:
    sizes = [
        f"{format_nbytes(nbytes)} {what}"
        for nbytes, what in ((node.memory_nbytes, "of memory"), (node.free_nbytes, "free"))
        if nbytes is not None
    ]
    speeds = [
        f"{what} {format_rate(rate)}"
        for what, rate in (("reads", node.read_bytes_per_s), ("writes", node.write_bytes_per_s))
        if rate is not None
    ]
    distances = " ".join(str(distance) for _, distance in node.distances)
    return Finding(
        subject=f"node {node.index}",
        value=", ".join([node.kind, *sizes, f"{len(node.cpus)} CPUs"]),
        status="warn" if node.pin_warning else "ok",
        detail=node.pin_warning or ", ".join([f"distances {distances or 'not told'}", *speeds]),
    )


def cxl(topology: Topology) -> tuple[Finding, ...]:
    """CXL memory devices."""
    if not topology.cxl_devices:
        return (Finding(subject="CXL", value="no device"),)
    return tuple(
        Finding(
            subject=f"CXL {device.name}",
            value="size not told"
            if device.volatile_nbytes is None
            else f"{format_nbytes(device.volatile_nbytes)} of memory",
            detail=f"near node {device.near_node}" if device.near_node is not None else "",
        )
        for device in topology.cxl_devices
    )


def examine_gpus(system: System, gpus: Sequence[Gpu]) -> tuple[Finding, ...]:
    """Each GPU; a machine without one is a fact, a card without a driver a warning."""
    if gpus:
        return tuple(_gpu(gpu) for gpu in gpus)
    if cards := count_nvidia_cards(system):
        return (
            Finding(
                subject="GPU",
                value=f"{cards} NVIDIA card{'s' * (cards > 1)} without a working driver",
                status="warn",
                detail="nvidia-smi lists none; training runs on the CPU",
                mend="sudo modprobe nvidia; nvidia-smi",
            ),
        )
    return (Finding(subject="GPU", value="none", detail="training runs on the CPU"),)


def _gpu(gpu: Gpu) -> Finding:
    narrow = (
        gpu.pcie_width is not None
        and gpu.pcie_width_max is not None
        and gpu.pcie_width < gpu.pcie_width_max
    )
    return Finding(
        subject=f"GPU {gpu.index}",
        value=f"{gpu.name}, {format_nbytes(gpu.memory_nbytes)}, driver {gpu.driver}",
        status="warn" if narrow else "ok",
        detail=_pcie(gpu) + (": every transfer is slower for it" if narrow else ""),
        mend="reseat the card, or move it to a slot with all its lanes" if narrow else "",
    )


def _pcie(gpu: Gpu) -> str:
    """The link of a card; an idle one lowers its generation to save power, never its width."""
    if gpu.pcie_gen is None or gpu.pcie_width is None:
        return f"{gpu.capability}, PCIe link not told"
    generation = f"PCIe {gpu.pcie_gen}"
    if gpu.pcie_gen_max is not None and gpu.pcie_gen < gpu.pcie_gen_max:
        generation += f" now, {gpu.pcie_gen_max} under load,"
    width = f"x{gpu.pcie_width}"
    if gpu.pcie_width_max is not None and gpu.pcie_width < gpu.pcie_width_max:
        width += f" of x{gpu.pcie_width_max}"
    return f"{gpu.capability}, {generation} {width}"
