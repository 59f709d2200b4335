"""The gradient of a lookup is the rows that were looked up; its table is never made in memory.

[Note: rows, exactly] In the backward of an embedding torch adds each token's gradient to its row
of a table of zeros, in the order of the tokens. Here the same kernel gets a table of nothing but
the rows that were looked up: the same additions in the same order, so the same bits. They travel
through autograd as a sparse tensor, so that torch itself adds them to those of other uses of the
weight (a tied head, a second lookup), when and in the order in which it would have added tables.
Just before torch accumulates the sum, it is accumulated here, and torch gets nothing to add:

* without a gradient so far, the gradient's home in scratch becomes it: cleared by extents, its rows
  written through the mapping, a shard at a time;
* to a gradient that is at home the rows are added there, a shard at a time;
* to a gradient in memory they are added there.

So hooks, loggers and the optimizer see a dense ``p.grad`` as ever, and memory holds no more than
what the layers behind the lookup gave for its tokens.

[Note: zeros have signs] A dense gradient of a lookup is +0 in all other rows, and is never -0: sums
that begin with +0 never become it. What it is added to therefore loses each -0, and no more, as by
adding 0.0. That is done to whatever rows are added to.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils.hooks import RemovableHandle  # noqa: TC002 (as all of torch)

from offload.allocator.units import format_nbytes
from offload.swap.census import gives_rows, uses_rows_only
from offload.swap.gradients import GradientSwapper
from offload.swap.parts import looks_away
from offload.swap.uncompiled import uncompiled
from offload.tiers.journal import Journal
from offload.tiers.mapped import MappedTensor

_SHARD_NBYTES = 8 << 20  # of pages that one shard of rows may bring into memory
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FAULT_NBYTES = 64 << 10  # what the kernel maps around a page that is read, if it is cached


class _Lookup(torch.autograd.Function):
    """Hands on what was looked up; its backward gives rows, or what torch's would."""

    @staticmethod
    def forward(
        ctx: Any,
        _weight: torch.Tensor,
        looked_up: torch.Tensor,
        indices: torch.Tensor,
        table: "_Table",
        padding: int,
        scaled: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(indices)
        ctx.table, ctx.padding, ctx.scaled = table, padding, scaled
        ctx.mark_dirty(looked_up)  # that is: the result, and no view of anything
        return looked_up

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,), (indices,), table = gradients, ctx.saved_tensors, ctx.table
        if table.wants_rows():
            found = table.note(rows_of(gradient, indices, ctx.padding, scaled=ctx.scaled))
        else:
            found = torch.ops.aten.embedding_backward(
                gradient, indices, len(table.parameter), ctx.padding, ctx.scaled, False
            )
        return found, None, None, None, None, None


def rows_of(
    gradient: torch.Tensor, indices: torch.Tensor, padding: int, *, scaled: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows that ``indices`` name, ascending, and the gradient of each.

    Args:
        gradient: of what was looked up, (..., width) beside ``indices``, (...).
        padding: the row that gets no gradient; -1 for none.
        scaled: each row's gradient is divided by how often it was looked up.

    Returns:
        int64 of (rows,), and (rows, width): bit for bit these rows of torch's dense gradient.
    """
    rows, places = torch.unique(indices, return_inverse=True)
    if not len(rows):
        return rows.long(), gradient.new_zeros(0, gradient.shape[-1])
    padded = (rows == padding).nonzero()
    values = torch.ops.aten.embedding_dense_backward(
        gradient, places, len(rows), int(padded[0]) if len(padded) else -1, scaled
    )
    return rows.long(), values


@dataclass(slots=True, eq=False)
class _Table:
    """A parameter that modules look rows up in, and the node that accumulates its gradient."""

    parameter: nn.Parameter
    accumulator: Node
    # The backward passes, which may run in turns, in which rows are on their way to it.
    tasks: set[int] = field(default_factory=set)

    def wants_rows(self) -> bool:
        """Whether the backward that runs now accumulates into ``parameter``, unseen by others.

        Otherwise someone gets to see the gradient itself, which is to be the usual dense one.
        """
        hooks = self.parameter._backward_hooks or {}
        if torch.is_grad_enabled() or not all(map(looks_away, hooks.values())):
            return False
        try:
            return bool(torch._C._will_engine_execute_node(self.accumulator))
        except RuntimeError:  # torch.autograd.grad asks for it
            return False

    def note(self, found: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """The rows as autograd can add them to others."""
        self.tasks.add(torch._C._current_graph_task_id())
        return _sparse(*found, self.parameter.shape)

    def take_note(self) -> bool:
        """Whether rows came in this backward; once."""
        task = torch._C._current_graph_task_id()
        came = task in self.tasks
        self.tasks.discard(task)
        return came


class RowGradients:
    """Has the lookups of a model give rows; called on the training thread only.

    Args:
        gradients: watches the parameters already.
        journal: is told which large tables get a whole gradient in memory, and why.
    """

    def __init__(self, model: nn.Module, gradients: GradientSwapper, journal: Journal) -> None:
        self._gradients = gradients
        self._tables: dict[nn.Parameter, _Table] = {}
        self._handles: list[RemovableHandle] = []
        lookups = [
            (name, module)
            for name, module in model.named_modules()
            if uses_rows_only(module) and gradients.watches(module.weight)
        ]
        # Rows that the user asked for come as they are; torch doesn't sum them up before.
        sparse = {module.weight for _, module in lookups if module.sparse}
        for name, module in lookups:
            weight = module.weight
            if weight in sparse:
                continue
            if gives_rows(module) and weight.is_floating_point():
                self._watch(module, weight)
            else:
                journal.notice(
                    name,
                    f"its gradient of {format_nbytes(weight.nbytes)} is made whole in memory: "
                    f"only a plain torch.nn.Embedding gives rows, this is {_describe(module)}",
                )

    def _watch(self, module: nn.Module, weight: nn.Parameter) -> None:
        table = self._tables.get(weight)
        if table is None:
            accumulator = get_gradient_edge(weight).node
            table = self._tables[weight] = _Table(weight, accumulator)

            def before_accumulation(sums: Sequence[torch.Tensor | None]) -> Any:
                return self._before_accumulation(table, sums[0])

            self._handles.append(accumulator.register_prehook(before_accumulation))

        @uncompiled
        def after(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            indices = args[0] if args else kwargs["input"]
            if not _is_plain_lookup(output, indices, table):
                return output
            padding = -1 if module.padding_idx is None else module.padding_idx
            return _Lookup.apply(  # type: ignore[no-untyped-call]
                weight, output.detach(), indices, table, padding, module.scale_grad_by_freq
            )

        # The first of all, before others change the output or take the saved-tensor hooks off.
        self._handles.append(module.register_forward_hook(after, prepend=True, with_kwargs=True))

    def _before_accumulation(
        self, table: _Table, total: torch.Tensor | None
    ) -> tuple[torch.Tensor] | None:
        """Accumulate rows, so that torch has nothing left to accumulate."""
        if not table.take_note() or total is None:
            return None
        if total.layout is torch.strided:  # whole gradients came, too: the sum is of our own
            total.add_(0.0)  # [Note: zeros have signs]
            return None
        self._place(table.parameter, total)
        return (_sparse(total._indices()[0, :0], total._values()[:0], total.shape),)  # nothing

    def _place(self, parameter: nn.Parameter, total: torch.Tensor) -> None:
        """Do what torch would do with the dense ``total``."""
        gradients = self._gradients
        rows, values = total._indices()[0], total._values()
        gradients.settle(parameter)
        gradient = parameter.grad
        if gradient is None and not gradients.keeps(parameter):
            fresh = gradients.rows.begin(parameter, total.dtype)
            with gradients.rows.writing(parameter, values.nbytes):
                _write_rows(fresh, rows, values)
            parameter.grad = fresh.tensor.detach()
        elif gradient is None:
            parameter.grad = total.to_dense()
        elif gradient.layout is not torch.strided:
            parameter.grad = total.to_dense() + gradient
        elif type(gradient) is torch.Tensor and (home := gradients.home_of(parameter)) is not None:
            with gradients.rows.writing(parameter, values.nbytes):
                _lose_signs_of_zeros(home)
                _write_rows(home, rows, values, add=True)
        else:  # in memory; one that a step in backward has used up says so
            gradient.add_(0.0).add_(total)

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._tables.clear()


def _is_plain_lookup(output: Any, indices: Any, table: _Table) -> bool:
    """Whether autograd would make a table larger than what was looked up, and nothing more.

    Transforms of functions (``torch.func``) and forward-mode derivatives have rules of their own.
    """
    node = getattr(output, "grad_fn", None)
    return (
        node is not None
        and type(output) is torch.Tensor
        and node.name() == "EmbeddingBackward0"
        and node.next_functions[0][0] is table.accumulator
        and indices.numel() < len(table.parameter)
        and torch._C._functorch.peek_interpreter_stack() is None
        and getattr(forward_ad, "_current_level", -1) < 0
    )


def _sparse(rows: torch.Tensor, values: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Rows of a table, ascending, and the ``values`` that they have."""
    return torch.sparse_coo_tensor(
        rows[None], values, shape, check_invariants=False, is_coalesced=True
    )


def _write_rows(
    home: MappedTensor, rows: torch.Tensor, values: torch.Tensor, *, add: bool = False
) -> None:
    """Write ``values``, (rows, width), to these rows of a mapping; or ``add`` them."""
    table, width_nbytes = home.tensor, values.shape[1] * values.element_size()
    for part in _parts(len(rows), max(width_nbytes, _FAULT_NBYTES)):
        new = values[part]
        if add:
            new = table.index_select(0, rows[part]).add_(new)
        table.index_copy_(0, rows[part], new)
        home.shed()


def _lose_signs_of_zeros(home: MappedTensor) -> None:
    """See [Note: zeros have signs]; what has no -0 is only read."""
    flat = home.tensor.view(-1)
    bits = flat.view(_INTEGERS[flat.element_size()])  # of which -0 has the least
    least = torch.iinfo(bits.dtype).min
    for part in _parts(len(flat), flat.element_size()):
        if int(bits[part].min()) == least:
            flat[part].add_(0.0)
        home.shed()


def _parts(count: int, nbytes: int) -> list[slice]:
    """Slices of ``count`` things, which bring ``nbytes`` into memory each, by shards."""
    step = max(_SHARD_NBYTES // nbytes, 1)
    return [slice(start, start + step) for start in range(0, count, step)]


def _describe(module: nn.Module) -> str:
    kind = type(module).__name__
    return f"{kind} with a forward of its own" if isinstance(module, nn.Embedding) else kind
