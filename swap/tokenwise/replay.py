"""Executes the operations of a chain once more, on the tail of the rows only."""

import functools
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from offload.swap.tokenwise.analyse import Chain
from offload.swap.tokenwise.program import Node, Ref, Value
from offload.swap.tokenwise.rows import Axis, base_name, resized_args
from offload.swap.tokenwise.unwatched import unwatched

GRID_ROWS = 64
"""Cuts are multiples of this, with as many rows on each side: where linear layers give the same
bits for fewer rows (measured; one remaining row, for one, takes another kernel)."""


def cuts(rows: int) -> tuple[int, ...]:
    """Where sequences of ``rows`` tokens may be cut: 0 rebuilds all rows, ``rows`` none."""
    inner = range(GRID_ROWS, rows - GRID_ROWS + 1, GRID_ROWS)
    return (0, *inner, rows) if rows >= GRID_ROWS else (rows,)


def nearest_cut(rows: int, alpha: float) -> int:
    """The cut nearest to the fraction ``alpha``; of two the one that swaps more rows."""
    return min(cuts(rows), key=lambda cut: (abs(cut - alpha * rows), -cut))


def measurable_cut(rows: int, alpha: float) -> int:
    """The cut nearest to ``alpha`` behind which there is something to rebuild."""
    return min(cuts(rows)[:-1], key=lambda cut: (abs(cut - alpha * rows), -cut))


def rows_of(tensor: torch.Tensor, axis: Axis, start: int, stop: int) -> torch.Tensor:
    """A view of some rows of each sequence; the dimension of the rows is split if it must be."""
    if axis.outer == 1:
        return tensor.narrow(axis.dim, start, stop - start)
    per_sequence = tensor.shape[axis.dim] // axis.outer
    split: torch.Tensor = tensor.unflatten(axis.dim, (axis.outer, per_sequence))
    return split.narrow(axis.dim + 1, start, stop - start)


def sliced(tensor: torch.Tensor, axis: Axis, start: int, stop: int) -> torch.Tensor:
    """Some rows of each sequence in the tensor's own shape and order of dimensions, dense."""
    view = rows_of(tensor, axis, start, stop)
    shape = list(tensor.shape)
    shape[axis.dim] = axis.outer * (stop - start)
    stride = _dense_stride(tuple(shape), tensor.stride())
    if axis.outer == 1 and _same_stride(shape, view.stride(), stride):
        return view
    result = tensor.new_empty_strided(shape, stride)
    rows_of(result, axis, 0, stop - start).copy_(view)
    return result


def interchangeable(rows: torch.Tensor, tail: torch.Tensor) -> bool:
    """Whether ``tail`` may stand for ``rows``: kernels see the same shape and strides."""
    return rows.shape == tail.shape and _same_stride(list(rows.shape), rows.stride(), tail.stride())


def direct(axis: Axis, tail: torch.Tensor) -> bool:
    """Whether a product may write straight to ``tail``."""
    return axis.outer == 1 and tail.is_contiguous()


def _same_stride(shape: list[int], one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return all(
        size == 1 or mine == theirs for size, mine, theirs in zip(shape, one, other, strict=True)
    )


def _dense_stride(shape: tuple[int, ...], like: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a dense tensor whose dimensions lie in the order that ``like`` tells.

    A dimension of stride 0 (expanded) stays expanded.
    """
    stride = [0] * len(shape)
    passed = 1
    order = sorted(range(len(shape)), key=lambda dim: (like[dim], -dim))
    for dim in order:
        if like[dim] == 0 and shape[dim] > 1:
            continue
        stride[dim] = passed
        passed *= shape[dim]
    return tuple(stride)


@dataclass(frozen=True, slots=True)
class _Step:
    """One operation with the arguments for fewer rows."""

    node: Node
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    func: Any
    out: Any  # the same operation where it writes to memory that it is given
    dtype: torch.dtype  # of the first result, which an operation in place keeps
    used_up: tuple[int, ...]  # values that nothing needs after it


class Sink(Protocol):
    """Takes rebuilt rows."""

    def place(self, value: int) -> torch.Tensor | None:
        """Where a product may write the rows of ``value`` straight; ``None``: anywhere."""

    def take(self, value: int, rows: torch.Tensor) -> torch.Tensor:
        """The rows of ``value``; what is returned, equal in bits and strides, replaces them."""


class Replay:
    """A chain compiled for one cut: rows ``cut:`` of each sequence are rebuilt.

    Attributes:
        weights: names of the parameters and buffers that it reads.
    """

    def __init__(self, chain: Chain, cut: int) -> None:
        program = chain.program
        self.chain = chain
        self.cut = cut
        self._values = program.values
        self._rows = program.rows
        self._steps: list[_Step] = []
        self._known: dict[frozenset[int], tuple[list[_Step], list[int]]] = {}
        last_use: dict[int, int] = {}
        for position, index in enumerate(chain.nodes):
            for value in program.nodes[index].refs():
                last_use[value] = position
        for position, index in enumerate(chain.nodes):
            node = program.nodes[index]
            axes = tuple(chain.axes[out] for out in node.outs)
            self._steps.append(
                _Step(
                    node,
                    resized_args(node, axes, self._rows, self._rows - cut),
                    dict(node.kwargs),
                    _functional(node.op),
                    writing_out(node.op),
                    program.values[node.outs[0]].dtype,
                    (
                        *(value for value, last in last_use.items() if last == position),
                        *(out for out in node.outs if out not in last_use),
                    ),
                )
            )
        self.weights = self._read_by(self._steps)

    def _steps_of(self, roots: Collection[int]) -> tuple[list[_Step], list[int]]:
        """The steps behind some of the targets, and the sources that they start from."""
        key = frozenset(roots)
        if key in self._known:
            return self._known[key]
        needed = set(roots)
        steps: list[_Step] = []
        for step in reversed(self._steps):
            if needed.intersection(step.node.outs):
                steps.append(step)
                needed.update(step.node.refs())
        steps.reverse()
        found = steps, [value for value in self.chain.sources if value in needed]
        self._known[key] = found
        return found

    def _read_by(self, steps: Iterable[_Step]) -> tuple[str, ...]:
        refs = (value for step in steps for value in step.node.refs())
        names = (self._values[value].name for value in refs)
        return tuple(dict.fromkeys(name for name in names if name is not None))

    def weights_of(self, roots: Collection[int]) -> tuple[str, ...]:
        """The parameters and buffers that rebuilding these targets reads."""
        return self._read_by(self._steps_of(roots)[0])

    def sources_of(self, roots: Collection[int]) -> list[int]:
        """The sources that rebuilding these targets starts from."""
        return self._steps_of(roots)[1]

    def run(
        self,
        roots: Collection[int],
        sources: Mapping[int, torch.Tensor],
        weights: Mapping[str, torch.Tensor],
        sink: "Sink",
    ) -> None:
        """Rebuild the tail rows of some targets.

        Args:
            roots: the values that fill the targets' storages.
            sources: whole tensors by value.
            weights: the block's parameters and buffers by name.
            sink: takes the rows as they are rebuilt.
        """
        with torch.no_grad(), _no_autocast(sources), unwatched():
            env: dict[int, torch.Tensor] = {}
            steps, needed = self._steps_of(roots)
            for value in needed:
                axis = self.chain.axes[value]
                whole = sources[value].detach()
                rows = whole if axis is None else sliced(whole, axis, self.cut, self._rows)
                env[value] = rows
            for step in steps:
                self._execute(step, env, weights, roots, sink)
                for value in step.used_up:
                    env.pop(value, None)

    def _execute(
        self,
        step: _Step,
        env: dict[int, torch.Tensor],
        weights: Mapping[str, torch.Tensor],
        roots: Collection[int],
        sink: "Sink",
    ) -> None:
        resolve = functools.partial(self._resolve, env, weights)
        args = [resolve(arg) for arg in step.args]
        kwargs = {name: resolve(arg) for name, arg in step.kwargs.items()}
        first = step.node.outs[0]
        place = sink.place(first) if step.out is not None and first in roots else None
        if place is not None:
            assert step.out is not None
            results = [step.out(*args, **kwargs, out=place)]
        else:
            result = step.func(*args, **kwargs)
            results = [result] if isinstance(result, torch.Tensor) else list(result)
        if step.node.mutated:
            results[0] = results[0].to(step.dtype)
        for out, rows in zip(step.node.outs, results, strict=False):
            env[out] = sink.take(out, rows) if out in roots else rows

    def _resolve(
        self, env: dict[int, torch.Tensor], weights: Mapping[str, torch.Tensor], arg: Any
    ) -> Any:
        if isinstance(arg, Ref):
            value = self._values[arg.value]
            if value.name is not None:
                return _viewed(weights[value.name].detach(), value)
            return env[arg.value]
        if isinstance(arg, tuple):
            return [self._resolve(env, weights, item) for item in arg]
        return arg


@contextmanager
def _no_autocast(sources: Mapping[int, torch.Tensor]) -> Iterator[None]:
    """What the forward cast was recorded as an operation."""
    kinds = {"cpu", *(source.device.type for source in sources.values())}
    with ExitStack() as off:
        for kind in kinds:
            if torch.is_autocast_enabled(kind):
                off.enter_context(torch.autocast(kind, enabled=False))
        yield


def _viewed(weight: torch.Tensor, value: Value) -> torch.Tensor:
    if tuple(weight.shape) == value.shape and weight.stride() == value.stride:
        return weight
    return weight.as_strided(value.shape, value.stride, value.offset)


@functools.cache
def _functional(op: str) -> Any:
    """The operation by name, the one that makes a new tensor where it writes in place."""
    _, name, overload = op.split(".")
    if name in ("view", "_unsafe_view"):
        return torch.ops.aten.reshape.default
    plain = base_name(op)
    packet = getattr(torch.ops.aten, plain)
    return getattr(packet, overload)


@functools.cache
def writing_out(op: str) -> Any:
    """The form of a matrix product that writes to given memory; these make the large results."""
    plain = base_name(op)
    return getattr(torch.ops.aten, plain).out if plain in ("mm", "addmm", "bmm") else None
