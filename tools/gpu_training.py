"""A few training steps with weights and optimizer states in any tier, for ``gpu_check``."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import torch

from offload.tiers.accelerator import Accelerator
from offload.tiers.base import Block
from offload.tiers.device import DeviceTier
from offload.tiers.filetier import FileTier, Lanes
from offload.tiers.hostmem import page_ceil
from offload.tiers.journal import Journal
from offload.tiers.pinned import PinnedTier
from offload.tiers.pinning import Pinner
from offload.tiers.ram import RamTier

_MIB = 1 << 20
_WIDTH, _BATCH, _STEPS = 128, 32, 4
_SHAPES = ((_WIDTH, _WIDTH), (_WIDTH,), (_WIDTH, _WIDTH), (_WIDTH,))  # two linear layers


class UnderTest(Protocol):
    """A device that the checks run on."""

    name: str
    pinners: Sequence[Pinner]

    def open(self) -> Accelerator: ...
    def open_delayed(self, seed: int) -> Accelerator: ...
    def place(self, values: torch.Tensor) -> torch.Tensor: ...
    def computing(self, accelerator: Accelerator) -> AbstractContextManager[object]: ...


def _train_step(
    step: int, batch: torch.Tensor, tensors: Sequence[torch.Tensor], losses: list[torch.Tensor]
) -> None:
    """Forward, backward and AdamW in place; tensors: weights, then first and second moments."""
    count = len(_SHAPES)
    weights = [weight.detach().requires_grad_() for weight in tensors[:count]]
    hidden = torch.nn.functional.linear(batch, weights[0], weights[1]).relu()
    loss = torch.nn.functional.linear(hidden, weights[2], weights[3]).square().mean()
    gradients = torch.autograd.grad(loss, weights)
    losses.append(loss.detach().clone())
    with torch.no_grad():
        for index, gradient in enumerate(gradients):
            weight, first, second = (tensors[index + part * count] for part in range(3))
            first.lerp_(gradient, 0.1)
            second.mul_(0.99).addcmul_(gradient, gradient, value=0.01)
            scale = (second / (1 - 0.99 ** (step + 1))).sqrt_().add_(1e-8)
            weight.mul_(0.999).addcdiv_(first / (1 - 0.9 ** (step + 1)), scale, value=-1e-2)


def initial() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Weights and moments, and the batch of each step; on the host, always the same."""
    random = torch.Generator().manual_seed(7)
    weights = [torch.randn(shape, generator=random) / _WIDTH**0.5 for shape in _SHAPES]
    moments = [torch.zeros(shape) for shape in (*_SHAPES, *_SHAPES)]
    batches = [torch.randn(_BATCH, _WIDTH, generator=random) for _ in range(_STEPS)]
    return [*weights, *moments], batches


class Home(ABC):
    """Where tensors live between their visits to the device."""

    def __init__(self, tier: DeviceTier) -> None:
        self.tier = tier
        self.blocks: list[Block] = []

    @abstractmethod
    def keep(self, values: torch.Tensor) -> None:
        """Take the next tensor in, from the host."""

    @abstractmethod
    def fetch(self, block: Block, index: int) -> None:
        """Start bringing tensor ``index`` to ``block``."""

    @abstractmethod
    def evict(self, block: Block, index: int) -> None:
        """Start taking ``block`` back as tensor ``index``."""

    @abstractmethod
    def values(self, index: int) -> torch.Tensor:
        """A copy of tensor ``index`` on the host."""


class PinnedHome(Home):
    """Blocks of a pinned pool."""

    def __init__(self, tier: DeviceTier, stack: ExitStack, pinners: Sequence[Pinner]) -> None:
        super().__init__(tier)
        self.pool = stack.enter_context(PinnedTier(2 * _MIB, pinners=pinners))

    def keep(self, values: torch.Tensor) -> None:
        block = self.pool.allocate(values.nbytes)
        self.pool.tensor(block, values.dtype, values.shape).copy_(values)
        self.blocks.append(block)

    def fetch(self, block: Block, index: int) -> None:
        self.tier.fetch(block, self.blocks[index])

    def evict(self, block: Block, index: int) -> None:
        self.tier.evict(block, self.blocks[index])

    def values(self, index: int) -> torch.Tensor:
        block = self.blocks[index]
        return self.pool.tensor(block, torch.float32, (block.nbytes // 4,)).clone()


class HostHome(Home):
    """Blocks of ordinary memory, which nothing pins."""

    def __init__(self, tier: DeviceTier, stack: ExitStack, pinners: Sequence[Pinner]) -> None:
        del pinners
        super().__init__(tier)
        self.memory = stack.enter_context(RamTier(2 * _MIB))

    def keep(self, values: torch.Tensor) -> None:
        block = self.memory.allocate(values.nbytes)
        self.memory.write(block, values.data_ptr())
        self.blocks.append(block)

    def fetch(self, block: Block, index: int) -> None:
        self.tier.write(block, self.memory.address(self.blocks[index]), nbytes=block.nbytes)

    def evict(self, block: Block, index: int) -> None:
        self.tier.read(block, self.memory.address(self.blocks[index]), nbytes=block.nbytes)

    def values(self, index: int) -> torch.Tensor:
        block = self.blocks[index]
        values = torch.empty(block.nbytes // 4)
        self.memory.read(block, values.data_ptr())
        return values


class FileHome(Home):
    """Blocks of a file, through two pinned buffers."""

    def __init__(self, tier: DeviceTier, stack: ExitStack, pinners: Sequence[Pinner]) -> None:
        super().__init__(tier)
        largest = page_ceil(4 * _WIDTH * _WIDTH)
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="offload-gpu-check-")))
        lanes = Lanes(Journal())
        stack.callback(lanes.close)
        self.file = stack.enter_context(FileTier(folder, None, lanes))
        self.pool = stack.enter_context(PinnedTier(2 * largest, pinners=pinners))

    def keep(self, values: torch.Tensor) -> None:
        stored = self.file.allocate(values.nbytes)
        with self.pool.allocate(values.nbytes) as buffer:
            self.pool.tensor(buffer, values.dtype, values.shape).copy_(values)
            self.file.write(stored, self.pool.address(buffer)).wait()
        self.blocks.append(stored)

    def fetch(self, block: Block, index: int) -> None:
        stored = self.blocks[index]
        with self.pool.allocate(stored.nbytes) as buffer:
            self.pool.guard(buffer, self.file.read(stored, self.pool.address(buffer)))
            self.tier.fetch(block, buffer)  # waits for the file

    def evict(self, block: Block, index: int) -> None:
        stored = self.blocks[index]
        with self.pool.allocate(stored.nbytes) as buffer:
            self.tier.evict(block, buffer).wait()
            self.file.write(stored, self.pool.address(buffer)).wait()

    def values(self, index: int) -> torch.Tensor:
        stored = self.blocks[index]
        with self.pool.allocate(stored.nbytes) as buffer:
            self.file.read(stored, self.pool.address(buffer)).wait()
            return self.pool.tensor(buffer, torch.float32, (stored.nbytes // 4,)).clone()


HOMES: dict[str, Callable[[DeviceTier, ExitStack, Sequence[Pinner]], Home]] = {
    "pinned": PinnedHome,
    "host": HostHome,
    "file": FileHome,
}


def train_resident(device: UnderTest) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Tensors and losses after the steps, all of it in device memory; results on the host."""
    tensors, batches = initial()
    placed = [device.place(values) for values in tensors]
    losses: list[torch.Tensor] = []
    for step, batch in enumerate(batches):
        _train_step(step, device.place(batch), placed, losses)
    return [values.cpu() for values in placed], [loss.cpu() for loss in losses]


def train_swapped(
    device: UnderTest, home: Callable[[DeviceTier, ExitStack, Sequence[Pinner]], Home]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The same with every tensor fetched from its home before each step, and evicted after."""
    tensors, batches = initial()
    losses: list[torch.Tensor] = []
    with ExitStack() as stack:
        opened = stack.enter_context(device.open_delayed(3))
        tier = stack.enter_context(DeviceTier(opened, 2 * _MIB))
        kept = home(tier, stack, device.pinners)
        stack.callback(opened.synchronize)
        for values in tensors:
            kept.keep(values)
        for step, batch in enumerate(batches):
            tier.next_step()  # the second and later ones run at planned addresses
            placed = device.place(batch)
            blocks = [tier.allocate(values.nbytes) for values in tensors]
            for index, block in enumerate(blocks):
                kept.fetch(block, index)
            views = [
                tier.tensor(block, values.dtype, values.shape)
                for block, values in zip(blocks, tensors, strict=True)
            ]
            opened.launch(partial(_train_step, step, placed, views, losses))
            for index, block in enumerate(blocks):
                kept.evict(block, index)
                block.release()
        opened.synchronize()
        tier.drain()
        return [kept.values(index) for index in range(len(tensors))], [x.cpu() for x in losses]
