"""What sysfs tells, read from trees that look like machines of every kind."""

import json

import pytest

from offload.allocator.errors import ConfigError
from offload.tiers.topology import parse_list, read_topology

GIB = 1 << 30


def plant(root, files):
    """Write a tree of files: {path: text}."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def node_files(index, *, cpus="", total_kib=1 << 20, free_kib=1 << 19, distance="10"):
    folder = f"devices/system/node/node{index}"
    return {
        f"{folder}/cpulist": cpus,
        f"{folder}/distance": distance,
        f"{folder}/meminfo": (
            f"Node {index} MemTotal:       {total_kib} kB\n"
            f"Node {index} MemFree:        {free_kib} kB\n"
            f"Node {index} HugePages_Total:     0"
        ),
    }


def hmat_files(index, *, read, write, latency):
    folder = f"devices/system/node/node{index}/access0/initiators"
    return {
        f"{folder}/read_bandwidth": read,
        f"{folder}/write_bandwidth": write,
        f"{folder}/read_latency": latency,
        f"{folder}/write_latency": latency,
        f"{folder}/node0/uevent": "",
    }


@pytest.fixture
def cxl_machine(tmp_path):
    """Two sockets and two add-in cards: one set up by firmware, one by a region, movable."""
    distances = ["10 21 14 24", "21 10 24 14", "14 24 10 26", "24 14 26 10"]
    files = {
        "devices/system/node/has_memory": "0-3",
        "devices/system/node/has_normal_memory": "0-2",
        "devices/system/memory/block_size_bytes": "8000000",
        "devices/virtual/memory_tiering/memory_tier4/nodelist": "0-1",
        "devices/virtual/memory_tiering/memory_tier22/nodelist": "2,3",
        # A window of the firmware: 64 GiB at 0x1000000000; node 2's blocks lie in it.
        "bus/cxl/devices/decoder0.0/devtype": "cxl_decoder_root",
        "bus/cxl/devices/decoder0.0/start": "0x1000000000",
        "bus/cxl/devices/decoder0.0/size": "0x1000000000",
        # An endpoint decoder says nothing about physical windows.
        "bus/cxl/devices/decoder2.0/devtype": "cxl_decoder_endpoint",
        "bus/cxl/devices/decoder2.0/start": "0x0",
        "bus/cxl/devices/decoder2.0/size": "0xffffffffff",
        "bus/cxl/devices/region0/resource": "0x2000000000",
        "bus/cxl/devices/region0/size": "0x1000000000",
        "bus/cxl/devices/region0/interleave_ways": "2",
        "bus/cxl/devices/mem0/ram/size": "0x1000000000",
        "bus/cxl/devices/mem0/pmem/size": "0x0",
        "bus/cxl/devices/mem0/numa_node": "1",
        "bus/cxl/devices/mem0/serial": "0x2a",
        "bus/cxl/devices/mem0/firmware_version": "1.3",
        "bus/cxl/devices/mem1/numa_node": "-1",
        "bus/cxl/devices/memory_bridge/uevent": "",
    }
    for index, cpus in enumerate(["0-3,8-11", "4-7,12-15", "", ""]):
        files |= node_files(index, cpus=cpus, distance=distances[index])
    for index in (0, 1):
        files |= hmat_files(index, read=204800, write=102400, latency=100)
    files |= hmat_files(2, read=51200, write=25600, latency=250)
    files |= {
        "devices/system/node/node2/memory512/state": "online",  # 512 x 128 MiB = 0x1000000000
        "devices/system/node/node2/memory513/state": "online",
        "devices/system/node/node3/memory1024/state": "online",
        "devices/system/node/node0/memory0/state": "online",
    }
    return plant(tmp_path, files)


def test_a_machine_with_cxl_cards(cxl_machine):
    topology = read_topology(cxl_machine)
    near, other, card, region_card = topology.nodes
    assert near.cpus == (0, 1, 2, 3, 8, 9, 10, 11)
    assert [node.kind for node in topology.nodes] == ["dram", "dram", "cxl", "cxl"]
    assert (near.memory_nbytes, near.free_nbytes) == (GIB, GIB // 2)
    assert other.distances == ((0, 21), (1, 10), (2, 24), (3, 14))
    assert (card.read_bytes_per_s, card.write_bytes_per_s) == (51200 << 20, 25600 << 20)
    assert card.read_latency_s == card.write_latency_s == pytest.approx(250e-9)
    assert card.initiators == (0,)
    assert [node.tier for node in topology.nodes] == [4, 4, 22, 22]
    assert [node.movable for node in topology.nodes] == [False, False, False, True]
    assert region_card.read_bytes_per_s is None
    (unknown,) = topology.unknown
    assert unknown == (
        "the firmware's HMAT gives no bandwidth or latency for node 3: measure it, or the "
        "published figures of its kind are assumed"
    )


def test_cxl_devices_and_regions(cxl_machine):
    topology = read_topology(cxl_machine)
    first, second = topology.cxl_devices
    assert (first.name, first.volatile_nbytes, first.persistent_nbytes) == ("mem0", 64 * GIB, 0)
    assert (first.near_node, first.serial, first.firmware) == (1, "0x2a", "1.3")
    assert (second.name, second.volatile_nbytes, second.near_node) == ("mem1", None, None)
    (region,) = topology.cxl_regions
    assert (region.name, region.start, region.nbytes, region.ways) == (
        "region0", 0x2000000000, 64 * GIB, 2,
    )  # fmt: skip


def test_memory_that_refuses_pins_is_a_warning_with_what_mends_it(cxl_machine):
    topology = read_topology(cxl_machine)
    warnings = [node.pin_warning for node in topology.nodes]
    assert warnings[:3] == [None, None, None]
    assert "all memory of node 3 is ZONE_MOVABLE, which refuses long-term pins" in warnings[3]
    assert "daxctl reconfigure-device --mode=system-ram --no-movable" in warnings[3]
    assert warnings[3] in topology.lines()


def test_a_plain_machine_with_one_node(tmp_path):
    root = plant(
        tmp_path,
        {
            **node_files(0, cpus="0-1"),
            "devices/system/node/has_memory": "0",
            "devices/system/node/has_normal_memory": "0",
        },
    )
    topology = read_topology(root)
    (node,) = topology.nodes
    assert (node.kind, node.distances, node.movable) == ("dram", ((0, 10),), False)
    assert node.read_bytes_per_s is node.tier is None
    assert topology.cxl_devices == topology.cxl_regions == topology.unknown == ()
    assert list(topology.lines()) == ["node 0: dram, 1.00 GiB, 2 CPUs"]


def test_processors_only_in_the_second_access_class(tmp_path):
    files = {
        name.replace("access0", "access1"): text
        for name, text in hmat_files(1, read=1000, write=0, latency=300).items()
    }
    root = plant(tmp_path, {**node_files(0, cpus="0"), **node_files(1), **files})
    node = read_topology(root).node(1)
    assert (node.kind, node.initiators) == ("other", (0,))
    assert node.read_bytes_per_s == 1000 << 20
    assert node.write_bytes_per_s is None  # firmware writes 0 for what it does not know


def test_a_container_that_hides_sysfs(tmp_path):
    topology = read_topology(tmp_path / "nothing")
    assert topology.nodes == ()
    assert "are unknown" in topology.unknown[0]
    with pytest.raises(ConfigError, match=r"node 1 does not exist.*on nodes unknown"):
        topology.node(1)


def test_files_that_can_not_be_read_or_understood(tmp_path):
    root = plant(tmp_path, {**node_files(0, cpus="zero"), **node_files(1, distance="x")})
    (root / "devices/system/node/node1/cpulist").unlink()
    (root / "devices/system/node/node1/cpulist").mkdir()  # even root can't read a folder
    (root / "devices/system/node/node0/meminfo").write_bytes(b"\xff\xfe")
    first, second = read_topology(root).nodes
    assert (first.cpus, first.memory_nbytes, first.movable) == ((), None, None)
    assert (second.cpus, second.distances) == ((), ())
    assert "size unknown" in next(iter(read_topology(root).lines()))


def test_a_node_that_does_not_exist_names_those_that_do(cxl_machine):
    with pytest.raises(ConfigError, match=r"node 9 does not exist.*on nodes 0, 1, 2, 3; choose"):
        read_topology(cxl_machine).node(9)


def test_json_is_versioned(cxl_machine):
    told = json.loads(read_topology(cxl_machine).to_json())
    assert told["format"] == 1
    assert told["nodes"][2]["kind"] == "cxl"


def test_this_machine_is_read():
    topology = read_topology()
    assert all(node.memory_nbytes is None or node.memory_nbytes >= 0 for node in topology.nodes)


@pytest.mark.parametrize(
    ("text", "numbers"), [("", ()), ("0", (0,)), ("0-2,5", (0, 1, 2, 5)), ("\n", ())]
)
def test_kernel_lists(text, numbers):
    assert parse_list(text) == numbers
