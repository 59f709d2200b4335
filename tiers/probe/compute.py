"""How fast the processor computes, by kind of work, type and size of one call.

The figures are those of a training process: torch's own kernels, as many threads as torch uses,
and glibc told to give freed memory back, so that every large result is fresh memory.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import xxhash

from offload.tiers import hostmem
from offload.tiers.machine import ComputeRate, Machine, Work
from offload.tiers.probe.pace import Clock

if TYPE_CHECKING:
    import torch

_REPEATS = 5
_LEAST_S = 4e-3  # of one repeat: many calls of small kernels
_MATRICES = ((32, 64, 64), (64, 128, 128), (64, 512, 512), (256, 1024, 1024), (512, 1024, 2048))
_THIN = ((8, 256, 256), (8, 1024, 1024))
_SEQUENCES = (64, 256, 512)
_HEADS, _HEAD_WIDTH = 8, 64
_SIZES = (64 << 10, 1 << 20, 16 << 20, 64 << 20)  # bytes of one operand
_TILE_NUMEL = 1 << 20
_DTYPES = {"float32": 0.7, "bfloat16": 1.0}  # by which share of the time each is done


def measure_compute(
    seconds: float = 4.0,
    *,
    progress: Callable[[str], None] = lambda _text: None,
    clock: Clock = time.perf_counter,
) -> tuple[ComputeRate, ...]:
    """The CPU's rates; imports torch.

    Args:
        seconds: nothing is measured after them, but the smallest call of each kind of work.
        clock: replaced by tests.
    """
    import torch  # noqa: F401  (its import is not to be timed)

    hostmem.return_freed_memory()
    began_s = clock()
    rates: list[ComputeRate] = []
    for dtype, share in _DTYPES.items():
        for work, size, call in _cases(dtype):
            known = any((rate.work, rate.dtype) == (work, dtype) for rate in rates)
            if known and clock() > began_s + share * seconds:
                continue
            progress(f"{work} in {dtype}")
            taken_s = _seconds(call, clock)
            rates.append(
                ComputeRate(
                    processor="cpu", work=work, dtype=dtype, size=size, per_s=size / taken_s
                )
            )
    return tuple(rates)


def _seconds(call: Callable[[], object], clock: Clock) -> float:
    """Median seconds of one call."""
    call()
    began_s = clock()
    call()
    count = max(1, min(10_000, int(_LEAST_S / max(clock() - began_s, 1e-7))))
    taken: list[float] = []
    for _ in range(_REPEATS):
        began_s = clock()
        for _ in range(count):
            call()
        taken.append((clock() - began_s) / count)
    return max(statistics.median(taken), 1e-9)


_Case = tuple[Work, int, Callable[[], object]]


def _cases(dtype: str) -> Iterator[_Case]:
    """What is measured in ``dtype``: the work, the size of one call, the call."""
    import torch

    kind: torch.dtype = getattr(torch, dtype)
    yield from _matrices(kind)
    yield from _attention(kind)
    yield from _elements(kind)
    yield from _optimizer(kind)
    if kind == torch.float32:
        yield from _memory()
        one = torch.zeros(8, requires_grad=True)
        yield "dispatch", 1, lambda: one + 1.0


def _matrices(kind: "torch.dtype") -> Iterator[_Case]:
    import torch

    for work, shapes in (("matmul", _MATRICES), ("thin matmul", _THIN)):
        for rows, inner, columns in shapes:
            left = torch.ones(rows, inner, dtype=kind)
            right = torch.ones(columns, inner, dtype=kind).t()
            out = torch.empty(rows, columns, dtype=kind)
            flops = 2 * rows * inner * columns
            yield work, flops, _bound(torch.mm, left, right, out=out)  # type: ignore[misc]


def _bound(function: Callable[..., object], *args: object, **options: object) -> Callable[[], None]:
    def call() -> None:
        function(*args, **options)

    return call


def _attention(kind: "torch.dtype") -> Iterator[_Case]:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    for sequence in _SEQUENCES:
        shape = (1, _HEADS, sequence, _HEAD_WIDTH)
        q, k, v = (torch.ones(shape, dtype=kind, requires_grad=True) for _ in range(3))
        flops = 4 * _HEADS * sequence * sequence * _HEAD_WIDTH
        with torch.no_grad():
            forward = _bound(scaled_dot_product_attention, q.detach(), k.detach(), v.detach())
        yield "attention", flops, forward
        out = scaled_dot_product_attention(q, k, v)
        grad = torch.ones_like(out)
        backward = _bound(torch.autograd.grad, out, (q, k, v), grad, retain_graph=True)
        yield "attention backward", flops * 5 // 2, backward


def _elements(kind: "torch.dtype") -> Iterator[_Case]:
    import torch

    for nbytes in _SIZES:
        numel = nbytes // kind.itemsize
        left, right, out = (torch.ones(numel, dtype=kind) for _ in range(3))
        yield "pointwise", 3 * nbytes, _bound(torch.add, left, right, out=out)
        yield "heavy", 2 * nbytes, _bound(torch.ops.aten.gelu.out, left, out=out)


def _optimizer(kind: "torch.dtype") -> Iterator[_Case]:
    import torch

    parameter = torch.ones(_TILE_NUMEL, dtype=kind)
    parameter.grad = torch.ones_like(parameter)
    stepper = torch.optim.AdamW([parameter], lr=1e-4, fused=True)
    moved = 7 * parameter.nbytes  # all four are read, all but the gradient written
    yield "optimizer", moved, _bound(stepper.step)

    def step_alone() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            stepper.step()
        finally:
            torch.set_num_threads(threads)

    yield "optimizer thread", moved, step_alone


def _memory() -> Iterator[_Case]:
    import torch

    fresh = 16 << 20
    yield "first touch", fresh, lambda: torch.empty(fresh, dtype=torch.uint8).fill_(1)
    content = bytes(4 << 20)
    yield "checksum", len(content), lambda: xxhash.xxh3_64_intdigest(content)


def add_compute(
    machine: Machine,
    seconds: float = 4.0,
    *,
    progress: Callable[[str], None] = lambda _text: None,
) -> Machine:
    """``machine``, which is this one, with its CPU's rates."""
    return replace(machine, compute=measure_compute(seconds, progress=progress))
