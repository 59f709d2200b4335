"""Device tiers and pinned pools pass the shipped contract."""

from abc import abstractmethod
from contextlib import contextmanager

import pytest

from offload.tiers.cpudevice import CpuAccelerator
from offload.tiers.device import DeviceTier
from offload.tiers.memory import memory_at
from offload.tiers.pinned import PinnedTier, SizeClass
from offload.tiers.pinning import LockPinner
from offload.tiers.simulated.accelerator import SimulatedAccelerator
from offload.tiers.testing import TierContract


class DeviceContract(TierContract):
    """Blocks of a device, seen through the bytes behind its tensors."""

    large_nbytes = (1 << 20) + 4097  # a copy is one request, however large

    @abstractmethod
    def open_device(self):
        """A new device."""

    @contextmanager
    def open_tier(self, directory):
        with self.open_device() as device, DeviceTier(device, 5 * self.large_nbytes) as tier:
            yield tier

    def _bytes(self, tier, block, offset, nbytes):
        address = tier._memory.tensor.data_ptr() + block.extent.offset + offset
        return memory_at(address, nbytes)

    def peek(self, tier, block, offset, nbytes):
        return bytes(self._bytes(tier, block, offset, nbytes))

    def poke(self, tier, block, offset, data):
        self._bytes(tier, block, offset, len(data))[:] = data


class TestDeviceTierOnCpu(DeviceContract):
    def open_device(self):
        return CpuAccelerator()


class TestDeviceTierSimulated(DeviceContract):
    def open_device(self):
        return SimulatedAccelerator(seed=1)


class TestPinnedTier(TierContract):
    """The pool, poisoned wherever nobody may look."""

    large_nbytes = (1 << 20) + 4097

    @contextmanager
    def open_tier(self, directory):
        with PinnedTier(5 * self.large_nbytes, checked=True) as tier:
            yield tier

    def peek(self, tier, block, offset, nbytes):
        return bytes(memory_at(tier.address(block) + offset, nbytes))

    def poke(self, tier, block, offset, data):
        memory_at(tier.address(block) + offset, len(data))[:] = data


class TestLockedTier(TestPinnedTier):
    @contextmanager
    def open_tier(self, directory):
        with PinnedTier(5 * self.large_nbytes, pinners=[LockPinner()]) as tier:
            if tier.memory != "locked":
                pytest.skip("mlock of 5 MiB is refused here")
            yield tier


class TestPinnedTierWithClasses(TestPinnedTier):
    """Sizes of the contract that have rooms of their own, and others that share the rest."""

    @contextmanager
    def open_tier(self, directory):
        classes = [
            SizeClass(nbytes=4096, count=50),  # of as many steps as a random run has
            SizeClass(nbytes=300_000, count=12),
            SizeClass(nbytes=2 * self.large_nbytes // 5, count=1),
        ]
        room = sum(size.held_nbytes for size in classes)
        with PinnedTier(6 * self.large_nbytes + room, classes=classes, checked=True) as tier:
            yield tier

    test_a_full_tier_says_what_is_missing = None  # classes keep their room: see test_tiers_pinned
