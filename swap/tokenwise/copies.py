"""The weights of a block that computes on a device: what it reads are copies, which come and go.

Rows are rebuilt from the copies of that moment: a copy is fetched as an operation reads it, and
the operations of the forward were recorded by the names of the weights behind theirs. The
stand-ins by which a model gets at them (``stand_ins``) are no operations of the block, so they are
looked up aside (``TokenWise.aside``).
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from offload.swap.device_weights import DeviceWeights
from offload.swap.tokenwise.keeper import Keeper
from offload.swap.tokenwise.passes import Weights, names_by_storage, state_of


class CopiedWeights(Weights):
    """As ``Weights``; buffers are on the device all the time.

    Args:
        copies: of the weights of the model.
        names: of the weights behind parameters.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        copies: DeviceWeights,
        names: Mapping[nn.Parameter, str],
    ) -> None:
        self._copies = copies
        self._own = {
            key: names[parameter]
            for key, parameter in module.named_parameters()
            if parameter in names
        }
        self._buffers = dict(module.named_buffers())
        self.tensors = _Tensors(copies, self._own, self._buffers)
        self.by_storage = _Names(copies, self._own, names_by_storage(self._buffers))
        self.prefix = f"{name}." if name else ""

    def state_of(self, name: str) -> tuple[int, int]:
        """As in ``Weights``; a copy may have any storage."""
        if name in self._buffers:
            return state_of(self._buffers[name])
        return self._copies.state_of(self._own[name])

    def use(self, names: Iterable[str], keeper: Keeper) -> None:
        """Each is fetched as it is read."""


class _Tensors(Mapping[str, torch.Tensor]):
    def __init__(
        self, copies: DeviceWeights, own: dict[str, str], buffers: dict[str, torch.Tensor]
    ) -> None:
        self._copies, self._own, self._buffers = copies, own, buffers

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._buffers:
            return self._buffers[name]
        return self._copies.require(self._own[name])

    def __iter__(self) -> Iterator[str]:
        yield from self._own
        yield from self._buffers

    def __len__(self) -> int:
        return len(self._own) + len(self._buffers)


class _Names(Mapping[int, str]):
    """By the storage of the present copy, which another may have a moment later."""

    def __init__(self, copies: DeviceWeights, own: dict[str, str], buffers: dict[int, str]) -> None:
        self._copies, self._buffers = copies, buffers
        self._keys = {weight: key for key, weight in reversed(own.items())}

    def __getitem__(self, storage: int) -> str:
        if storage in self._buffers:
            return self._buffers[storage]
        return self._keys[self._copies.names[storage]]

    def __iter__(self) -> Iterator[int]:
        yield from self._buffers
        yield from (at for at, weight in self._copies.names.items() if weight in self._keys)

    def __len__(self) -> int:
        return sum(1 for _ in self)
