"""Saved activations of any code, swapped without an engine.

swap = offload.ActivationSwap(model, limit="1GiB", nvme="/data/nvme")
for batch in loader:
with swap:
loss = model(batch)
loss.backward()
swap.close()
"""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import nn

from offload.allocator.errors import ConfigError
from offload.allocator.units import parse_nbytes
from offload.config import OffloadConfig, make_config
from offload.recomputing import rebuild_rows
from offload.swap.activations import ActivationCache
from offload.swap.homes import FileHome, Home, MemoryHome
from offload.swap.selective import put_on, take_off
from offload.swap.tokenwise.tokenwise import TokenWise
from offload.tiers import hostmem
from offload.tiers.filetier import FileTier, Lanes
from offload.tiers.journal import Journal
from offload.tiers.lanes import Lane
from offload.tiers.ram import RamTier


class ActivationSwap:
    """A context: what autograd saves inside it is swapped beyond ``limit``.

    It may be entered any number of times, and nested. Backward may run inside or outside of it.
    Compiled functions may be called inside of it; inside of them the compiler decides what is
    saved, so that it refuses to enter this context there.

    Args:
        model: its parameters and buffers are never moved. Without one only parameters that are
            saved as such are told from activations; their transposes are moved too.
        limit: of saved tensors that stay where they are; bytes, or a size such as ``"1GiB"``.
        in_flight: of saved tensors that are leaving, or are fetched ahead of their use.
        memory: of a pool of host memory that they go to first.
        nvme: directory whose unlinked scratch file takes the rest.
        min_nbytes: smaller storages move in batches.
        io_threads: requests in flight in each direction.
        recompute: ``tokenwise`` rebuilds token rows of what the blocks of ``model`` save.
        alpha, relaxed, blocks: of it, as in the settings.

    Raises:
        ConfigError: neither ``memory`` nor ``nvme``, a size that can't be read, recompute without
            a model, or blocks that it has not.
        TierIOError: the directory can't be written.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        limit: str | int = 0,
        memory: str | int | None = None,
        nvme: str | Path | None = None,
        in_flight: str | int = "64MiB",
        min_nbytes: str | int = 64 << 10,
        io_threads: int = 4,
        recompute: str = "off",
        alpha: float | str | None = None,
        relaxed: bool | None = None,
        blocks: Sequence[str] | None = None,
        journal: Journal | None = None,
    ) -> None:
        limit_nbytes, least_nbytes = _size("limit", limit), _size("min_nbytes", min_nbytes)
        in_flight_nbytes = _size("in_flight", in_flight)
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
        if memory_nbytes is None and nvme is None:
            raise ConfigError("saved activations need a place to go: pass memory= or nvme=")
        hostmem.return_freed_memory()
        self.journal = journal or Journal()
        self._closing: list[Any] = []
        homes: list[Home] = []
        try:
            if memory_nbytes is not None:
                homes.append(self._open_memory(memory_nbytes, io_threads))
            if nvme is not None:
                homes.append(self._open_files(Path(nvme), io_threads))
        except BaseException:
            self._close_parts()
            raise
        self.cache = ActivationCache(
            homes,
            self.journal,
            limit_nbytes=limit_nbytes,
            min_nbytes=least_nbytes,
            in_flight_nbytes=in_flight_nbytes,
        )
        self.tokenwise = None
        if model is not None:
            self.cache.know_model(model)
            self.tokenwise = self._rebuild_rows(model, config)

    def _rebuild_rows(self, model: nn.Module, config: OffloadConfig) -> TokenWise | None:
        try:
            return rebuild_rows(model, self.cache, config)
        except BaseException:
            self._close_parts()
            raise

    def _open_memory(self, nbytes: int, workers: int) -> Home:
        tier = RamTier(nbytes, name="memory")
        reads, writes = (
            Lane(name, workers, self.journal) for name in ("memory→host", "host→memory")
        )
        self._closing += [tier, reads, writes]
        return MemoryHome(tier, reads, writes)

    def _open_files(self, directory: Path, workers: int) -> Home:
        directory.mkdir(parents=True, exist_ok=True)
        lanes = Lanes(self.journal, workers)
        self._closing.append(lanes)
        tier = FileTier(directory, None, lanes)
        self._closing.insert(0, tier)
        return FileHome(tier)

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
        if self._closing:
            if self.tokenwise is not None:
                self.tokenwise.remove()
            self.cache.close()
            self._close_parts()

    def _close_parts(self) -> None:
        while self._closing:
            self._closing.pop().close()


def _size(name: str, value: str | int) -> int:
    try:
        return parse_nbytes(value)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error
