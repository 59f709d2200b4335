"""What a training step does, found out without running it.

[Note: fake run] The step runs on fake tensors: torch's own rules for shapes, types and storages,
no bytes, no arithmetic. A dispatch mode below autograd sees each kernel call, weak references tell
when a storage dies, and saved-tensor hooks tell what autograd saves. The hooks give nothing but a
handle to autograd, so that a storage which only autograd would hold dies at once: the program tells
apart what must be in memory and what swapping may move. What backward reads comes back as a
stand-in, which is not counted: its bytes are those of the saved storage.

The rules by which saved tensors are moved or left alone are those of ``activations``: what is saved
outside of the model's calls, such as by a loss that the script computes, stays where it is.
"""

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from offload.allocator.errors import UnsupportedError
from offload.swap.activations import LEAST_NBYTES, is_small_slice
from offload.swap.census import (
    named_weights,
    storage_key,
    take_census,
    uses_rows_only,
    weight_forms,
)
from offload.swap.planning.kernels import describe, tensors_of
from offload.swap.planning.lookups import Tables
from offload.swap.planning.program import Event, Lookup, Operation, Program, What
from offload.swap.planning.row_records import Saving
from offload.swap.planning.row_tracing import BlockWatch
from offload.swap.planning.saved_handle import SavedHandle
from offload.swap.planning.stepping import stepping_of
from offload.swap.planning.traced_storages import TracedStorages
from offload.swap.state_precision import EXACT, Precision
from offload.swap.tokenwise.unwatched import takes_saved

# What torch raises where a fake tensor is asked for its values.
ON_VALUES = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    GuardOnDataDependentSymNode,
)


def _drop(_record: logging.LogRecord) -> bool:
    """Torch logs what it then raises."""
    return False


def fake_mode() -> FakeTensorMode:
    """The mode in which a model is built and its step traced; real tensors may be mixed in."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def trace_step(
    model: nn.Module,
    loss_of: Callable[[nn.Module], torch.Tensor],
    *,
    tokens: int,
    optimizer: Optimizer | None,
    precision: Precision = EXACT,
    rebuild_nbytes: int | None = None,
) -> Program:
    """The program of one step of ``model``, which was built under ``fake_mode``.

    Call it under that mode.

    Args:
        loss_of: a forward, up to the loss.
        tokens: elements of the batch.
        precision: of what the optimizer keeps.
        rebuild_nbytes: as of ``Tracer``.

    Raises:
        UnsupportedError: what the model does depends on values, which a fake run has not.
    """
    tracer = Tracer(model, rebuild_nbytes=rebuild_nbytes)
    with tracer.running():
        loss = loss_of(model)
        tracer.backward(loss.backward)
    return tracer.program(tokens, optimizer, precision)


class Tracer(TorchDispatchMode):
    """Writes down what a step does while it runs on fake tensors; see [Note: fake run].

    Args:
        rebuild_nbytes: blocks are watched, too: what token-wise recompute would rebuild of saved
            storages that are no smaller. None: they are not.
    """

    MEND = "give --dtype bfloat16, or run it with a first budget and read its report"

    def __init__(self, model: nn.Module, *, rebuild_nbytes: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model = model
        self.census = take_census(model)
        self._events: list[Event] = []
        self._operations: dict[Operation, int] = {}
        self._uses: dict[tuple[str, ...], int] = {}
        self._lookups: dict[Lookup, int] = {}
        self._storages = TracedStorages([*model.parameters(), *model.buffers()], self._note)
        self._numbers = {weight.name: at for at, weight in enumerate(self.census.weights)}
        self._names = {
            storage_key(parameter): name
            for name, parameters in named_weights(model)
            for parameter in parameters
        }
        self._saved: Counter[int] = Counter()  # handles that live, by storage
        self._savings: Counter[Saving] = Counter()  # and by the block that saves it
        self._tables = Tables(model)
        self._row_gradients: Counter[str] = Counter()
        self._muted = False
        self._depth = 0  # of hooked modules, as ``hooks`` counts it
        self._watch = (
            None if rebuild_nbytes is None else BlockWatch(model, self, min_nbytes=rebuild_nbytes)
        )

    # What the watch asks.

    @property
    def events(self) -> Sequence[Event]:
        """What was seen so far."""
        return self._events

    @property
    def names(self) -> Mapping[int, str]:
        """Of weights, by storage."""
        return self._names

    def number_of(self, storage: int) -> int | None:
        """Of a storage that is counted, by its key."""
        return self._storages.number_of(storage)

    def takes_saved(self) -> bool:
        """Whether autograd hands what it saves to this object, outside of backward."""
        return takes_saved(self._pack)

    # While the step runs.

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watch the model, what autograd saves, and every kernel.

        Raises:
            UnsupportedError: as ``trace_step``.
        """
        with ExitStack() as stack:
            for handle in self._hooks():
                stack.callback(handle.remove)
            stack.enter_context(self)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack))
            logging.getLogger(fake_tensor.__name__).addFilter(_drop)
            stack.callback(logging.getLogger(fake_tensor.__name__).removeFilter, _drop)
            try:
                yield
            except ON_VALUES as error:
                raise self.needs_values(error) from error
            except (RuntimeError, NotImplementedError) as error:
                raise UnsupportedError(
                    f"{type(self._model).__name__} can't be planned: torch refuses a step of it "
                    f"({error}). If a real run of it does not fail, {self.MEND}"
                ) from error

    def needs_values(self, error: BaseException) -> UnsupportedError:
        """What to raise for one of ``ON_VALUES``."""
        return UnsupportedError(
            f"what {type(self._model).__name__} computes depends on the values of its "
            f"tensors ({error}), which planning does not have: run it with a first budget "
            "and read its report"
        )

    def backward(self, run: Callable[[], None]) -> None:
        """Let backward ``run``; the step ends with it."""
        run()
        self._note(What.STEP, 0)

    def join_forward(self) -> None:
        """The model's own forward has begun before its hooks stood: make up for them."""
        self._enter(self._model, ())
        self._on_forward(self._model, ())
        for info in self.census.modules:
            if not info.name:
                self._use(info.weights)

    def _hooks(self) -> Iterator[Any]:
        if self._watch is not None:
            yield from self._watch.hooks()
        users = {info.name: info.weights for info in self.census.modules}
        for name, module in self._model.named_modules():
            if name in users or module is self._model or module._parameters:
                yield module.register_forward_pre_hook(self._enter, prepend=True)
                yield module.register_forward_hook(self._leave, always_call=True)
            if module is self._model:
                yield module.register_forward_pre_hook(self._on_forward, prepend=True)
            if weights := users.get(name):
                yield module.register_forward_pre_hook(self._on_use(weights), prepend=True)
            elif uses_rows_only(module):
                yield module.register_forward_pre_hook(self._on_lookup(module), prepend=True)
        for name, parameters in named_weights(self._model):
            for parameter in parameters:
                if parameter.requires_grad:
                    yield parameter.register_post_accumulate_grad_hook(self._on_gradient(name))

    def _enter(self, _module: nn.Module, _arguments: Any) -> None:
        self._depth += 1

    def _leave(self, _module: nn.Module, _arguments: Any, _output: Any) -> None:
        self._depth -= 1
        if not self._depth:
            self._note(What.RETURN, 0)

    def _on_forward(self, _module: nn.Module, _arguments: Any) -> None:
        self._note(What.FORWARD, 0)

    def _on_use(self, weights: tuple[str, ...]) -> Callable[[nn.Module, Any], None]:
        def use(_module: nn.Module, _arguments: Any) -> None:
            self._use(weights)

        return use

    def _use(self, weights: tuple[str, ...]) -> None:
        self._note(What.USE, self._uses.setdefault(weights, len(self._uses)))

    def _on_lookup(self, module: nn.Module) -> Callable[[nn.Module, Any], None]:
        weight = next(iter(module._parameters.values()))
        assert weight is not None

        def look_up(_module: nn.Module, arguments: Sequence[Any]) -> None:
            indices = tensors_of(arguments)
            rows = indices[0].numel() if indices else 0
            lookup = Lookup(weight=self._names[storage_key(weight)], rows=rows)
            self._note(What.LOOKUP, self._lookups.setdefault(lookup, len(self._lookups)))

        return look_up

    def _on_gradient(self, name: str) -> Callable[[torch.Tensor], None]:
        def take(parameter: torch.Tensor) -> None:
            parameter.grad = None  # its memory is counted as the gradient's from now on
            self._note(What.GRADIENT, self._numbers[name])

        return take

    def _note(self, what: What, which: int) -> None:
        self._events.append(Event(what, which))

    # Kernels and storages.

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run ``func`` and write it down."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if self._muted or func.namespace == "prim":
            return output
        operation = describe(func, args, kwargs, output)
        rows = self._tables.rows_of(func, args)
        if rows is not None:
            self._storages.meet_rows(output, rows.nbytes)
            operation = replace(operation, nbytes=2 * rows.nbytes)
            if rows.weight in self.census.by_rows:
                self._row_gradients[rows.weight] += rows.nbytes
        elif func is torch.ops.aten.add.Tensor:
            self._storages.meet_sum(output, args)
        for tensor in tensors_of([output]):
            self._storages.meet(tensor)
        self._note(What.COMPUTE, self._operations.setdefault(operation, len(self._operations)))
        return output

    # What autograd saves.

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | SavedHandle:
        if self._watch is None:
            return self._handle_of(tensor, forward=-1)
        with self._watch.packing(tensor) as forward:
            return self._handle_of(tensor, forward)

    def _handle_of(self, tensor: torch.Tensor, forward: int) -> torch.Tensor | SavedHandle:
        storage = tensor.untyped_storage()
        name = self._names.get(storage._cdata)
        if name is not None:
            return SavedHandle(tensor, weight=name)
        # What was there before the step, such as a batch, is not known yet.
        self._storages.meet(tensor)
        number = self._storages.number_of(storage._cdata)
        if (
            not self._depth
            or number is None
            or storage.nbytes() < LEAST_NBYTES
            or is_small_slice(tensor, storage.nbytes())
        ):
            return tensor
        saving = Saving(number, forward)
        if not self._savings[saving]:
            self._mark(What.SAVE, saving)
        if not self._saved[number]:
            self._note(What.SAVE, number)
        self._savings[saving] += 1
        self._saved[number] += 1
        handle = SavedHandle(tensor, saving=saving)
        weakref.finalize(handle, self._forget, saving).atexit = False
        return handle

    def _mark(self, what: What, saving: Saving) -> None:
        if self._watch is not None:
            self._watch.mark(what, saving)

    def _forget(self, saving: Saving) -> None:
        number = saving.storage
        self._savings[saving] -= 1
        self._saved[number] -= 1
        if not self._savings[saving]:
            self._mark(What.FORGET, saving)
        if not self._saved[number]:
            self._note(What.FORGET, number)

    def _unpack(self, saved: torch.Tensor | SavedHandle) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        if saved.weight is not None:
            self._use((saved.weight,))
            assert saved.tensor is not None
            return saved.tensor
        assert saved.saving is not None
        self._mark(What.UNSAVE, saved.saving)
        self._note(What.UNSAVE, saved.saving.storage)
        return self._stand_in(saved)

    def _stand_in(self, saved: SavedHandle) -> torch.Tensor:
        self._muted = True
        try:
            tensor = saved.stand_in()
        finally:
            self._muted = False
        self._storages.ignore(tensor.untyped_storage())
        return tensor

    # What it was.

    def program(
        self, tokens: int, optimizer: Optimizer | None, precision: Precision = EXACT
    ) -> Program:
        """All that was seen; what the user's code still holds, it lets go of behind the step."""
        return Program(
            census=self.census,
            itemsizes={
                name: parameters[0].itemsize for name, parameters in named_weights(self._model)
            },
            buffers_nbytes=sum(buffer.nbytes for buffer in self._model.buffers()),
            tokens=tokens,
            operations=tuple(self._operations),
            storages=self._storages.nbytes,
            uses=tuple(self._uses),
            lookups=tuple(self._lookups),
            events=(*self._events, *(Event(What.FREE, number) for number in self._storages.living)),
            stepping=None if optimizer is None else stepping_of(self._model, optimizer, precision),
            row_gradients=dict(self._row_gradients),
            rows=None if self._watch is None else self._watch.program(),
            weight_forms=weight_forms(self._model),
        )
