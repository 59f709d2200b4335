"""Records what a block's forward executes, and compares it with what it executed before.

[Note: recorded every time] The mode is active in every forward, not only in the first one: a
chain is rebuilt in backward only if this very forward has executed it, operation by operation
and constant by constant. So control flow that changes, a scale that a schedule moves, a shape of
another batch are noticed where they happen, and what follows is swapped whole. A tensor that is
saved was made by operations that came before: agreeing so far is all that its chain needs.

[Note: identity of storages] A tensor is known by its storage and its geometry. A storage's
address may be used again once it is freed, so a weak reference pins each one that was seen; it
keeps the descriptor, not the bytes.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from offload.swap.tokenwise.program import Node, Program, Ref, Slot, Value

_Geometry: TypeAlias = tuple[int, tuple[int, ...], tuple[int, ...], Any]


PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
"""Types of tensors that are no more than a view of a storage."""


@dataclass(frozen=True, slots=True)
class _Schema:
    """What is asked of an operation at each call."""

    name: str
    mutated: tuple[int | str, ...]
    draws: bool


_schemas: dict[OpOverload, _Schema] = {}


def _schema_of(func: OpOverload) -> _Schema:
    found = _schemas.get(func)
    if found is None:
        mutated = tuple(
            argument.name if argument.kwarg_only else position
            for position, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        )
        draws = torch.Tag.nondeterministic_seeded in func.tags
        found = _schemas[func] = _Schema(str(func), mutated, draws)
    return found


class _Bytes:
    """A storage within one forward."""

    __slots__ = ("index", "pin", "root", "views")

    def __init__(self, index: int, pin: object) -> None:
        self.index = index
        self.pin = pin  # [Note: identity of storages]
        self.root: int | None = None
        self.views: dict[_Geometry, int] = {}


class Recorder(TorchDispatchMode):
    """Turns one forward into a ``Program``.

    Args:
        rows: tokens of one sequence.
        weights: name of the parameter or buffer behind a storage (by ``_cdata``).
        expected: what earlier forwards executed; ``diverged`` tells the first difference.
        wanted: values that ``on_wanted`` is given as soon as they exist; ``None``: every
            tensor that comes from outside.

    Attributes:
        own_s: time that recording itself has taken, where ``clock`` was given to measure it.
        readable: types of tensors that are no more than a view of a storage.
    """

    readable: tuple[type, ...] = PLAIN

    def __init__(
        self,
        rows: int,
        weights: Mapping[int, str],
        expected: Program | None = None,
        wanted: frozenset[int] | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.own_s = 0.0
        self._clock = clock
        self.diverged: str | None = None
        self._rows = rows
        self._weights = weights
        self._expected = expected
        self._wanted = wanted
        self.on_wanted: Callable[[int, torch.Tensor], None] | None = None
        self._values: list[Value] = []
        self._nodes: list[Node] = []
        self._slots: list[Slot] = []
        self._bytes: dict[int, _Bytes] = {}
        self._storage_nbytes: list[int] = []
        self._unreadable = False  # the node takes or makes a tensor that has no plain storage

    def program(self) -> Program:
        """What was recorded so far."""
        return Program(
            rows=self._rows,
            values=tuple(self._values),
            nodes=tuple(self._nodes),
            slots=tuple(self._slots),
            storage_nbytes=tuple(self._storage_nbytes),
        )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Execute ``func`` and take note of it."""
        kwargs = kwargs or {}
        began_s = self._clock() if self._clock is not None else 0.0
        schema = _schema_of(func)
        first_new = len(self._values)
        self._unreadable = False
        noted = tuple(map(self._note, args))
        noted_kwargs = tuple((name, self._note(value)) for name, value in kwargs.items())
        func_s = self._clock() if self._clock is not None else 0.0
        result = func(*args, **kwargs)
        if self._clock is not None:
            began_s += self._clock() - func_s
        index = len(self._nodes)
        outs: list[int] = []
        mutated = self._mutated(schema, noted, dict(noted_kwargs))
        if not mutated:
            self._note_results(result, index, outs)
        for position, value in zip(schema.mutated, mutated, strict=False):
            changed = kwargs[position] if isinstance(position, str) else args[position]
            outs.append(self._overwritten(changed, value, index))
        name = f"unreadable.{schema.name}" if self._unreadable else schema.name
        self._nodes.append(Node(name, noted, noted_kwargs, tuple(outs), mutated, schema.draws))
        self._compare(first_new)
        if self._clock is not None:
            self.own_s += self._clock() - began_s
        return result

    def value(self, index: int) -> Value:
        """A value that was recorded."""
        return self._values[index]

    def saved(self, tensor: torch.Tensor) -> Slot:
        """Autograd saves ``tensor``."""
        storage = tensor.untyped_storage()
        known = self._bytes.get(storage._cdata)
        if known is None:
            self._external(tensor)
            known = self._bytes[storage._cdata]
        offset, shape, stride, dtype = _geometry(tensor)
        slot = Slot(known.index, shape, stride, offset, dtype, known.root, len(self._nodes))
        self._slots.append(slot)
        if self._expected is not None and self.diverged is None:
            position = len(self._slots) - 1
            if (
                position >= len(self._expected.slots)
                or self._expected.slots[position] != slot
                or self._expected.storage_nbytes[slot.storage] != storage.nbytes()
            ):
                self.diverged = f"saved tensor {position} is not the one of earlier forwards"
        return slot

    def finish(self) -> None:
        """The forward is over: the expected program must be, too."""
        expected = self._expected
        if expected is None or self.diverged is not None:
            return
        if len(self._nodes) != len(expected.nodes) or len(self._slots) != len(expected.slots):
            self.diverged = "it ended earlier than in earlier forwards"

    def _compare(self, first_new: int) -> None:
        expected = self._expected
        if expected is None or self.diverged is not None:
            return
        index = len(self._nodes) - 1
        node = self._nodes[index]
        if (
            index >= len(expected.nodes)
            or expected.nodes[index] != node
            or expected.values[first_new : len(self._values)] != tuple(self._values[first_new:])
        ):
            before = expected.nodes[index].op if index < len(expected.nodes) else "nothing"
            self.diverged = f"operation {index} was {node.op}, in earlier forwards {before}"

    def _mutated(
        self, schema: _Schema, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[int, ...]:
        found = [
            kwargs.get(position)
            if isinstance(position, str)
            else args[position]
            if position < len(args)
            else None
            for position in schema.mutated
        ]
        return tuple(ref.value for ref in found if isinstance(ref, Ref))

    def _note(self, arg: Any) -> Any:
        if isinstance(arg, torch.Tensor):
            return Ref(self._value_of(arg)) if self._readable(arg) else None
        if isinstance(arg, list | tuple):
            return tuple(map(self._note, arg))
        return arg

    def _note_results(self, result: Any, node: int, outs: list[int]) -> None:
        if isinstance(result, torch.Tensor):
            if self._readable(result):
                outs.append(self._made(result, node))
        elif isinstance(result, list | tuple):
            for item in result:
                self._note_results(item, node, outs)

    def _readable(self, tensor: torch.Tensor) -> bool:
        plain = type(tensor) in self.readable and tensor.layout is torch.strided
        self._unreadable = self._unreadable or not plain
        return plain

    def _value_of(self, tensor: torch.Tensor) -> int:
        known = self._bytes.get(tensor.untyped_storage()._cdata)
        if known is not None:
            value = known.views.get(_geometry(tensor))
            if value is not None:
                return value
        return self._external(tensor)

    def _external(self, tensor: torch.Tensor) -> int:
        """A tensor that no recorded operation has made."""
        storage = tensor.untyped_storage()
        name = self._weights.get(storage._cdata)
        known = self._bytes.get(storage._cdata)
        kind: Any = "unknown" if known is not None and known.root is not None else "external"
        if name is not None and tensor.numel() * tensor.element_size() == storage.nbytes():
            kind = "parameter"
        known = known or self._new_bytes(storage)
        value = self._new_value(tensor, kind, known, None, name)
        if kind == "external":
            self._tell(value, tensor, always=self._wanted is None)
        return value

    def _made(self, tensor: torch.Tensor, node: int) -> int:
        storage = tensor.untyped_storage()
        known = self._bytes.get(storage._cdata)
        fresh = known is None
        known = known or self._new_bytes(storage)
        value = self._new_value(tensor, "made", known, node, None)
        if fresh and math.prod(tensor.shape) * tensor.element_size() == storage.nbytes():
            known.root = value
        self._tell(value, tensor)
        return value

    def _overwritten(self, tensor: torch.Tensor, old: int, node: int) -> int:
        """``tensor`` was changed in place: other views of its bytes are not known any more."""
        known = self._bytes[tensor.untyped_storage()._cdata]
        before = self._values[old]
        whole = known.root is not None and _same_place(self._values[known.root], before)
        known.views.clear()
        value = self._new_value(tensor, "made", known, node, None)
        known.root = value if whole else None
        self._tell(value, tensor)
        return value

    def _tell(self, value: int, tensor: torch.Tensor, *, always: bool = False) -> None:
        wanted = always or (self._wanted is not None and value in self._wanted)
        if wanted and self.diverged is None and self.on_wanted is not None:
            self.on_wanted(value, tensor)

    def _new_bytes(self, storage: torch.UntypedStorage) -> _Bytes:
        known = _Bytes(len(self._storage_nbytes), self.pin(storage))
        self._bytes[storage._cdata] = known
        self._storage_nbytes.append(storage.nbytes())
        return known

    def pin(self, storage: torch.UntypedStorage) -> object:
        """Keeps its address from being given to another one: [Note: identity of storages]."""
        return StorageWeakRef(storage)

    def _new_value(
        self, tensor: torch.Tensor, kind: Any, known: _Bytes, node: int | None, name: str | None
    ) -> int:
        geometry = _geometry(tensor)
        offset, shape, stride, dtype = geometry
        index = len(self._values)
        self._values.append(
            Value(
                kind, known.index, shape, stride, offset, dtype, tensor.element_size(), node, name
            )
        )
        known.views[geometry] = index
        return index


def _geometry(tensor: torch.Tensor) -> _Geometry:
    return int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _same_place(one: Value, other: Value) -> bool:
    return (one.offset, one.shape, one.stride, one.dtype) == (
        other.offset,
        other.shape,
        other.stride,
        other.dtype,
    )
