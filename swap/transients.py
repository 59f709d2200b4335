"""The transients of a training step: every storage that its operations make, and how long it lives.

The step is run under torch's ``FakeTensorMode``, where tensors have shapes and no bytes: nothing
is computed, and a model far larger than this machine is recorded in seconds. A tick is one
operation. What kernels take and give back within themselves is not seen, nor are the storages
that were there before (parameters, buffers, the batch).
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed._tools.mod_tracker import ModTracker
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from offload.allocator.lifetimes import Lifetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Transient:
    """A storage, alive from the tick of its operation until its last holder dropped it.

    Attributes:
        operation: what made it, such as ``aten.mm.default``.
        module: the innermost module that ran, by its path from the outermost one's class; empty
            outside of modules.
        backward: whether it was made in backward, a recomputed forward included.
    """

    nbytes: int
    first_tick: int
    last_tick: int
    operation: str
    module: str
    backward: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTrace:
    """The transients of one step in the order of their making, and its ticks."""

    transients: tuple[Transient, ...]
    ticks: int

    def lifetimes(self, *, align: int = 512) -> list[Lifetime]:
        """For a packing: ``t0`` is the first transient, and so on."""
        return [
            Lifetime(f"t{index}", one.nbytes, one.first_tick, one.last_tick, align)
            for index, one in enumerate(self.transients)
        ]


def record_step(step: Callable[[], object]) -> StepTrace:
    """The transients of ``step``, which runs a forward and a backward.

    Enter ``FakeTensorMode`` around the making of model and batch, and around this call, and
    nothing is computed; without it the step runs as it is. Every operation must run on the
    calling thread, as those of the CPU do, backward's too.
    """
    with ModTracker() as modules:
        recorder = _Recorder(modules)
        try:
            with recorder:
                step()
        finally:
            recorder.look_away()
    return recorder.trace()


class _Recorder(TorchDispatchMode):
    def __init__(self, modules: ModTracker) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._modules = modules
        self._tick = -1
        self._made: list[tuple[int, int, str, str, bool]] = []  # a transient, but for its end
        self._ends: dict[int, int] = {}  # last tick, by index in _made
        self._known: set[int] = set()  # living storages, made before or by the step
        self._watches: list[weakref.finalize[..., Any]] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        del types
        for storage in _storages((args, kwargs)):
            self._watch(storage, None)  # a view or a change of it is nothing new
        result = func(*args, **(kwargs or {}))
        if not (storages := _storages(result)):
            return result  # a question, such as a fake tensor's for its device
        self._tick += 1
        for storage in storages:
            if storage._cdata not in self._known and storage.nbytes():
                self._made.append((storage.nbytes(), self._tick, str(func), *self._where()))
                self._watch(storage, len(self._made) - 1)
        return result

    def _where(self) -> tuple[str, bool]:
        module = max(self._modules.parents - {"Global"}, key=len, default="")
        return module, self._modules.is_bw

    def _watch(self, storage: torch.UntypedStorage, index: int | None) -> None:
        """See when ``storage`` dies: its address names another one then."""
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self._watches.append(weakref.finalize(storage, self._died, storage._cdata, index))

    def _died(self, key: int, index: int | None) -> None:
        self._known.discard(key)
        if index is not None:
            self._ends[index] = self._tick

    def look_away(self) -> None:
        """What dies from now on is not the step's doing."""
        for watch in self._watches:
            watch.detach()

    def trace(self) -> StepTrace:
        """What lives on, such as gradients, lives to the end."""
        return StepTrace(
            transients=tuple(
                Transient(
                    nbytes=nbytes,
                    first_tick=tick,
                    last_tick=self._ends.get(index, self._tick),
                    operation=operation,
                    module=module,
                    backward=backward,
                )
                for index, (nbytes, tick, operation, module, backward) in enumerate(self._made)
            ),
            ticks=self._tick + 1,
        )


def _storages(tree: object) -> list[torch.UntypedStorage]:
    return [
        leaf.untyped_storage()
        for leaf in tree_leaves(tree)
        if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided
    ]
