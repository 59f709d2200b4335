"""Which memory node holds each tensor, where DRAM is too small for all of them.

Pure: the same tensors and nodes always give the same plan.

[Note: the cost model] A step touches each tensor in up to three ways: the CPU passes over it
(optimizer states, master weights, gradients), a device reads it by DMA, a device writes it by DMA.
For a tensor of ``n`` bytes whose share on node ``i`` is ``x_i``, one touch of a kind costs

    max(n / fastest DRAM rate, max over i of x_i / rate_i)

that is, nodes work side by side, and nothing is faster than local DRAM alone (the processor, or
the device's link, is the limit there). It reproduces the measurements that were published with
CXL-aware allocation (arXiv 2507.03305): Adam over 545 M elements takes 54.8 ms in DRAM, 228.8 ms
on CXL, and at 1:1, 1:2, 1:3 and 1:4 106.8, 143, 164 and 178 ms where the model says 114, 153, 172
and 183; a device's writes reach 51.7 GiB/s in DRAM, 34.7 on CXL and 50.2 interleaved, where it says
51.7. Ratios with more DRAM than CXL were not measured: there the model is an extrapolation.

[Note: benefit per byte] So a byte of a tensor that goes from far memory to DRAM saves the
reciprocal of the far rate, for each touch whose slowest part is the far one, and nothing once
DRAM's share is as large as its share of the bandwidth. These savings are constant over segments
of a tensor and fall from one to the next, so that giving DRAM to the segments with the largest
saving per byte is optimal (fractional knapsack): Adam states first, down to the share that CXL can
serve as fast; then gradients that a device writes; weights and activations that a device reads
last. The whole-class rule of that paper gives DRAM to whole classes in a fixed order instead, and
shares by 1:1 only. Where cards differ so that far memory can't be striped in proportion to
bandwidth, that rule or plain interleaving may come out ahead: the best of the three is taken.

[Note: small tensors] The processor's caches hide far memory from small tensors: the same
measurements show 1.08x at 1.8 M elements, 1.14x at 12.8 M, 3.8x at 67.9 M (fp32).
"""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from offload.allocator.errors import BudgetError, ConfigError
from offload.allocator.units import format_nbytes
from offload.tiers.topology import Topology

_GIB = float(1 << 30)
# Bytes per second of the published machine. A CPU pass is one step of Adam over four fp32 tensors
# of 545 M elements; DMA is one GPU at 2 GiB.
_PUBLISHED = {
    "dram": (545e6 * 16 / 54.8e-3, 51.8 * _GIB, 51.7 * _GIB),
    "cxl": (545e6 * 16 / 228.8e-3, 49.8 * _GIB, 34.7 * _GIB),
}
# A CPU pass on far memory: how much slower than in DRAM, by bytes of the tensor, as far as the
# caches hide it; see [Note: small tensors]. Between the points: linear over the logarithm.
_HIDDEN_NBYTES, _SEEN_NBYTES = 12.8e6 * 4, 67.9e6 * 4
_HIDDEN_SLOWDOWN = 1.14

Shares: TypeAlias = dict[str, tuple[tuple[int, int], ...]]  # (node, nbytes) by tensor
_Rates: TypeAlias = tuple[float, float, float]  # a figure of CPU passes, DMA reads, DMA writes


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedTensor:
    """A tensor to place; touches are how often a step passes over all of it.

    Attributes:
        role: weight | gradient | state | activation; the whole-class rule goes by it.
        cpu_touches: passes of the CPU: the optimizer step, clipping.
        dma_reads: copies from it to a device.
        dma_writes: copies from a device into it.
    """

    name: str
    role: Literal["state", "weight", "activation", "gradient"]
    nbytes: int
    cpu_touches: float = 0.0
    dma_reads: float = 0.0
    dma_writes: float = 0.0

    @property
    def touches(self) -> _Rates:
        """CPU passes, DMA reads and DMA writes of a step."""
        return self.cpu_touches, self.dma_reads, self.dma_writes


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNode:
    """Room on a node, and its rates: measured, of the HMAT, or published ones of its kind."""

    index: int
    local: bool  # DRAM of the processors that train; False: CXL and other far memory
    capacity_nbytes: int
    cpu_bytes_per_s: float
    dma_read_bytes_per_s: float
    dma_write_bytes_per_s: float

    @property
    def rates(self) -> _Rates:
        """Bytes per second of a CPU pass, of DMA reads and of DMA writes."""
        return self.cpu_bytes_per_s, self.dma_read_bytes_per_s, self.dma_write_bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class NodePlan:
    """Where each tensor goes.

    Attributes:
        shares: by tensor, the (node, nbytes) pairs that hold it; their sum is its size.
        rule: benefit | class | interleave: what gave the shortest step.
        step_s: what memory adds to a step, by the cost model.
    """

    shares: Mapping[str, tuple[tuple[int, int], ...]]
    rule: str
    step_s: float

    def used_nbytes(self) -> dict[int, int]:
        """Bytes of each node that holds some."""
        used: dict[int, int] = {}
        for parts in self.shares.values():
            for node, nbytes in parts:
                used[node] = used.get(node, 0) + nbytes
        return dict(sorted(used.items()))

    def to_json(self) -> str:
        """The plan as versioned JSON."""
        return json.dumps({"format": 1, **dataclasses.asdict(self)}, indent=2)


def nodes_of(
    topology: Topology,
    capacity_nbytes: Mapping[int, int],
    *,
    link_bytes_per_s: float = _PUBLISHED["dram"][1],
) -> tuple[MemoryNode, ...]:
    """The nodes of ``capacity_nbytes`` with the rates of the HMAT, or the published ones.

    The HMAT is taken where it tells the rates of all these nodes; DMA is bounded by the device's
    link.

    Raises:
        ConfigError: a node that does not exist.
    """
    found = [topology.node(index) for index in sorted(capacity_nbytes)]
    known = all(node.read_bytes_per_s and node.write_bytes_per_s for node in found)
    nodes = []
    for node in found:
        cpu, read, write = _PUBLISHED["dram" if node.kind == "dram" else "cxl"]
        if known:
            cpu = node.read_bytes_per_s or cpu
            read = min(cpu, link_bytes_per_s)
            write = min(node.write_bytes_per_s or write, link_bytes_per_s)
        nodes.append(
            MemoryNode(
                index=node.index,
                local=node.kind == "dram",
                capacity_nbytes=capacity_nbytes[node.index],
                cpu_bytes_per_s=cpu,
                dma_read_bytes_per_s=read,
                dma_write_bytes_per_s=write,
            )
        )
    return tuple(nodes)


def place(tensors: Sequence[PlacedTensor], nodes: Sequence[MemoryNode]) -> NodePlan:
    """The plan with the shortest step; see [Note: benefit per byte].

    Never over a node's capacity, and never longer than the whole-class rule or plain
    interleaving. More DRAM never makes it longer where far nodes are alike: rates of all
    kinds and capacities in one proportion; and so the DRAM nodes.

    Raises:
        BudgetError: the tensors are larger than the nodes together.
        ConfigError: no DRAM node, or a name or node that comes twice.
    """
    nodes = sorted(nodes, key=lambda node: node.index)
    _check(tensors, nodes)
    plans = [
        NodePlan(shares=shares, rule=rule, step_s=step_seconds(tensors, nodes, shares))
        for rule, shares in (
            ("benefit", by_benefit(tensors, nodes)),
            ("class", by_class(tensors, nodes)),
            ("interleave", interleaved(tensors, nodes)),
        )
    ]
    return min(plans, key=lambda plan: plan.step_s)  # the first of equals


def step_seconds(
    tensors: Sequence[PlacedTensor],
    nodes: Sequence[MemoryNode],
    shares: Mapping[str, Sequence[tuple[int, int]]],
) -> float:
    """Seconds that a step spends on these tensors; see [Note: the cost model]."""
    by_index = {node.index: node for node in nodes}
    total = 0.0
    for tensor in tensors:
        best = _best_rates(nodes)
        for kind, touches in enumerate(tensor.touches):
            slowest = tensor.nbytes / best[kind]
            for index, nbytes in shares[tensor.name]:
                rate = _rates(tensor, by_index[index], best)[kind]
                slowest = max(slowest, nbytes / rate)
            total += touches * slowest
    return total


def by_class(tensors: Sequence[PlacedTensor], nodes: Sequence[MemoryNode]) -> Shares:
    """The rule of arXiv 2507.03305: states, weights, activations, then gradients.

    A tensor that fits in what is left of DRAM is local; one that does not is dealt evenly over
    what is left of DRAM and all far nodes.
    """
    order = {"state": 0, "weight": 1, "activation": 2, "gradient": 3}
    free = {node.index: node.capacity_nbytes for node in nodes}
    local = [node.index for node in nodes if node.local]
    far = [node.index for node in nodes if not node.local]
    shares: Shares = {}
    for tensor in sorted(tensors, key=lambda tensor: order[tensor.role]):
        where = local if tensor.nbytes <= sum(free[index] for index in local) else local + far
        shares[tensor.name] = _evenly(tensor.nbytes, where, free)
    return shares


def interleaved(tensors: Sequence[PlacedTensor], nodes: Sequence[MemoryNode]) -> Shares:
    """What ``numactl --interleave=all`` does: every tensor evenly over all nodes with room."""
    free = {node.index: node.capacity_nbytes for node in nodes}
    everywhere = [node.index for node in nodes]
    return {tensor.name: _evenly(tensor.nbytes, everywhere, free) for tensor in tensors}


def by_benefit(tensors: Sequence[PlacedTensor], nodes: Sequence[MemoryNode]) -> Shares:
    """The rule of [Note: benefit per byte]; optimal where nodes are alike."""
    local = [node for node in nodes if node.local]
    far = [node for node in nodes if not node.local]
    total = sum(tensor.nbytes for tensor in tensors)
    room = min(total, sum(node.capacity_nbytes for node in local))
    quotas = {**_quotas(local, room), **_quotas(far, total - room)}
    stripes = _stripes(far, quotas)
    costs = [_far_costs(tensor, nodes, far, stripes) for tensor in tensors]
    segments = [
        (-saved, -cost[0], -cost[2], position, order, nbytes)
        for position, (tensor, cost) in enumerate(zip(tensors, costs, strict=True))
        for order, (saved, nbytes) in enumerate(_segments(tensor, _best_rates(nodes), cost))
    ]
    near = [0] * len(tensors)
    # Pieces that save nothing come last. They too go to DRAM while there is room: what the CPU
    # touches, then what a device writes, then what it reads.
    for _, _, _, position, _, nbytes in sorted(segments):
        taken = min(nbytes, room)
        near[position] += taken
        room -= taken
    return {
        tensor.name: (
            *_take(quotas, local, near_nbytes),
            *_take(quotas, far, tensor.nbytes - near_nbytes),
        )
        for tensor, near_nbytes in zip(tensors, near, strict=True)
    }


def _segments(tensor: PlacedTensor, best: _Rates, far_costs: _Rates) -> Iterator[tuple[float, int]]:
    """(seconds saved per byte, nbytes) of the pieces of a tensor, the most urgent first.

    A kind of touch stops to gain when DRAM holds ``1 - local / far`` of the tensor, where
    ``local`` and ``far`` are its seconds per byte.
    """
    ends = [
        math.ceil(tensor.nbytes * max(0.0, 1 - touches / rate / cost)) if cost else 0
        for touches, rate, cost in zip(tensor.touches, best, far_costs, strict=True)
    ]
    start = 0
    for end in sorted({*ends, tensor.nbytes}):
        if end > start:
            yield (
                sum(cost for cost, last in zip(far_costs, ends, strict=True) if last >= end),
                (end - start),
            )
            start = end


def _far_costs(
    tensor: PlacedTensor,
    nodes: Sequence[MemoryNode],
    far: Sequence[MemoryNode],
    stripes: Mapping[int, float],
) -> _Rates:
    """Seconds per step and byte of each kind of touch, striped over far memory."""
    best = _best_rates(nodes)
    rates = [(stripes[node.index], _rates(tensor, node, best)) for node in far]
    cpu, read, write = (
        touches * max((part / rate[kind] for part, rate in rates), default=0.0)
        for kind, touches in enumerate(tensor.touches)
    )
    return cpu, read, write


def _rates(tensor: PlacedTensor, node: MemoryNode, best: _Rates) -> _Rates:
    """The node's rates for this tensor: caches hide far memory from small ones."""
    cpu, read, write = node.rates
    full = best[0] / cpu
    if full <= _HIDDEN_SLOWDOWN:
        return cpu, read, write
    at = math.log(max(tensor.nbytes, 1) / _HIDDEN_NBYTES) / math.log(_SEEN_NBYTES / _HIDDEN_NBYTES)
    slowdown = _HIDDEN_SLOWDOWN + (full - _HIDDEN_SLOWDOWN) * min(max(at, 0.0), 1.0)
    return best[0] / slowdown, read, write


def _best_rates(nodes: Sequence[MemoryNode]) -> _Rates:
    """The fastest DRAM node's, kind by kind."""
    cpu, read, write = zip(*(node.rates for node in nodes if node.local), strict=True)
    return max(cpu), max(read), max(write)


def _quotas(nodes: Sequence[MemoryNode], nbytes: int) -> dict[int, int]:
    """``nbytes`` shared out in proportion to the rates of DMA reads, as far as there is room."""
    quotas = {node.index: 0 for node in nodes}
    while nbytes:
        open_nodes = [node for node in nodes if quotas[node.index] < node.capacity_nbytes]
        total = sum(node.dma_read_bytes_per_s for node in open_nodes)
        left = nbytes
        for node in open_nodes:
            part = math.ceil(left * node.dma_read_bytes_per_s / total)
            part = min(part, nbytes, node.capacity_nbytes - quotas[node.index])
            quotas[node.index] += part
            nbytes -= part
    return quotas


def _stripes(nodes: Sequence[MemoryNode], quotas: Mapping[int, int]) -> dict[int, float]:
    """Each far node's part of a striped tensor; that of one byte where nothing is far."""
    used = sum(quotas[node.index] for node in nodes)
    total = sum(node.dma_read_bytes_per_s for node in nodes)
    return {
        node.index: quotas[node.index] / used if used else node.dma_read_bytes_per_s / total
        for node in nodes
    }


def _take(
    quotas: dict[int, int], nodes: Sequence[MemoryNode], nbytes: int
) -> Iterator[tuple[int, int]]:
    """Take ``nbytes`` off the quotas so that what is left of them stays in proportion."""
    total = sum(quotas[node.index] for node in nodes)
    for node in nodes:
        quota = quotas[node.index]
        part = -(-nbytes * quota // total) if total else 0
        part = min(part, quota, nbytes)
        total -= quota
        nbytes -= part
        quotas[node.index] -= part
        if part:
            yield node.index, part


def _evenly(nbytes: int, where: Sequence[int], free: dict[int, int]) -> tuple[tuple[int, int], ...]:
    """Take ``nbytes`` from the nodes of ``where`` in equal parts, as far as each has room."""
    parts = dict.fromkeys(where, 0)
    while nbytes:
        open_nodes = [index for index in where if free[index]]
        even = -(-nbytes // len(open_nodes))
        for index in open_nodes:
            part = min(even, free[index], nbytes)
            parts[index] += part
            free[index] -= part
            nbytes -= part
    return tuple((index, part) for index, part in parts.items() if part)


def _check(tensors: Sequence[PlacedTensor], nodes: Sequence[MemoryNode]) -> None:
    problems = []
    if not any(node.local for node in nodes):
        problems.append("no DRAM node was given: the CPU's own memory is needed as a measure")
    for what, names in (
        ("node", [node.index for node in nodes]),
        ("tensor", [tensor.name for tensor in tensors]),
    ):
        problems += [
            f"{what} {name} comes {count} times: give it once"
            for name, count in Counter(names).items()
            if count > 1
        ]
    if problems:
        raise ConfigError(*problems)
    needed = sum(tensor.nbytes for tensor in tensors)
    room = sum(node.capacity_nbytes for node in nodes)
    if needed > room:
        raise BudgetError(
            f"{len(tensors)} tensors of {format_nbytes(needed)} ({needed} bytes) do not fit on "
            f"nodes {', '.join(str(node.index) for node in nodes)} with {format_nbytes(room)}: "
            f"raise a budget by {format_nbytes(needed - room)}, or move tensors to a file",
            needed_nbytes=needed,
            budget_nbytes=room,
        )
