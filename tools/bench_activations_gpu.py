"""Training steps on a CUDA device, their saved activations swapped to pinned memory or files.

    OFFLOAD_PEER_TRL=~/trl python tools/bench_activations_gpu.py --json runs/bench/gpu.json

Two models in float32: one of GPT-2 small's shape, which saves more than the link can carry while it
computes, and a wide one, which computes long enough. Beside no offload: PyTorch's ``save_on_cpu``
and ``checkpoint``, and the implementations of torchtune, TRL and DeepSpeed whose checkouts are
named (``gpu_peers``), in the same process and rotation.
"""

import contextlib
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import gpu_peers
from bench_activations import Model, Size, unique_nbytes
from benchlib import Result, arguments, finish
from offload import ActivationSwap
from offload.tiers.events import ListRecorder, Move
from offload.tiers.journal import Journal

_LINK_NBYTES = 256 << 20


@dataclass(frozen=True)
class Case:
    """A model and its batch; ``hides``: whether its computation takes longer than the link."""

    name: str
    size: Size
    batch: int
    hides: bool


CASES = (
    Case("GPT-2 small", Size(length=1024), batch=8, hides=False),
    Case("wide", Size(layers=6, width=4096, heads=32, vocabulary=8192, length=1024), 4, hides=True),
)
QUICK = Case("quick", Size(layers=2, length=256), batch=2, hides=False)


@dataclass
class Mode:
    """One way to hold saved activations, and what was measured of it."""

    name: str
    context: Callable[[], Any]
    recompute: bool = False
    inside: bool = False  # backward runs inside of the context
    mark: Callable[[torch.Tensor], None] = lambda _: None
    swap: ActivationSwap | None = None
    step_s: list[float] = field(default_factory=list)
    forward_s: list[float] = field(default_factory=list)  # as the device saw it
    kept_nbytes: int = 0
    peak_nbytes: int = 0
    out_nbytes: int = 0
    same: bool = False

    def step(self, model: Model, tokens: torch.Tensor) -> None:
        """Run and measure one forward and backward."""
        model.recompute, model.mark = self.recompute, self.mark
        model.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before_nbytes = torch.cuda.memory_allocated()
        out_nbytes = self._total()
        began, between, ended = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        began.record()
        with self.context():
            loss = model(tokens)
            between.record()
            self.kept_nbytes = torch.cuda.memory_allocated() - before_nbytes
            if self.inside:
                loss.backward()
        if not self.inside:
            loss.backward()
        ended.record()
        torch.cuda.synchronize()
        self.forward_s.append(began.elapsed_time(between) / 1e3)
        self.step_s.append(began.elapsed_time(ended) / 1e3)
        self.peak_nbytes = torch.cuda.max_memory_allocated() - before_nbytes
        self.out_nbytes = self._total() - out_nbytes

    def _total(self) -> int:
        """Bytes that left the device so far."""
        if self.swap is None:
            return 0
        events = self.swap.journal.recorder.events  # type: ignore[attr-defined]
        moves = (event for event in events if isinstance(event, Move))
        return sum(move.nbytes for move in moves if move.src.startswith("cuda"))


def link_bytes_per_s() -> dict[str, float]:
    """What pinned memory and the device exchange at best, in each direction."""
    device = torch.empty(_LINK_NBYTES, dtype=torch.uint8, device="cuda")
    host = torch.empty(_LINK_NBYTES, dtype=torch.uint8, pin_memory=True)

    def rate(target: torch.Tensor, source: torch.Tensor) -> float:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        target.copy_(source, non_blocking=True)
        ended.record()
        torch.cuda.synchronize()
        elapsed_ms: float = began.elapsed_time(ended)
        return _LINK_NBYTES / elapsed_ms * 1e3

    return {
        "out": max(rate(host, device) for _ in range(5)),
        "back": max(rate(device, host) for _ in range(5)),
    }


def modes_of(
    model: Model, nvme: Path, peers: dict[str, Callable[[], Any]], saved_nbytes: int
) -> Iterator[Mode]:
    """Each way, opened when it is asked for."""
    yield Mode("no offload", contextlib.nullcontext)
    yield Mode("save_on_cpu", lambda: torch.autograd.graph.save_on_cpu(pin_memory=True))
    yield Mode("checkpoint", contextlib.nullcontext, recompute=True)
    for name, make in peers.items():
        context = make()  # reused: it holds a pool
        if hasattr(context, "mark"):  # it moves the inputs of checkpointed layers only
            mark, title = context.mark, f"{name}, checkpoint"
            yield Mode(title, _reused(context), recompute=True, inside=True, mark=mark)
        else:
            yield Mode(name, _reused(context))
    pool = saved_nbytes * 5 // 4
    for limit in (0, saved_nbytes // 2):
        swap = _swap(model, limit=limit, memory=pool)
        half = ", half stays" if limit else ""
        yield Mode(f"offload, pinned{half}", _reused(swap), swap=swap)
    swap = _swap(model, memory=pool)
    yield Mode("offload, pinned, checkpoint", _reused(swap), recompute=True, swap=swap)
    swap = _swap(model, nvme=nvme)
    yield Mode("offload, files", _reused(swap), swap=swap)


def _swap(model: Model, **settings: Any) -> ActivationSwap:
    return ActivationSwap(model, journal=Journal(ListRecorder()), **settings)


def _reused(context: Any) -> Callable[[], Any]:
    return lambda: context


def gradients(model: Model) -> list[torch.Tensor]:
    """A copy of every gradient."""
    grads = [parameter.grad for parameter in model.parameters()]
    return [grad.clone() for grad in grads if grad is not None]


def run_case(result: Result, case: Case, options: Any) -> None:
    """Every mode in turns on the model of ``case``."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Model(case.size)
        tokens = torch.randint(case.size.vocabulary, (case.batch, case.size.length))
    count, _, saved_nbytes = unique_nbytes(model, tokens)
    result.notes.append(f"{case.name}: {count} tensors saved, {saved_nbytes} bytes of storages")
    peers = gpu_peers.contexts(result.notes)
    modes = list(modes_of(model, options.nvme, peers, saved_nbytes))
    right: list[torch.Tensor] = []
    for turn in range(options.turns + 1):
        for mode in modes:
            mode.step(model, tokens)
            if not right:
                right = gradients(model)
            mode.same = all(map(torch.equal, gradients(model), right))
            if turn == 0:
                mode.step_s.clear()
                mode.forward_s.clear()
    for mode in modes:
        if mode.swap is not None:
            mode.swap.close()
    report(result, case, modes, saved_nbytes)


def report(result: Result, case: Case, modes: list[Mode], saved_nbytes: int) -> None:
    """A row for each mode, and what must hold."""
    link = link_bytes_per_s()
    plain, offload = modes[0], [mode for mode in modes if mode.swap is not None]
    for mode in modes:
        result.add(
            case=case.name,
            mode=mode.name,
            step_s=statistics.median(mode.step_s),
            ratio=ratio(mode, plain),
            kept_nbytes=mode.kept_nbytes,
            peak_nbytes=mode.peak_nbytes,
            out_nbytes=mode.out_nbytes,
            same_bits=str(mode.same),
        )
    for mode in offload:
        name = f"{case.name}: {mode.name}"
        result.check(f"{name}: bits are the same", float(mode.same), 1)
        if not mode.recompute:
            result.at_most(f"{name}: bytes out over distinct", mode.out_nbytes / saved_nbytes, 1.0)
    pinned = next(mode for mode in offload if mode.name == "offload, pinned")
    if case.hides:
        result.at_most(f"{case.name}: {pinned.name}: over no offload", ratio(pinned, plain), 1.05)
    else:
        step_s = statistics.median(pinned.step_s)
        busy = sum(pinned.out_nbytes / rate for rate in link.values()) / step_s
        result.check(f"{case.name}: {pinned.name}: share that the link is busy", busy, 0.9)
        share = bound_s(plain, pinned, link) / step_s
        result.notes.append(f"{case.name}: {pinned.name}: the bound is {share:.3f} of the step")
    for mode in modes[1:]:
        if mode.swap is None and not mode.recompute:
            name = f"{case.name}: {pinned.name} over {mode.name}"
            result.at_most(name, ratio(pinned, mode), 1.0)


def bound_s(plain: Mode, swapped: Mode, link: dict[str, float]) -> float:
    """Forward takes as long as it computes, or as the bytes take to leave; backward likewise."""
    forward_s = statistics.median(plain.forward_s)
    backward_s = statistics.median(plain.step_s) - forward_s
    out_s, back_s = (swapped.out_nbytes / link[way] for way in ("out", "back"))
    return max(forward_s, out_s) + max(backward_s, back_s)


def ratio(mode: Mode, other: Mode) -> float:
    """Of their steps, each taken with the one of the same turn."""
    return statistics.median(one / two for one, two in zip(mode.step_s, other.step_s, strict=True))


def main() -> int:
    """Run and print."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--turns", type=int, default=4, help="steps of each mode (default: 4)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no CUDA device", file=sys.stderr)
        return 2
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the same bits each time
    torch.use_deterministic_algorithms(mode=True)
    result = Result(f"Saved activations of one step on {torch.cuda.get_device_name()}")
    for case in (QUICK,) if options.quick else CASES:
        run_case(result, case, options)
    link = link_bytes_per_s()
    result.notes.append(f"link: {link['out'] / 1e9:.1f} GB/s out, {link['back'] / 1e9:.1f} back")
    return finish(result, options.json)


if __name__ == "__main__":
    sys.exit(main())
