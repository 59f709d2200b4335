"""``NumaTier`` where there are nodes: landing, full nodes, and pins that ZONE_MOVABLE refuses."""

import ctypes
import os
from contextlib import contextmanager

import pytest

from offload.allocator.errors import CapacityError, ConfigError
from offload.tiers import hostmem, mempolicy
from offload.tiers.journal import Journal
from offload.tiers.memory import memory_at
from offload.tiers.numa import NumaTier
from offload.tiers.testing import TierContract, pattern

pytestmark = pytest.mark.numa_vm
MIB = 1 << 20
_SETUP, _REGISTER, _REGISTER_BUFFERS = 425, 427, 0


class TestNumaTierOnNodeOne(TierContract):
    @contextmanager
    def open_tier(self, directory):
        with NumaTier(1, 5 * self.large_nbytes) as tier:
            yield tier

    def peek(self, tier, block, offset, nbytes):
        return bytes(memory_at(tier.address(block) + offset, nbytes))

    def poke(self, tier, block, offset, data):
        memory_at(tier.address(block) + offset, len(data))[:] = data


@pytest.fixture
def journal():
    return Journal()


@pytest.mark.parametrize("nbytes", [1, 5000, 3 * MIB, 64 * MIB])
def test_blocks_land_on_their_node(journal, nbytes):
    with NumaTier(1, 100 * MIB, journal=journal) as tier:
        block = tier.allocate(nbytes)
        landing = tier.landing(block)
        assert landing.got.nbytes_by_node == {1: block.extent.nbytes}
        assert str(landing) == "asked node 1, got 100 % node 1"
        assert journal.notices == []


def test_several_nodes_share_a_block_by_their_weights(journal):
    with NumaTier({0: 3, 1: 1}, 100 * MIB, journal=journal) as tier:
        landing = tier.landing(tier.allocate(64 * MIB))
        assert landing.got.nbytes_by_node == {0: 48 * MIB, 1: 16 * MIB}
        assert str(landing) == "asked 75 % node 0, 25 % node 1, got 75 % node 0, 25 % node 1"
        assert journal.notices == []


def test_a_full_node_is_an_error_and_not_a_killed_process(journal):
    with NumaTier(2, 128 * MIB, journal=journal) as tier:
        first = tier.allocate(64 * MIB)
        data = pattern(4096)
        memory_at(tier.address(first), 4096)[:] = data
        others = hostmem.map_anonymous(48 * MIB)
        mempolicy.mbind(others, 48 * MIB, mempolicy.Mode.BIND, [2])
        hostmem.touch(others, 48 * MIB)
        try:
            with pytest.raises(CapacityError, match=r"node 2 is full: .* found no room.* by \d+ b"):
                tier.allocate(64 * MIB)
        finally:
            hostmem.unmap(others, 48 * MIB)
        assert tier.used_nbytes == 64 * MIB
        assert bytes(memory_at(tier.address(first), 4096)) == data
        again = tier.allocate(48 * MIB)
        assert tier.landing(again).got.nbytes_by_node == {2: 48 * MIB}


def test_more_capacity_than_the_node_has_is_refused():
    with pytest.raises(CapacityError, match=r"numa:2 has 128\.00 MiB of memory"):
        NumaTier(2, 129 * MIB)


def test_a_node_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match=r"node 5 does not exist.*on nodes 0, 1, 2"):
        NumaTier(5, MIB)


def test_strays_are_told(journal):
    with NumaTier(1, 64 * MIB, journal=journal) as tier:
        block = tier.allocate(40 * MIB)
        mempolicy.mbind(tier.address(block), 2 * MIB, mempolicy.Mode.BIND, [0], move=True)
        assert str(tier.landing(block)) == "asked node 1, got 95 % node 1, 5 % node 0"
        assert journal.notices == ["numa:1: 40.00 MiB: asked node 1, got 95 % node 1, 5 % node 0"]


def test_registering_moves_pages_out_of_zone_movable(journal):
    """A long-term pin by io_uring, which takes the kernel's path that a GPU driver takes."""
    with NumaTier(2, 64 * MIB, journal=journal) as tier:
        (warning,) = journal.notices
        assert "all memory of node 2 is ZONE_MOVABLE" in warning
        assert "--no-movable" in warning
        block = tier.allocate(8 * MIB)
        assert tier.landing(block).got.nbytes_by_node == {2: 8 * MIB}
        with pinned(tier.address(block), 8 * MIB):
            landing = tier.landing(block)
        assert 2 not in landing.got.nbytes_by_node
        assert str(landing).startswith("asked node 2, got ")
        assert journal.notices[-1] == f"numa:2: 8.00 MiB: {landing}"


def test_registering_leaves_pages_of_other_nodes_alone(journal):
    with NumaTier(1, 64 * MIB, journal=journal) as tier:
        block = tier.allocate(8 * MIB)
        with pinned(tier.address(block), 8 * MIB):
            assert tier.landing(block).got.nbytes_by_node == {1: 8 * MIB}
        assert journal.notices == []


@contextmanager
def pinned(address, nbytes):
    libc = ctypes.CDLL(None, use_errno=True)
    ring = libc.syscall(_SETUP, 4, (ctypes.c_uint8 * 120)())
    assert ring >= 0, ctypes.get_errno()
    try:
        vector = (ctypes.c_uint64 * 2)(address, nbytes)
        done = libc.syscall(_REGISTER, ring, _REGISTER_BUFFERS, vector, 1)
        assert done == 0, ctypes.get_errno()
        yield
    finally:
        os.close(ring)
