"""SSDTrain's model of what a drive must take (section III-D), and its schedule on its testbed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from offload.swap.planning.block_schedule import Block, Traffic, ticks_of
from offload.swap.planning.schedule import Lane, Medium, Schedule
from offload.swap.planning.timeline import simulate

_YEAR_S = 365.25 * 24 * 3600
_FORWARD = 1 / 3  # of a step without recomputation


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """What one GPU does for one micro-batch.

    Attributes:
        layers: of its pipeline stage.
        step_s: forward and backward of them.
        nbytes: activations of one layer.
    """

    layers: int
    step_s: float
    nbytes: float

    @property
    def write_bytes_per_s(self) -> float:
        """Section III-D: the activations within half of the step."""
        return self.layers * self.nbytes / (self.step_s / 2)


def figures(inputs: Mapping[str, Any]) -> dict[str, float]:
    """Ours, by claim."""
    stages = {name: _stage(inputs, model) for name, model in inputs["models"]["value"].items()}
    names = list(stages)
    large = [stages[name] for name in names[names.index(inputs["large"]["value"]) :]]
    most = max(stage.write_bytes_per_s for stage in large)
    tested = [_tested(inputs, *one) for one in inputs["tested"]["value"]]
    return {
        "write_gb_per_s": most / 1e9,
        "write_small_gb_per_s": max(stage.write_bytes_per_s for stage in stages.values()) / 1e9,
        "write_falls": large[-1].write_bytes_per_s / large[0].write_bytes_per_s,
        "life_years": _life_years(inputs, most),
        "tested_falls": tested[-1].write_bytes_per_s / tested[0].write_bytes_per_s,
        "step_on_testbed": max(_step_over_compute(inputs, stage) for stage in tested),
    }


def _stage(inputs: Mapping[str, Any], model: Mapping[str, float]) -> _Stage:
    """One sequence; Narayanan et al., equation 3, without the recomputed forward: 72 for 96."""
    tokens, hidden, layers = inputs["tokens"]["value"], model["hidden"], model["layers"]
    head = inputs["vocabulary"]["value"] / (16 * layers * hidden)
    flops = 72 * tokens * layers * hidden**2 * (1 + tokens / (6 * hidden) + head)
    return _Stage(
        layers=int(layers // model["pipeline"]),
        step_s=flops / (model["tensor"] * model["pipeline"] * model["flops"]),
        nbytes=inputs["layer_bytes"]["value"] * tokens * hidden / model["tensor"],
    )


def _tested(inputs: Mapping[str, Any], hidden: int, layers: int) -> _Stage:
    """One of the models of section IV, on one of two GPUs in tensor parallel."""
    tokens = inputs["tested_tokens"]["value"] * inputs["tested_batch"]["value"]
    attention = inputs["tested_tokens"]["value"] / (6 * hidden)
    rate = inputs["tested_flops"]["value"] * inputs["tested_share"]["value"]
    # Korthikanti et al., section 4.2: 10 sbh on each GPU, 24 sbh shared out, without attention's
    # matrices.
    return _Stage(
        layers=layers,
        step_s=72 * tokens * layers * hidden**2 * (1 + attention) / 2 / rate,
        nbytes=(10 + 24 / 2) * tokens * hidden,
    )


def _life_years(inputs: Mapping[str, Any], write_bytes_per_s: float) -> float:
    """Of drives that take that in half of the time."""
    endurance = (
        inputs["endurance_nbytes"]["value"]
        * inputs["write_amplification"]["value"]
        * inputs["retention_cycles"]["value"]
    )
    return float(endurance / (write_bytes_per_s / 2) / _YEAR_S)


def _step_over_compute(inputs: Mapping[str, Any], stage: _Stage) -> float:
    """Its schedule on the testbed's drives, against compute alone."""
    parts = stage.layers * int(inputs["parts"]["value"])
    nbytes, forward_s = stage.layers * stage.nbytes / parts, stage.step_s * _FORWARD / parts
    drives = inputs["drives"]["value"]
    write = drives * inputs["drive_write_bytes_per_s"]["value"]
    read = drives * inputs["drive_read_bytes_per_s"]["value"]
    leaves = _leaving(parts, nbytes, forward_s, min(write, inputs["bus_bytes_per_s"]["value"]))

    def swapped(index: int) -> Traffic:
        return Traffic(
            role="activation",
            nbytes=int(nbytes),
            evicted=("forward",),
            fetched=("backward",),
            evict_by=("device→file",),
            fetch_by=("file→device",),
            # Section III-C2: backward queues so early that the bus is never idle.
            ahead=parts - 1 - index,
        )

    blocks = [
        Block(
            name=f"module {index}",
            forward_s=forward_s,
            backward_s=2 * forward_s,
            traffic=(swapped(index),) if index < leaves else (),
        )
        for index in range(parts)
    ]
    media = ("drives", "bus")
    timeline = simulate(
        Schedule(
            lanes=(
                Lane(
                    name="device→file",
                    source="device",
                    target="file",
                    bytes_per_s=write,
                    media=media,
                ),
                Lane(
                    name="file→device",
                    source="file",
                    target="device",
                    bytes_per_s=read,
                    media=media,
                ),
            ),
            media=(
                Medium(name="drives", width=1),
                Medium(name="bus", bytes_per_s=inputs["bus_bytes_per_s"]["value"]),
            ),
            ticks=ticks_of(blocks, optimizer="none"),
        )
    )
    return timeline.step_s / stage.step_s


def _leaving(parts: int, nbytes: float, forward_s: float, bytes_per_s: float) -> int:
    """How many modules leave, from the first on: its adaptive offloading.

    K-Wu/FlashTrain, tensor_cache.py: module ``j`` and those behind it stay as soon as writing all
    before it, and writing and reading it, takes more than the rate in the time from the first
    module's forward to the backward of ``j``. The last module stays in any case.
    """
    for part in range(parts - 1):
        seconds = (3 * parts - 2 * part) * forward_s
        if (part + 2) * nbytes / seconds > bytes_per_s:
            return part
    return parts - 1
