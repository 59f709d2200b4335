"""MEMO's figures from its own inputs: bytes, alpha, and where swapping hides behind compute."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from offload.swap.planning.block_schedule import Block, Traffic, ticks_of
from offload.swap.planning.schedule import Lane, Pool, Schedule
from offload.swap.planning.timeline import Timeline, simulate
from offload.swap.tokenwise.solve import BlockCost, Link, solve

_K, _GIB = 1 << 10, float(1 << 30)
_MILLION = 1 << 20
_HALF = 2  # bytes of an element
_ROWS = 128  # grid of the cut
_HIDDEN = 1e-3  # of a step may be stalls


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One sequence of one length, split over the GPUs; bytes and seconds are one GPU's."""

    inputs: Mapping[str, float]
    tokens: int
    own_link: bool = False

    @property
    def layers(self) -> int:
        return int(self.inputs["layers"])

    @property
    def unit_nbytes(self) -> float:
        """Of a tensor of tokens x hidden."""
        return _HALF * self.tokens * self.inputs["hidden"] / self.inputs["gpus"]

    @property
    def layer_nbytes(self) -> int:
        return int(self.inputs["skeletal_units"] * self.unit_nbytes)

    @property
    def host_nbytes(self) -> float:
        return self.inputs["host_nbytes"] / self.inputs["gpus"]

    @property
    def link_bytes_per_s(self) -> float:
        sharing = 1 if self.own_link else self.inputs["gpus_per_uplink"]
        return self.inputs["link_bytes_per_s"] * self.inputs["link_share"] / sharing

    def seconds(self, flops: float) -> float:
        """Of the GPUs together."""
        rate = self.inputs["gpus"] * self.inputs["gpu_flops"] * self.inputs["mfu"]
        return flops / rate

    @property
    def dense_flops(self) -> float:
        """Of a layer's forward without attention: products with 12 h^2 weights."""
        return 24 * self.tokens * self.inputs["hidden"] ** 2

    @property
    def attention_flops(self) -> float:
        """Under a causal mask."""
        return 2 * self.tokens**2 * self.inputs["hidden"]

    @property
    def forward_s(self) -> float:
        return self.seconds(self.dense_flops + self.attention_flops)

    @property
    def rebuild_s(self) -> float:
        """q, k, v, the dense product and h to 4h: 16 of the 24."""
        return self.seconds(self.dense_flops * 16 / 24)


def figures(inputs: Mapping[str, Any]) -> dict[str, float]:
    """Ours, by claim."""
    plain = {name: float(one["value"]) for name, one in inputs.items()}
    million = _Job(inputs=plain, tokens=_MILLION)
    gpus, layers = plain["gpus"], million.layers
    longer = _Job(inputs=plain, tokens=576 * _K)
    alpha = _alpha(million)
    return {
        "skeletal_gib": million.layer_nbytes * gpus * layers / _GIB,
        "inputs_gib": million.unit_nbytes * gpus * layers / _GIB,
        "inputs_per_gpu_gib": million.unit_nbytes * layers / _GIB,
        "attention_share": 100 * million.unit_nbytes / million.layer_nbytes,
        "attention_time": 100
        * longer.attention_flops
        / (longer.attention_flops + longer.dense_flops),
        "alpha": alpha,
        "step_at_alpha": _step(million, alpha).step_s / _compute_s(million),
        "overlap_tokens": _overlap(plain, own_link=False) / _K,
        "overlap_own_link_tokens": _overlap(plain, own_link=True) / _K,
        "feasible_tokens": _feasible(plain) / _K,
    }


def _alpha(job: _Job) -> float:
    """Of the project's closed form, under the host's memory: see ``swap.tokenwise.solve``."""
    whole = 2 * job.unit_nbytes
    cost = BlockCost(
        forward_s=job.forward_s,
        backward_s=2 * job.forward_s,
        rebuild_s=job.rebuild_s,
        heads_s=0.0,
        overhead_s=0.0,
        whole_nbytes=int(whole),
        target_nbytes=int(job.layer_nbytes - whole),
    )
    link = Link(
        name="host",
        bytes_per_s=job.link_bytes_per_s,
        free_nbytes=job.host_nbytes / (job.layers - 2),
    )
    return solve(cost, [link], range(0, job.tokens + 1, _ROWS)).alpha


def _compute_s(job: _Job) -> float:
    return 3 * job.forward_s * job.layers


def _step(job: _Job, alpha: float) -> Timeline:
    """Two rounding buffers; the last two layers stay in them (section 4.1)."""
    whole = 2 * job.unit_nbytes
    moved = int(whole + alpha * (job.layer_nbytes - whole))
    swapped = Traffic(
        role="activation",
        nbytes=moved,
        evicted=("forward",),
        fetched=("backward",),
        evict_by=("device→host",),
        fetch_by=("host→device",),
        room_nbytes=job.layer_nbytes,
    )
    blocks = [
        Block(
            name=f"layer {index}",
            forward_s=job.forward_s,
            backward_s=2 * job.forward_s + (1 - alpha) * job.rebuild_s * stays_not,
            traffic=(swapped,) * stays_not,
            kept=(("device", job.layer_nbytes),) * (1 - stays_not),
        )
        for index in range(job.layers)
        for stays_not in [int(index < job.layers - 2)]
    ]
    rate = job.link_bytes_per_s
    return simulate(
        Schedule(
            lanes=(
                Lane(name="device→host", source="device", target="host", bytes_per_s=rate),
                Lane(name="host→device", source="host", target="device", bytes_per_s=rate),
            ),
            ticks=ticks_of(blocks, optimizer="none"),
            pools=(
                Pool(tier="device", nbytes=2 * job.layer_nbytes),
                Pool(tier="host", nbytes=int(job.host_nbytes)),
            ),
        )
    )


def _overlap(inputs: Mapping[str, float], *, own_link: bool) -> int:
    """The shortest length, in steps of 1K, whose full swap costs nothing."""
    short, long = 0, 1024
    while long - short > 1:
        middle = (short + long) // 2
        job = _Job(inputs=inputs, tokens=middle * _K, own_link=own_link)
        hides = _step(job, 1.0).step_s <= (1 + _HIDDEN) * _compute_s(job)
        short, long = (short, middle) if hides else (middle, long)
    return long * _K


def _feasible(inputs: Mapping[str, float]) -> int:
    """The longest length whose states, two buffers and logits fit a GPU, in steps of 1K."""
    hidden, vocabulary = inputs["hidden"], inputs["vocabulary"]
    parameters = 12 * inputs["layers"] * hidden**2 + vocabulary * hidden
    states = inputs["state_bytes"] * parameters / inputs["gpus"]
    buffers = 2 * inputs["skeletal_units"] * _HALF * hidden / inputs["gpus"]
    logits = inputs["logits_bytes"] * vocabulary / inputs["gpus"]
    return math.floor((inputs["gpu_nbytes"] - states) / (buffers + logits) / _K) * _K
