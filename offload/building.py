"""Building a model straight into the store: no moment holds it whole in memory.

Each parameter gets its stable address when its module registers it, before it is initialised:
initialisation then writes through a shared mapping to the store, with the random numbers of a
plain construction, and the governor sheds the written pages.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from offload.config import OffloadConfig, make_config
from offload.runtime import Runtime
from offload.swap.census import unmovable_reason
from offload.tiers.mapped import MappedTensor
from offload.tiers.memory import HostBuffer
from offload.tiers.store import StoredTensor, checksum

MIN_NBYTES = 64 << 10  # smaller parameters are built in memory
_PLACE_NBYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Built:
    """A weight that stands in a store without a model yet."""

    runtime: Runtime
    stored: StoredTensor
    mapped: MappedTensor

    def seal(self) -> None:
        """Checksum what was written; from now on the user's writes stay private to the page."""
        assert self.stored.current is not None
        tier = self.runtime.store.tier
        staging = HostBuffer(max(1, min(self.stored.chunk_nbytes, self.stored.nbytes)))
        try:
            for at, nbytes in self.stored.chunks():
                tier.read(self.stored.current, staging.address, offset=at, nbytes=nbytes).wait()
                self.stored.checksums.append(checksum(staging.address, nbytes))
        finally:
            staging.release()
        self.mapped.shared = False
        self.mapped.file_as(self.stored.current)


# By address: how ``attach`` finds out that a parameter already stands in a store.
_built: dict[int, Built] = {}


def built_weight(parameter: torch.Tensor) -> Built | None:
    """The weight behind ``parameter`` if it was built in a store and is still there."""
    return _built.get(parameter.data_ptr()) if parameter.numel() else None


def runtime_of(model: nn.Module) -> Runtime | None:
    """The runtime whose store ``model`` was built in, if it was."""
    for parameter in model.parameters():
        built = built_weight(parameter)
        if built is not None:
            return built.runtime
    return None


def claim(built: Built) -> None:
    """An engine takes the weight over: it is no longer merely built."""
    del _built[built.mapped.address]


def drop_unclaimed(runtime: Runtime) -> None:
    """Forget weights of ``runtime`` that were built and then replaced by others."""
    for built in [built for built in _built.values() if built.runtime is runtime]:
        claim(built)
        runtime.store.drop(built.stored)


class Building:
    """The context of ``offload.init``."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._hook: Any = None

    def __enter__(self) -> Self:
        self._hook = register_module_parameter_registration_hook(self._on_register)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hook.remove()
        if error is not None:
            drop_unclaimed(self.runtime)
            self.runtime.close()

    def _on_register(self, _module: nn.Module, _name: str, parameter: Any) -> None:
        if (
            type(parameter) is nn.Parameter
            and parameter.nbytes >= MIN_NBYTES
            and unmovable_reason(parameter) is None
            and built_weight(parameter) is None
        ):
            self.place(parameter)

    def place(self, parameter: nn.Parameter, *, copy: bool = True) -> Built:
        """Give ``parameter`` its home in the store; its present values go there too."""
        source = parameter.data
        built = self.allocate(source.dtype, source.shape)
        if copy:
            # Blocks are zero when new: memory that was never written costs no write either.
            from_bytes = source.reshape(-1).view(torch.uint8)
            to_bytes = built.mapped.tensor.reshape(-1).view(torch.uint8)
            for at in range(0, built.mapped.nbytes, _PLACE_NBYTES):
                part = from_bytes[at : at + _PLACE_NBYTES]
                if part.any():
                    to_bytes[at : at + _PLACE_NBYTES].copy_(part)
        parameter.data = built.mapped.tensor
        return built

    def allocate(self, dtype: torch.dtype, shape: Sequence[int]) -> Built:
        """A weight of zeros in the store."""
        store = self.runtime.store
        chunk_nbytes = self.runtime.chunk_numel * dtype.itemsize
        stored = store.add(f"built {self.runtime.next_number()}", dtype, tuple(shape), chunk_nbytes)
        stored.current = store.tier.allocate(stored.nbytes)
        store.tier.clear(stored.current)
        mapped = MappedTensor(store.tier.file, dtype, shape, shared=True)
        mapped.file_as(stored.current)
        built = Built(self.runtime, stored, mapped)
        _built[mapped.address] = built
        self.runtime.governor.watch(mapped)
        return built


def init(
    *,
    budget: str | int | Mapping[str, Any] | None = None,
    nvme: str | Path | Sequence[str | Path] | None = None,
    config: OffloadConfig | str | Path | Mapping[str, Any] | None = None,
) -> Building:
    """Context in which modules are built straight into the store.

    ``with offload.init(budget="host=4GiB", nvme="/data"): model = Model()`` draws the same
    random numbers as a plain construction. Pass the model to ``offload.attach`` afterwards.

    Args:
        budget: bytes per tier, as for ``attach``.
        nvme: the directory of the store, or several, as for ``attach``.
        config: file or mapping with the same keys; arguments win over it.

    Raises:
        ConfigError: wrong arguments.
        StoreInUseError: another process holds the store.
        CapacityError: the disk is full (raised where a module is built).
    """
    return Building(Runtime(make_config(config, budget=budget, nvme=nvme)))
