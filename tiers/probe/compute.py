"""How fast the processor computes, by kind of work, type and size of one call.

The figures are those of a training process: torch's own kernels, as many threads as torch uses,
and glibc told to give freed memory back, so that every large result is fresh memory.

[Note: fresh memory] The kernel gives small allocations page by page, which takes four times as long
for each byte as the huge pages that large ones get. So the first touch has a rate for each size: of
what filling fresh memory takes beyond filling memory that is there. Many small ones live at once,
for one alone may be found in what the heap has free.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

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
_FRESH = (16 << 20, 256 << 10, 2 << 20, 4 << 20, 64 << 20)  # bytes; the first one in any case
_FRESH_NBYTES = 16 << 20  # of all that live at once, at least
_LEAST_DIFFERENCE = 0.05  # of the longer call: below it is noise
_TILE_NUMEL = 1 << 20
_DTYPES = {"float32": 0.7, "bfloat16": 0.3}  # shares of the time


def measure_compute(
    seconds: float = 4.0,
    *,
    dtypes: Sequence[str] = tuple(_DTYPES),
    progress: Callable[[str], None] = lambda _text: None,
    clock: Clock = time.perf_counter,
) -> tuple[ComputeRate, ...]:
    """The CPU's rates; imports torch.

    Args:
        seconds: nothing is measured after them, but the smallest call of each kind of work.
        dtypes: of these types alone; ``float32`` is always needed.
        clock: replaced by tests.
    """
    import torch  # noqa: F401  (its import is not to be timed)

    hostmem.return_freed_memory()
    began_s = clock()
    rates: list[ComputeRate] = []
    until_s = began_s
    for dtype in dtypes:
        until_s += seconds * _DTYPES[dtype] / sum(_DTYPES[each] for each in dtypes)
        for work, size, call, less, times in _cases(dtype):
            known = any((rate.work, rate.dtype) == (work, dtype) for rate in rates)
            if known and clock() > until_s:
                continue
            progress(f"{work} in {dtype}")
            taken_s = _seconds(call, clock) if less is None else _difference(call, less, clock)
            rates.append(
                ComputeRate(
                    processor="cpu", work=work, dtype=dtype, size=size, per_s=times * size / taken_s
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


def _difference(call: Callable[[], object], less: Callable[[], object], clock: Clock) -> float:
    """Median seconds by which ``call`` takes longer than ``less``."""
    both_s = _seconds(call, clock)
    return max(both_s - _seconds(less, clock), _LEAST_DIFFERENCE * both_s)


class _Case(NamedTuple):
    """A call that does so much work so many ``times``, less what another call takes."""

    work: Work
    size: int
    call: Callable[[], object]
    less: Callable[[], object] | None = None
    times: int = 1


def _cases(dtype: str) -> Iterator[_Case]:
    """What is measured in ``dtype``."""
    import torch

    kind: torch.dtype = getattr(torch, dtype)
    yield from _matrices(kind)
    yield from _attention(kind)
    yield from _elements(kind)
    yield from _optimizer(kind)
    if kind == torch.float32:
        yield from _memory()
        one = torch.zeros(8, requires_grad=True)
        yield _Case("dispatch", 1, lambda: one + 1.0)


def _matrices(kind: "torch.dtype") -> Iterator[_Case]:
    import torch

    for work, shapes in (("matmul", _MATRICES), ("thin matmul", _THIN)):
        for rows, inner, columns in shapes:
            left = torch.ones(rows, inner, dtype=kind)
            right = torch.ones(columns, inner, dtype=kind).t()
            out = torch.empty(rows, columns, dtype=kind)
            flops = 2 * rows * inner * columns
            yield _Case(work, flops, _bound(torch.mm, left, right, out=out))  # type: ignore[arg-type]


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
        yield _Case("attention", flops, forward)
        out = scaled_dot_product_attention(q, k, v)
        grad = torch.ones_like(out)
        backward = _bound(torch.autograd.grad, out, (q, k, v), grad, retain_graph=True)
        yield _Case("attention backward", flops * 5 // 2, backward)


def _elements(kind: "torch.dtype") -> Iterator[_Case]:
    import torch

    for nbytes in _SIZES:
        numel = nbytes // kind.itemsize
        left, right, out = (torch.ones(numel, dtype=kind) for _ in range(3))
        yield _Case("pointwise", 3 * nbytes, _bound(torch.add, left, right, out=out))
        yield _Case("heavy", 2 * nbytes, _bound(torch.ops.aten.gelu.out, left, out=out))


def _optimizer(kind: "torch.dtype") -> Iterator[_Case]:
    import torch

    parameter = torch.ones(_TILE_NUMEL, dtype=kind)
    parameter.grad = torch.ones_like(parameter)
    stepper = torch.optim.AdamW([parameter], lr=1e-4, fused=True)
    moved = 7 * parameter.nbytes  # all four are read, all but the gradient written
    yield _Case("optimizer", moved, _bound(stepper.step))

    def step_alone() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            stepper.step()
        finally:
            torch.set_num_threads(threads)

    yield _Case("optimizer thread", moved, step_alone)


def _memory() -> Iterator[_Case]:
    import torch

    for nbytes in _FRESH:  # see [Note: fresh memory]
        there = torch.empty(nbytes, dtype=torch.uint8)
        count = max(1, _FRESH_NBYTES // nbytes)
        fresh, again = partial(_fill_fresh, nbytes, count), partial(_fill, there, count)
        yield _Case("first touch", nbytes, fresh, again, count)
    content = bytes(4 << 20)
    yield _Case("checksum", len(content), lambda: xxhash.xxh3_64_intdigest(content))


def _fill_fresh(nbytes: int, count: int) -> "list[torch.Tensor]":
    import torch

    return [torch.empty(nbytes, dtype=torch.uint8).fill_(1) for _ in range(count)]


def _fill(there: "torch.Tensor", count: int) -> None:
    for _ in range(count):
        there.fill_(1)


def add_compute(
    machine: Machine,
    seconds: float = 4.0,
    *,
    dtypes: Sequence[str] = tuple(_DTYPES),
    progress: Callable[[str], None] = lambda _text: None,
) -> Machine:
    """``machine``, which is this one, with its CPU's rates, as ``measure_compute``."""
    return replace(machine, compute=measure_compute(seconds, dtypes=dtypes, progress=progress))
