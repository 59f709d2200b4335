"""A training step of a 12-layer GPT-2-small-like model, its saved activations swapped or not.

    .venv/bin/python tools/bench_activations.py --json runs/bench/activations.json

Beside no offload: PyTorch's ``save_on_cpu`` and ``checkpoint``, in the same process and rotation.
"""

import contextlib
import hashlib
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchlib import Result, arguments, finish
from offload import ActivationSwap
from offload.tiers import hostmem
from offload.tiers.engines.registry import wrapping
from offload.tiers.mempolicy import allowed_nodes
from offload.tiers.wrappers import Link, ThrottledEngine

# They refuse to run without an accelerator; what they would be compared on is in gpu_check.
SLOW_BYTES_PER_S = 0.1e9  # of the link that can't keep up, both directions together
_NEED_ACCELERATOR = (
    "torchtune OffloadActivations",
    "TRL OffloadActivations",
    "DeepSpeed CheckpointHiddenStatesOffload",  # takes tensors of the CPU for moved ones
)


@dataclass(frozen=True)
class Size:
    """The shape of the model and of its batch."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    vocabulary: int = 50257
    length: int = 512


class Block(nn.Module):
    """Attention and MLP, each behind a norm."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.norms = nn.ModuleList(nn.LayerNorm(size.width) for _ in range(2))
        self.qkv = nn.Linear(size.width, 3 * size.width)
        self.out = nn.Linear(size.width, size.width)
        self.up = nn.Linear(size.width, 4 * size.width)
        self.down = nn.Linear(4 * size.width, size.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, length, width) to the same."""
        batch, length, width = x.shape
        split = self.qkv(self.norms[0](x)).view(batch, length, 3, self.heads, -1)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        result: torch.Tensor = x + self.down(F.gelu(self.up(self.norms[1](x)), approximate="tanh"))
        return result


class Model(nn.Module):
    """GPT-2's shape with tied embeddings."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.vocabulary, size.width)
        self.positions = nn.Embedding(size.length, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.recompute = False
        self.mark: Callable[[torch.Tensor], None] = lambda _: None  # told of each block's input

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The loss of predicting each of ``tokens`` (batch, length) from those before it."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            self.mark(x)
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@dataclass
class Mode:
    """One way to hold saved activations, and what was measured of it."""

    name: str
    context: Callable[[], Any] = contextlib.nullcontext
    recompute: bool = False
    swap: ActivationSwap | None = None
    slow: bool = False  # behind a link that can't keep up: the whole step counts
    step_s: list[float] = field(default_factory=list)
    growth_nbytes: list[int] = field(default_factory=list)
    moved: list[tuple[int, int]] = field(default_factory=list)
    digest: str = ""

    def step(self, model: Model, tokens: torch.Tensor) -> None:
        """Run and measure one forward and backward."""
        model.recompute = self.recompute
        model.zero_grad()
        hostmem.trim_heap()
        before_nbytes, began_s = hostmem.resident_nbytes()[0], time.perf_counter()
        written, read = self._totals()
        with self.context():
            loss = model(tokens)
        forward_s = time.perf_counter() - began_s
        if self.swap is not None and not self.slow:
            self.swap.cache.spiller.close()  # what is leaving has left
        hostmem.trim_heap()
        self.growth_nbytes.append(hostmem.resident_nbytes()[0] - before_nbytes)
        began_s = time.perf_counter()
        loss.backward()
        self.step_s.append(forward_s + time.perf_counter() - began_s)
        now = self._totals()
        self.moved.append((now[0] - written, now[1] - read))
        self.digest = _digest(model)

    def _totals(self) -> tuple[int, int]:
        """Bytes that left and came back so far, to whichever home."""
        if self.swap is None:
            return 0, 0
        homes = {home.name for home in self.swap.cache.spiller.homes}
        moves = self.swap.journal.recorder.events  # type: ignore[attr-defined]
        moves = [move for move in moves if hasattr(move, "src")]
        return (
            sum(move.nbytes for move in moves if move.dst in homes),
            sum(move.nbytes for move in moves if move.src in homes),
        )


def _digest(model: Model) -> str:
    """Of every gradient, in order."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        assert parameter.grad is not None
        digest.update(parameter.grad.numpy().data)
    return digest.hexdigest()


def unique_nbytes(model: Model, tokens: torch.Tensor) -> tuple[int, int, int]:
    """Of the saved tensors of one step: how many, their bytes, and those of distinct storages.

    Parameters are left out of the last; storages too small to leave alone are not.
    """
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}
    packed: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed.append(tensor.nbytes)
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            storages[storage._cdata] = storage  # alive, so that its address stays its own
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens)
    return len(packed), sum(packed), sum(storage.nbytes() for storage in storages.values())


def saved_tensors(model: Model, tokens: torch.Tensor) -> list[torch.Tensor]:
    """What autograd saves in one forward, in order."""
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.detach())
        return saved[-1]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens)
    return saved


def hook_s(swap: ActivationSwap, saved: list[torch.Tensor], repeats: int = 50) -> float:
    """Seconds to pack and unpack one of ``saved``, and to let go of it; nothing moves."""
    cache = swap.cache

    def measure() -> float:
        began_s = time.process_time()
        cache.begin_pass("bench")
        handles = [cache.pack(tensor) for tensor in saved]
        while handles:
            cache.unpack(handles.pop())
        return time.process_time() - began_s

    measure()
    return min(measure() for _ in range(repeats)) / len(saved)


def main() -> int:
    """Run and print."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--turns", type=int, default=15, help="steps of each mode (default: 15)")
    options = parser.parse_args()
    size = Size(layers=2, length=128) if options.quick else Size()
    torch.manual_seed(0)
    model, tokens = Model(size), torch.randint(size.vocabulary, (1, size.length))
    result = Result("Saved activations of one step")
    swaps = {
        "offload, memory": _swap(model, memory="16GiB"),
        "offload, node": _swap(model, nodes={allowed_nodes()[0]: "4GiB"}),
        "offload, files": _swap(model, nvme=options.nvme),
    }
    link = Link(bytes_per_s=SLOW_BYTES_PER_S)
    with wrapping(lambda engine: ThrottledEngine(engine, link)):
        slow = _swap(model, nvme=options.nvme)
    modes = [
        Mode("no offload"),
        Mode("save_on_cpu", torch.autograd.graph.save_on_cpu),
        Mode("checkpoint", recompute=True),
        *(Mode(name, _reused(swap), swap=swap) for name, swap in swaps.items()),
        Mode("offload, slow files", _reused(slow), swap=slow, slow=True),
    ]
    count, saved, unique = unique_nbytes(model, tokens)
    result.notes.append(
        f"{count} tensors saved, {saved} bytes; {unique} bytes of distinct storages, "
        "parameters left out"
    )
    for turn in range(2 if options.quick else options.turns + 1):
        for mode in modes:
            mode.step(model, tokens)
            if turn == 0:
                mode.step_s.clear()
    _report(result, modes, unique, model, saved_tensors(model, tokens))
    for swap in (*swaps.values(), slow):
        swap.close()
    return finish(result, options.json)


def _swap(model: Model, **homes: Any) -> ActivationSwap:
    from offload.tiers.events import ListRecorder
    from offload.tiers.journal import Journal

    settings = {"limit": 0, **homes}
    return ActivationSwap(model, journal=Journal(ListRecorder()), **settings)


def _reused(swap: ActivationSwap) -> Callable[[], ActivationSwap]:
    return lambda: swap


def _report(
    result: Result, modes: list[Mode], unique: int, model: Model, saved: list[torch.Tensor]
) -> None:
    plain = modes[0]
    for mode in modes:
        result.add(
            mode=mode.name,
            step_s=statistics.median(mode.step_s),
            ratio=statistics.median(
                one / other for one, other in zip(mode.step_s, plain.step_s, strict=True)
            ),
            growth_nbytes=statistics.median(mode.growth_nbytes[1:]),
            out_nbytes=mode.moved[-1][0],
            back_nbytes=mode.moved[-1][1],
        )
        if mode.swap is not None:
            _check(result, mode, plain, unique)
    with_room = _swap(model, limit="1TiB", memory="1MiB")
    cost_s = hook_s(with_room, saved)
    with_room.close()
    result.at_most("pack + unpack beyond I/O, us per tensor", cost_s * 1e6, 4.0)
    result.notes += [f"{name}: needs an accelerator, not run" for name in _NEED_ACCELERATOR]


def _check(result: Result, mode: Mode, plain: Mode, unique: int) -> None:
    growth = statistics.median(mode.growth_nbytes[1:]) / statistics.median(plain.growth_nbytes[1:])
    ratio = result.rows[-1]["ratio"]
    result.check(f"{mode.name}: bits are the same", float(mode.digest == plain.digest), 1)
    if mode.name.endswith("memory"):
        result.at_most(f"{mode.name}: bytes that are copied", sum(mode.moved[-1]), 0)
        result.at_most(f"{mode.name}: step over no offload", ratio, 1.05)
        return
    result.at_most(f"{mode.name}: bytes out over distinct bytes", mode.moved[-1][0] / unique, 1.0)
    result.check(f"{mode.name}: bytes out over distinct bytes", mode.moved[-1][0] / unique, 0.99)
    if mode.slow:
        busy = sum(mode.moved[-1]) / SLOW_BYTES_PER_S / statistics.median(mode.step_s)
        result.check(f"{mode.name}: share of the step that the link is busy", busy, 0.9)
    elif mode.name.endswith("files"):
        result.at_most(f"{mode.name}: growth after forward over no offload", growth, 0.02)


if __name__ == "__main__":
    sys.exit(main())
