"""The device tier and the pinned pool on a real CUDA device; ``tools/gpu_check.py`` does more."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch

from offload.allocator.errors import CapacityError
from offload.tiers.cuda import CudaAccelerator, DelayedCudaAccelerator
from offload.tiers.device import DeviceTier
from offload.tiers.events import ListRecorder
from offload.tiers.journal import Journal
from offload.tiers.memory import memory_at
from offload.tiers.pinned import PinnedTier
from offload.tiers.pinning import CudaPinner
from offload.tiers.simulated.scenarios import RACY, RIGHT
from offload.tiers.testing import TierContract, find_race, machine_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
MIB = 1 << 20


@pytest.mark.gpu
class TestCudaDeviceTier(TierContract):
    large_nbytes = MIB + 4097

    @contextmanager
    def open_tier(self, directory):
        with (
            CudaAccelerator(checked=True) as device,
            DeviceTier(device, 5 * self.large_nbytes) as tier,
        ):
            yield tier

    def _bytes(self, tier, block, offset, nbytes):
        torch.cuda.synchronize()
        return tier._memory.bytes_at(block.extent.offset + offset, nbytes)

    def peek(self, tier, block, offset, nbytes):
        return bytes(self._bytes(tier, block, offset, nbytes).cpu().numpy())

    def poke(self, tier, block, offset, data):
        source = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self._bytes(tier, block, offset, len(data)).copy_(source)
        torch.cuda.synchronize()


@pytest.mark.gpu
class TestRegisteredPool(TierContract):
    large_nbytes = MIB + 4097

    @contextmanager
    def open_tier(self, directory):
        with PinnedTier(5 * self.large_nbytes, pinners=[CudaPinner()], checked=True) as pool:
            assert pool.memory == "registered"
            yield pool

    def peek(self, tier, block, offset, nbytes):
        return bytes(memory_at(tier.address(block) + offset, nbytes))

    def poke(self, tier, block, offset, data):
        memory_at(tier.address(block) + offset, len(data))[:] = data


TestCudaDeviceTierMachine = pytest.mark.gpu(machine_of(TestCudaDeviceTier))


@pytest.mark.parametrize("name", RIGHT)
def test_right_code_is_right_however_streams_are_held_up(name):
    scenario = partial(RIGHT[name], pinners=[CudaPinner()])
    race = find_race(scenario, seeds=range(100), open_device=DelayedCudaAccelerator)
    assert race is None, race


@pytest.mark.parametrize("name", RACY)
def test_a_planted_race_shows_when_streams_are_held_up(name):
    scenario = partial(RACY[name], pinners=[CudaPinner()])
    assert find_race(scenario, seeds=range(300), open_device=DelayedCudaAccelerator)


def test_the_pool_is_pinned_for_torch_and_its_size_is_exact():
    with PinnedTier(129 * MIB + 1, pinners=[CudaPinner()]) as pool:
        assert pool.memory == "registered"
        assert pool.spec.capacity == 129 * MIB + 4096
        assert pool.tensor(pool.allocate(MIB), torch.uint8, (MIB,)).is_pinned()


def test_a_refused_registration_leaves_no_error_behind():
    journal = Journal()
    pinner = CudaPinner()
    with PinnedTier(MIB, pinners=[pinner], journal=journal) as pool:
        with pytest.raises(Exception, match="cudaHostRegister of 1048576 bytes"):
            pinner.pin(pool._base, MIB)  # a second time
        assert torch.ones(8, device="cuda").sum().item() == 8


def test_moves_tell_the_times_of_the_device():
    recorder = ListRecorder()
    device = CudaAccelerator()
    with (
        PinnedTier(64 * MIB, pinners=[CudaPinner()]) as pool,
        DeviceTier(device, 64 * MIB, journal=Journal(recorder, clock=device.now)) as tier,
    ):
        tier.fetch(tier.allocate(64 * MIB), pool.allocate(64 * MIB)).wait()
    (move,) = recorder.events
    assert 0 < move.duration_s < move.t_s


def test_bytes_that_arrive_are_no_write_to_the_tensors_over_them():
    device = CudaAccelerator()
    with PinnedTier(MIB, pinners=[CudaPinner()]) as pool:
        memory, buffer = device.allocate(MIB), pool.allocate(MIB)
        version = memory.tensor._version
        device.copy_in(device.stream("in"), memory, 0, pool.address(buffer), MIB).settle()
        assert memory.tensor._version == version


def test_the_limit_refuses_what_exceeds_it():
    device = CudaAccelerator()
    torch.cuda.empty_cache()
    device.set_limit(torch.cuda.memory_reserved() + 64 * MIB)
    try:
        with pytest.raises(CapacityError, match=f"{128 * MIB} bytes"):
            device.allocate(128 * MIB)
    finally:
        device.set_limit(torch.cuda.mem_get_info()[1])
