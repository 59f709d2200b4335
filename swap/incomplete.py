"""Gradients that stay in memory while more parts of them are to come.

[Note: parts that come together] Where several backward passes run in turns, a gradient gets its
parts one soon after the other. It stays in memory until the last has been added, and leaves once.
That is no promise: where memory is short, and tiles of the step in backward can't make room, the
oldest leave before. Later parts are added through the mapping, as behind any backward that has
ended.
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

    @property
    def nbytes(self) -> int:
        """Of all that wait."""
        return sum(gradient.nbytes for gradient in self._gradients.values())

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

    def wanted_nbytes(self, leaving_nbytes: int, limit_nbytes: int) -> int:
        """Room to leave: beyond the limit, with those that leave, they take spare bytes only."""
        is_within = self.nbytes + leaving_nbytes <= limit_nbytes
        return 0 if is_within else self._reserve_nbytes

    def is_short(self, leaving_nbytes: int, limit_nbytes: int) -> bool:
        """Whether some must leave."""
        if self.nbytes > self.most_nbytes:
            return True
        return self._governor.room() < self.wanted_nbytes(leaving_nbytes, limit_nbytes)
