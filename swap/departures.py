"""Gradients on their way to scratch, oldest first, and whether the user's code changed them.

A version counter tells of most changes; ``p.grad.data`` and numpy change bytes without counting.
Against those there is a checksum, taken before the user's code could have its hands on the bytes.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from offload.tiers.lanes import Transfer
from offload.tiers.mapped import MappedTensor
from offload.tiers.store import checksum


@dataclass(slots=True, eq=False)
class Departure:
    """A gradient on its way to its home.

    Attributes:
        version: of the tensor when it began to leave.
        checksum: of its bytes then; None as long as nobody could change them.
    """

    parameter: nn.Parameter
    tensor: torch.Tensor
    version: int
    home: MappedTensor
    transfer: Transfer
    checksum: int | None = None

    def is_changed(self) -> bool:
        """Whether the tensor was changed since it began to leave."""
        if self.tensor._version != self.version:
            return True
        return self.checksum is not None and self.checksum != checksum_of(self.tensor)


class Departures:
    """The queue of them."""

    def __init__(self) -> None:
        self._queue: deque[Departure] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    def __getitem__(self, index: int) -> Departure:
        return self._queue[index]

    @property
    def nbytes(self) -> int:
        """Of all that are on their way."""
        return sum(left.tensor.nbytes for left in self._queue)

    def add(self, departure: Departure) -> None:
        """The youngest."""
        self._queue.append(departure)

    def of(self, parameter: nn.Parameter) -> list[Departure]:
        """Those of ``parameter``: more than one if the user dropped the first."""
        return [left for left in self._queue if left.parameter is parameter]

    def has(self, gradient: torch.Tensor) -> bool:
        """Whether the bytes of ``gradient`` are on their way."""
        address = gradient.data_ptr()
        return any(left.tensor.data_ptr() == address for left in self._queue)

    def has_failed(self) -> bool:
        """Whether a write has failed."""
        return any(left.transfer.done() and left.transfer.error for left in self._queue)

    def ended(self) -> Iterator[Departure]:
        """Takes those out whose write has ended, up to the first that has not."""
        while self._queue and self._queue[0].transfer.done():
            yield self._queue.popleft()

    def note_bytes(self) -> None:
        """The user's code runs next: take the checksums that are missing."""
        for left in self._queue:
            if left.checksum is None:
                left.checksum = checksum_of(left.tensor)


def checksum_of(tensor: torch.Tensor) -> int:
    """Of the bytes of a contiguous tensor."""
    return checksum(tensor.data_ptr(), tensor.nbytes)


def has_user_hook(parameter: nn.Parameter) -> bool:
    """Whether code that isn't Offload's runs when ``parameter`` gets a gradient."""
    hooks: list[Any] = [
        *(parameter._backward_hooks or {}).values(),
        *(getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values(),
    ]
    modules = [getattr(hook, "__module__", None) or "" for hook in hooks]
    return not all(module.startswith("offload.") for module in modules)
