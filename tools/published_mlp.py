"""ZeRO-3 with NVMe against MLP-Offload: an iteration's forward, backward and update.

Two rates of the drive, one of the GPU and one ratio are taken from the runs of *other* models in
the authors' logs; what the runs of 40B and 70B take then follows from bytes and schedule.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from offload.swap.planning.block_schedule import Block, Traffic, ticks_of
from offload.swap.planning.schedule import Lane, Medium, Pool, Schedule
from offload.swap.planning.timeline import simulate
from offload.tiers.events import ListRecorder, Move

_IN_FLIGHT = 4  # subgroups that are read, stepped or written at once


@dataclass(frozen=True, kw_only=True)
class _Rates:
    """Of the node, from the runs of other models.

    Attributes:
        read, write: bytes per second of the drive, each alone.
        flops: of one GPU in forward.
        backward: seconds per second of forward, nothing being written.
    """

    read: float
    write: float
    flops: float
    backward: float


@dataclass(frozen=True, kw_only=True)
class _Split:
    forward_s: float
    backward_s: float
    update_s: float

    @property
    def step_s(self) -> float:
        return self.forward_s + self.backward_s + self.update_s


def figures(inputs: Mapping[str, Any]) -> dict[str, float]:
    """Ours, by claim."""
    rates = _calibrate(inputs)
    ours: dict[str, float] = {}
    for name in ("40B", "70B"):
        model = inputs["models"]["value"][name]
        zero, mlp = _zero(inputs, model, rates), _mlp(inputs, model, rates)
        for system, split in (("zero", zero), ("mlp", mlp)):
            ours[f"{system}_forward_{name}"] = split.forward_s
            ours[f"{system}_backward_{name}"] = split.backward_s
            ours[f"{system}_update_{name}"] = split.update_s
            ours[f"{system}_step_{name}"] = split.step_s
        ours[f"gain_{name}"] = zero.step_s / mlp.step_s
    return ours


def _calibrate(inputs: Mapping[str, Any]) -> _Rates:
    runs = [
        (inputs["models"]["value"][name]["parameters"], seconds)
        for name, seconds in inputs["calibration"]["value"].items()
    ]
    state, gradient = inputs["state_bytes"]["value"], inputs["gradient_bytes"]["value"]
    write = mean(gradient * count / run["backward_s"] for count, run in runs)
    return _Rates(
        # Backward writes gradients. The update reads them and the states, and writes the states:
        # one thing at a time, so that what is left of it is reading.
        write=write,
        read=mean(
            (state + gradient) * count / (run["update_s"] - state * count / write)
            for count, run in runs
        ),
        flops=mean(2 * count * inputs["tokens"]["value"] / run["forward_s"] for count, run in runs),
        backward=mean(run["mlp_backward_s"] / run["forward_s"] for _, run in runs),
    )


def _blocks(
    inputs: Mapping[str, Any],
    model: Mapping[str, int],
    rates: _Rates,
    traffic: Sequence[tuple[Traffic, ...]],
) -> list[Block]:
    """A block for each subgroup; the GPUs work at the same index at the same time."""
    count = len(traffic)
    forward_s = 2 * model["parameters"] * inputs["tokens"]["value"] / rates.flops / count
    return [
        Block(
            name=f"subgroup {index}",
            forward_s=forward_s,
            backward_s=forward_s * rates.backward,
            traffic=moves,
        )
        for index, moves in enumerate(traffic)
    ]


def _zero(inputs: Mapping[str, Any], model: Mapping[str, int], rates: _Rates) -> _Split:
    """Gradients go to the drive in backward, and come back with the states."""
    count = model["subgroups"]
    part = model["parameters"] // count
    moves = (
        Traffic(
            role="gradient",
            nbytes=inputs["gradient_bytes"]["value"] * part,
            evicted=("backward",),
            fetched=("optimizer",),
            evict_by=("host→nvme",),
            fetch_by=("nvme→host",),
            ahead=_IN_FLIGHT // 2,
        ),
        Traffic(
            role="state",
            nbytes=inputs["state_bytes"]["value"] * part,
            fetched=("optimizer",),
            evicted=("optimizer",),
            fetch_by=("nvme→host",),
            evict_by=("host→nvme",),
            ahead=_IN_FLIGHT // 2,
        ),
    )
    return _split(inputs, _blocks(inputs, model, rates, [moves] * count), rates, part)


def _mlp(inputs: Mapping[str, Any], model: Mapping[str, int], rates: _Rates) -> _Split:
    """Gradients stay; two paths; what was stepped last is in memory and is stepped first."""
    count = model["subgroups"]
    part = model["parameters"] // count
    kept = int(inputs["kept_per_buffer"]["value"] * model["buffers"])
    every = int(inputs["nvme_every"]["value"])
    traffic = []
    for index in range(count):
        path = "pfs" if index % every == every - 1 else "nvme"
        traffic.append(
            (
                Traffic(
                    role="state",
                    nbytes=inputs["state_bytes"]["value"] * part,
                    fetched=("optimizer",) if index >= kept else (),
                    evicted=("optimizer",) if index < count - kept else (),
                    fetch_by=(f"{path}→host",),
                    evict_by=(f"host→{path}",),
                    ahead=_IN_FLIGHT // 2,
                ),
            )
        )
    return _split(inputs, _blocks(inputs, model, rates, traffic), rates, part)


def _split(inputs: Mapping[str, Any], blocks: list[Block], rates: _Rates, part: int) -> _Split:
    subgroup = part * (inputs["state_bytes"]["value"] + inputs["gradient_bytes"]["value"])
    recorder = ListRecorder()
    timeline = simulate(
        Schedule(
            lanes=_lanes(inputs, rates),
            media=(Medium(name="nvme", width=1), Medium(name="pfs", width=1)),
            ticks=ticks_of(blocks),
            pools=(Pool(tier="host", nbytes=_IN_FLIGHT * subgroup),),
        ),
        recorder,
    )
    forward_s = timeline.ticks[len(blocks) - 1][1]
    left_s = [
        event.t_s
        for event in recorder.events
        if isinstance(event, Move) and event.role == "gradient" and event.src == "host"
    ]
    backward_s = max(timeline.ticks[2 * len(blocks) - 1][1], *left_s, 0.0)
    return _Split(
        forward_s=forward_s,
        backward_s=backward_s - forward_s,
        update_s=timeline.step_s - backward_s,
    )


def _lanes(inputs: Mapping[str, Any], rates: _Rates) -> tuple[Lane, ...]:
    shares = {"nvme": 1.0, "pfs": inputs["pfs_of_nvme"]["value"]}
    return tuple(
        lane
        for name, share in shares.items()
        for lane in (
            Lane(
                name=f"{name}→host",
                source=f"file:{name}",
                target="host",
                bytes_per_s=rates.read * share,
                media=(name,),
            ),
            Lane(
                name=f"host→{name}",
                source="host",
                target=f"file:{name}",
                bytes_per_s=rates.write * share,
                media=(name,),
            ),
        )
    )
