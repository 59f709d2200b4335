"""A training step as plain records: what it computes, saves, uses and lets go of, in order.

Written by ``tracing``, read by the simulator. Nothing here knows torch. A step is a list of
events; each names a row of one of the program's tables by its number.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal, NamedTuple, TypeAlias

from offload.swap.census import Census, ModuleInfo, WeightInfo
from offload.swap.planning.row_records import RowProgram

OperationKind: TypeAlias = Literal[
    "matmul",  # products of matrices, convolutions
    "attention",  # fused attention
    "pointwise",  # a few operations for each byte: limited by memory
    "heavy",  # exponentials and reductions for each element
    "view",  # moves no byte
]
StateForm: TypeAlias = Literal[
    "plain",  # as the optimizer computes with it
    "bf16",  # the others: float32 for the optimizer; ``rounding``,
    "signed",  # ``eightbit``,
    "unsigned",
    "low",  # ``masters``: the lower half of a bfloat16 weight's master
]


class Product(NamedTuple):
    """A product of two matrices: ``rows`` times ``inner``, and ``inner`` times ``columns``.

    Attributes:
        first_turned: the first one lies in memory by columns; so may the second one.
    """

    rows: int
    inner: int
    columns: int
    first_turned: bool
    second_turned: bool
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One kernel call.

    Attributes:
        name: as torch's dispatcher knows it, such as ``aten.mm``.
        flops: of its matrix products; 0 for other kinds.
        nbytes: read and written.
        rows: the smallest dimension of a matrix product; 0 for other kinds.
        dtype: of what it writes, such as ``float32``.
        causal_keys: of causal attention: keys of the longest row, of whose products with all
            queries ``flops`` counts half; 0 for other kinds.
        product: of two matrices, or of each two of a batch; None for other kinds.
    """

    name: str
    kind: OperationKind
    flops: int
    nbytes: int
    rows: int
    dtype: str
    causal_keys: int = 0
    product: Product | None = None


class What(IntEnum):
    """What an event tells; ``which`` is the row of the table that it names."""

    COMPUTE = 0  # operations: a kernel runs
    USE = 1  # uses: a module, or backward, is about to read these weights
    LOOKUP = 2  # lookups: a few rows of a weight are read where they are
    ALLOCATE = 3  # storages: memory that is not saved by autograd alone
    FREE = 4  # storages: nobody but autograd holds it any more
    SAVE = 5  # storages: autograd saves it, for the first time
    UNSAVE = 6  # storages: backward reads what was saved
    FORGET = 7  # storages: autograd needs it no more
    GRADIENT = 8  # weights: its gradient is complete
    FORWARD = 9  # a pass begins
    STEP = 10  # backward has ended, the optimizer steps
    # Of token-wise recompute (``row_events``); ``which`` of all but the second is a number itself.
    BORROW = 11  # what is rebuilt takes so many bytes more of what saved tensors may, or fewer
    PREFETCH = 12  # prefetches: these saved storages are needed soon, in this order
    RECORD = 13  # so many operations have been recorded
    RETURN = 14  # the outermost module's forward has ended


class Event(NamedTuple):
    """One moment of a step."""

    what: What
    which: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookup:
    """Rows of a weight that are read through its mapping, without a fetch of the whole."""

    weight: str
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepping:
    """What the optimizer keeps and how it steps.

    Attributes:
        name: of its class.
        states_nbytes: in the store, of each per-element state of each weight that it steps.
        fused: one kernel, without temporaries.
        forms: of the states of a weight in the store; all are plain of one that is left out.
        by_tile: weights that are never stepped in memory, whatever the budget.
        state_precision: the setting, as ``master_weights``.
    """

    name: str
    states_nbytes: Mapping[str, tuple[int, ...]]
    fused: bool
    forms: Mapping[str, tuple[StateForm, ...]] = field(default_factory=dict)
    by_tile: frozenset[str] = frozenset()
    state_precision: str = "exact"
    master_weights: str = "none"

    def forms_of(self, name: str) -> tuple[StateForm, ...]:
        """The form of each of its states, in the order of ``states_nbytes``."""
        plain: tuple[StateForm, ...] = ("plain",)
        return self.forms.get(name) or plain * len(self.states_nbytes[name])

    @property
    def is_exact(self) -> bool:
        """Whether nothing is rounded, nor more precise than the weights are."""
        return (self.state_precision, self.master_weights) == ("exact", "none")

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(sum(sizes) for sizes in self.states_nbytes.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """One training step of a model on one batch.

    Attributes:
        census: weights and their users.
        itemsizes: bytes of an element of each weight.
        weight_forms: type and shape of each weight, by which runs of other models are told apart.
        buffers_nbytes: of the model's buffers, which stay in memory.
        tokens: elements of the batch, for rates per token.
        operations: distinct kernel calls.
        storages: bytes of each storage.
        uses: weights that are used at once.
        row_gradients: bytes of the gradients that are made of looked-up rows alone, at most: as if
            no row was looked up twice.
        stepping: the optimizer's part; None where nothing is stepped.
        rows: what of its saved bytes can be rebuilt, where that was asked for.
        prefetches: storages that are needed soon.
    """

    census: Census
    itemsizes: Mapping[str, int]
    buffers_nbytes: int
    tokens: int
    operations: tuple[Operation, ...]
    storages: tuple[int, ...]
    uses: tuple[tuple[str, ...], ...]
    lookups: tuple[Lookup, ...]
    events: tuple[Event, ...]
    stepping: Stepping | None
    row_gradients: Mapping[str, int] = field(default_factory=dict)
    rows: RowProgram | None = None
    prefetches: tuple[tuple[int, ...], ...] = ()
    weight_forms: Mapping[str, str] = field(default_factory=dict)

    @property
    def flops(self) -> int:
        """Of all matrix products of forward and backward."""
        return sum(
            self.operations[event.which].flops
            for event in self.events
            if event.what is What.COMPUTE
        )

    @property
    def products(self) -> tuple[Product, ...]:
        """Distinct products of matrices, in the order of their first use."""
        products = (operation.product for operation in self.operations)
        return tuple(dict.fromkeys(product for product in products if product is not None))

    @property
    def parameters(self) -> int:
        """Elements of all weights."""
        return sum(one.nbytes // self.itemsizes[one.name] for one in self.census.weights)

    @property
    def trainable_nbytes(self) -> int:
        """Bytes of the weights that get a gradient."""
        return sum(weight.nbytes for weight in self.census.weights if weight.trainable)

    @property
    def saved_nbytes(self) -> int:
        """The most that autograd holds at once for backward."""
        return self._most(What.SAVE, What.FORGET)

    @property
    def transient_nbytes(self) -> int:
        """The most that is held at once by others than autograd, gradients included."""
        return self._most(What.ALLOCATE, What.FREE)

    def to_json(self) -> str:
        """The program as one line of JSON."""
        fields = dataclasses.asdict(self)
        for name in ("lookups", "by_rows"):
            fields["census"][name] = sorted(fields["census"][name])
        if self.stepping is not None:
            fields["stepping"]["by_tile"] = sorted(self.stepping.by_tile)
        fields["events"] = [number for event in self.events for number in event]
        return json.dumps(fields)

    @staticmethod
    def from_json(text: str) -> "Program":
        """The program that ``to_json`` wrote."""
        fields = json.loads(text)
        numbers, stepping = iter(fields["events"]), fields["stepping"]
        census = fields["census"]
        return Program(
            census=Census(
                weights=tuple(WeightInfo(**weight) for weight in census["weights"]),
                modules=tuple(
                    ModuleInfo(name=module["name"], weights=tuple(module["weights"]))
                    for module in census["modules"]
                ),
                lookups=frozenset(census["lookups"]),
                by_rows=frozenset(census["by_rows"]),
            ),
            itemsizes=fields["itemsizes"],
            buffers_nbytes=fields["buffers_nbytes"],
            tokens=fields["tokens"],
            operations=tuple(map(_operation, fields["operations"])),
            storages=tuple(fields["storages"]),
            uses=tuple(map(tuple, fields["uses"])),
            lookups=tuple(Lookup(**lookup) for lookup in fields["lookups"]),
            row_gradients=fields["row_gradients"],
            rows=fields["rows"] and RowProgram.from_fields(fields["rows"]),
            prefetches=tuple(map(tuple, fields["prefetches"])),
            weight_forms=fields["weight_forms"],
            events=tuple(
                Event(What(what), which) for what, which in zip(numbers, numbers, strict=True)
            ),
            stepping=stepping
            and Stepping(
                **stepping
                | {
                    "states_nbytes": _tuples(stepping["states_nbytes"]),
                    "forms": _tuples(stepping["forms"]),
                    "by_tile": frozenset(stepping["by_tile"]),
                }
            ),
        )

    def _most(self, more: What, less: What) -> int:
        now = most = 0
        for event in self.events:
            if event.what is more:
                now += self.storages[event.which]
                most = max(most, now)
            elif event.what is less:
                now -= self.storages[event.which]
        return most


def _operation(fields: dict[str, Any]) -> Operation:
    product = fields["product"]
    return Operation(**fields | {"product": product and Product(*product)})


def _tuples(lists: Mapping[str, list[Any]]) -> dict[str, tuple[Any, ...]]:
    return {name: tuple(values) for name, values in lists.items()}
