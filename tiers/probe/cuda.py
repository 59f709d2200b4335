"""CUDA devices: their links, from pageable and from pinned memory, and their rates."""

import dataclasses
import errno
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from offload.allocator.errors import OffloadError, TierIOError
from offload.tiers.machine import ComputeRate, Machine
from offload.tiers.pinned import PinnedTier
from offload.tiers.pinning import CudaPinner
from offload.tiers.probe.device import CASES as ROUTE_CASES
from offload.tiers.probe.device import device_routes, measure_device
from offload.tiers.probe.pace import Effort, Pace, Route

_BUFFER_NBYTES = 64 << 20

CASES = 4 * ROUTE_CASES  # shares of the time that a device takes


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
        CapacityError: no room on the device.
        RuntimeError: the device can't be used.
        TierIOError: the pool could not be registered with CUDA.
    """
    import torch

    from offload.tiers.cuda import CudaAccelerator

    nbytes = min(_BUFFER_NBYTES, effort.memory_nbytes // 2)
    pageable = torch.ones(nbytes, dtype=torch.uint8)  # touched
    with (
        CudaAccelerator(f"cuda:{index}") as accelerator,
        PinnedTier(nbytes, pinners=[CudaPinner()]) as pool,
    ):
        if pool.memory != CudaPinner.name:
            raise TierIOError(errno.EPERM, "; ".join(pool.journal.notices))
        block = pool.allocate(nbytes)
        pool.tensor(block, torch.uint8, (nbytes,)).fill_(1)
        addresses = {"host": pageable.data_ptr(), "pinned": pool.address(block)}
        yield device_routes(accelerator, f"device:{index}", addresses, nbytes)


def add_devices(
    machine: Machine, *, progress: Callable[[str], None] = lambda _text: None
) -> tuple[Machine, Mapping[str, str]]:
    """``machine``, which is this one, with the rates of its CUDA devices.

    Returns:
        And why a processor could not be measured, by its name.
    """
    from offload.tiers.cuda import CudaAccelerator

    known = {processor.name for processor in machine.processors}
    rates: list[ComputeRate] = []
    failures: dict[str, str] = {}
    for name in (f"cuda:{index}" for index in range(count_devices())):
        if name not in known:
            continue
        try:
            with CudaAccelerator(name) as accelerator:
                rates += measure_device(accelerator, name, progress=progress)
        except (OffloadError, RuntimeError) as error:  # torch raises RuntimeError
            failures[name] = str(error)
    return dataclasses.replace(machine, compute=(*machine.compute, *rates)), failures
