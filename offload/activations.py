"""Saved activations of any code, swapped without an engine.

swap = offload.ActivationSwap(model, limit="1GiB", nvme="/data/nvme")
for batch in loader:
with swap:
loss = model(batch)
loss.backward()
swap.close()
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import nn

from offload.allocator.errors import ConfigError
from offload.allocator.units import parse_nbytes, parse_size
from offload.config import OffloadConfig, make_config
from offload.interrupts import deliver_lost_interrupts
from offload.recomputing import rebuild_rows
from offload.saving import SwapHomes, device_of, in_flight_by_default
from offload.swap.activations import ActivationCache
from offload.swap.selective import put_on, take_off
from offload.tiers import hostmem
from offload.tiers.accelerator import Accelerator
from offload.tiers.journal import Journal


class ActivationSwap:
    """A context: what autograd saves inside it is swapped beyond ``limit``.

    It may be entered any number of times, and nested. Backward may run inside or outside of it.
    Compiled functions may be called inside of it; inside of them the compiler decides what is
    saved, so that it refuses to enter this context there.

    Args:
        model: its parameters and buffers are never moved. Without one only parameters that are
            saved as such are told from activations; their transposes are moved too.
        limit: of saved tensors that stay where they are; a size such as ``"1GiB"``. Plain numbers
            are bytes, and below a MiB refused for want of a unit, here and in all sizes but
            ``min_nbytes``: write ``"24B"``.
        in_flight: of saved tensors that are leaving, or are fetched ahead of their use; by default
            64 MiB, or on a GPU a 32nd of its memory if that is more. On a GPU the newest quarter
            of it leaves later: what is saved again meanwhile is then copied once.
        memory: of host memory. A model on a GPU swaps to a pinned pool of that size first; on the
            CPU saved tensors are in host memory already, and so many more stay.
        nodes: of memory nodes (CXL, NUMA) by their number, which take what that has no room for.
        nvme: directory whose unlinked scratch file takes the rest.
        min_nbytes: smaller storages move in batches.
        io_threads: requests in flight in each direction.
        recompute: ``tokenwise`` rebuilds token rows of what the blocks of ``model`` save.
        alpha, relaxed, blocks: of it, as in the settings.
        accelerator: whose tensors are swapped; by default the GPU that the model is on, or none.

    Raises:
        ConfigError: no place to go, a size or a node that can't be read, a path through a symbolic
            link, recompute without a model, or blocks that it has not.
        TierIOError: the directory can't be written.
        CapacityError: a memory node has not so much memory.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        limit: str | int = 0,
        memory: str | int | None = None,
        nodes: Mapping[int, str | int] | None = None,
        nvme: str | Path | None = None,
        in_flight: str | int | None = None,
        min_nbytes: str | int = 64 << 10,
        io_threads: int = 4,
        recompute: str = "off",
        alpha: float | str | None = None,
        relaxed: bool | None = None,
        blocks: Sequence[str] | None = None,
        accelerator: Accelerator | None = None,
        journal: Journal | None = None,
    ) -> None:
        limit_nbytes = _size("limit", limit)
        least_nbytes = _read("min_nbytes", min_nbytes, parse_nbytes)
        in_flight_nbytes = None if in_flight is None else _size("in_flight", in_flight)
        config = make_config(
            OffloadConfig(),
            recompute=recompute,
            alpha=alpha,
            relaxed=relaxed,
            blocks=blocks,
            min_swap_nbytes=least_nbytes,
        )
        if config.recompute != "off" and model is None:
            raise ConfigError("recompute finds the blocks in the model: pass model=")
        memory_nbytes = None if memory is None else _size("memory", memory)
        node_nbytes = {_node(node): _size("nodes", size) for node, size in (nodes or {}).items()}
        if memory_nbytes is None and nvme is None and not node_nbytes:
            raise ConfigError("saved activations need a place to go: pass memory=, nodes= or nvme=")
        hostmem.return_freed_memory()
        deliver_lost_interrupts()
        self.journal = journal or Journal()
        self.tokenwise = None
        accelerator = accelerator or device_of(model)
        if in_flight_nbytes is None:
            in_flight_nbytes = in_flight_by_default(accelerator)
        if accelerator is None and memory_nbytes is not None:  # they are there: nothing to copy
            limit_nbytes, memory_nbytes = limit_nbytes + memory_nbytes, None
        with ExitStack() as opened:
            homes = SwapHomes(accelerator, self.journal, opened, workers=io_threads)
            homes.open(memory_nbytes, node_nbytes, None if nvme is None else Path(nvme))
            self.cache = ActivationCache(
                homes.homes,
                self.journal,
                limit_nbytes=limit_nbytes,
                min_nbytes=least_nbytes,
                in_flight_nbytes=in_flight_nbytes,
                place=homes.place,
            )
            if model is not None:
                self.cache.fixed.know_model(model)
                self.tokenwise = rebuild_rows(model, self.cache, config)
            self._opened = opened.pop_all()
        self._closed = False

    def __enter__(self) -> Self:
        self.cache.begin_pass("swap")
        put_on(self.cache, self.tokenwise)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        take_off()

    def close(self) -> None:
        """Give memory and scratch back; safe to call twice.

        Tensors that are still saved then, and have left memory, can't be used any more.
        """
        if not self._closed:
            self._closed = True
            if self.tokenwise is not None:
                self.tokenwise.remove()
            self.cache.close()
            self._opened.close()


def _node(number: object) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise ConfigError(
            f"nodes: {number!r} is not the number of a memory node: write {{1: '16GiB'}}"
        )
    return number


def _size(name: str, value: str | int) -> int:
    return _read(name, value, parse_size)


def _read(name: str, value: str | int, parse: Callable[[str | int], int]) -> int:
    try:
        return parse(value)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error
