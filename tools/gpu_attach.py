"""Training through ``offload.attach`` on a device, against a loop that steps on the host itself."""

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gpu_report import Outcome, Report
from gpu_training import UnderTest
from offload.allocator.segment import ArenaStats
from offload.tiers.accelerator import Accelerator
from offload.tiers.cuda import CudaAccelerator
from offload.tiers.simulated.deferred import Deferred

if TYPE_CHECKING:
    from offload.engine import Engine

MIB = 1 << 20
_LIMIT_S = 30.0  # of all seeds: the whole command stays under 8 minutes


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How large the model and its batches are.

    Attributes:
        budget_nbytes: of the device.
    """

    width: int
    inner: int
    layers: int
    vocabulary: int
    batch: int
    tokens: int
    steps: int
    budget_nbytes: int
    dtype: torch.dtype = torch.float32
    checkpointed: bool = False
    place_first: bool = False  # the model is on the device before it is attached


# Weights and gradients of 0.75 GiB, and activations of as much.
REAL = Shape(
    width=768, inner=2048, layers=12, vocabulary=8192, batch=4, tokens=256, steps=20,
    budget_nbytes=640 * MIB,
)  # fmt: skip
SMALL = Shape(
    width=128, inner=256, layers=2, vocabulary=256, batch=2, tokens=16, steps=3,
    budget_nbytes=8 * MIB,
)  # fmt: skip


class Attention(nn.Module):
    """Causal, by plain operations, whose backward is deterministic."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 64
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        q, k, v = (
            part.view(batch, tokens, self.heads, -1).transpose(1, 2)
            for part in self.qkv(x).chunk(3, -1)
        )
        scores = (q @ k.transpose(-1, -2)) * (width // self.heads) ** -0.5 + mask
        mixed: torch.Tensor = self.out(
            (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, width)
        )
        return mixed


class Layer(nn.Module):
    """As in Llama: RMS norms, attention, a gated unit."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(shape.width) for _ in range(2))
        self.attention = Attention(shape.width)
        self.gate, self.up = (nn.Linear(shape.width, shape.inner, bias=False) for _ in range(2))
        self.down = nn.Linear(shape.inner, shape.width, bias=False)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norms[0](x), mask)
        y = self.norms[1](x)
        y = nn.functional.silu(self.gate(y)) * self.up(y)
        result: torch.Tensor = x + self.down(y)
        return result


class Model(nn.Module):
    """A small decoder with a tied head and a mask among its buffers."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.checkpointed = shape.checkpointed
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        mask = torch.full((shape.tokens, shape.tokens), float("-inf")).triu(1)
        self.register_buffer("mask", mask)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            if self.checkpointed:
                x = checkpoint(layer, x, self.mask, use_reentrant=False)
            else:
                x = layer(x, self.mask)
        logits = self.head(self.norm(x)).float()
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def make_model(shape: Shape) -> Model:
    """Always the same one, on the host."""
    torch.manual_seed(7)
    return Model(shape).to(shape.dtype)


def batches(shape: Shape, count: int) -> list[torch.Tensor]:
    """Always the same ones, on the host."""
    random = torch.Generator().manual_seed(8)
    size = shape.batch, shape.tokens
    return [torch.randint(shape.vocabulary, size, generator=random) for _ in range(count)]


def _optimizer(parameters: Sequence[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, 1e-3)


def train_plainly(shape: Shape, device: torch.device) -> list[torch.Tensor]:
    """Losses, norms and weights: ``device`` computes, the optimizer's step is on the host."""
    model = make_model(shape)
    homes = [parameter.detach().clone() for parameter in model.parameters()]
    model = model.to(device)
    optimizer, results = _optimizer(homes), []
    data = iter(batches(shape, 2 * shape.steps))
    for _ in range(shape.steps):
        for _ in range(2):
            loss = model(next(data).to(device))
            loss.backward()
        for home, parameter in zip(homes, model.parameters(), strict=True):
            home.grad = parameter.grad.to("cpu", copy=True)  # type: ignore[union-attr]
        results += [torch.nn.utils.clip_grad_norm_(homes, 1.0), loss.detach().cpu()]
        optimizer.step()
        model.zero_grad()
        with torch.no_grad():
            for home, parameter in zip(homes, model.parameters(), strict=True):
                parameter.copy_(home)
    return [*results, *homes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What a run left: its results, and the most bytes that the device held.

    Attributes:
        reserved_nbytes: the most, what is only cached included.
        fetched: copies of weights that travelled to the device.
        rebuilt_nbytes: of saved tensors whose token rows are rebuilt, in all blocks.
    """

    results: list[torch.Tensor]
    peak_nbytes: int
    reserved_nbytes: int
    arena: ArenaStats | None
    fetched: int
    notices: list[str]
    rebuilt_nbytes: int


@contextmanager
def _computing(accelerator: Accelerator) -> Iterator[None]:
    simulated: AbstractContextManager[object] = nullcontext()
    if accelerator.torch_device.type == "cpu":
        simulated = Deferred(accelerator, beside_host=True)
    with simulated:
        yield


def train_attached(
    shape: Shape, accelerator: Accelerator, config: dict[str, Any] | None = None
) -> Trained:
    """The same steps through ``offload.attach``; the loop is an ordinary one."""
    import offload
    from offload.tiers.events import ListRecorder, Move

    model = make_model(shape)
    if shape.place_first and accelerator.torch_device.type != "cpu":
        model = model.to(accelerator.torch_device)
    optimizer, results = _optimizer(list(model.parameters())), []
    with TemporaryDirectory(dir=".") as folder:
        engine: Engine = offload.attach(
            model,
            optimizer,
            budget=f"host=16GiB,device={shape.budget_nbytes}",
            nvme=Path(folder),
            commit="never",
            accelerator=accelerator,
            config=config,
        )
        recorder = engine._journal.recorder = ListRecorder()
        with engine, _computing(accelerator):
            data: Any = iter(batches(shape, 2 * shape.steps))
            for _ in range(shape.steps):
                for _ in range(2):
                    loss = model(next(data))
                    loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                results += [norm.clone(), torch.tensor(loss.item())]
                optimizer.step()
                optimizer.zero_grad()
            del loss
            peak = _peak_nbytes(accelerator)
            reserved = accelerator.peak_nbytes()
            arena = engine.computing.arena if engine.computing is not None else None
            used = None if arena is None else arena.stats()
            rows = [] if engine.tokenwise is None else engine.tokenwise.report()
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    moves = [event for event in recorder.events if isinstance(event, Move)]
    fetched = sum(move.role == "weight" and move.dst == accelerator.name for move in moves)
    return Trained(
        results=[*results, *weights],
        peak_nbytes=peak,
        reserved_nbytes=reserved,
        arena=used,
        fetched=fetched,
        notices=engine.notices,
        rebuilt_nbytes=sum(report.rebuilt_nbytes for report in rows),
    )


def _peak_nbytes(accelerator: Accelerator) -> int:
    """The most that was held, by torch's count where it has one."""
    if accelerator.torch_device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return accelerator.peak_nbytes()


def forget() -> None:
    """Give back what earlier runs left to the allocator, and count from now on."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_per_process_memory_fraction(1.0)  # whatever a failed check left


# -- the checks -----------------------------------------------------------------------------------


def run_checks(report: Report, device: UnderTest, *, quick: bool) -> None:
    """Every check of this kind, one after the other; none hides another."""
    on_cuda = device.name != "simulated"
    try:
        import offload.attaching  # noqa: F401
    except ImportError as error:
        missing = f"offload.attach was not checked: it needs {error.name}"
        if on_cuda:  # there it is the point
            told = f"{missing}: pip install pydantic pyyaml xxhash"
            report.run("attach", "imports", lambda: Outcome(told, holds=False))
        else:
            report.notes.append(missing)
        return
    whole, few = (REAL, replace(REAL, steps=4)) if on_cuda else (SMALL, replace(SMALL, steps=2))
    roomy = 2 * few.budget_nbytes
    few_rows = replace(few, steps=3, tokens=max(few.tokens, 128), budget_nbytes=roomy)  # grid: 64
    cases = {
        f"{whole.steps} steps": whole,
        "bfloat16": replace(few, dtype=torch.bfloat16),
        "checkpointed": replace(few, checkpointed=True),
        "on the device before": replace(few, place_first=True),
        "with room for all": replace(few, budget_nbytes=8 * few.budget_nbytes),
    }
    for name, shape in cases.items():
        report.run("attach", name, partial(training_is_exact, shape, device))
    held_up = replace(SMALL, width=256, inner=512, steps=2, budget_nbytes=160 * MIB)
    seeds = range(2 if quick else 20)
    report.run("attach", "streams held up", partial(no_race_in, held_up, device, seeds))
    for alpha in (0.5,) if quick else (0.0, 0.5):
        name = f"token rows rebuilt, alpha {alpha}"
        report.run("attach", name, partial(rebuilding_is_exact, few_rows, device, alpha))
    scaled = replace(few, steps=20 if on_cuda else 8, budget_nbytes=roomy)
    for fused in (True,) if quick else (False, True):
        name = "autocast and GradScaler" + (", fused" if fused else "")
        report.run("attach", name, partial(scaled_training_is_exact, scaled, device, fused=fused))
    if on_cuda:
        report.run("attach", "too small a budget", partial(budget_is_refused, few))


def _differences(got: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> int:
    pairs = zip(got, right, strict=True)
    return sum(not torch.equal(one.cpu(), other.cpu()) for one, other in pairs)


def _place_of(device: UnderTest) -> torch.device:
    return torch.device("cpu" if device.name == "simulated" else "cuda")


def _open(device: UnderTest) -> Accelerator:
    """The device as users have it: nothing is poisoned."""
    return device.open() if device.name == "simulated" else CudaAccelerator()


def training_is_exact(shape: Shape, device: UnderTest) -> Outcome:
    """The bits of the loop that steps on the host, within the device budget."""
    forget()
    right = train_plainly(shape, _place_of(device))
    plain_nbytes = torch.cuda.max_memory_allocated() if device.name != "simulated" else 0
    forget()
    began_s = time.perf_counter()
    got = train_attached(shape, _open(device))
    step_s = (time.perf_counter() - began_s) / shape.steps
    forget()
    wrong = _differences(got.results, right)
    told = (
        f"{wrong} of {len(right)} tensors differ; peak {got.peak_nbytes >> 20} MiB of "
        f"{shape.budget_nbytes >> 20} MiB (plain: {plain_nbytes >> 20} MiB), "
        f"{got.fetched} weights fetched, {step_s:.2f} s a step"
    )
    within = got.peak_nbytes <= shape.budget_nbytes
    return Outcome(
        told,
        holds=wrong == 0 and within and got.fetched > 0,
        value=got.peak_nbytes,
        target=f"<= {shape.budget_nbytes}",
    )


def run_arena_checks(report: Report) -> None:
    """With and without one segment for what the step computes; CUDA only."""
    room = replace(REAL, steps=8, budget_nbytes=2048 * MIB)
    cases = {
        "8 steps": room,
        "8 steps, checkpointed": replace(room, checkpointed=True),
        "8 steps, little room": replace(room, budget_nbytes=REAL.budget_nbytes),
    }
    for name, shape in cases.items():
        report.run("arena", name, partial(arena_is_exact, shape))


def arena_is_exact(shape: Shape) -> Outcome:
    """The bits of the same run without an arena; the segment serves, and the budget holds."""
    forget()
    plain = train_attached(shape, CudaAccelerator())
    forget()
    got = train_attached(shape, CudaAccelerator(), {"device_arena": True})
    forget()
    wrong, arena = _differences(got.results, plain.results), got.arena
    told = (
        f"{wrong} of {len(got.results)} tensors differ; reserved {got.reserved_nbytes >> 20} MiB "
        f"(without: {plain.reserved_nbytes >> 20} MiB), in use {got.peak_nbytes >> 20} MiB "
        f"(without: {plain.peak_nbytes >> 20} MiB)"
    )
    if arena is None or arena.plan is None or arena.before is None or arena.after is None:
        return Outcome(f"{told}; no segment: {arena and arena.off}", holds=False)
    told += (
        f"; a segment of {arena.plan.nbytes >> 20} MiB ({arena.plan.live_nbytes >> 20} MiB alive, "
        f"{arena.plan.packed_nbytes >> 20} MiB at planned addresses) served {arena.served} of "
        f"{arena.steps} steps, {arena.deviations} needed more; fragmentation "
        f"{arena.before.fragmentation:.1%} before, {arena.after.fragmentation:.1%} after"
    )
    within = got.reserved_nbytes <= shape.budget_nbytes
    return Outcome(
        told,
        holds=wrong == 0 and within and arena.served > 0,
        value=arena.after.fragmentation,
        target=f"fragmentation before: {arena.before.fragmentation:.3f}",
    )


def no_race_in(shape: Shape, device: UnderTest, seeds: Sequence[int]) -> Outcome:
    """The same bits however the streams are held up."""
    forget()
    right = train_plainly(shape, _place_of(device))
    began_s, ran = time.monotonic(), 0
    for seed in seeds:
        if time.monotonic() - began_s > _LIMIT_S:
            break
        forget()
        got = train_attached(shape, device.open_delayed(seed))
        if wrong := _differences(got.results, right):
            return Outcome(f"{wrong} tensors differ under seed {seed}", holds=False, value=seed)
        ran += 1
    return Outcome(f"the same bits under {ran} seeds", holds=ran > 0, value=ran)


def rebuilding_is_exact(shape: Shape, device: UnderTest, alpha: float) -> Outcome:
    """Token rows rebuilt on the device, from copies of weights that come and go: the same bits."""
    forget()
    right = train_plainly(shape, _place_of(device))
    forget()
    config = {"recompute": "tokenwise", "alpha": alpha, "blocks": ["layers"]}
    got = train_attached(shape, _open(device), config)
    forget()
    wrong = _differences(got.results, right)
    rebuilt = f"{got.rebuilt_nbytes / MIB:.1f} MiB of rows rebuilt"
    told = f"{wrong} of {len(right)} tensors differ; {rebuilt}; {'; '.join(got.notices)[:200]}"
    return Outcome(told, holds=wrong == 0 and got.rebuilt_nbytes > 0, value=got.rebuilt_nbytes)


def _first_scale(shape: Shape) -> float:
    """Too large: steps are skipped until it is small enough, which the last ones find."""
    return 2.0 ** (10 + shape.steps)


def scale_plainly(shape: Shape, device: torch.device, *, fused: bool) -> list[torch.Tensor]:
    """Scales, losses and weights: autocast on ``device``; unscaled and stepped on the host."""
    model = make_model(shape)
    homes = [parameter.detach().clone() for parameter in model.parameters()]
    model = model.to(device)
    optimizer, results, scale = torch.optim.AdamW(homes, 1e-3, fused=fused), [], _first_scale(shape)
    (batch,) = batches(shape, 1)
    for _ in range(shape.steps):
        with torch.autocast(device.type, torch.float16):
            loss = model(batch.to(device))
        (loss * scale).backward()
        found = torch.zeros(())
        gradients = [one.grad.to("cpu", copy=True) for one in model.parameters()]  # type: ignore[union-attr]
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, torch.tensor(1 / scale))
        for home, gradient in zip(homes, gradients, strict=True):
            home.grad = gradient
        if found:
            scale /= 2
        else:
            optimizer.step()
        results += [loss.detach().cpu(), torch.tensor(scale)]
        model.zero_grad()
        with torch.no_grad():
            for home, parameter in zip(homes, model.parameters(), strict=True):
                parameter.copy_(home)
    return [*results, *homes]


def scaled_training_is_exact(shape: Shape, device: UnderTest, *, fused: bool) -> Outcome:
    """Autocast to float16 with a ``GradScaler`` of the device; gradients are on the host.

    A fused step unscales by itself.
    """
    import offload

    forget()
    place, accelerator = _place_of(device), _open(device)
    right = scale_plainly(shape, place, fused=fused)
    forget()
    model = make_model(shape)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=fused)
    scaler = torch.amp.GradScaler(place.type, init_scale=_first_scale(shape))
    results = []
    with TemporaryDirectory(dir=".") as folder:
        engine = offload.attach(
            model,
            optimizer,
            budget=f"host=16GiB,device={shape.budget_nbytes}",
            nvme=Path(folder),
            commit="never",
            accelerator=accelerator,
        )
        with engine, _computing(accelerator):
            model.to(place)  # as scripts do: nothing is to be moved
            (batch,) = batches(shape, 1)
            for _ in range(shape.steps):
                with torch.autocast(place.type, torch.float16):
                    loss = model(batch)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                results += [torch.tensor(loss.item()), torch.tensor(scaler.get_scale())]
            del loss
    forget()
    got = [*results, *(parameter.detach() for parameter in model.parameters())]
    scales, losses = [one.item() for one in results[1::2]], [one.item() for one in results[::2]]
    told = f"loss {losses[0]:.3f} to {losses[-1]:.3f}, scale {scales[0]:.3g} to {scales[-1]:.3g}"
    wrong = _differences(got, right)
    trained = losses[-1] < losses[0] and scales[-1] < _first_scale(shape)
    return Outcome(f"{wrong} tensors differ; {told}", holds=wrong == 0 and trained)


def budget_is_refused(shape: Shape) -> Outcome:
    """A device budget that holds no layer is refused before the first step."""
    from offload.allocator.errors import BudgetError

    forget()
    try:
        train_attached(replace(shape, budget_nbytes=MIB), CudaAccelerator())
    except BudgetError as error:
        return Outcome(str(error)[:100], holds="device=" in str(error))
    return Outcome("1 MiB was taken as a budget", holds=False)
