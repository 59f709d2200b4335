"""Gradients that stay in memory while more parts of them are to come.

[Note: parts that come together] Where several backward passes run in turns, a gradient gets its
parts one soon after the other. It stays in memory until the last has been added, and leaves once.
That is no promise: where memory is short the oldest leave before, and later parts are added
through the mapping, as behind any backward that has ended.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn

from offload.swap.governor import Governor

if TYPE_CHECKING:
    from collections.abc import Callable


class IncompleteGradients:
    """Those that wait, the oldest first.

    Attributes:
        expects_more: whether more parts of a parameter's gradient are to come; None: nothing runs
            in turns.
        most_nbytes: that may wait, however much room there is.
    """

    def __init__(self, governor: Governor) -> None:
        self.expects_more: Callable[[nn.Parameter], bool] | None = None
        self.most_nbytes = 0
        self._governor = governor
        self._gradients: dict[nn.Parameter, torch.Tensor] = {}
        self._reserve_nbytes = 0  # for the next gradient and its weight

    def __len__(self) -> int:
        return len(self._gradients)

    def watch(self, parameter: nn.Parameter) -> None:
        """Count on gradients of ``parameter``."""
        self._reserve_nbytes = max(self._reserve_nbytes, 2 * parameter.nbytes)

    def of(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """The gradient of ``parameter``, if it waits."""
        return self._gradients.get(parameter)

    def put(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        """Let ``gradient`` wait, as the newest."""
        self._gradients[parameter] = gradient

    def drop(self, parameter: nn.Parameter) -> None:
        """Nothing of ``parameter`` waits any more."""
        self._gradients.pop(parameter, None)

    def take_oldest(self) -> tuple[nn.Parameter, torch.Tensor]:
        """What has waited longest; it does not wait any more."""
        parameter = next(iter(self._gradients))
        return parameter, self._gradients.pop(parameter)

    def is_short(self, leaving_nbytes: int, limit_nbytes: int) -> bool:
        """Whether some must leave: beyond the limit they take spare bytes only."""
        waiting = sum(gradient.nbytes for gradient in self._gradients.values())
        if waiting > self.most_nbytes:
            return True
        if waiting + leaving_nbytes <= limit_nbytes:
            return self._governor.room() < 0
        return self._governor.room() < self._reserve_nbytes
