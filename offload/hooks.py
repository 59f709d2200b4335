"""Hooks on a model: they tell the swappers what is used when, and change nothing else.

[Note: scope] A *pass* is one outermost call of a hooked module. Saved-tensor hooks are active
inside it, so that other models of the same thread are left alone. Modules that run again inside
backward (``torch.utils.checkpoint``) belong to the pass whose backward it is: they fetch weights,
but begin no pass and push no hooks, for checkpoint's own hooks must stay innermost.

Of micro-batches that run in turns, each on a thread of its own, the passes are one: it begins with
the first of them (``in_turns``). Whether a call is an outermost one is known for each thread.
"""

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle  # noqa: TC002 (as all of torch)

from offload.computing import Computing
from offload.hosting import Hosting
from offload.swap.buckets import Form, form_of
from offload.swap.census import uses_rows_only
from offload.swap.looked_up import ask_for_rows
from offload.swap.selective import SavedTensors, put_on, take_off
from offload.swap.uncompiled import uncompiled
from offload.swap.weights import Weight
from offload.swap.window import in_backward
from offload.tiers.mapped import MappedTensor

if TYPE_CHECKING:
    from offload.swap.forward_step import ForwardStep
    from offload.swap.window import Window


def _tables_of(passes: Hosting | Computing) -> dict[nn.Parameter, MappedTensor]:
    """The parameters of which rows are looked up where they are."""
    if isinstance(passes, Computing):
        return {}  # a device has tables whole
    weights = [passes.weights.weights[name] for name in passes.census.lookups]
    return {parameter: weight.mapped for weight in weights for parameter in weight.parameters}


def _hooks_allowed() -> bool:
    """Whether saved-tensor hooks may be pushed here."""
    return bool(torch._C._autograd._saved_tensors_hooks_is_enabled())  # type: ignore[attr-defined]


class _Here(threading.local):
    """How deep this thread is in hooked modules, and whether saved-tensor hooks are on."""

    depth = 0
    pushed = False


class ModelHooks:
    """Installs the hooks of one model; ``remove`` takes them off again.

    Args:
        passes: what they go through, on the CPU or on the device on which the model computes.
        on_pass: called as a pass begins, with the form of its inputs.

    Attributes:
        in_forward: steps weights right before their use; None where nothing does.
    """

    def __init__(
        self,
        model: nn.Module,
        passes: Hosting | Computing,
        on_pass: Callable[[Form], None],
    ) -> None:
        self._computing = passes if isinstance(passes, Computing) else None
        self._weights: Window[Any] = passes.weights
        self._activations = passes.activations
        self._on_pass = on_pass
        self._saved: SavedTensors | None = passes.saved
        self.in_forward: ForwardStep | None = None
        self._here = _Here()
        self._in_turns = False
        self._handles: list[RemovableHandle] = []
        self._running: dict[nn.Module, Callable[[tuple[Any, ...]], object]] = {}
        users = {info.name: info.weights for info in passes.census.modules}
        self._tables = _tables_of(passes)
        for name, module in model.named_modules():
            if name in users or module is model or module._parameters:
                self._hook(name, module, users.get(name, ()))

    def _hook(self, name: str, module: nn.Module, weights: tuple[str, ...]) -> None:
        computing = self._computing
        weight: Any = getattr(module, "weight", None)
        table = self._tables.get(weight) if uses_rows_only(module) else None

        @uncompiled
        def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
            if table is not None:
                ask_for_rows(table, args[0] if args else kwargs.get("input"))
            if self.in_forward is None:
                self._enter(name, (args, kwargs))
                if weights:
                    self._weights.use(weights)
                return
            with self.in_forward.guards.aside():
                self._enter(name, (args, kwargs))
                self.in_forward.need(weights)
                if weights:
                    self._weights.use(weights)
                self.in_forward.go_on()

        @uncompiled
        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            self._leave(output)

        def before_on_device(module: nn.Module, args: Any, kwargs: Any) -> Any:
            assert computing is not None
            with computing.aside():
                before(module, args, kwargs)
                return computing.enter(module, args, kwargs, outermost=self._here.depth == 1)

        def after_on_device(module: nn.Module, args: Any, output: Any) -> None:
            assert computing is not None
            with computing.aside():
                if self._here.depth:
                    computing.leave(module, outermost=self._here.depth == 1)
                after(module, args, output)

        first: Any = before if computing is None else before_on_device
        last: Any = after if computing is None else after_on_device
        self._running[module] = lambda args: first(module, args, {})
        self._handles += [
            # Other hooks of the same module may use its weights: be the first before them.
            module.register_forward_pre_hook(first, prepend=True, with_kwargs=True),
            module.register_forward_hook(last, always_call=True),
        ]

    def watch_backward(self, weight: Weight) -> None:
        """Note when backward has finished with ``weight``."""
        name = weight.name
        for parameter in weight.parameters:
            if parameter.requires_grad:
                self._handles.append(
                    parameter.register_post_accumulate_grad_hook(
                        lambda _parameter: self._weights.touch(name)
                    )
                )

    def _enter(self, name: str, inputs: object) -> None:
        here = self._here
        here.depth += 1
        if here.depth > 1 or in_backward():
            return
        trains = torch.is_grad_enabled()
        form = form_of(inputs, trains=trains)
        if not self._in_turns:
            self._weights.trace.begin((name, trains))
            self._on_pass(form)
            if self._computing is not None:
                self._computing.begin_pass(form)
        # torch.func forbids such hooks inside its transforms: what it saves then stays in memory.
        if trains and _hooks_allowed():
            if not self._in_turns:
                self._activations.begin_pass((name, form.rounded()))
            put_on(self._activations, self._saved)
            here.pushed = True

    @contextmanager
    def in_turns(self, kind: Hashable, uses: Sequence[str], inputs: object) -> Iterator[None]:
        """All passes inside, on whichever thread, are one of ``kind``.

        Args:
            uses: of weights, in the order in which they are expected the first time.
            inputs: of all of them.
        """
        form = form_of(inputs, trains=True)
        self._weights.trace.begin(kind, uses)
        self._on_pass(form)
        self._activations.begin_pass((kind, form.rounded()))
        self._in_turns = True
        try:
            yield
        finally:
            self._in_turns = False

    def join_pass(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """``module`` is already running: its pass begins now, its pre-hooks are made up for."""
        self._running[module](args)

    def _leave(self, output: Any) -> None:
        here = self._here
        if here.depth == 0:
            return  # a global hook failed before ours: this call never entered
        here.depth -= 1
        if here.depth == 0 and self.in_forward is not None:
            self.in_forward.finish()
        if here.depth == 0 and here.pushed:
            here.pushed = False
            take_off()
            self._activations.count_unseen(output)

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
