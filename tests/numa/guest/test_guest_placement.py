"""Memory policies on a machine with nodes 0 (DRAM), 1 (no CPUs) and 2 (small, ZONE_MOVABLE)."""

import os
from contextlib import contextmanager

import pytest

from offload.allocator.errors import CapacityError, ConfigError
from offload.tiers import hostmem, mempolicy
from offload.tiers.hostmem import HUGE_PAGE, PAGE
from offload.tiers.mempolicy import Mode
from offload.tiers.topology import read_topology

pytestmark = pytest.mark.numa_vm
MIB = 1 << 20
WEIGHTED = os.environ["NUMA_VM_KERNEL"] == "6.12"


@contextmanager
def mapped(nbytes, mode=None, nodes=(), *, align=HUGE_PAGE):
    """Fresh memory under a policy, touched."""
    address = hostmem.map_anonymous(nbytes, align=align)
    try:
        if mode is not None:
            mempolicy.mbind(address, nbytes, mode, nodes)
        hostmem.touch(address, nbytes)
        yield address
    finally:
        hostmem.unmap(address, nbytes)


def where(address, nbytes):
    found = mempolicy.placement(address, nbytes)
    assert found.absent_nbytes == 0
    return found.nbytes_by_node


def test_topology_reads_nodes_distances_and_hmat():
    topology = read_topology()
    dram, far, movable = topology.nodes
    assert (dram.kind, far.kind, movable.kind) == ("dram", "other", "other")
    assert (dram.cpus, far.cpus, movable.cpus) == ((0, 1), (), ())
    assert far.distances[:2] == ((0, 20), (1, 10))
    assert (dram.read_bytes_per_s, far.read_bytes_per_s) == (200 << 30, 50 << 30)
    assert (dram.write_bytes_per_s, far.write_bytes_per_s) == (200 << 30, 50 << 30)
    assert dram.read_latency_s == pytest.approx(100e-9)
    assert far.read_latency_s == pytest.approx(250e-9)
    assert far.initiators == (0,)
    assert movable.memory_nbytes == 128 * MIB
    assert (dram.movable, far.movable, movable.movable) == (False, False, True)
    if WEIGHTED:  # Linux 6.1 puts both nodes into one tier
        assert dram.tier < far.tier


@pytest.mark.parametrize("node", [0, 1, 2])
def test_bind_lands_whole_huge_pages_on_its_node(node):
    with mapped(8 * MIB, Mode.BIND, [node]) as address:
        assert where(address, 8 * MIB) == {node: 8 * MIB}
        assert mempolicy.get_mempolicy(address) == (Mode.BIND, (node,))
        if WEIGHTED:  # Linux 6.1 can't tell which pages are huge
            assert mempolicy.placement(address, 8 * MIB).huge_nbytes == 8 * MIB


def test_preferred_spills_when_its_node_is_full():
    with mapped(160 * MIB, Mode.PREFERRED, [2]) as address:
        found = where(address, 160 * MIB)
        assert 64 * MIB < found[2] <= 128 * MIB
        assert sum(found.values()) == 160 * MIB


def test_preferred_many():
    with mapped(8 * MIB, Mode.PREFERRED_MANY, [1]) as address:
        assert where(address, 8 * MIB) == {1: 8 * MIB}


def test_interleave_deals_huge_pages_in_turn():
    with mapped(16 * MIB, Mode.INTERLEAVE, [0, 1]) as address:
        assert where(address, 16 * MIB) == {0: 8 * MIB, 1: 8 * MIB}
        for page in range(8):  # a huge page is whole on one node
            assert len(where(address + page * HUGE_PAGE, HUGE_PAGE)) == 1


def test_interleave_deals_small_pages_in_turn():
    with mapped(MIB, Mode.INTERLEAVE, [0, 1], align=PAGE) as address:
        assert where(address, MIB) == {0: MIB // 2, 1: MIB // 2}


def test_weighted_interleave_follows_the_weights_or_falls_back():
    if not WEIGHTED:
        assert mempolicy.interleave_weights() is None
        address = hostmem.map_anonymous(16 * MIB)
        applied = mempolicy.mbind(address, 16 * MIB, Mode.WEIGHTED_INTERLEAVE, [0, 1])
        assert applied.mode is Mode.INTERLEAVE
        assert "Linux 6.1" in applied.note
        assert "has no weighted interleave" in applied.note
        hostmem.touch(address, 16 * MIB)
        assert where(address, 16 * MIB) == {0: 8 * MIB, 1: 8 * MIB}
        hostmem.unmap(address, 16 * MIB)
        with pytest.raises(OSError, match=r"Linux 6\.9 or newer: echo 3 > "):
            mempolicy.set_interleave_weights({0: 3})
        return
    before = mempolicy.interleave_weights()
    assert set(before) >= {0, 1}
    mempolicy.set_interleave_weights({0: 3, 1: 1})
    try:
        with mapped(16 * MIB, Mode.WEIGHTED_INTERLEAVE, [0, 1]) as address:
            assert mempolicy.get_mempolicy(address)[0] is Mode.WEIGHTED_INTERLEAVE
            assert where(address, 16 * MIB) == {0: 12 * MIB, 1: 4 * MIB}
    finally:
        mempolicy.set_interleave_weights({0: before[0], 1: before[1]})


def test_the_policy_of_the_thread_holds_for_ranges_without_one():
    mempolicy.set_mempolicy(Mode.BIND, [1])
    try:
        assert mempolicy.get_mempolicy() == (Mode.BIND, (1,))
        with mapped(4 * MIB) as address:
            assert where(address, 4 * MIB) == {1: 4 * MIB}
    finally:
        mempolicy.set_mempolicy(Mode.DEFAULT)


def test_touched_pages_move_to_another_node():
    with mapped(8 * MIB, Mode.BIND, [0]) as address:
        mempolicy.mbind(address, 8 * MIB, Mode.BIND, [1], move=True)
        assert where(address, 8 * MIB) == {1: 8 * MIB}
        mempolicy.move_pages(address, 4 * MIB, 0)
        assert where(address, 8 * MIB) == {0: 4 * MIB, 1: 4 * MIB}


def test_moving_to_a_full_node_says_so():
    nbytes = 160 * MIB
    with (
        mapped(nbytes, Mode.BIND, [0]) as address,
        pytest.raises(CapacityError, match=r"node 2 is full: .* of 160\.00 MiB found no room"),
    ):
        mempolicy.move_pages(address, nbytes, 2)


def test_a_node_that_does_not_exist_is_refused_even_beside_one_that_does():
    with (
        mapped(PAGE, align=PAGE) as address,
        pytest.raises(ConfigError, match=r"node 7 does not exist.*choose from 0, 1, 2"),
    ):
        mempolicy.mbind(address, PAGE, Mode.INTERLEAVE, [0, 7])
