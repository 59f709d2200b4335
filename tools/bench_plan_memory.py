"""The memory plan against its bound, and against allocators that see one request at a time."""

import time
from functools import partial

from benchlib import Result, median_of
from offload.allocator import caching
from offload.allocator.bilevel import plan_memory
from offload.allocator.lifetimes import Lifetime, check, events
from offload.allocator.planned import PlannedArena, PlanningStats
from offload.allocator.segment import StepRequests, plan_segment
from offload.allocator.tlsf import TLSF
from plan_traces import Activations, Shape, record_training

_WAYS: tuple[tuple[Activations, bool], ...] = (
    ("kept", False),
    ("recomputed", False),
    ("recomputed", True),
    ("swapped", True),
)
_SHAPES = (
    Shape(family="gpt2", layers=12, width=768, tokens=512),
    Shape(family="gpt2", layers=24, width=1024, tokens=1024, batch=4),
    Shape(family="gpt2", layers=36, width=1280, tokens=1024),
    Shape(family="llama", layers=16, width=2048, tokens=512),
    Shape(family="llama", layers=16, width=2048, tokens=8192),
    Shape(family="llama", layers=32, width=4096, tokens=4096),
)
_DEEP = (
    Shape(family="gpt2", layers=80, width=1024, tokens=512),
    Shape(family="llama", layers=80, width=8192, tokens=4096),
)
_REPEATS = 5


def measure(result: Result, *, quick: bool) -> None:
    """A row for each trace, and the checks."""
    shapes = _SHAPES[:1] if quick else (*_SHAPES, *_DEEP)
    gaps, deep_s, ratios = [0.0], [0.0], []
    for shape in shapes:
        for activations, leave in _WAYS[2:] if quick else _WAYS:
            trace = record_training(shape, activations, gradients_leave=leave)
            lives = trace.lifetimes()
            plan = plan_memory(lives)
            check(plan.packing, lives)
            plan_s = median_of(_REPEATS, partial(_planning_s, lives))
            cached = caching.replay(lives)
            arena = _two_steps(lives)
            assert arena.before is not None
            assert arena.after is not None
            result.add(
                step=shape.name,
                activations=activations,
                gradients="leave" if leave else "stay",
                tensors=len(lives),
                blocks=" + ".join(f"{kind.count}x{kind.buffers}" for kind in plan.kinds),
                bound_nbytes=plan.lower_bound_nbytes,
                gap=plan.gap,
                plan_cpu_s=plan_s,
                tlsf_frag=arena.before.fragmentation,
                planned_frag=arena.after.fragmentation,
                caching_ratio=cached.reserved_nbytes / plan.peak_nbytes,
                caching_frag=cached.fragmentation,
                segment_gap=_segment_gap(lives),
            )
            gaps.append(plan.gap)
            ratios.append(cached.reserved_nbytes / plan.peak_nbytes)
            if shape in _DEEP:
                deep_s.append(plan_s)
    result.at_most("peak of the worst plan above its lower bound, as a share", max(gaps), 0.02)
    if not quick:
        result.at_most("seconds to plan the slowest of 80 blocks", max(deep_s), 1)
        result.check("caching allocator (a model of it) over plan, least", min(ratios), 1)
    result.notes.append(
        "blocks: how many of each kind x buffers of one, solved once; gap: peak over bound; frag: "
        "share of the span, or of what is reserved, not in use at the peak; caching: a model of "
        "PyTorch's caching allocator over three steps, its reserved bytes over the plan's peak; "
        "segment gap: the one segment that serves the step by best fit, over its large bytes alive"
    )


def _segment_gap(lives: list[Lifetime]) -> float:
    return plan_segment(StepRequests(lifetimes=tuple(lives), kept=frozenset())).gap


def _planning_s(lives: list[Lifetime]) -> float:
    began_s = time.process_time()  # one thread computes: other processes' work is not counted
    plan_memory(lives)
    return time.process_time() - began_s


def _two_steps(lives: list[Lifetime]) -> PlanningStats:
    """The trace through an arena twice: searched for, and then planned."""
    arena = PlannedArena(TLSF(1 << 46))
    for _ in range(2):
        arena.next_step()
        extents = {}
        for position, comes in events(lives):
            if comes:
                extents[position] = arena.allocate(lives[position].nbytes, align=512)
            else:
                arena.free(extents.pop(position))
    arena.next_step()
    return arena.stats()
