"""Which gradients of lookups a run makes of rows alone, found out while a fake step runs.

As ``row_gradients`` has it: of plain embeddings that look up fewer rows than their table has.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from offload.swap.census import gives_rows, named_weights, storage_key, uses_rows_only
from offload.swap.gradients import MIN_NBYTES


class Rows(NamedTuple):
    """A gradient that a run makes of rows: ``nbytes`` of them at most, of ``weight``."""

    weight: str
    nbytes: int


class Tables:
    """The weights of ``model`` whose lookups all give rows for the gradient."""

    def __init__(self, model: nn.Module) -> None:
        gives: dict[int, bool] = {}
        for module in model.modules():
            if uses_rows_only(module):
                weight: Any = module.weight
                moved = weight.requires_grad and weight.nbytes >= MIN_NBYTES
                rows = moved and weight.is_floating_point() and gives_rows(module)
                gives[storage_key(weight)] = rows and gives.get(storage_key(weight), True)
        self._names = {
            storage_key(parameter): name
            for name, parameters in named_weights(model)
            for parameter in parameters
            if gives.get(storage_key(parameter))
        }

    def rows_of(self, func: Any, arguments: Sequence[Any]) -> Rows | None:
        """What a run makes where ``func``, which autograd calls, makes a table; None: the same."""
        if func is not torch.ops.aten.embedding_dense_backward.default or not self._names:
            return None
        gradient, indices, count = arguments[:3]
        node: Any = torch._C._current_autograd_node()
        weight = getattr(node.next_functions[0][0], "variable", None) if node else None
        name = None if weight is None else self._names.get(storage_key(weight))
        if name is None or indices.numel() >= count:
            return None
        return Rows(name, int(indices.numel() * gradient.shape[-1] * gradient.itemsize))
