"""Token-wise recompute: the solved alpha against fixed ones, and the peak of a long context.

Behind a link of 0.5, 1 and 2 GB/s, a training step with the solved alpha stands beside a sweep of
fixed alphas, full swap (1) and full recompute (0) among them, all measured in turn in one run.
Then one step of a long context in processes of their own: plain, with torch's checkpointing of
each layer, and with rows rebuilt on top of the tensor cache, which swaps to a file.
"""

import argparse
import contextlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchlib import Check, Result, arguments, finish
from offload import ActivationSwap
from offload.swap.tokenwise.plans import Settings
from offload.swap.tokenwise.timing import Timer
from offload.swap.tokenwise.tokenwise import TokenWise
from offload.tiers import hostmem
from throttled_keeper import Clock, ThrottledKeeper

REPEATS = 45  # the noise of a median over so many is below the 2 % in question
WARM_UPS = 4  # recorded, verified
TRIALS = 16  # passes in which the solved alpha is held against 0 and 1
ALPHAS: tuple[Any, ...] = ("auto", 1.0, 0.75, 0.5, 0.25, 0.0)
LIMIT_NBYTES = 40 << 20  # saved last, so they stay: the loss, and little of the last block
RATES = (0.5e9, 1e9, 2e9)


def llama(rows: int, width: int, layers: int) -> Any:
    """A Llama-shaped model with random weights and a small vocabulary."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=max(width // 64, 1),
        num_key_value_heads=max(width // 128, 1),
        max_position_embeddings=rows,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).train()


class Contestant:
    """A way to keep the saved tensors of the model, which all share: its memory is the same."""

    def __init__(self, model: nn.Module, alpha: Any, bytes_per_s: float, clock: Clock) -> None:
        self.clock = clock
        self.alpha = alpha
        self.model: Any = model
        weights = list(model.parameters())
        self.keeper = ThrottledKeeper(bytes_per_s, 32 << 20, LIMIT_NBYTES, weights, clock)
        timer = Timer(clock.now_s)
        self.rows = TokenWise(self.model, self.keeper, Settings(alpha=alpha), timer=timer)
        self.times_s: list[float] = []

    def step(self, tokens: torch.Tensor) -> float:
        """Seconds of one forward and backward."""
        began_s = self.clock.now_s()
        with torch.autograd.graph.saved_tensors_hooks(self.rows.pack, self.rows.unpack):
            loss = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        seconds = self.clock.now_s() - began_s
        self.model.zero_grad(set_to_none=True)
        return seconds

    @property
    def median_s(self) -> float:
        """Median of the steps that count."""
        return statistics.median(self.times_s)


def sweep(result: Result, clock: Clock, *, quick: bool) -> None:
    """Solved against fixed alphas, link by link."""
    batch, rows, width, layers = (1, 512, 64, 3) if quick else (8, 1024, 64, 5)
    model = llama(rows, width, layers)
    tokens = torch.randint(1024, (batch, rows))
    shuffled = random.Random(0)
    for rate in RATES[:1] if quick else RATES:
        contestants = [Contestant(model, alpha, rate, clock) for alpha in ALPHAS]
        for _ in range(0 if quick else TRIALS):
            contestants[0].step(tokens)
        for repeat in range(WARM_UPS + (1 if quick else REPEATS)):
            # In turn: what else the machine does meets them all, and each follows on each.
            for one in shuffled.sample(contestants, len(contestants)):
                if repeat == WARM_UPS:
                    one.keeper.forget_totals()
                seconds = one.step(tokens)
                if repeat >= WARM_UPS:
                    one.times_s.append(seconds)
        for one in contestants:
            reports = one.rows.report()
            swapped = [report.cut / report.rows for report in reports] or [1.0]
            result.add(
                link_bytes_per_s=rate,
                alpha=str(one.alpha),
                swapped_rows=statistics.mean(swapped),
                step_s=one.median_s,
                moved_nbytes=one.keeper.moved_nbytes / len(one.times_s),
                waited_s=one.keeper.waited_s / len(one.times_s),
            )
        for one in contestants:
            one.rows.remove()
        if not quick:
            _check_sweep(result, rate, contestants)


def _check_sweep(result: Result, rate: float, contestants: list[Contestant]) -> None:
    solved, *fixed = contestants

    def over(other: Contestant) -> float:
        """Median of the rounds' ratios."""
        pairs = zip(solved.times_s, other.times_s, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)

    name = f"at {rate / 1e9:g} GB/s: solved alpha's step over"
    best = min(fixed, key=lambda one: one.median_s)
    at_most(result, f"{name} the best fixed one's", over(best), 1.05)
    extremes = [one for one in fixed if one.alpha in (0.0, 1.0)]
    # 1, and the noise of two equal programs' medians.
    at_most(result, f"{name} full swap's or recompute's", max(map(over, extremes)), 1.02)


def at_most(result: Result, name: str, value: float, limit: float) -> None:
    """A figure that must stay below ``limit``."""
    result.checks.append(Check(name, value, f"<= {limit}", value <= limit))


def job(kind: str, rows: int, width: int, layers: int, steps: int, folder: Path) -> None:
    """Train ``steps`` steps in this process and print its peak resident set."""
    hostmem.return_freed_memory()
    model = llama(rows, width, layers)
    tokens = torch.randint(1024, (1, rows), generator=torch.Generator().manual_seed(1))
    before = hostmem.resident_nbytes()[0]
    digest, seconds = 0.0, []
    if kind == "checkpoint":
        model.activation_checkpointing_enable({"use_reentrant": False})
    swap = None
    if kind in ("swap", "tokenwise"):
        how: dict[str, Any] = (
            {"recompute": "tokenwise", "alpha": 0.0} if kind == "tokenwise" else {}
        )
        swap = ActivationSwap(model, limit="8MiB", in_flight="8MiB", nvme=folder, **how)
    for _ in range(steps):
        began_s = time.perf_counter()
        with swap or contextlib.nullcontext():
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        digest = sum(one.grad.double().abs().sum().item() for one in model.parameters())
        model.zero_grad(set_to_none=True)
        del loss
        seconds.append(time.perf_counter() - began_s)
    if swap is not None:
        swap.close()
    peak = hostmem.peak_resident_nbytes()
    figures = {"peak_nbytes": peak, "before_nbytes": before, "digest": digest}
    print(json.dumps({**figures, "step_s": min(seconds)}))


def long_context(result: Result, folder: Path, *, quick: bool) -> None:
    """Peak resident set of a step with a long context, in processes of their own."""
    rows, width, layers = (512, 64, 2) if quick else (8192, 256, 8)
    figures: dict[str, Any] = {}
    for kind in ("plain", "checkpoint", "swap", "tokenwise"):
        command = [sys.executable, __file__, "--job", kind, "--nvme", str(folder)]
        command += ["--shape", f"{rows},{width},{layers}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        figures[kind] = json.loads(done.stdout.splitlines()[-1])
        result.add(
            alpha=kind,
            step_s=figures[kind]["step_s"],
            peak_nbytes=figures[kind]["peak_nbytes"],
            grown_nbytes=figures[kind]["peak_nbytes"] - figures[kind]["before_nbytes"],
        )
    same = len({one["digest"] for one in figures.values()}) == 1
    result.checks.append(Check("gradients agree in each of the four", float(same), "== 1", same))
    for kind in ("swap", "tokenwise"):
        for other, limit in (("plain", 0.35), ("checkpoint", 0.8)):
            peak, grown = (
                one(figures[kind]) / one(figures[other]) for one in (_peak_nbytes, _grown_nbytes)
            )
            if not quick:
                at_most(result, f"{kind}: growth of the resident set over {other}", grown, limit)
            if not quick and kind == "swap":
                at_most(result, f"{kind}: peak resident set over {other}", peak, limit)
            else:
                result.notes.append(f"{kind}: peak resident set over {other}: {peak:.3f}")


def _peak_nbytes(figures: dict[str, Any]) -> float:
    return float(figures["peak_nbytes"])


def _grown_nbytes(figures: dict[str, Any]) -> float:
    """The peak beyond what the process held before the first step: torch and the model."""
    return float(figures["peak_nbytes"] - figures["before_nbytes"])


def main() -> int:
    """Run and print."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=("sweep", "context"), help="only one of the two")
    parser.add_argument("--wall", action="store_true", help="the sweep in ordinary time")
    options = parser.parse_args()
    options.nvme.mkdir(parents=True, exist_ok=True)
    if options.job:
        rows, width, layers = map(int, options.shape.split(","))
        job(options.job, rows, width, layers, 2, options.nvme)
        return 0
    result = Result("Token-wise recompute: solved alpha and long context")
    if options.part != "context":
        clock = Clock(wall=options.wall)
        if not options.wall:
            torch.set_num_threads(1)
            result.notes.append("sweep: times are CPU time of one thread, waits for the link added")
        sweep(result, clock, quick=options.quick)
    if options.part != "sweep":
        with tempfile.TemporaryDirectory(dir=options.nvme) as folder:
            long_context(result, Path(folder), quick=options.quick)
    return finish(result, options.json)


if __name__ == "__main__":
    sys.exit(main())
