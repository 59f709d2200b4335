"""An emulated CXL type-3 device: its region becomes a node, and the node a tier."""

import time
from pathlib import Path

import pytest

from offload.tiers import mempolicy
from offload.tiers.journal import Journal
from offload.tiers.memory import memory_at
from offload.tiers.numa import NumaTier
from offload.tiers.testing import pattern
from offload.tiers.topology import read_topology

pytestmark = pytest.mark.numa_vm
MIB = 1 << 20
REGION_NBYTES = 256 * MIB
BUS = Path("/sys/bus/cxl/devices")


@pytest.fixture(scope="module")
def node():
    """The node of a new region over the whole device; the kernel brings its memory online."""
    before = mempolicy.allowed_nodes()
    name = (BUS / "decoder0.0" / "create_ram_region").read_text().strip()
    (BUS / "decoder0.0" / "create_ram_region").write_text(name)
    steps = [
        (BUS / name / "interleave_granularity", "256"),
        (BUS / name / "interleave_ways", "1"),
        (BUS / name / "size", str(REGION_NBYTES)),
        (BUS / "decoder2.0" / "mode", "ram"),
        (BUS / "decoder2.0" / "dpa_size", str(REGION_NBYTES)),
        (BUS / name / "target0", "decoder2.0"),
        (BUS / name / "commit", "1"),
        (Path("/sys/bus/cxl/drivers/cxl_region/bind"), name),
    ]
    for path, value in steps:
        path.write_text(value)
    for _ in range(300):
        if new := set(mempolicy.allowed_nodes()) - set(before):
            return new.pop()
        time.sleep(0.1)
    pytest.fail("the region never became a node")


def test_topology_tells_devices_regions_and_the_kind_of_the_node(node):
    topology = read_topology()
    (device,) = topology.cxl_devices
    assert (device.name, device.volatile_nbytes, device.serial) == ("mem0", REGION_NBYTES, "0x1")
    (region,) = topology.cxl_regions
    assert (region.nbytes, region.ways) == (REGION_NBYTES, 1)
    far = topology.node(node)
    assert (far.kind, far.cpus, far.movable) == ("cxl", (), True)
    assert topology.node(0).kind == "dram"
    assert topology.node(0).tier < far.tier


def test_blocks_land_on_cxl_memory(node):
    journal = Journal()
    with NumaTier(node, 16 * MIB, journal=journal) as tier:
        assert "ZONE_MOVABLE" in journal.notices[0]  # as daxctl leaves it by default
        block = tier.allocate(4 * MIB)
        assert str(tier.landing(block)) == f"asked node {node}, got 100 % node {node}"
        memory_at(tier.address(block), 4096)[:] = pattern(4096)
        assert bytes(memory_at(tier.address(block), 4096)) == pattern(4096)
        assert len(journal.notices) == 1


def test_dram_and_cxl_share_a_block(node):
    with NumaTier({0: 1, node: 1}, 16 * MIB) as tier:
        landing = tier.landing(tier.allocate(8 * MIB))
        assert landing.got.nbytes_by_node == {0: 4 * MIB, node: 4 * MIB}
