"""Training through ``offload.attach`` on a device, against a loop that steps on the host itself."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from gpu_attached import (
    attached,
    differences,
    forget,
    moves_there,
    no_race,
    open_device,
    place_of,
)
from gpu_decoder import MIB, REAL, SMALL, Shape, batches, make_model
from gpu_report import Outcome, Report
from gpu_training import UnderTest
from offload.allocator.segment import ArenaStats
from offload.tiers.accelerator import Accelerator
from offload.tiers.cuda import CudaAccelerator

_LIMIT_S = 30.0  # of all seeds: the whole command stays under 8 minutes


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


def train_attached(
    shape: Shape, accelerator: Accelerator, config: dict[str, Any] | None = None
) -> Trained:
    """The same steps through ``offload.attach``; the loop is an ordinary one."""
    model = make_model(shape)
    if shape.place_first and accelerator.torch_device.type != "cpu":
        model = model.to(accelerator.torch_device)
    optimizer, results = _optimizer(list(model.parameters())), []
    with attached(model, optimizer, shape, accelerator, config) as engine:
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
    return Trained(
        results=[*results, *weights],
        peak_nbytes=peak,
        reserved_nbytes=reserved,
        arena=used,
        fetched=moves_there(engine, "weight", accelerator),
        notices=engine.notices,
        rebuilt_nbytes=sum(report.rebuilt_nbytes for report in rows),
    )


def _peak_nbytes(accelerator: Accelerator) -> int:
    """The most that was held, by torch's count where it has one."""
    if accelerator.torch_device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return accelerator.peak_nbytes()


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


def training_is_exact(shape: Shape, device: UnderTest) -> Outcome:
    """The bits of the loop that steps on the host, within the device budget."""
    forget()
    right = train_plainly(shape, place_of(device))
    plain_nbytes = torch.cuda.max_memory_allocated() if device.name != "simulated" else 0
    forget()
    began_s = time.perf_counter()
    got = train_attached(shape, open_device(device))
    step_s = (time.perf_counter() - began_s) / shape.steps
    forget()
    wrong = differences(got.results, right)
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
    wrong, arena = differences(got.results, plain.results), got.arena
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
    right = train_plainly(shape, place_of(device))

    def train(accelerator: Accelerator) -> list[torch.Tensor]:
        return train_attached(shape, accelerator).results

    return no_race(train, right, device, seeds, _LIMIT_S)


def rebuilding_is_exact(shape: Shape, device: UnderTest, alpha: float) -> Outcome:
    """Token rows rebuilt on the device, from copies of weights that come and go: the same bits."""
    forget()
    right = train_plainly(shape, place_of(device))
    forget()
    config = {"recompute": "tokenwise", "alpha": alpha, "blocks": ["layers"]}
    got = train_attached(shape, open_device(device), config)
    forget()
    wrong = differences(got.results, right)
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
    forget()
    place, accelerator = place_of(device), open_device(device)
    right = scale_plainly(shape, place, fused=fused)
    forget()
    model = make_model(shape)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=fused)
    scaler = torch.amp.GradScaler(place.type, init_scale=_first_scale(shape))
    results = []
    with attached(model, optimizer, shape, accelerator):
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
    wrong = differences(got, right)
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
