"""The homes of saved activations: those of an engine, and those of a swap that has none."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from offload.allocator.errors import TierIOError
from offload.config import OffloadConfig
from offload.runtime import Runtime, open_lanes
from offload.swap.activations import ActivationCache
from offload.swap.census import named_weights
from offload.swap.ferry import Ferry
from offload.swap.gradients import MIN_NBYTES
from offload.swap.homes import FileHome, Home, MemoryHome
from offload.swap.optim_kinds import state_nbytes
from offload.swap.places import DevicePlace, HostPlace, Place
from offload.swap.plan import Plan
from offload.swap.state_precision import EXACT, Precision
from offload.swap.weights import WeightSwapper
from offload.swap.writebudget import BudgetedHome, WriteBudget
from offload.tiers.accelerator import Accelerator
from offload.tiers.base import Tier
from offload.tiers.cuda import CudaAccelerator
from offload.tiers.engines.registry import AUTO
from offload.tiers.filetier import FileTier
from offload.tiers.journal import Journal
from offload.tiers.lanes import Lane
from offload.tiers.numa import NumaTier
from offload.tiers.pinned import PinnedTier
from offload.tiers.pinning import CudaPinner, Pinner

_IN_FLIGHT_NBYTES = 64 << 20
_DEVICE_SHARE = 32


def make_homes(
    runtime: Runtime, model: nn.Module, optimizer: Optimizer | None
) -> tuple[list[Home], WriteBudget | None]:
    """Scratch, within the write budget if there is one.

    Raises:
        BudgetError: the step must write more than the budget.
    """
    scratch = FileHome(runtime.activation_scratch)
    limit = runtime.config.nvme_write_budget
    if limit is None:
        return [scratch], None
    writes = step_writes_nbytes(model, optimizer, runtime.precision)
    budget = WriteBudget(runtime.journal, limit, writes)
    return [BudgetedHome(scratch, budget)], budget


def open_cache(
    homes: Sequence[Home],
    runtime: Runtime,
    plan: Plan,
    model: nn.Module,
    weights: WeightSwapper,
) -> ActivationCache:
    """What a model on the CPU saves, kept within the plan; it knows the model's weights."""
    activations = ActivationCache(
        homes,
        runtime.journal,
        limit_nbytes=plan.activations_nbytes,
        min_nbytes=runtime.config.min_swap_nbytes,
        weights=weights,
        room=runtime.governor.room,
        is_tight=runtime.governor.is_tight,
    )
    activations.fixed.know_model(model)
    activations.fixed.know_weights(
        {
            weight.mapped.tensor.untyped_storage()._cdata: name
            for name, weight in weights.weights.items()
        }
    )
    return activations


def step_writes_nbytes(
    model: nn.Module, optimizer: Optimizer | None, precision: Precision = EXACT
) -> int:
    """What a step writes whatever happens: what is trained, its gradients and states."""
    trained = [
        parameters[0].nbytes
        for _, parameters in named_weights(model)
        if any(parameter.requires_grad for parameter in parameters)
    ]
    gradients = sum(nbytes for nbytes in trained if nbytes >= MIN_NBYTES)
    if optimizer is None:
        return gradients
    return gradients + sum(trained) + state_nbytes(optimizer, precision=precision)


def budgets_of(config: OffloadConfig, host_nbytes: int) -> dict[str, int]:
    """The budgets that a run's record names."""
    named = {
        "host": host_nbytes,
        "device": config.budget.get("device"),
        "nvme_write": config.nvme_write_budget,
        "nvme_endurance": config.nvme_endurance,
    }
    return {name: nbytes for name, nbytes in named.items() if nbytes is not None}


class SwapHomes:
    """Opens homes, fastest first: a pool of pinned memory, memory nodes, a scratch file.

    Args:
        accelerator: the device that saved tensors are on; None: they are in host memory.
        opened: closes what is opened here, last first.
        workers: requests in flight in each direction of a home.
        ferry: carries between the device and homes that are not pinned; by default one of its own.

    Attributes:
        place: where saved tensors live.
    """

    def __init__(
        self,
        accelerator: Accelerator | None,
        journal: Journal,
        opened: ExitStack,
        *,
        workers: int,
        ferry: Ferry | None = None,
    ) -> None:
        self.homes: list[Home] = []
        self.place: Place = HostPlace()
        self._ferry = ferry
        self._accelerator = accelerator
        self._journal = journal
        self._opened = opened
        self._workers = workers
        self._pinners = pinners_of(accelerator)

    def open(
        self, memory_nbytes: int | None, node_nbytes: Mapping[int, int], nvme: Path | None
    ) -> None:
        """Open the homes that are given.

        Raises:
            TierIOError: the directory can't be written.
            CapacityError, ConfigError: a node that does not exist, or has not so much memory.
        """
        if self._accelerator is not None:
            staged = len(node_nbytes) + (nvme is not None)
            ferry = self._ferry
            if ferry is None:
                ferry = Ferry(
                    self._accelerator,
                    self._journal,
                    buffers=2 * staged * self._workers,
                    pinners=self._pinners,
                )
                self._opened.callback(ferry.close)
            self.place = DevicePlace(ferry, self._journal)
        if memory_nbytes is not None:
            self._add_memory(
                PinnedTier(
                    memory_nbytes, pinners=self._pinners, journal=self._journal, name="memory"
                )
            )
        for node, nbytes in sorted(node_nbytes.items()):
            self._add_memory(NumaTier(node, nbytes, journal=self._journal))
        if nvme is not None:
            self._add_files(nvme)

    def _add_memory(self, tier: Tier) -> None:
        self._opened.enter_context(tier)
        name = tier.spec.name
        links = f"{name}→host", f"host→{name}"
        reads, writes = (Lane(link, self._workers, self._journal) for link in links)
        self._opened.callback(reads.close)
        self._opened.callback(writes.close)
        self.homes.append(MemoryHome(tier, reads, writes))

    def _add_files(self, directory: Path) -> None:
        lanes = open_lanes([directory], self._journal, io_engine=AUTO, workers=self._workers)
        self._opened.callback(lanes.close)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TierIOError(
                error.errno,
                f"can't make {directory} ({error.strerror}): pass another directory with nvme=",
            ) from error
        tier = self._opened.enter_context(FileTier(directory, None, lanes))
        self.homes.append(FileHome(tier))


def in_flight_by_default(accelerator: Accelerator | None) -> int:
    """Bytes of saved tensors on their way: a fast device saves many large ones in a short time."""
    total = accelerator.total_nbytes() if accelerator is not None else None
    return max(_IN_FLIGHT_NBYTES, (total or 0) // _DEVICE_SHARE)


def pinners_of(accelerator: Accelerator | None) -> tuple[Pinner, ...]:
    """Ways to make host memory fit for the copy engine of ``accelerator``."""
    return (CudaPinner(),) if isinstance(accelerator, CudaAccelerator) else ()


def device_of(model: nn.Module | None) -> Accelerator | None:
    """The GPU that ``model`` is on, if it is on one."""
    for parameter in model.parameters() if model is not None else ():
        if parameter.device.type == "cuda":
            return CudaAccelerator(parameter.device)
    return None
