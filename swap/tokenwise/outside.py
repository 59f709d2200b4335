"""Bytes that a pass saves outside of its blocks: logits and the loss, above all.

They come last and are needed first, so they stay in memory and leave that room to no block.
"""

import torch
from torch import nn


class OutsideBytes:
    """Counts each storage of a pass once, weights left out.

    A pass begins with its first block, or with one that has run before in it, and ends with its
    backward. What is saved between passes is of none, however long no block runs.

    Attributes:
        nbytes: the most that a pass has saved outside.
    """

    def __init__(self, model: nn.Module) -> None:
        self.nbytes = 0
        self._model = model
        self._weights: set[int] = set()
        self._counted: set[int] = set()
        self._now_nbytes = 0
        self._ran: set[str] = set()

    def begin(self, block: str) -> bool:
        """The forward of ``block`` begins; True if a pass begins with it."""
        first = block in self._ran or not self._ran
        if first:
            self.end()
            self._weights = {weight.untyped_storage()._cdata for weight in self._model.parameters()}
        self._ran.add(block)
        return first

    def saved(self, tensor: torch.Tensor) -> None:
        """Autograd saves ``tensor`` outside of all blocks."""
        if not self._ran or tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self._weights and storage._cdata not in self._counted:
            self._counted.add(storage._cdata)
            self._now_nbytes += storage.nbytes()
            self.nbytes = max(self.nbytes, self._now_nbytes)

    def end(self) -> None:
        """The pass is over."""
        self._ran.clear()
        self._counted.clear()
        self._now_nbytes = 0
