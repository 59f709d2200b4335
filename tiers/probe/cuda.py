"""Links between memory and CUDA devices, from pageable and from pinned memory."""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from offload.allocator.errors import TierIOError
from offload.tiers.pinned import PinnedTier
from offload.tiers.pinning import CudaPinner
from offload.tiers.probe.pace import Effort, Pace, Route

if TYPE_CHECKING:
    import torch

_BLOCKS = (1 << 20, 8 << 20, 32 << 20)
_BUFFER_NBYTES = 64 << 20

CASES = 4 * (len(_BLOCKS) + 1)  # shares of the time that a device takes


def count_devices() -> int:
    """CUDA devices that torch can use; imports torch, and none without it."""
    try:
        import torch
    except ImportError:
        return 0
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


@contextmanager
def open_device(effort: Effort, index: int, _pace: Pace) -> Iterator[tuple[Route, ...]]:
    """The four links of device ``index``: from pageable memory and a pinned pool, both ways.

    Raises:
        RuntimeError: torch could not allocate on the device.
        TierIOError: the pool could not be registered with CUDA.
    """
    import torch

    device = torch.device("cuda", index)
    nbytes = min(_BUFFER_NBYTES, effort.memory_nbytes // 2)
    held = torch.empty(nbytes, dtype=torch.uint8, device=device)
    pageable = torch.ones(nbytes, dtype=torch.uint8)  # touched
    blocks = tuple(block for block in _BLOCKS if block <= nbytes)
    name = f"device:{index}"
    finish = partial(torch.cuda.synchronize, device)
    with PinnedTier(nbytes, pinners=[CudaPinner()]) as pool:
        if pool.memory != CudaPinner.name:
            raise TierIOError(errno.EPERM, "; ".join(pool.journal.notices))
        pinned = pool.tensor(pool.allocate(nbytes), torch.uint8, (nbytes,)).fill_(1)
        yield tuple(
            route
            for host, memory in (("host", pageable), ("pinned", pinned))
            for route in (
                copy_route(host, name, memory, held, blocks, finish),
                copy_route(name, host, held, memory, blocks, finish),
            )
        )


def copy_route(
    source: str,
    target: str,
    read: "torch.Tensor",  # (nbytes,) bytes
    written: "torch.Tensor",  # (nbytes,) bytes
    blocks: tuple[int, ...],
    finish: Callable[[], None],
) -> Route:
    """A link by torch's own copies; ``finish`` returns when the device has ended them."""

    def move(block_nbytes: int, count: int) -> None:
        for number in range(count):
            at = number % (read.numel() // block_nbytes) * block_nbytes
            part = slice(at, at + block_nbytes)
            written[part].copy_(read[part], non_blocking=True)
        finish()

    return Route(source=source, target=target, blocks=blocks, in_flight=1, move=move)
