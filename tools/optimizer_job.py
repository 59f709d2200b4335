"""The job that ``bench_optimizer`` compares: some training steps of a decoder, one way of many.

Prints one JSON object: times of whole steps and of the optimizer's visible part, seconds of all
processors, bytes that the process moved to and from drives by the kernel's count, and its peak
resident set.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import offload
from fit_job import VOCABULARY, Decoder, Shape, loss_of
from offload.tiers.hostmem import peak_resident_nbytes
from stepmeter import StepMeter

SEQUENCE = 64
SHAPES = {
    "tiny": Shape(layers=2, width=128, heads=2),
    "70M": Shape(layers=12, width=512, heads=8),
    "350M": Shape(layers=24, width=1024, heads=16),
}
IN_MEMORY = "in memory"  # Offload with room for everything
MASTERS = "in backward, bf16 with fp32 masters"
WAYS = (
    "plain",
    "behind",
    "in backward",
    "in backward, bf16 states",
    "in backward, 8bit states",
    MASTERS,
    IN_MEMORY,
    "deepspeed",
    "deepspeed pipelined",
)
Steps = Callable[[torch.Tensor], tuple[float, float]]  # loss, seconds visible of the optimizer


def plain_steps(shape: Shape) -> Steps:
    """Everything in memory."""
    model = Decoder(shape)
    return _looped(model, _adamw(model))


def offload_steps(shape: Shape, nvme: Path, budget: str, config: dict[str, Any]) -> Steps:
    """Weights, gradients and states on a file."""
    half = config["master_weights"] == "fp32"
    torch.set_default_dtype(torch.bfloat16 if half else torch.float32)
    with offload.init(budget=budget, nvme=nvme):
        model = Decoder(shape)
    torch.set_default_dtype(torch.float32)
    optimizer = _adamw(model)
    offload.attach(model, optimizer, commit="manual", config=config)
    return _looped(model, optimizer)


def _adamw(model: torch.nn.Module) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def _looped(model: torch.nn.Module, optimizer: Any) -> Steps:
    def step(tokens: torch.Tensor) -> tuple[float, float]:
        loss = loss_of(model, tokens)
        loss.backward()
        began_s = time.perf_counter()
        optimizer.step()
        visible_s = time.perf_counter() - began_s
        optimizer.zero_grad()
        return loss.item(), visible_s

    return step


def deepspeed_steps(shape: Shape, nvme: Path, *, pipelined: bool) -> Steps:
    """ZeRO-3 with the optimizer on NVMe, in fp32: the configurations that work on a CPU."""
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533", "DS_ACCELERATOR": "cpu"}
    os.environ.update(ranks | rendezvous)
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=Decoder(shape),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
            "zero_optimization": {
                "stage": 3,
                "sub_group_size": 20_000_000,
                "offload_optimizer": {
                    "device": "nvme",
                    "nvme_path": str(nvme),
                    "buffer_count": 12 if pipelined else 4,  # fewer fail
                    "pipeline_read": pipelined,
                    "pipeline_write": pipelined,
                },
            },
            "aio": {
                "block_size": 1 << 20,
                "queue_depth": 32,
                "intra_op_parallelism": 4,
                "single_submit": False,
                "overlap_events": True,
            },
        },
    )

    def step(tokens: torch.Tensor) -> tuple[float, float]:
        loss = loss_of(engine, tokens)
        engine.backward(loss)
        began_s = time.perf_counter()
        engine.step()
        return loss.item(), time.perf_counter() - began_s

    return step


def main() -> None:
    """Train; print the JSON result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SHAPES, required=True)
    parser.add_argument("--way", choices=WAYS, required=True)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--budget", default="host=1GiB")
    parser.add_argument("--nvme", type=Path, required=True)
    options = parser.parse_args()
    torch.manual_seed(0)
    shape, nvme, way = SHAPES[options.size], options.nvme, options.way
    nvme.mkdir(parents=True, exist_ok=True)
    if way == "plain":
        step = plain_steps(shape)
    elif way.startswith("deepspeed"):
        step = deepspeed_steps(shape, nvme, pipelined=way.endswith("pipelined"))
    else:
        config = {
            "step_in_backward": way.startswith("in backward"),
            "state_precision": way.split()[-2] if way.endswith(" states") else "exact",
            "master_weights": "fp32" if way == MASTERS else "none",
        }
        step = offload_steps(shape, nvme, options.budget, config)
    losses, visible_s, meter = [], [], StepMeter()
    for number in range(options.steps):
        seeded = torch.Generator().manual_seed(number)
        tokens = torch.randint(VOCABULARY, (1, SEQUENCE + 1), generator=seeded)
        with meter.step():
            loss, seconds = step(tokens)
        losses.append(loss)
        visible_s.append(seconds)
    figures: dict[str, Any] = {"losses": losses, "visible_s": visible_s, **asdict(meter)}
    with torch.device("meta"):
        figures["parameters"] = sum(one.numel() for one in Decoder(shape).parameters())
    print(json.dumps({**figures, "peak_nbytes": peak_resident_nbytes()}))


if __name__ == "__main__":
    main()
