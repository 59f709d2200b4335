"""Which parts of gradients are still to come, and whose is next: one from each micro-batch.

[Note: order of parts] Floating-point sums depend on their order, so each gradient is summed up in
the order of the micro-batches, as if these had gone through the model one after the other. When
all go the same way through it, turns alone see to that. Where they do not (a layer that one skips,
an expert that gets none of its tokens) the one that comes early waits: for those before it that
have not added their part yet and will, which autograd tells of a backward that has begun. If one
adds a second part behind another's (a checkpointed layer with ``use_reentrant=True`` that is used
twice) the order is lost, and that is an error before it is a wrong sum.

What waits does so in a hook on the parameter's gradient, before autograd takes the lock under
which it is added up.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

from offload.allocator.errors import UnsupportedError
from offload.swap.relay import Relay


@dataclass(frozen=True, slots=True, eq=False)
class _Gate:
    """The hook that waits, and looks at no gradient."""

    parts: "Parts"
    parameter: nn.Parameter

    def __call__(self, _gradient: torch.Tensor) -> None:
        self.parts.await_turn(self.parameter)


def looks_away(hook: object) -> bool:
    """Whether a hook of a parameter is known to look at no gradient."""
    return isinstance(hook, _Gate)


class Parts:
    """The parts that micro-batches, which run in turns, add to each gradient.

    Args:
        names: of the parameters that have gradients.
    """

    def __init__(self, relay: Relay[Any], names: Mapping[nn.Parameter, str]) -> None:
        count = relay.count
        self._relay = relay
        self._names = names
        self._added: list[set[nn.Parameter]] = [set() for _ in range(count)]
        self._coming: list[frozenset[nn.Parameter] | None] = [None] * count  # of each backward
        self._last: dict[nn.Parameter, int] = {}  # who added the last part
        with torch.enable_grad():
            self._nodes = {parameter: get_gradient_edge(parameter).node for parameter in names}
        self._hooks: list[RemovableHandle] = [self._guard(parameter) for parameter in names]

    def _guard(self, parameter: nn.Parameter) -> RemovableHandle:
        handle: RemovableHandle = parameter.register_hook(_Gate(self, parameter))
        return handle

    def begin_backward(self) -> None:
        """Autograd runs the backward of the present micro-batch: see what it will add."""
        index = self._relay.current
        if index is not None and self._coming[index] is None:
            will_run = torch._C._will_engine_execute_node
            self._coming[index] = frozenset(
                parameter for parameter, node in self._nodes.items() if will_run(node)
            )

    def await_turn(self, parameter: nn.Parameter) -> None:
        """Wait for the parts that come before; then the present micro-batch adds its own.

        Raises:
            UnsupportedError: it is too late for it.
        """
        index = self._relay.current
        if index is None:
            return
        self.begin_backward()
        self._relay.wait_until(lambda: not self._is_coming(parameter, range(index)))
        if self._last.get(parameter, index) > index:
            raise UnsupportedError(
                f"micro-batch {index} adds to the gradient of {self._names[parameter]} "
                f"{tuple(parameter.shape)} once more, behind micro-batch {self._last[parameter]}: "
                "the sum would differ from that of a loop over the micro-batches in its last bits. "
                "Use that loop, or checkpoint with use_reentrant=False"
            )
        self._last[parameter] = index
        self._added[index].add(parameter)

    def expects_more(self, parameter: nn.Parameter) -> bool:
        """Whether another micro-batch will soon add its part to the gradient of ``parameter``."""
        return not self._relay.is_one_by_one and self._is_coming(parameter, range(len(self._added)))

    def _is_coming(self, parameter: nn.Parameter, of: Iterable[int]) -> bool:
        for index in of:
            if parameter in self._added[index] or not self._relay.is_alive(index):
                continue
            coming = self._coming[index]
            if coming is None or parameter in coming:
                return True
        return False

    def stop(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
