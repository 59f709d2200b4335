"""What a block's forward did: operations, the tensors between them, and what autograd saved.

Plain frozen records of integers and constants. Two executions that did the same thing give
equal programs, for values and storages are numbered in the order of their appearance.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Kind: TypeAlias = Literal["parameter", "external", "made", "unknown"]


@dataclass(frozen=True, slots=True)
class Ref:
    """A value as an argument of an operation."""

    value: int


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor at one version of its bytes.

    Attributes:
        kind: ``parameter`` (or buffer) of the block; ``external``: it came from outside;
            ``made`` by a node; ``unknown``: a view of bytes that were changed under it.
        storage: index of the storage that it views.
        node: index of the node that made it.
        name: of the parameter, within the block.
    """

    kind: Kind
    storage: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int  # in elements
    dtype: Any  # torch.dtype; opaque here
    itemsize: int
    node: int | None = None
    name: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the elements, without what the storage holds beside them."""
        return math.prod(self.shape) * self.itemsize

    def is_dense(self) -> bool:
        """Whether the elements fill a stretch of memory, each once, in some order of dimensions."""
        expected = 1
        for stride, size in sorted(zip(self.stride, self.shape, strict=True)):
            if size == 1:
                continue
            if stride != expected:
                return False
            expected *= size
        return self.offset == 0 and 0 not in self.shape


@dataclass(frozen=True, slots=True)
class Node:
    """One operation that was executed.

    Attributes:
        op: its overload, such as ``aten.addmm.default``.
        args: ``Ref``, constants, and tuples of both.
        kwargs: as ``args``, by name.
        outs: the values that it made, lists flattened.
        mutated: the values that it wrote into; their new versions come last in ``outs``.
        draws: whether it draws random numbers.
    """

    op: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    outs: tuple[int, ...]
    mutated: tuple[int, ...] = ()
    draws: bool = False

    def refs(self) -> tuple[int, ...]:
        """The values among the arguments, in order."""
        found: list[int] = []
        _collect(self.args, found)
        _collect(tuple(value for _, value in self.kwargs), found)
        return tuple(found)


@dataclass(frozen=True, slots=True)
class Slot:
    """One call of the pack hook: autograd saved a view of a storage.

    Attributes:
        root: the value that fills the storage at that moment, if there is one.
        at: nodes executed before.
    """

    storage: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: Any
    root: int | None
    at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """One execution of a block's forward.

    Attributes:
        rows: tokens of one sequence: the size of the dimension that rows are cut in.
        storage_nbytes: by storage index.
    """

    rows: int
    values: tuple[Value, ...]
    nodes: tuple[Node, ...]
    slots: tuple[Slot, ...]
    storage_nbytes: tuple[int, ...]


def _collect(arg: Any, found: list[int]) -> None:
    if isinstance(arg, Ref):
        found.append(arg.value)
    elif isinstance(arg, tuple):
        for item in arg:
            _collect(item, found)
