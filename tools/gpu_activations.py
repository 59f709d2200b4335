"""Saved activations of a device, swapped to each home by the tensor cache, for ``gpu_check``."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from gpu_training import UnderTest
from offload.swap.activations import ActivationCache
from offload.swap.ferry import Ferry
from offload.swap.homes import FileHome, Home, MemoryHome
from offload.swap.places import DevicePlace
from offload.swap.selective import put_on, take_off
from offload.tiers.accelerator import Accelerator
from offload.tiers.base import Tier
from offload.tiers.events import ListRecorder, Move
from offload.tiers.filetier import FileTier, Lanes
from offload.tiers.journal import Journal
from offload.tiers.lanes import Lane
from offload.tiers.pinned import PinnedTier
from offload.tiers.ram import RamTier

SWAP_HOMES = ("pinned", "host", "file", "all")
_MIB = 1 << 20
_WIDTH, _ROWS, _LAYERS, _STEPS = 128, 256, 3, 2
_WORKERS = 2


class Swap:
    """A cache that keeps nothing on the device, with one home or all of them."""

    def __init__(
        self,
        device: UnderTest,
        accelerator: Accelerator,
        home: str,
        *,
        room_nbytes: int = 16 * _MIB,
    ) -> None:
        self._recorder = ListRecorder()
        self._device = accelerator.name
        self.journal = Journal(self._recorder, clock=accelerator.now)
        self._stack = ExitStack()
        ferry = Ferry(accelerator, self.journal, buffers=4 * _WORKERS, pinners=device.pinners)
        self._stack.callback(ferry.close)
        place = DevicePlace(ferry, self.journal)
        homes: list[Home] = []
        if home in {"pinned", "all"}:
            nbytes = _MIB if home == "all" else room_nbytes
            homes.append(self._memory(PinnedTier(nbytes, pinners=device.pinners)))
        if home in {"host", "all"}:
            homes.append(self._memory(RamTier(_MIB if home == "all" else room_nbytes)))
        if home in {"file", "all"}:
            folder = self._stack.enter_context(TemporaryDirectory(dir="."))
            lanes = Lanes(self.journal, _WORKERS)
            self._stack.callback(lanes.close)
            homes.append(FileHome(self._stack.enter_context(FileTier(Path(folder), None, lanes))))
        self.cache = ActivationCache(
            homes, self.journal, limit_nbytes=0, in_flight_nbytes=_MIB, min_nbytes=0, place=place
        )

    def _memory(self, tier: Tier) -> Home:
        self._stack.enter_context(tier)
        reads, writes = (Lane(tier.spec.name, _WORKERS, self.journal) for _ in range(2))
        self._stack.callback(reads.close)
        self._stack.callback(writes.close)
        return MemoryHome(tier, reads, writes)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """What autograd saves goes to the cache."""
        self.cache.begin_pass("model")
        put_on(self.cache)
        try:
            yield
        finally:
            take_off()

    @property
    def left_nbytes(self) -> int:
        """Bytes that left the device."""
        moves = (event for event in self._recorder.events if isinstance(event, Move))
        return sum(move.nbytes for move in moves if move.src == self._device)

    def close(self) -> None:
        """End all moves and give everything back."""
        self.cache.close()
        self._stack.close()


def step_gradients(
    device: UnderTest, accelerator: Accelerator, swap: Swap | None
) -> list[torch.Tensor]:
    """Losses and gradients of some steps of a small residual network, on the host."""
    random = torch.Generator().manual_seed(7)
    with device.computing(accelerator):
        weights = [
            device.place(torch.randn(_WIDTH, _WIDTH, generator=random) / _WIDTH**0.5)
            .detach()
            .requires_grad_()
            for _ in range(_LAYERS)
        ]
        results = []
        for _ in range(_STEPS):
            hidden = device.place(torch.randn(_ROWS, _WIDTH, generator=random))
            with swap.saving() if swap is not None else torch.enable_grad():
                for weight in weights:
                    hidden = torch.nn.functional.gelu(hidden @ weight).exp().sin() + hidden
                loss = hidden.square().mean()
            loss.backward()
            results.append(loss.detach())
        results += [weight.grad for weight in weights if weight.grad is not None]
    accelerator.synchronize()
    return [result.cpu().clone() for result in results]
