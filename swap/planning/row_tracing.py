"""Watches the blocks of a step that runs on fake tensors, as token-wise recompute would.

The runtime's own recorder writes down what each block does, and its own analysis says what can be
rebuilt (``tokenwise.record``, ``tokenwise.analyse``). Whether rebuilt rows have the right bits,
which a run looks at before it uses them, no fake tensor tells: all are taken to be right.

[Note: storages that die] A run's recorder pins each storage, so that its address is given to no
other one. Here a pin would keep the storage from being seen to die, and with it from being freed in
the traced program. So the recorder forgets a storage when it dies.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from offload.swap.census import storage_key
from offload.swap.planning.program import Event, What
from offload.swap.planning.row_kinds import kind_of, part_values
from offload.swap.planning.row_records import (
    NOT_COUNTED,
    BlockForward,
    BlockKind,
    Mark,
    Packed,
    RowProgram,
    Saving,
)
from offload.swap.tokenwise.analyse import Chain, find_chain
from offload.swap.tokenwise.blocks import find_blocks
from offload.swap.tokenwise.plans import why_whole
from offload.swap.tokenwise.program import Program  # noqa: TC001 (as all of ours)
from offload.swap.tokenwise.record import PLAIN, Recorder


class Traced(Protocol):
    """What the watch asks of the tracer."""

    @property
    def events(self) -> Sequence[Event]:
        """What was seen so far."""

    @property
    def names(self) -> Mapping[int, str]:
        """Of weights, by storage."""

    def number_of(self, storage: int) -> int | None:
        """Of a storage that is counted, by its key."""

    def takes_saved(self) -> bool:
        """Whether autograd hands what it saves to the tracer now."""


class _Recorder(Recorder):
    """Records fake tensors: [Note: storages that die].

    Attributes:
        numbers: of each storage, as the tracer counts it.
        operations: of each node, as the tracer counts them.
        packs: of each tensor that was saved: events, and values that were known, before it.
    """

    readable = (*PLAIN, FakeTensor)

    def __init__(self, traced: Traced, rows: int, weights: Mapping[int, str]) -> None:
        super().__init__(rows, weights)
        self._traced = traced
        self.muted = False
        self.numbers: list[int] = []
        self.operations: list[int] = []
        self.packs: list[tuple[int, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Execute ``func`` and take note of it, unless nobody computes it."""
        if self.muted or func.namespace == "prim":
            return func(*args, **(kwargs or {}))
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.operations.append(
            next(e.which for e in reversed(self._traced.events) if e.what is What.COMPUTE)
        )
        return result

    def pin(self, storage: torch.UntypedStorage) -> object:
        """Nothing: the storage is forgotten when it dies."""
        key = storage._cdata
        number = self._traced.number_of(key)
        self.numbers.append(NOT_COUNTED if number is None else number)
        weakref.finalize(storage, self._bytes.pop, key, None).atexit = False
        return None

    def take(self, tensor: torch.Tensor) -> None:
        """Autograd saves ``tensor``."""
        self.saved(tensor)
        self.packs.append((len(self._traced.events), len(self._values)))


@dataclass(slots=True)
class _Running:
    block: str
    module: nn.Module
    begin: int
    recorder: _Recorder
    forward: int


class BlockWatch:
    """Sees what the blocks of a model do in one step.

    Args:
        min_nbytes: smaller storages are not rebuilt.
    """

    def __init__(self, model: nn.Module, traced: Traced, *, min_nbytes: int) -> None:
        self._blocks = find_blocks(model)
        self._traced = traced
        self._min_nbytes = min_nbytes
        self._running: _Running | None = None
        self._chains: dict[Program, tuple[int, Chain]] = {}
        self._short: dict[int, int] = {}  # by rows: the kind of blocks with too few
        self._kinds: list[BlockKind] = []
        self._forwards: list[BlockForward] = []
        self._savings: dict[Saving, int] = {}
        self._marks: list[Mark] = []

    def hooks(self) -> Iterator[Any]:
        """See forwards of blocks until these are removed."""
        for name, module in self._blocks.items():
            yield module.register_forward_pre_hook(self._before(name), with_kwargs=True)
            yield module.register_forward_hook(self._after, always_call=True)

    @contextmanager
    def packing(self, tensor: torch.Tensor) -> Iterator[int]:
        """Autograd saves ``tensor``: the forward of the block that does it, or -1.

        What happens meanwhile is no operation of the block.
        """
        running = self._running
        if running is None:
            yield -1
            return
        running.recorder.muted = True
        try:
            running.recorder.take(tensor)
            yield running.forward
        finally:
            running.recorder.muted = False

    def mark(self, what: What, saving: Saving) -> None:
        """Something happens to ``saving`` now."""
        number = self._savings.setdefault(saving, len(self._savings))
        self._marks.append(Mark(len(self._traced.events), int(what), number))

    def program(self) -> RowProgram:
        """All that was seen."""
        return RowProgram(
            blocks=len(self._blocks),
            kinds=tuple(self._kinds),
            forwards=tuple(self._forwards),
            savings=tuple(self._savings),
            marks=tuple(self._marks),
        )

    def _before(self, block: str) -> Callable[..., None]:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self._running is not None or not self._traced.takes_saved():
                return
            inputs = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
            hidden = next((one for one in inputs if one.is_floating_point() and one.ndim > 1), None)
            if hidden is None:
                return
            rows, begin = int(hidden.shape[-2]), len(self._traced.events)
            if (why := why_whole(rows, "auto")) is not None:
                kind = self._short.setdefault(rows, len(self._kinds))
                if kind == len(self._kinds):
                    self._kinds.append(BlockKind(rows=rows, why=why))
                self._forwards.append(BlockForward(block=block, kind=kind, begin=begin, end=begin))
                return
            named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            weights = {storage_key(tensor): name for name, tensor in named.items()}
            recorder = _Recorder(self._traced, rows, weights)
            self._running = _Running(block, module, begin, recorder, len(self._forwards))
            recorder.__enter__()  # type: ignore[no-untyped-call]

        return before

    def _after(self, module: nn.Module, _arguments: Any, output: Any) -> None:
        running = self._running
        if running is None or running.module is not module:
            return
        self._running = None
        running.recorder.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        if output is not None:  # else it raised
            self._forwards.append(self._forward_of(running))

    def _forward_of(self, running: _Running) -> BlockForward:
        recorder, program = running.recorder, running.recorder.program()
        if program not in self._chains:
            chain = find_chain(program, min_nbytes=self._min_nbytes)
            self._chains[program] = len(self._kinds), chain
            self._kinds.append(kind_of(chain, recorder.operations))
        kind, chain = self._chains[program]
        named = dict(running.module.named_parameters())
        end = len(self._traced.events)

        def names(values: Sequence[int]) -> tuple[str, ...]:
            inner = dict.fromkeys(program.values[value].name for value in values)
            tensors = [named[name] for name in inner if name in named]
            return tuple(dict.fromkeys(self._traced.names[storage_key(one)] for one in tensors))

        def packed(values: Sequence[int]) -> tuple[Packed, ...]:
            """When each would be given in charge: with the next tensor that is saved."""
            found = []
            for value in values:
                number = recorder.numbers[program.values[value].storage]
                at = next((at for at, known in recorder.packs if known > value), end)
                freed = Event(What.FREE, number)  # else: it is held until then
                before = range(running.begin, at)
                at = next((at for at in before if self._traced.events[at] == freed), at)
                found.append(Packed(number, at))
            return tuple(found)

        return BlockForward(
            block=running.block,
            kind=kind,
            begin=running.begin,
            end=end,
            targets=tuple(recorder.numbers[target.storage] for target in chain.targets),
            sources=packed(chain.sources),
            externals=packed(
                [at for at, value in enumerate(program.values) if value.kind == "external"]
            ),
            weights=tuple(map(names, part_values(chain))),
        )
