"""What stands in ``p.grad`` for a gradient that a step in backward has used up."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from offload.allocator.errors import ConsumedGradientError


class ConsumedGradient(torch.Tensor):
    """Looks like the gradient, has no bytes, and refuses every operation.

    ``None`` in its place would be skipped in silence: clipping would find a norm of zero.
    """

    weight_name: str

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ConsumedGradient({self.weight_name}, shape={tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        found = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls))
        raise ConsumedGradientError(
            f"{func} meets the gradient of {found.weight_name} {tuple(found.shape)}, which the "
            "step in backward has used up already. Call optimizer.step() and "
            "optimizer.zero_grad() after each backward (or after each accumulation_steps of "
            "them); to clip, unscale or log gradients, set step_in_backward=False"
        )


def consumed_gradient(parameter: torch.Tensor, name: str) -> ConsumedGradient:
    """The stand-in for the gradient of ``parameter``, whose weight is ``name``."""
    made: ConsumedGradient = torch.Tensor._make_wrapper_subclass(
        ConsumedGradient,
        parameter.shape,
        strides=parameter.stride(),
        dtype=parameter.dtype if parameter.grad is None else parameter.grad.dtype,
        device=parameter.device,
    )
    made.weight_name = name
    return made
