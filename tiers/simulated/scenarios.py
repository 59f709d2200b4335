"""What a swapper does to a device, in small: right code, and races planted on purpose.

Each scenario takes any ``Accelerator`` and the pinners of its pool, and returns what came out.
``RIGHT`` must come out the same on every device and under every seed; each of ``RACY`` leaves out
one edge or one wait, and must be found (``races``): a detector that misses one is broken.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch

from offload.tiers.accelerator import Accelerator
from offload.tiers.device import DeviceTier
from offload.tiers.pinned import PinnedTier, SizeClass
from offload.tiers.pinning import Pinner

if TYPE_CHECKING:
    from offload.tiers.base import Block


class Scenario(Protocol):
    """Something to do on a device; returns what came out."""

    __name__: str

    def __call__(self, device: Accelerator, pinners: Sequence[Pinner]) -> torch.Tensor: ...


NUMEL = 1024  # float32 elements of a block: one page
_NBYTES = 4 * NUMEL
_LAYERS = 6
_SHAPE = (NUMEL,)


@contextmanager
def _tiers(
    device: Accelerator, pinners: Sequence[Pinner], *, blocks: int = 2, buffers: int = 2
) -> Iterator[tuple[DeviceTier, PinnedTier]]:
    """A device tier of ``blocks`` and a pool of ``buffers``; both outlive all work."""
    classes = [SizeClass(nbytes=_NBYTES, count=buffers)]
    with (
        PinnedTier(classes=classes, pinners=pinners) as pool,
        DeviceTier(device, blocks * _NBYTES) as tier,
    ):
        try:
            yield tier, pool
        finally:
            device.synchronize()


def _fill(pool: PinnedTier, block: "Block", value: float) -> None:
    pool.tensor(block, torch.float32, _SHAPE).fill_(value)


def _view(tier: DeviceTier, block: "Block", *, read_only: bool = False) -> torch.Tensor:
    return tier.tensor(block, torch.float32, _SHAPE, read_only=read_only)


def _out(device: Accelerator, values: torch.Tensor) -> torch.Tensor:
    """What a tensor of the device holds after all work."""
    device.synchronize()
    return values.cpu().clone()


def round_trip(device: Accelerator, pinners: Sequence[Pinner]) -> torch.Tensor:
    """Fetch, compute in place, evict, read on the host."""
    with _tiers(device, pinners) as (tier, pool):
        block, buffer = tier.allocate(_NBYTES), pool.allocate(_NBYTES)
        _fill(pool, buffer, 3)
        tier.fetch(block, buffer)
        values = _view(tier, block)
        device.launch(partial(torch.mul, values, 2, out=values))
        tier.evict(block, buffer).wait()
        return pool.tensor(buffer, torch.float32, _SHAPE).clone()


def stream_layers(device: Accelerator, pinners: Sequence[Pinner]) -> torch.Tensor:
    """Weights of many layers through two buffers and two blocks, one layer ahead of compute."""
    with _tiers(device, pinners, blocks=3) as (tier, pool):
        total = _view(tier, sums := tier.allocate(_NBYTES))
        device.launch(total.zero_)
        ahead = _fetch_layer(tier, pool, 0)
        for layer in range(_LAYERS):
            block = ahead
            if layer + 1 < _LAYERS:
                ahead = _fetch_layer(tier, pool, layer + 1)
            weights = _view(tier, block, read_only=True)
            device.launch(partial(total.mul_, 3))
            device.launch(partial(total.add_, weights))
            tier.used(block)
            block.release()  # its last kernel may not have begun
        with pool.allocate(_NBYTES) as target:
            tier.evict(sums, target).wait()
            return pool.tensor(target, torch.float32, _SHAPE).clone()


def _fetch_layer(tier: DeviceTier, pool: PinnedTier, layer: int) -> "Block":
    block = tier.allocate(_NBYTES)
    with pool.allocate(_NBYTES) as buffer:  # waits for a buffer on its way back
        _fill(pool, buffer, layer + 1)
        tier.fetch(block, buffer)
    return block


def planned_addresses(device: Accelerator, pinners: Sequence[Pinner]) -> torch.Tensor:
    """Steps of one form, whose blocks get planned addresses, and one that deviates midway."""
    with _tiers(device, pinners, blocks=4, buffers=3) as (tier, pool):
        total = _view(tier, tier.allocate(_NBYTES))
        device.launch(total.zero_)
        for step in range(4):
            tier.next_step()
            small = tier.allocate(_NBYTES // 4)
            ahead = _fetch_layer(tier, pool, step)
            small.release()
            later = tier.allocate(_NBYTES if step < 3 else 2 * _NBYTES)  # over the small one
            device.launch(partial(_view(tier, later).fill_, step + 1))
            device.launch(partial(total.mul_, 3))
            device.launch(partial(total.add_, _view(tier, ahead, read_only=True)))
            ahead.release()
            with tier.allocate(_NBYTES) as last:  # where the fetched one was
                device.launch(partial(_view(tier, last).copy_, _view(tier, later)))
                later.release()
                device.launch(partial(total.add_, _view(tier, last)))
        tier.next_step()
        return _out(device, total)


def there_and_back(device: Accelerator, pinners: Sequence[Pinner]) -> torch.Tensor:
    """Activations leave and come back to other bytes; the host never waits in between."""
    with _tiers(device, pinners, blocks=2, buffers=_LAYERS) as (tier, pool):
        saved = []
        for layer in range(_LAYERS):
            block = tier.allocate(_NBYTES)
            device.launch(partial(_view(tier, block).fill_, layer + 1))
            saved.append(pool.allocate(_NBYTES))
            tier.evict(block, saved[-1])
            block.release()
        total = _view(tier, tier.allocate(_NBYTES))
        device.launch(total.zero_)
        for buffer in reversed(saved):
            with tier.allocate(_NBYTES) as block:
                tier.fetch(block, buffer)
                buffer.release()
                values = _view(tier, block)
                device.launch(partial(total.mul_, 3))
                device.launch(partial(total.add_, values))
        return _out(device, total)


def update_in_place(device: Accelerator, pinners: Sequence[Pinner]) -> torch.Tensor:
    """One block is fetched, changed and evicted again and again, through the same buffer."""
    with _tiers(device, pinners, blocks=1, buffers=1) as (tier, pool):
        block, buffer = tier.allocate(_NBYTES), pool.allocate(_NBYTES)
        _fill(pool, buffer, 1)
        for step in range(_LAYERS):
            tier.fetch(block, buffer)
            values = _view(tier, block)
            device.launch(partial(values.mul_, 2))
            device.launch(partial(values.add_, step))
            tier.evict(block, buffer)
        return pool.tensor(buffer, torch.float32, _SHAPE).clone()  # waits


def snapshots(device: Accelerator, pinners: Sequence[Pinner]) -> torch.Tensor:
    """A block is evicted at each step, while kernels and fetches go on changing it."""
    with _tiers(device, pinners, blocks=1, buffers=_LAYERS + 1) as (tier, pool):
        block, source = tier.allocate(_NBYTES), pool.allocate(_NBYTES)
        _fill(pool, source, 100)
        tier.fetch(block, source)
        targets = []
        for step in range(_LAYERS):
            values = _view(tier, block)
            device.launch(partial(values.add_, step + 1))
            targets.append(pool.allocate(_NBYTES))
            tier.evict(block, targets[-1])
            if step % 3 == 2:
                tier.fetch(block, source)
        return torch.cat([pool.tensor(target, torch.float32, _SHAPE) for target in targets])


def missing_wait(device: Accelerator, pinners: Sequence[Pinner]) -> torch.Tensor:
    """The kernel does not wait for the fetch: its view is older than the fetch."""
    with _tiers(device, pinners) as (tier, pool):
        block, out, buffer = tier.allocate(_NBYTES), tier.allocate(_NBYTES), pool.allocate(_NBYTES)
        _fill(pool, buffer, 3)
        values, result = _view(tier, block), _view(tier, out)
        tier.used(block)
        tier.fetch(block, buffer)
        device.launch(partial(torch.mul, values, 2, out=result))
        return _out(device, result)


def buffer_back_too_early(device: Accelerator, pinners: Sequence[Pinner]) -> torch.Tensor:
    """The pool is not told of the fetch, and gives its source to the next."""
    with _tiers(device, pinners, buffers=1) as (tier, pool):
        blocks = [tier.allocate(_NBYTES) for _ in range(2)]
        for value, block in enumerate(blocks):
            with pool.allocate(_NBYTES) as buffer:
                _fill(pool, buffer, value + 1)
                tier.write(block, pool.address(buffer))
        return _out(device, _view(tier, blocks[0]))


def reuse_before_last_kernel(device: Accelerator, pinners: Sequence[Pinner]) -> torch.Tensor:
    """A kernel is enqueued on a view after the block was declared used, and its bytes go on."""
    with _tiers(device, pinners) as (tier, pool):
        out = _view(tier, tier.allocate(_NBYTES))
        with tier.allocate(_NBYTES) as block:
            values = _view(tier, block)
            device.launch(partial(values.fill_, 5))
            tier.used(block)
            device.launch(partial(torch.mul, values, 2, out=out))
        with tier.allocate(_NBYTES) as block, pool.allocate(_NBYTES) as buffer:
            _fill(pool, buffer, 7)
            tier.fetch(block, buffer)
        return _out(device, out)


def host_reads_too_early(device: Accelerator, pinners: Sequence[Pinner]) -> torch.Tensor:
    """The host reads the target of an eviction without waiting for it."""
    with _tiers(device, pinners) as (tier, pool):
        block, buffer = tier.allocate(_NBYTES), pool.allocate(_NBYTES)
        values = pool.tensor(buffer, torch.float32, _SHAPE).fill_(1)
        device.launch(partial(_view(tier, block).fill_, 4))
        tier.evict(block, buffer)
        return values.clone()


def back_before_there(device: Accelerator, pinners: Sequence[Pinner]) -> torch.Tensor:
    """Two tiers of one device share a buffer, and none knows of the other's copy."""
    with _tiers(device, pinners) as (tier, pool), DeviceTier(device, _NBYTES) as other:
        buffer = pool.allocate(_NBYTES)
        _fill(pool, buffer, 1)
        first, second = tier.allocate(_NBYTES), other.allocate(_NBYTES)
        device.launch(partial(_view(tier, first).fill_, 4))
        tier.read(first, pool.address(buffer))
        other.write(second, pool.address(buffer))
        return _out(device, _view(other, second))


RIGHT: dict[str, Scenario] = {
    call.__name__: call
    for call in (
        round_trip,
        stream_layers,
        planned_addresses,
        there_and_back,
        update_in_place,
        snapshots,
    )
}
RACY: dict[str, Scenario] = {
    call.__name__: call
    for call in (
        missing_wait,
        buffer_back_too_early,
        reuse_before_last_kernel,
        host_reads_too_early,
        back_before_there,
    )
}
