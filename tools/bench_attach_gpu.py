"""Steps of training through ``offload.attach`` on a CUDA device, beside plain training there.

    python tools/bench_attach_gpu.py --json runs/bench/attach_gpu.json

The decoder of ``gpu_check`` in float32, and one of 0.9 billion parameters in bfloat16: model,
gradients and optimizer on the device, and then through ``attach`` with little room and with plenty.
Forward, backward and step are told apart, so the device is waited for between them.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import gpu_check

gpu_check.make_importable()

import torch  # noqa: E402

from gpu_attached import attached, forget, open_device, place_of  # noqa: E402
from gpu_checks import Cuda  # noqa: E402
from gpu_decoder import MIB, REAL, Shape, batches, make_model  # noqa: E402
from gpu_training import UnderTest  # noqa: E402

_WARM_UPS = 2  # steps that do not count
_PASSES = 2  # forward and backward, in one step
LARGE = replace(
    REAL, width=2048, inner=5632, layers=16, vocabulary=32000, tokens=1024, steps=6,
    dtype=torch.bfloat16, budget_nbytes=8192 * MIB,
)  # fmt: skip
MODELS = {"12 layers, float32": replace(REAL, steps=10), "0.9 billion, bfloat16": LARGE}


@dataclass(frozen=True, slots=True)
class Phases:
    """Median seconds of one step's parts."""

    forward_s: float
    backward_s: float
    step_s: float

    @property
    def total_s(self) -> float:
        """Of the whole step."""
        return self.forward_s + self.backward_s + self.step_s


class _Watch:
    """Tells parts of a step apart."""

    def __init__(self) -> None:
        self._steps: list[dict[str, float]] = []

    def begin(self) -> None:
        """Another step begins."""
        self._steps.append({"forward_s": 0.0, "backward_s": 0.0, "step_s": 0.0})

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens inside, the device's work included, counts as ``name``."""
        _wait()
        began_s = time.perf_counter()
        yield
        _wait()
        self._steps[-1][name] += time.perf_counter() - began_s

    def phases(self) -> Phases:
        """Medians, without the first steps."""
        counted = self._steps[_WARM_UPS:]
        return Phases(
            **{name: statistics.median(one[name] for one in counted) for name in counted[0]}
        )


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _train(model: Any, optimizer: Any, data: list[torch.Tensor], steps: int) -> Phases:
    watch = _Watch()
    for _ in range(steps):
        watch.begin()
        for batch in data:
            with watch.part("forward_s"):
                loss = model(batch)
            with watch.part("backward_s"):
                loss.backward()
        with watch.part("step_s"):
            optimizer.step()
            optimizer.zero_grad()
    return watch.phases()


def _optimizer(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-3, fused=True)


def plainly(shape: Shape, device: UnderTest) -> Phases:
    """Model, gradients and optimizer are on the device."""
    forget()
    place = place_of(device)
    model = make_model(shape).to(place)
    data = [batch.to(place) for batch in batches(shape, _PASSES)]
    return _train(model, _optimizer(model), data, shape.steps)


def through_attach(shape: Shape, device: UnderTest, config: dict[str, Any] | None = None) -> Phases:
    """The same through ``offload.attach``."""
    forget()
    model = make_model(shape)
    optimizer = _optimizer(model)
    with attached(model, optimizer, shape, open_device(device), config):
        return _train(model, optimizer, batches(shape, _PASSES), shape.steps)


def compare(shape: Shape, device: UnderTest) -> dict[str, Phases]:
    """Every way to train one model."""
    room_nbytes = 8 * shape.budget_nbytes
    total_nbytes = open_device(device).total_nbytes()
    if total_nbytes is not None:
        room_nbytes = min(room_nbytes, total_nbytes * 4 // 5)
    roomy = replace(shape, budget_nbytes=room_nbytes)
    found = {"plain, all on the device": plainly(shape, device)}
    found[f"attach, {shape.budget_nbytes // MIB} MiB"] = through_attach(shape, device)
    name = f"attach, {roomy.budget_nbytes // MIB} MiB"
    found[name] = through_attach(roomy, device)
    found[f"{name}, the device steps"] = through_attach(
        roomy, device, {"optimizer_device": "device"}
    )
    forget()
    return found


def tell(name: str, found: dict[str, Phases]) -> None:
    """Print one model's table."""
    plain_s = next(iter(found.values())).total_s
    print(f"{name}: seconds of a step of {_PASSES} passes")
    for way, phases in found.items():
        print(
            f"  {way:<42} forward {phases.forward_s:.3f}  backward {phases.backward_s:.3f}  "
            f"step {phases.step_s:.3f}  {phases.total_s / plain_s:.2f} of plain",
            flush=True,
        )


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; 2 if there is no CUDA device."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no CUDA device", file=sys.stderr)
        return 2
    device, document = Cuda(), {}
    for name, shape in MODELS.items():
        found = compare(shape, device)
        tell(name, found)
        document[name] = {way: asdict(phases) for way, phases in found.items()}
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        told = {"machine": gpu_check.machine(), "models": document}
        options.json.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
