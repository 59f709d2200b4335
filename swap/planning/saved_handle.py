"""What autograd keeps of a saved tensor while a step is traced."""

import torch

from offload.swap.planning.row_records import Saving


class SavedHandle:
    """The layout of a saved tensor; of a weight, the tensor itself."""

    __slots__ = ("__weakref__", "device", "dtype", "saving", "size", "stride", "tensor", "weight")

    def __init__(
        self, tensor: torch.Tensor, *, saving: Saving | None = None, weight: str | None = None
    ) -> None:
        self.tensor = None if weight is None else tensor.detach()
        self.saving = saving
        self.weight = weight
        self.size, self.stride = tensor.size(), tensor.stride()
        self.dtype, self.device = tensor.dtype, tensor.device

    def stand_in(self) -> torch.Tensor:
        """A fake tensor of the same layout."""
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)
