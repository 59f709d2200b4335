"""Masters outside of tiles: stepped whole, read by the user, cut short where a weight is written.

The two halves of a master are a weight and a state of its parameter (``masters``).
"""

from collections.abc import Generator

import torch
from torch import nn

from offload.swap.masters import MASTER_LOW, check_low, master_of, split
from offload.swap.states import State, StateKeeper, is_large
from offload.swap.weights import Weight, WeightSwapper
from offload.tiers.hostmem import page_ceil
from offload.tiers.memory import HostBuffer
from offload.tiers.store import Store, StoredTensor


class WholeMaster:
    """One bfloat16 parameter that the optimizer steps whole, as a float32 one.

    Attributes:
        stepped: what the optimizer steps.
    """

    __slots__ = ("_parameter", "stepped")

    def __init__(self, parameter: nn.Parameter, low: torch.Tensor | None) -> None:
        self._parameter = parameter
        self.stepped = nn.Parameter(master_of(parameter, low))
        assert parameter.grad is not None
        self.stepped.grad = parameter.grad.detach().float()

    def take(self) -> torch.Tensor:
        """Make the parameter the upper half of what was stepped; returns the lower half."""
        low = torch.empty(self._parameter.shape, dtype=torch.int16)
        split(_flat(self.stepped), _flat(self._parameter), low.view(-1))
        return low


class MasterKeeper:
    """The masters of the weights of one optimizer; called on the training thread only."""

    def __init__(self, keeper: StateKeeper, weights: WeightSwapper) -> None:
        self._keeper = keeper
        self._weights = weights
        self._small: dict[nn.Parameter, torch.Tensor] = {}  # lower halves that are ours
        weights.overwritten = self._overwritten

    def low_of(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """The lower half of the master of ``parameter``, if it has one that is not zero."""
        low: torch.Tensor | None = self._keeper.optimizer.state.get(parameter, {}).get(MASTER_LOW)
        return low

    def begin_whole(self, parameter: nn.Parameter) -> WholeMaster:
        """``parameter``, which has a gradient, in float32, for a step on all of it."""
        weight = self._keeper_weight(parameter)
        if weight is not None:
            self._weights.absorb(weight)
        return WholeMaster(parameter, self.low_of(parameter))

    def end_whole(self, parameter: nn.Parameter, whole: WholeMaster) -> torch.Tensor:
        """It has been stepped: ``parameter`` is new; returns the new lower half."""
        low = whole.take()
        if not is_large(low):
            self._small[parameter] = low
        return low

    def check(self) -> None:
        """Raise unless every lower half in ``optimizer.state`` is one.

        Raises:
            UnsupportedError: naming the weight whose is none.
        """
        for parameter, name in self._keeper.names.items():
            if self._keeper.precision.has_master(parameter):
                low = self._keeper.optimizer.state.get(parameter, {}).get(MASTER_LOW)
                if low is not None:
                    check_low(name, parameter, low)

    def adopt(self) -> None:
        """The lower halves in ``optimizer.state`` are those of the weights in the store."""
        for parameter in self._keeper.names:
            low = self.low_of(parameter)
            if low is not None and not is_large(low):
                self._small[parameter] = low

    def _keeper_weight(self, parameter: nn.Parameter) -> Weight | None:
        name = self._keeper.names.get(parameter)
        return self._weights.weights[name] if name is not None else None

    def low_halves(self) -> dict[int, torch.Tensor | None]:
        """The lower half of each weight that has a master, by the weight's address.

        What the user's code has written to weights counts.

        Raises:
            TierIOError: a write failed.
        """
        halves: dict[int, torch.Tensor | None] = {}
        for parameter, name in self._keeper.names.items():
            if self._keeper.precision.has_master(parameter) and parameter.requires_grad:
                weight = self._weights.weights[name]
                self._weights.absorb(weight)
                halves[weight.mapped.address] = self.low_of(parameter)
        return halves

    def _overwritten(self, weight: Weight) -> None:
        """The user's code wrote to ``weight``: see ``masters`` [Note: written weights]."""
        parameter = weight.parameters[0]
        low = self.low_of(parameter)
        if low is None or not self._keeper.precision.has_master(parameter):
            return
        if not is_large(low):
            if self._small.get(parameter) is low:
                _cut_short(self._weights.store, weight, low)
            else:  # loaded, as the weight was
                self._small[parameter] = low
            return
        state = self._keeper.known(parameter, MASTER_LOW)
        if state is not None and self._keeper.shows(low, state):
            self._cut_stored_short(weight, state)

    def _cut_stored_short(self, weight: Weight, state: State) -> None:
        store = self._weights.store
        old = _chunks(store, weight.stored)
        lows = _chunks(store, state.stored)
        now = _flat(weight.mapped.tensor).view(torch.int16)

        def fill(at: int, staged: torch.Tensor) -> None:
            start, low = at // 2, staged.view(torch.int16)
            before, part = next(old), now[start : start + low.numel()]
            low.copy_(next(lows))
            low[before != part] = 0

        try:
            store.fill(state.stored, fill)
        finally:
            old.close()
            lows.close()
        self._keeper.show(state)


def _cut_short(store: Store, weight: Weight, low: torch.Tensor) -> None:
    old = torch.empty(weight.stored.shape, dtype=weight.stored.dtype)
    store.read_into(weight.stored, old)
    now = weight.mapped.tensor.view(torch.int16)
    low[old.view(torch.int16) != now] = 0


def _chunks(store: Store, stored: StoredTensor) -> Generator[torch.Tensor]:
    """The current version of 16-bit numbers, chunk by chunk, as int16; each is gone with the next.

    A chunk may be written anew when it has been given out.
    """
    assert stored.current is not None
    buffer = HostBuffer(max(1, min(stored.chunk_nbytes, stored.nbytes)))
    try:
        for at, nbytes in stored.chunks():
            store.tier.read(
                stored.current, buffer.address, offset=at, nbytes=page_ceil(nbytes)
            ).wait()
            yield buffer.tensor(torch.int16, (nbytes // 2,))
    finally:
        buffer.release()


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(-1)
