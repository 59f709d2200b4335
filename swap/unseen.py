"""Tensors that saved-tensor hooks never see: what a custom Function keeps on its ``ctx`` itself.

``ctx.save_for_backward(x)`` passes by the hooks, ``ctx.x = x`` does not: such bytes stay in memory.
They are found by walking the graph, for the node of a custom Function is its ``ctx``.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_leaves


def unseen_nbytes(outputs: Any, known: frozenset[int] = frozenset()) -> dict[str, int]:
    """Bytes that the graph behind ``outputs`` keeps past the hooks, by the name of its node.

    Args:
        outputs: anything that tensors are found in.
        known: keys of storages that stay in any case (weights, buffers); not counted.
    """
    found: dict[str, int] = {}
    counted = set(known)
    for node in _nodes(outputs):
        for tensor in tree_leaves(getattr(node, "__dict__", {})):
            if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in counted:
                counted.add(storage._cdata)
                found[node.name()] = found.get(node.name(), 0) + storage.nbytes()
    return found


def _nodes(outputs: Any) -> Iterator[Any]:
    """Every node of the graph, once."""
    waiting = [leaf.grad_fn for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [following for following, _ in node.next_functions]
