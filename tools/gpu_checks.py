"""The checks of ``gpu_check``: each on a real CUDA device or on the simulated one."""

import itertools
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

import contract_runner
import gpu_attach
import gpu_attached
import gpu_rates
import gpu_step
from gpu_activations import SWAP_HOMES, Swap, step_gradients
from gpu_caching import model_agrees, random_requests, recorded_step
from gpu_report import Outcome, Report
from gpu_tokenwise import AlphaChecks, Rebuilt, train
from gpu_training import HOMES, UnderTest, initial, train_resident, train_swapped
from offload.allocator.errors import CapacityError
from offload.swap.tokenwise.plans import Settings
from offload.tiers.accelerator import Accelerator
from offload.tiers.base import Block, Tier
from offload.tiers.cuda import CudaAccelerator, DelayedCudaAccelerator
from offload.tiers.device import DeviceTier
from offload.tiers.hostmem import page_ceil
from offload.tiers.journal import Journal
from offload.tiers.pinned import PinnedTier
from offload.tiers.pinning import CudaPinner, Pinner
from offload.tiers.simulated.accelerator import SimulatedAccelerator
from offload.tiers.simulated.deferred import Deferred
from offload.tiers.simulated.races import find_race
from offload.tiers.simulated.scenarios import RACY, RIGHT

MIB = 1 << 20
_SCENARIO_LIMIT_S = 20.0  # of one race scenario: the whole command stays under 8 minutes
_RATE_NBYTES = 256 * MIB
_RATE_REPEATS = 9


class Cuda:
    """The current CUDA device."""

    def __init__(self) -> None:
        self.name = torch.cuda.get_device_name()
        self.pinners: Sequence[Pinner] = (CudaPinner(),)

    def open(self) -> Accelerator:
        """The device, poisoned wherever nobody may read."""
        return CudaAccelerator(checked=True)

    def open_delayed(self, seed: int) -> Accelerator:
        """The device with its streams held up."""
        return DelayedCudaAccelerator(seed)

    def place(self, values: torch.Tensor) -> torch.Tensor:
        """A copy in device memory, made by torch."""
        return values.cuda()

    def computing(self, accelerator: Accelerator) -> AbstractContextManager[object]:
        """Inside, torch computes on the device."""
        del accelerator
        return nullcontext()


class Simulated:
    """The simulated device."""

    name = "simulated"
    pinners: Sequence[Pinner] = ()

    def open(self) -> Accelerator:
        """The device under one seed."""
        return SimulatedAccelerator(seed=1)

    def open_delayed(self, seed: int) -> Accelerator:
        """The device under ``seed``."""
        return SimulatedAccelerator(seed)

    def place(self, values: torch.Tensor) -> torch.Tensor:
        """A copy in memory."""
        return values.clone()

    def computing(self, accelerator: Accelerator) -> AbstractContextManager[object]:
        """Inside, what torch computes becomes kernels of ``accelerator``."""
        return Deferred(accelerator)


def run_all(report: Report, device: UnderTest, *, quick: bool) -> None:
    """Run every check that ``device`` can run."""
    report.run("contract", "device tier", partial(device_contract, device))
    report.run("contract", "pinned pool", partial(pinned_contract, device))
    seeds = range(20 if quick else 300)
    for name in RIGHT:
        report.run("races", name, partial(right_code_is_right, device, name, seeds))
    for name in RACY:
        report.run("races", f"planted: {name}", partial(planted_race_is_found, device, name))
    for home in HOMES:
        report.run("exact", f"device and {home}", partial(training_is_exact, device, home))
    for home in SWAP_HOMES:
        name = f"activations to {home}"
        few = seeds[: 4 if quick else None]
        report.run("exact", name, partial(activations_are_exact, device, home, few))
    if isinstance(device, Cuda):
        for alpha in (0.0, 0.5):
            name = f"token rows rebuilt, alpha {alpha}"
            report.run("exact", name, partial(rows_are_exact, device, alpha))
        report.run("exact", "token rows rebuilt, relaxed", partial(rows_are_close, device))
        run_alpha(report, device)
    gpu_rates.run_checks(report, device, real=isinstance(device, Cuda))
    report.run("pool", "exact size", partial(pool_size_is_exact, device))
    if isinstance(device, Cuda):
        report.run("pool", "nothing left behind", nothing_is_left)  # budgets would count it
    gpu_attach.run_checks(report, device, quick=quick)
    gpu_step.run_checks(report, device, quick=quick)
    if isinstance(device, Cuda):
        gpu_attach.run_arena_checks(report)
        report.run("pool", "registered", pool_is_pinned)
        for direction in ("H2D", "D2H"):
            report.run("pool", f"{direction} rate", partial(pool_rate, direction))
        report.run("budget", "limit and peak", limit_holds)
        run_caching(report)


def run_alpha(report: Report, device: UnderTest) -> None:
    """What ``alpha`` is solved from; the model that they share goes with the last of them."""
    for name, check in AlphaChecks(device).all().items():
        report.run("alpha", name, check)


def nothing_is_left() -> Outcome:
    """Checks before this one have given back what they had on the device."""
    gpu_attached.forget()
    left = torch.cuda.memory_allocated()
    return Outcome(f"{left} bytes", holds=left < MIB, value=left, target="< 1 MiB")


def run_caching(report: Report) -> None:
    """Hold our model of torch's caching allocator against the real one."""
    report.run("caching", "model, training steps", partial(model_agrees, recorded_step))
    for seed in range(3):
        requests = partial(random_requests, seed)
        report.run("caching", f"model, random requests {seed}", partial(model_agrees, requests))


# -- contracts ------------------------------------------------------------------------------------


def _contract_outcome(contract: Any) -> Outcome:
    count, failures = contract_runner.run_contract(contract)
    told = f"{count - len(failures)} of {count} tests pass"
    return Outcome("; ".join([told, *failures]), holds=not failures and count > 0)


def device_contract(device: UnderTest) -> Outcome:
    """Every test of ``TierContract`` on a device tier."""
    from offload.tiers.testing import TierContract

    class Contract(TierContract):
        large_nbytes = MIB + 4097

        @contextmanager
        def open_tier(self, directory: Path) -> Iterator[Tier]:
            del directory
            with device.open() as opened, DeviceTier(opened, 5 * self.large_nbytes) as tier:
                yield tier

        def peek(self, tier: Tier, block: Block, offset: int, nbytes: int) -> bytes:
            return bytes(self._bytes(tier, block, offset, nbytes).cpu().numpy())

        def poke(self, tier: Tier, block: Block, offset: int, data: bytes) -> None:
            source = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            self._bytes(tier, block, offset, len(data)).copy_(source)
            if torch.cuda.is_available():
                torch.cuda.synchronize()

        def _bytes(self, tier: Tier, block: Block, offset: int, nbytes: int) -> torch.Tensor:
            assert isinstance(tier, DeviceTier)
            assert tier._memory is not None
            tier.accelerator.synchronize()
            return tier._memory.bytes_at(block.extent.offset + offset, nbytes)

    return _contract_outcome(Contract())


def pinned_contract(device: UnderTest) -> Outcome:
    """Every test of ``TierContract`` on a pinned pool."""
    from offload.tiers.memory import memory_at
    from offload.tiers.testing import TierContract

    class Contract(TierContract):
        large_nbytes = MIB + 4097

        @contextmanager
        def open_tier(self, directory: Path) -> Iterator[Tier]:
            del directory
            with PinnedTier(5 * self.large_nbytes, pinners=device.pinners, checked=True) as pool:
                yield pool

        def peek(self, tier: Tier, block: Block, offset: int, nbytes: int) -> bytes:
            assert isinstance(tier, PinnedTier)
            return bytes(memory_at(tier.address(block) + offset, nbytes))

        def poke(self, tier: Tier, block: Block, offset: int, data: bytes) -> None:
            assert isinstance(tier, PinnedTier)
            memory_at(tier.address(block) + offset, len(data))[:] = data

    return _contract_outcome(Contract())


# -- races ----------------------------------------------------------------------------------------


def _within(seeds: Iterable[int], seconds: float, ran: list[int]) -> Iterator[int]:
    ends = time.perf_counter() + seconds
    for seed in seeds:
        if time.perf_counter() > ends:
            return
        ran.append(seed)
        yield seed


def right_code_is_right(device: UnderTest, name: str, seeds: Iterable[int]) -> Outcome:
    """Right code gives the same bits however its streams are held up."""
    ran: list[int] = []
    race = find_race(
        partial(RIGHT[name], pinners=device.pinners),
        seeds=_within(seeds, _SCENARIO_LIMIT_S, ran),
        open_device=device.open_delayed,
    )
    if race is not None:
        return Outcome(str(race).splitlines()[0], holds=False)
    return Outcome(f"the same bits under {len(ran)} seeds", holds=bool(ran), value=len(ran))


def planted_race_is_found(device: UnderTest, name: str) -> Outcome:
    """Holding streams up shows a race: else the check above would prove nothing."""
    ran: list[int] = []
    race = find_race(
        partial(RACY[name], pinners=device.pinners),
        seeds=_within(itertools.count(), _SCENARIO_LIMIT_S, ran),
        open_device=device.open_delayed,
    )
    if race is None:
        return Outcome(f"not found under {len(ran)} seeds", holds=False, value=len(ran))
    return Outcome(f"found under seed {race.seed}", value=race.seed)


# -- exactness ------------------------------------------------------------------------------------


def training_is_exact(device: UnderTest, home: str) -> Outcome:
    """Steps with all tensors swapped equal the same steps in device memory, bit by bit."""
    right, right_losses = train_resident(device)
    got, losses = train_swapped(device, HOMES[home])
    pairs = zip([*right, *right_losses], [*got, *losses], strict=True)
    wrong = sum(not torch.equal(one.reshape(-1), other.reshape(-1)) for one, other in pairs)
    trained = not any(map(torch.equal, right, initial()[0]))
    told = f"{len(right)} tensors and {len(losses)} losses, {wrong} of them differ"
    return Outcome(told, holds=wrong == 0 and trained, value=wrong)


def activations_are_exact(device: UnderTest, home: str, seeds: Sequence[int]) -> Outcome:
    """Gradients with all saved tensors swapped equal those of plain autograd, streams held up."""
    with device.open() as accelerator:
        right = step_gradients(device, accelerator, None)
    began_s, ran, left_nbytes = time.monotonic(), 0, 0
    for seed in seeds:
        if time.monotonic() - began_s > _SCENARIO_LIMIT_S:
            break
        with device.open_delayed(seed) as accelerator:
            swap = Swap(device, accelerator, home)
            got = step_gradients(device, accelerator, swap)
            swap.close()
            left_nbytes = swap.left_nbytes
        ran += 1
        if not all(map(torch.equal, got, right)):
            return Outcome(f"gradients differ under seed {seed}", holds=False, value=seed)
    told = f"{len(right)} tensors under {ran} seeds, {left_nbytes} bytes left in each"
    return Outcome(told, holds=left_nbytes > 0, value=ran)


def _rebuilding(device: Cuda, dtype: torch.dtype, settings: Settings) -> tuple[Rebuilt, Rebuilt]:
    """Plain steps, and those whose token rows are rebuilt from what is swapped to pinned memory."""
    place = torch.device("cuda")
    with device.open_delayed(5) as accelerator:
        swap = Swap(device, accelerator, "pinned", room_nbytes=256 * MIB)
        got = train(place, dtype, swap.cache, settings)
        swap.close()
    return train(place, dtype, None, settings), got


def rows_are_exact(device: Cuda, alpha: float) -> Outcome:
    """Gradients with rebuilt rows are plain autograd's; rows that would differ are swapped."""
    right, got = _rebuilding(device, torch.float32, Settings(alpha=alpha))
    wrong = sum(not torch.equal(*pair) for pair in zip(right.results, got.results, strict=True))
    told = f"{wrong} of {len(got.results)} tensors differ; {got.nbytes} bytes rebuilt"
    if got.why_whole:
        told += f", {got.whole_nbytes} swapped whole: {'; '.join(got.why_whole)}"
    return Outcome(told, holds=wrong == 0, value=got.nbytes)


def rows_are_close(device: Cuda) -> Outcome:
    """The opted-in mode that accepts rows which differ in the last bits, in float64."""
    right, got = _rebuilding(device, torch.float64, Settings(alpha=0.0, relaxed=True))
    pairs = zip(right.results, got.results, strict=True)
    error = max(float((one - other).abs().max() / one.abs().max()) for one, other in pairs)
    told = f"relative error {error:.1e}; {got.nbytes} bytes rebuilt"
    return Outcome(told, holds=error < 1e-12 and got.nbytes > 0, value=error, target="< 1e-12")


# -- the pool and the budget ----------------------------------------------------------------------


def pool_size_is_exact(device: UnderTest) -> Outcome:
    """The pool holds the bytes asked for, rounded up to 4 KiB."""
    asked = 129 * MIB + 1
    with PinnedTier(asked, pinners=device.pinners) as pool:
        held = pool.spec.capacity
    told = f"{asked} bytes asked, {held} held"
    return Outcome(told, holds=held == page_ceil(asked), value=held, target=str(page_ceil(asked)))


def pool_is_pinned() -> Outcome:
    """Torch sees the pool's memory as pinned, and no call has left an error behind."""
    journal = Journal()
    with PinnedTier(4 * MIB, pinners=[CudaPinner()], journal=journal) as pool:
        pinned = pool.tensor(pool.allocate(MIB), torch.uint8, (MIB,)).is_pinned()
        kind = pool.memory
    torch.zeros(1, device="cuda").add_(1).item()
    told = "; ".join([f"{kind}, is_pinned() is {pinned}", *journal.notices])
    return Outcome(told, holds=pinned and kind == "registered")


def pool_rate(direction: str) -> Outcome:
    """Copies with the pool against copies with ``torch.empty(pin_memory=True)``, in turns."""
    accelerator = CudaAccelerator()
    stream = accelerator.stream(direction)
    memory = accelerator.allocate(_RATE_NBYTES)
    stream.wait(memory.ready)
    peer = torch.empty(_RATE_NBYTES, dtype=torch.uint8, pin_memory=True)
    copy = accelerator.copy_in if direction == "H2D" else accelerator.copy_out

    def rate(address: int) -> float:
        event = copy(stream, memory, 0, address, _RATE_NBYTES)
        event.settle()
        started_s, ended_s = event.span()
        return _RATE_NBYTES / (ended_s - started_s)

    with PinnedTier(_RATE_NBYTES, pinners=[CudaPinner()]) as pool:
        address = pool.address(pool.allocate(_RATE_NBYTES))
        rates: dict[int, list[float]] = {address: [], peer.data_ptr(): []}
        for turn in range(_RATE_REPEATS + 2):
            for each, found in rates.items():
                measured = rate(each)
                if turn >= 2:  # warm
                    found.append(measured)
        ours, theirs = (statistics.median(found) for found in rates.values())
    told = f"pool {ours / 1e9:.2f} GB/s, pin_memory {theirs / 1e9:.2f} GB/s"
    return Outcome(told, holds=ours >= 0.98 * theirs, value=ours / theirs, target=">= 0.98")


def limit_holds() -> Outcome:
    """The device budget refuses what exceeds it, and the allocator's peak stays within."""
    accelerator = CudaAccelerator()
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved() + 64 * MIB
    _, total = torch.cuda.mem_get_info()
    accelerator.set_limit(limit)
    try:
        with DeviceTier(accelerator, 32 * MIB):
            try:
                accelerator.allocate(96 * MIB)
            except CapacityError:
                peak = accelerator.peak_nbytes()
                told = f"limit {limit} bytes, peak {peak}"
                return Outcome(told, holds=32 * MIB <= peak <= limit, value=peak)
            return Outcome("96 MiB were given within a limit of 64 MiB", holds=False)
    finally:
        accelerator.set_limit(total)
