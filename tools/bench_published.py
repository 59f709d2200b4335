"""Published results from the papers' own figures: theirs, ours, the error.

Inputs and claims stand in ``published.yaml``, each with its source. What does not reproduce says
why, and is a row without a check.
"""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

import published_cxl
import published_memo
import published_mlp
import published_ssdtrain
from benchlib import Check, Result
from offload.swap.planning.block_schedule import Block, Traffic, ticks_of
from offload.swap.planning.schedule import Lane, Medium, Pool, Schedule
from offload.swap.planning.timeline import simulate

_PACE_BLOCKS = 2000

_PAPERS: dict[str, Callable[[Mapping[str, Any]], dict[str, float]]] = {
    "memo": published_memo.figures,
    "ssdtrain": published_ssdtrain.figures,
    "cxl": published_cxl.figures,
    "mlp_offload": published_mlp.figures,
}


def read_papers() -> dict[str, Any]:
    """Inputs and claims by paper."""
    text = Path(__file__).with_name("published.yaml").read_text(encoding="utf-8")
    papers: dict[str, Any] = yaml.safe_load(text)
    for paper in papers.values():
        # Tables of figures have no value of their own.
        paper["inputs"] = {
            name: one if "value" in one else {"value": one} for name, one in paper["inputs"].items()
        }
    return papers


def measure(result: Result, *, quick: bool) -> None:
    """A row for each claim, and a check for each that reproduces."""
    differing = []
    for key, paper in read_papers().items():
        ours = _PAPERS[key](paper["inputs"])
        for name, claim in paper["claims"].items():
            error = relative_error(ours[name], claim["value"])
            differs = claim.get("differs")
            result.add(
                paper=paper["paper"].split(",")[0],
                claim=claim["name"],
                where=claim["where"],
                unit=claim["unit"],
                theirs=float(claim["value"]),
                ours=ours[name],
                error=error,
                reproduces="no" if differs else "yes",
            )
            if differs:
                differing.append(f"{claim['name']}: {differs}")
            else:
                result.checks.append(
                    Check(
                        f"{paper['paper'].split(',')[0]}, {claim['name']}: relative error",
                        error,
                        target_of(claim),
                        holds(ours[name], claim),
                    )
                )
    if not quick:
        result.check("blocks that are simulated in a second", _blocks_per_s(), 1000)
    result.notes += [f"does not reproduce: {text}" for text in differing]


def _blocks_per_s() -> float:
    """A step of blocks whose weights, gradients, activations and states all move, by two lanes."""
    down, up = ("device→host", "host→file"), ("file→host", "host→device")
    traffic = (
        Traffic(role="weight", nbytes=2 << 20, fetched=("forward", "backward"), fetch_by=up),
        Traffic(
            role="activation",
            nbytes=1 << 20,
            evicted=("forward",),
            fetched=("backward",),
            evict_by=down,
            fetch_by=up,
        ),
        Traffic(role="gradient", nbytes=2 << 20, evicted=("backward",), evict_by=down),
        Traffic(
            role="state",
            nbytes=12 << 20,
            fetched=("optimizer",),
            evicted=("optimizer",),
            fetch_by=up[:1],
            evict_by=down[1:],
        ),
    )
    blocks = [
        Block(
            name=f"{index}",
            forward_s=1e-3,
            backward_s=2e-3,
            optimizer_s=1e-3,
            traffic=traffic,
        )
        for index in range(_PACE_BLOCKS)
    ]
    ends = (("device", "host"), ("host", "file"), ("file", "host"), ("host", "device"))
    lanes = tuple(
        Lane(
            name=name,
            source=source,
            target=target,
            bytes_per_s=5e9,
            media=("drive",) if "file" in name else (),
        )
        for name, (source, target) in zip((*down, *up), ends, strict=True)
    )
    began_s = time.process_time()
    simulate(
        Schedule(
            lanes=lanes,
            ticks=ticks_of(blocks),
            media=(Medium(name="drive", width=1),),
            pools=(Pool(tier="device", nbytes=64 << 20), Pool(tier="host", nbytes=256 << 20)),
        )
    )
    return len(blocks) / (time.process_time() - began_s)


def relative_error(ours: float, theirs: float) -> float:
    """Ours beyond theirs, as a share of theirs."""
    return (ours - theirs) / theirs


def holds(ours: float, claim: Mapping[str, Any]) -> bool:
    """Whether ``ours`` is the claim's figure, within its tolerance, or on the right side of it."""
    error, tolerance = relative_error(ours, claim["value"]), float(claim["tolerance"])
    compare = claim.get("compare", "equal")
    if compare == "at_most":
        return error <= tolerance
    if compare == "at_least":
        return error >= -tolerance
    return math.fabs(error) <= tolerance


def target_of(claim: Mapping[str, Any]) -> str:
    """The tolerance, in words."""
    signs = {"equal": "within ±", "at_most": "<= ", "at_least": ">= -"}
    return f"{signs[claim.get('compare', 'equal')]}{claim['tolerance']}"
