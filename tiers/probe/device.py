"""How fast a device is, through ``accelerator``: links by block size, rates by kind of work.

Rates are told by events of the device's own stream, around calls that follow each other without
the host: what the host takes to launch them is not counted where the device takes longer. Operands
are random, for hardware draws less power on equal numbers, and is faster on them than in training.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from offload.allocator.errors import CapacityError
from offload.tiers.accelerator import Accelerator
from offload.tiers.machine import ComputeRate, Work
from offload.tiers.probe.pace import Clock, Route

if TYPE_CHECKING:
    import torch

BLOCKS = (1 << 20, 8 << 20, 32 << 20)
CASES = len(BLOCKS) + 1  # shares of the time that a route takes

_REPEATS = 5
_MOST_CALLS = 1000
_DTYPES = {"float32": 0.6, "bfloat16": 1.0}  # by which share of the time each is done


def device_routes(
    accelerator: Accelerator, name: str, addresses: Mapping[str, int], nbytes: int
) -> tuple[Route, ...]:
    """The links of the device's tier ``name``, both ways.

    Args:
        addresses: of ``nbytes`` of host memory, by the name of its tier; they must stay alive.

    Raises:
        CapacityError: the device has no room for ``nbytes``.
    """
    memory = accelerator.allocate(nbytes)
    blocks = tuple(block for block in BLOCKS if block <= nbytes)

    def route(source: str, target: str, address: int) -> Route:
        inwards = target == name
        stream = accelerator.stream("H2D" if inwards else "D2H")
        stream.wait(memory.ready)
        copy = accelerator.copy_in if inwards else accelerator.copy_out

        def move(block_nbytes: int, count: int) -> None:
            starts = (number % (nbytes // block_nbytes) * block_nbytes for number in range(count))
            events = [copy(stream, memory, at, address + at, block_nbytes) for at in starts]
            for event in events:
                event.settle()
                if event.error is not None:
                    raise event.error

        return Route(source=source, target=target, blocks=blocks, in_flight=1, move=move)

    return tuple(
        route(*ends, address)
        for host, address in addresses.items()
        for ends in ((host, name), (name, host))
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """Sizes of the calls that are measured, rising.

    Attributes:
        matrices: rows, inner and columns of a product.
        thin: the same, of few rows.
        sequences: tokens that attend to each other.
        sizes: bytes of one operand.
        tile_numel: elements that the optimizer steps at once.
    """

    matrices: tuple[tuple[int, int, int], ...] = (
        (256, 256, 256),
        (1024, 1024, 1024),
        (2048, 4096, 4096),
        (4096, 8192, 8192),
    )
    thin: tuple[tuple[int, int, int], ...] = ((8, 1024, 1024), (8, 4096, 4096))
    sequences: tuple[int, ...] = (256, 1024, 4096)
    heads: int = 16
    head_width: int = 64
    sizes: tuple[int, ...] = (1 << 20, 16 << 20, 256 << 20)
    tile_numel: int = 16 << 20


_Call: TypeAlias = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """A call of ``size``, whose operands ``make`` brings to the device."""

    work: Work
    size: int
    make: Callable[[], _Call]


def measure_device(
    accelerator: Accelerator,
    processor: str,
    seconds: float = 4.0,
    *,
    shapes: Shapes | None = None,
    repeat_s: float = 20e-3,
    progress: Callable[[str], None] = lambda _text: None,
    clock: Clock = time.perf_counter,
) -> tuple[ComputeRate, ...]:
    """The rates of ``processor``, which computes on ``accelerator``.

    Args:
        seconds: nothing is measured after them, but the smallest call of each kind of work.
        shapes: those that the device has no room for are left out, but the smallest of a kind.
        repeat_s: of one measurement: many calls of small kernels.
        clock: replaced by tests.

    Raises:
        CapacityError: no room for the smallest call of a kind.
        RuntimeError: the device failed, or torch has no such kernel for it.
    """
    import torch

    began_s = clock()
    rates: list[ComputeRate] = []
    for dtype, share in _DTYPES.items():
        for case in _Cases(accelerator, shapes or Shapes(), getattr(torch, dtype)).all():
            known = any((rate.work, rate.dtype) == (case.work, dtype) for rate in rates)
            if known and clock() > began_s + share * seconds:
                continue
            progress(f"{case.work} in {dtype} on {processor}")
            try:
                per_s = case.size / _seconds(accelerator, case.make(), repeat_s)
            except (CapacityError, torch.OutOfMemoryError):
                if not known:
                    raise
                continue
            rates.append(
                ComputeRate(
                    processor=processor, work=case.work, dtype=dtype, size=case.size, per_s=per_s
                )
            )
    return tuple(rates)


def _seconds(accelerator: Accelerator, call: _Call, repeat_s: float) -> float:
    """Median seconds of one call."""
    _timed(accelerator, call, 1)  # libraries load their kernels
    once_s = _timed(accelerator, call, 1)
    count = max(1, min(_MOST_CALLS, int(repeat_s / once_s)))
    return statistics.median(_timed(accelerator, call, count) / count for _ in range(_REPEATS))


def _timed(accelerator: Accelerator, call: _Call, count: int) -> float:
    """Seconds of ``count`` calls in a row; at least a nanosecond."""
    stream = accelerator.current_stream()
    began = stream.record()
    for _ in range(count):
        accelerator.launch(call)
    ended = stream.record()
    accelerator.synchronize()
    return max(ended.seconds_since(began), 1e-9)


class _Cases:
    """What is measured in one type."""

    def __init__(self, accelerator: Accelerator, shapes: Shapes, kind: "torch.dtype") -> None:
        self._accelerator = accelerator
        self._shapes = shapes
        self._kind = kind

    def all(self) -> Iterator[_Case]:
        """The smallest call of a kind of work comes first."""
        shapes = self._shapes
        for shape in shapes.matrices:
            yield _Case(work="matmul", size=_flops(shape), make=partial(self._product, shape))
        for shape in shapes.thin:
            size = _flops(shape)
            yield _Case(work="thin matmul", size=size, make=partial(self._product, shape))
        for tokens in shapes.sequences:
            flops = 4 * shapes.heads * tokens * tokens * shapes.head_width
            yield _Case(work="attention", size=flops, make=partial(self._attention, tokens))
            yield _Case(
                work="attention backward",
                size=flops * 5 // 2,
                make=partial(self._attention_backward, tokens),
            )
        for nbytes in shapes.sizes:
            yield _Case(work="pointwise", size=3 * nbytes, make=partial(self._sum, nbytes))
            yield _Case(work="heavy", size=2 * nbytes, make=partial(self._gelu, nbytes))
        moved = 7 * shapes.tile_numel * self._kind.itemsize  # four are read, three written
        yield _Case(work="optimizer", size=moved, make=self._step)

    def _random(self, shape: Sequence[int]) -> "torch.Tensor":
        """Of the device; filled by a kernel of the current stream."""
        nbytes = self._kind.itemsize
        for size in shape:
            nbytes *= size
        memory = self._accelerator.allocate(nbytes)
        self._accelerator.current_stream().wait(memory.ready)
        tensor = memory.view(0, self._kind, shape)
        self._accelerator.launch(lambda: tensor.uniform_(-1.0, 1.0))
        return tensor

    def _product(self, shape: tuple[int, int, int]) -> _Call:
        import torch

        rows, inner, columns = shape
        left, right = self._random((rows, inner)), self._random((columns, inner))
        out = self._random((rows, columns))
        return lambda: torch.mm(left, right.t(), out=out)

    def _heads(self, tokens: int) -> "torch.Tensor":
        return self._random((1, self._shapes.heads, tokens, self._shapes.head_width))

    def _attention(self, tokens: int) -> _Call:
        from torch.nn.functional import scaled_dot_product_attention

        q, k, v = (self._heads(tokens) for _ in range(3))
        return lambda: scaled_dot_product_attention(q, k, v)

    def _attention_backward(self, tokens: int) -> _Call:
        import torch
        from torch.nn.functional import scaled_dot_product_attention

        q, k, v = (self._heads(tokens).detach().requires_grad_() for _ in range(3))
        grad, made = self._heads(tokens), list["torch.Tensor"]()
        self._accelerator.launch(lambda: made.append(scaled_dot_product_attention(q, k, v)))
        self._accelerator.synchronize()
        return lambda: torch.autograd.grad(made[0], (q, k, v), grad, retain_graph=True)

    def _elements(self, nbytes: int, count: int) -> "list[torch.Tensor]":
        return [self._random((nbytes // self._kind.itemsize,)) for _ in range(count)]

    def _sum(self, nbytes: int) -> _Call:
        import torch

        left, right, out = self._elements(nbytes, 3)
        return lambda: torch.add(left, right, out=out)

    def _gelu(self, nbytes: int) -> _Call:
        import torch

        left, out = self._elements(nbytes, 2)
        return lambda: torch.ops.aten.gelu.out(left, out=out)

    def _step(self) -> _Call:
        import torch

        parameter = torch.nn.Parameter(self._random((self._shapes.tile_numel,)))
        parameter.grad = self._random((self._shapes.tile_numel,))
        return torch.optim.AdamW([parameter], lr=1e-4, fused=True).step


def _flops(shape: tuple[int, int, int]) -> int:
    rows, inner, columns = shape
    return 2 * rows * inner * columns
