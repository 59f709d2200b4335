"""How long each part of a step takes on a machine, from its measured rates.

An operation takes as long as the slower of its arithmetic and its memory traffic (the roofline
model: Williams, Waterman, Patterson, CACM 52(4), 2009), each at the rate that was measured for
calls of that size, and what every call costs. Between two measured sizes the rate is interpolated
on logarithmic scales; beyond them it stays what it was.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from typing import Literal

from offload.allocator.errors import ConfigError
from offload.swap.planning.program import Operation, StateForm, Stepping
from offload.tiers.hostmem import PAGE
from offload.tiers.machine import ComputeRate, Link, Machine, Work
from offload.tiers.pieces import PIECE_NBYTES

FRESH_NBYTES = 256 << 10  # larger results are fresh memory: ``hostmem.return_freed_memory``
_THIN_ROWS = 32
# In calls of the smallest kernel, which is mostly the interpreter's and the dispatcher's work.
_VIEW_CALLS = 0.5
_HOOK_CALLS = 6.0
FLUSHES = 3  # of a commit: data, record, directory
_LEAST_TOGETHER = 0.25
# Torch's attention on a CPU computes whole blocks of so many keys, which a causal mask then cuts.
_KEY_BLOCK = 512
_COMMIT_CALLS = 12.0  # for each weight in the record
# Which rates stand in for those of a type that nobody measured.
_ALIKE = {"float16": "bfloat16", "float64": "float32"}


class Curve:
    """A rate by the size of one call.

    Args:
        points: (size, rate), rising by size.
    """

    def __init__(self, points: Sequence[tuple[int, float]]) -> None:
        self._sizes = [math.log(size) for size, _ in points]
        self._rates = [math.log(rate) for _, rate in points]

    def rate(self, size: int) -> float:
        """What calls of ``size`` reach."""
        at = math.log(max(size, 1))
        after = bisect_left(self._sizes, at)
        if after == 0:
            return math.exp(self._rates[0])
        if after == len(self._sizes):
            return math.exp(self._rates[-1])
        low, high = self._sizes[after - 1], self._sizes[after]
        share = (at - low) / (high - low)
        before = self._rates[after - 1]
        return math.exp(before + share * (self._rates[after] - before))


class Costs:
    """Seconds of everything that a run does on one machine.

    Args:
        drive: the name of the file tier.
        key_block: keys that causal attention computes at once, masked ones among them.

    Attributes:
        reclaimed: how fast memory comes that a hypervisor took back, and its size: how much it
            takes at once; None: it takes none, or nobody measured that.

    Raises:
        ConfigError: a rate or a link that a step needs was not measured; names what measures it.
    """

    def __init__(self, machine: Machine, drive: str, *, key_block: int = _KEY_BLOCK) -> None:
        self._key_block = key_block
        self._machine = machine
        self._drive = drive
        self._curves: dict[tuple[Work, str], Curve] = {}
        self._requests = {
            pair: _by_block(machine, *pair) for pair in ((drive, "host"), ("host", drive))
        }
        self.call_s = 1 / self._curve("dispatch", "float32").rate(1)
        self.hook_s = _HOOK_CALLS * self.call_s
        self.checksum_bytes_per_s = self._curve("checksum", "float32").rate(PIECE_NBYTES)
        self._curve("first touch", "float32")
        self.reclaimed = _reclaimed(machine)
        read, write = machine.link(drive, "host"), machine.link("host", drive)
        self.read_latency_s, self.write_latency_s = read.latency_s, write.latency_s
        self._read_bytes_per_s, self._write_bytes_per_s = read.bytes_per_s, write.bytes_per_s
        self.lost_s_per_byte = self._seconds_each("moves", 0.0)  # as if lanes took nothing from it
        self.gradient_s = self._seconds_each("gradients", 0.0)
        self.fetch_s = self._seconds_each("fetches", 0.0)
        self.tile_part_s = self._seconds_each("tile parts", 0.0)
        self.small_step_s = self._seconds_each("small steps", self.hook_s)
        self._flush_s = self._seconds_each("flush", write.latency_s)

    def _seconds_each(self, work: Work, unknown: float, size: int = 1) -> float:
        """Of one unit of ``work``; ``unknown`` if nobody measured it."""
        try:
            return 1 / self._curve(work, "float32").rate(size)
        except ConfigError:
            return unknown

    def _curve(self, work: Work, dtype: str) -> Curve:
        key = work, dtype
        if key not in self._curves:
            try:
                points = self._machine.rates(work, dtype)
            except ConfigError:
                if dtype not in _ALIKE:
                    raise
                points = self._machine.rates(work, _ALIKE[dtype])
            self._curves[key] = Curve(points)
        return self._curves[key]

    def seconds(self, operation: Operation) -> float:
        """Of one call."""
        if operation.kind == "view":
            return _VIEW_CALLS * self.call_s
        dtype = operation.dtype if operation.dtype.startswith(("float", "bfloat")) else "float32"
        moving_s = self._at("pointwise", dtype, operation.nbytes)
        if operation.kind == "heavy":
            moving_s = self._at("heavy", dtype, operation.nbytes)
        elif operation.kind != "pointwise":
            flops = operation.flops * self._computed(operation.causal_keys)
            moving_s = max(moving_s, self._at(_work_of(operation), dtype, round(flops)))
        return max(moving_s, self.call_s)

    def _at(self, work: Work, dtype: str, size: int) -> float:
        return size / self._curve(work, dtype).rate(size)

    def _computed(self, causal_keys: int) -> float:
        """How often each product is computed that a causal mask leaves, masked ones included."""
        if not causal_keys:
            return 1.0
        blocks, rest = divmod(causal_keys, self._key_block)
        computed = self._key_block**2 * blocks * (blocks + 1) / 2 + rest * causal_keys
        return 2 * computed / causal_keys**2

    def fresh_s(self, nbytes: int) -> float:
        """What the kernel takes to make ``nbytes`` of fresh memory, in one piece."""
        return self._at("first touch", "float32", nbytes) if nbytes >= FRESH_NBYTES else 0.0

    @property
    def reclaimed_s_per_byte(self) -> float:
        """What fresh memory takes longer where a hypervisor has to bring it back."""
        if self.reclaimed is None:
            return 0.0
        fresh_s = 1 / self._curve("first touch", "float32").rate(self.reclaimed.size)
        return max(1 / self.reclaimed.per_s - fresh_s, 0.0)

    def page_write_s(self, apart: float) -> float:
        """Of zeroing a page of a mapped file, and its first write, so far from the next one."""
        return self._seconds_each("page writes", 0.0, max(round(apart), 1))

    def added_s(self, nbytes: int) -> float:
        """Of adding a gradient of ``nbytes`` to another, both in memory."""
        return self._at("pointwise", "float32", _ADDED * nbytes)

    def added_at_home_s(self, nbytes: int) -> float:
        """As ``added_s``, through the mapping of a file whose pages the kernel has in memory.

        Each page is a fault, and the first write to it.
        """
        given_s = nbytes / self._curve("first touch", "float32").rate(PAGE)
        return max(nbytes / PAGE * self.page_write_s(1.0), given_s) + self.added_s(nbytes)

    def looked_over_s(self, nbytes: int) -> float:
        """Of a look at all bytes of a mapped file that has none of them on the drive."""
        given_s = nbytes / self._curve("first touch", "float32").rate(PAGE)
        return given_s + self._at("pointwise", "float32", nbytes)

    def page_read_s(self, apart: float) -> float:
        """Of the first look at a page of a mapped file, so many pages from the next one."""
        return self._seconds_each("page reads", self.read_latency_s, max(round(apart), 1))

    def optimizer_s(
        self, stepping: Stepping, nbytes: int, *, threads: Literal["one", "all"]
    ) -> float:
        """A call of the optimizer's step that moves ``nbytes`` of weights, gradients, states."""
        work: Work = "optimizer" if threads == "all" else "optimizer thread"
        passes = 1 if stepping.fused else _UNFUSED_PASSES
        return passes * self._at(work, "float32", nbytes) + self.hook_s

    def recoding_s(self, form: StateForm, numel: int) -> float:
        """Of one thread, for numbers of a state that become float32 and then ``form`` again."""
        work, share = _RECODINGS[form]
        try:
            bytes_per_s = self._curve(work, "float32").rate(1)
        except ConfigError:
            bytes_per_s = share * self._curve("optimizer thread", "float32").rate(PIECE_NBYTES)
        return _FLOAT_NBYTES * numel / bytes_per_s

    def read_s(self, nbytes: int) -> float:
        """Of the drive, for one request of ``nbytes`` among others."""
        return self._request_s(self._drive, "host", nbytes)

    def write_s(self, nbytes: int) -> float:
        """As ``read_s``, to the drive."""
        return self._request_s("host", self._drive, nbytes)

    def _request_s(self, source: str, target: str, nbytes: int) -> float:
        moved = max(nbytes, PAGE)
        sizes, links = self._requests[source, target]
        link = links[max(bisect_right(sizes, moved) - 1, 0)]
        return max(moved / link.bytes_per_s, link.latency_s / link.in_flight)

    @property
    def both_bytes_per_s(self) -> float:
        """What both lanes move together, where both are busy."""
        try:
            both = 2 * self._machine.link(self._drive, self._drive).bytes_per_s
        except ConfigError:  # nobody measured it: as if the drive did one thing at a time
            both = (self._read_bytes_per_s + self._write_bytes_per_s) / 2
        return min(both, 1 / self._seconds_each("tiles", 1 / both))

    @property
    def together(self) -> float:
        """The share of its own rate at which each lane goes on while both are busy."""
        both, alone = self.both_bytes_per_s, self._read_bytes_per_s + self._write_bytes_per_s
        return min(max(both / alone, _LEAST_TOGETHER), 1.0)

    def commit_s(self, weights: int) -> float:
        """What a commit costs beside the bytes that it writes."""
        return FLUSHES * self._flush_s + weights * _COMMIT_CALLS * self.call_s


_FLOAT_NBYTES = 4
_ADDED = 3  # a sum reads two numbers for each that it writes
# Of each form of a state: whose rate it takes, and where nobody measured that, its share of the
# rate of the optimizer's step: `tools/bench_codecs.py` on an AMD EPYC.
_RECODINGS: Mapping[StateForm, tuple[Work, float]] = {
    "bf16": ("bf16 states", 0.41),
    "signed": ("8bit states", 0.086),
    "unsigned": ("8bit states", 0.086),
    "low": ("masters", 0.33),
}
_UNFUSED_PASSES = 2.5  # over the same bytes


def _reclaimed(machine: Machine) -> ComputeRate | None:
    """How a hypervisor takes memory back, and how fast it comes; None: it does not, or unknown."""
    return next((rate for rate in machine.compute if rate.work == "reclaimed touch"), None)


def _by_block(machine: Machine, source: str, target: str) -> tuple[list[int], list[Link]]:
    """Sizes of the blocks that were measured, rising, and the best measurement of each."""
    pair = source, target
    sizes = sorted(
        {link.block_nbytes for link in machine.links if (link.source, link.target) == pair}
    )
    return sizes, [machine.link(source, target, block_nbytes=size) for size in sizes]


def _work_of(operation: Operation) -> Work:
    if operation.kind == "attention":
        return "attention backward" if "backward" in operation.name else "attention"
    return "thin matmul" if operation.rows < _THIN_ROWS else "matmul"
