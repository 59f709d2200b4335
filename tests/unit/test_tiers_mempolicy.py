"""Memory policies on any machine: one node is enough, and refusals say what mends them.

What needs several nodes runs in the virtual machine (tests/numa).
"""

import errno
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from offload.allocator.errors import CapacityError, ConfigError, TierIOError
from offload.tiers import hostmem, mempolicy
from offload.tiers.hostmem import HUGE_PAGE, PAGE
from offload.tiers.journal import Journal
from offload.tiers.memory import memory_at
from offload.tiers.mempolicy import Mode, Placement
from offload.tiers.numa import Landing, NumaTier
from offload.tiers.topology import Node, Topology

MIB = 1 << 20
NODE = mempolicy.allowed_nodes()[0]
FORBIDDEN = Path(__file__).with_name("forbidden_calls.py")


@pytest.fixture
def memory():
    """16 MiB of fresh memory."""
    address = hostmem.map_anonymous(16 * MIB)
    yield address
    hostmem.unmap(address, 16 * MIB)


def test_a_range_has_the_policy_it_was_given(memory):
    assert mempolicy.get_mempolicy(memory) == mempolicy.get_mempolicy()
    applied = mempolicy.mbind(memory, 16 * MIB, Mode.BIND, [NODE])
    assert (applied.mode, applied.note) == (Mode.BIND, "")
    assert mempolicy.get_mempolicy(memory) == (Mode.BIND, (NODE,))
    mempolicy.mbind(memory, 8 * MIB, Mode.DEFAULT, [])
    assert mempolicy.get_mempolicy(memory)[0] is Mode.DEFAULT


def test_the_policy_of_the_thread():
    before = mempolicy.get_mempolicy()
    mempolicy.set_mempolicy(Mode.PREFERRED, [NODE])
    assert mempolicy.get_mempolicy() == (Mode.PREFERRED, (NODE,))
    mempolicy.set_mempolicy(*before)
    assert mempolicy.get_mempolicy() == before


def test_placement_tells_touched_from_absent(memory):
    found = mempolicy.placement(memory, 16 * MIB)
    assert (found.nbytes_by_node, found.absent_nbytes) == ({}, 16 * MIB)
    hostmem.touch(memory + 4 * MIB, 8 * MIB)
    found = mempolicy.placement(memory, 16 * MIB)
    assert found.nbytes_by_node == {NODE: 8 * MIB}
    assert found.absent_nbytes == 8 * MIB
    assert found.pages_by_node == {NODE: 8 * MIB // PAGE}


@pytest.mark.parametrize(
    ("start", "nbytes"), [(0, 16 * MIB), (PAGE, 16 * MIB - PAGE), (3 * PAGE, PAGE), (0, HUGE_PAGE)]
)
def test_placement_counts_each_byte_of_huge_pages_once(memory, start, nbytes):
    hostmem.touch(memory, 16 * MIB)
    found = mempolicy.placement(memory + start, nbytes)
    assert found.nbytes_by_node == {NODE: nbytes}
    assert found.absent_nbytes == 0


def test_placement_counts_small_pages_beside_huge_ones(memory):
    hostmem.touch(memory, 16 * MIB)
    hostmem.discard(memory + PAGE, PAGE)  # splits the first huge page
    found = mempolicy.placement(memory, 16 * MIB)
    assert found.nbytes_by_node == {NODE: 16 * MIB - PAGE}
    assert found.absent_nbytes == PAGE


def test_a_huge_page_is_asked_about_once(memory, monkeypatch):
    hostmem.touch(memory, 16 * MIB)
    if not hostmem.huge_ranges(memory, 16 * MIB):
        monkeypatch.setattr(hostmem, "huge_ranges", lambda *_: [(memory, memory + 16 * MIB)])
    asked = [len(pages) for pages, _ in mempolicy._batches(memory, 16 * MIB)]
    assert sum(asked) == 8


def test_questions_are_asked_in_bounded_batches(memory, monkeypatch):
    monkeypatch.setattr(mempolicy, "_BATCH", 100)
    monkeypatch.setattr(hostmem, "huge_ranges", lambda *_: None)  # as before Linux 6.7
    hostmem.touch(memory, 16 * MIB)
    batches = [(len(pages), int(sizes.sum())) for pages, sizes in mempolicy._batches(memory, MIB)]
    assert batches == [(100, 100 * PAGE), (100, 100 * PAGE), (56, 56 * PAGE)]
    assert mempolicy.placement(memory, 16 * MIB).nbytes_by_node == {NODE: 16 * MIB}


def test_touch_keeps_what_pages_hold(memory, monkeypatch):
    memory_at(memory, 5)[:] = b"bytes"
    hostmem.touch(memory, MIB)
    monkeypatch.setattr(hostmem, "_MADV_POPULATE_WRITE", 9999)  # as before Linux 5.14
    hostmem.touch(memory, 16 * MIB)
    assert bytes(memory_at(memory, 5)) == b"bytes"
    assert mempolicy.placement(memory, 16 * MIB).absent_nbytes == 0


def test_pages_move_to_the_node_they_are_on(memory):
    hostmem.touch(memory, 4 * MIB)
    mempolicy.move_pages(memory, 16 * MIB, NODE)  # pages that were never touched stay absent
    assert mempolicy.placement(memory, 16 * MIB).nbytes_by_node == {NODE: 4 * MIB}


def test_a_kernel_without_weighted_interleave_interleaves_evenly_and_says_so(memory, monkeypatch):
    class Kernel:
        """Linux before 6.9."""

        def syscall(self, number, *arguments):
            if Mode.WEIGHTED_INTERLEAVE in arguments[:3]:
                mempolicy.ctypes.set_errno(errno.EINVAL)
                return -1
            return real.syscall(number, *arguments)

    real = mempolicy._libc
    monkeypatch.setattr(mempolicy, "_libc", Kernel())
    applied = mempolicy.mbind(memory, MIB, Mode.WEIGHTED_INTERLEAVE, [NODE])
    assert applied.mode is Mode.INTERLEAVE
    assert "has no weighted interleave (6.9 and newer do)" in applied.note
    assert mempolicy.get_mempolicy(memory) == (Mode.INTERLEAVE, (NODE,))


def test_weights_are_written_where_they_can_be(tmp_path, monkeypatch):
    monkeypatch.setattr(mempolicy, "WEIGHTS", tmp_path)
    assert mempolicy.interleave_weights() is None
    for node in (0, 1):
        (tmp_path / f"node{node}").write_text("1\n")
    mempolicy.set_interleave_weights({0: 3})
    assert mempolicy.interleave_weights() == {0: 3, 1: 1}
    (tmp_path / "node1").unlink()
    (tmp_path / "node1").mkdir()
    with pytest.raises(TierIOError, match=rf"As root, on Linux 6.9 or newer: echo 2 > {tmp_path}"):
        mempolicy.set_interleave_weights({1: 2})
    with pytest.raises(ConfigError, match="node 0's weight is 256: give 1 to 255"):
        mempolicy.set_interleave_weights({0: 256})


@pytest.mark.parametrize("nodes", [[63], [NODE, 63], [1000]])
def test_a_node_that_does_not_exist(memory, nodes):
    for call in (
        lambda: mempolicy.mbind(memory, PAGE, Mode.BIND, nodes),
        lambda: mempolicy.set_mempolicy(Mode.INTERLEAVE, nodes),
        lambda: mempolicy.move_pages(memory, PAGE, nodes[-1]),
    ):
        with pytest.raises(ConfigError, match=rf"node {nodes[-1]} does not exist.*choose from"):
            call()


def test_no_node_at_all(memory):
    with pytest.raises(ConfigError, match="BIND needs at least one node"):
        mempolicy.mbind(memory, PAGE, Mode.BIND, [])


def test_a_range_that_is_not_whole_pages(memory):
    with pytest.raises(TierIOError, match=rf"mbind of .* on node {NODE} \(BIND\) failed") as caught:
        mempolicy.mbind(memory + 1, PAGE, Mode.BIND, [NODE])
    assert caught.value.errno == errno.EINVAL


def test_a_range_that_is_not_mapped():
    with pytest.raises(TierIOError) as caught:
        mempolicy.get_mempolicy(PAGE)
    assert caught.value.errno == errno.EFAULT


def test_too_many_mappings_name_the_limit(memory, monkeypatch):
    class Kernel:
        def syscall(self, *arguments):
            mempolicy.ctypes.set_errno(errno.ENOMEM)
            return -1

    monkeypatch.setattr(mempolicy, "_libc", Kernel())
    with pytest.raises(TierIOError, match=r"2\.00 MiB \(2097152 bytes\).*sysctl -w vm.max_map_cou"):
        mempolicy.mbind(memory, 2 * MIB, Mode.BIND, [NODE])


def test_an_unknown_processor_is_told_to_use_the_host_tier(memory, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(TierIOError, match="not on riscv64: use the host tier"):
        mempolicy.mbind(memory, PAGE, Mode.BIND, [NODE])


@pytest.mark.parametrize("call", ["mbind", "move_pages"])
def test_a_container_that_forbids_the_calls(call):
    """The kernel itself refuses, by a seccomp filter such as containers have."""
    done = subprocess.run(
        [sys.executable, FORBIDDEN, call], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"TierIOError {errno.EPERM}" in done.stdout
    assert f"{call} of 4.00 KiB (4096 bytes)" in done.stdout
    assert "start the container with --cap-add SYS_NICE" in done.stdout


def landing(asked, got, absent=0):
    placement = Placement(nbytes_by_node=got, absent_nbytes=absent, huge_nbytes=None)
    return Landing(nbytes=sum(asked.values()), asked=asked, got=placement)


@pytest.mark.parametrize(
    ("asked", "got", "absent", "text", "strayed"),
    [
        ({1: 100}, {1: 100}, 0, "asked node 1, got 100 % node 1", False),
        ({1: 100}, {0: 2, 1: 98}, 0, "asked node 1, got 98 % node 1, 2 % node 0", True),
        ({1: 1000}, {0: 1, 1: 999}, 0, "asked node 1, got 99 % node 1, 1 % node 0", True),
        ({1: 100}, {1: 60}, 40, "asked node 1, got 60 % node 1, 40 % absent", False),
        ({1: 100}, {0: 10, 1: 60}, 30, "asked node 1, got 60 % node 1, 10 % node 0, 30 % absent",
         True),
        ({0: 75, 1: 25}, {0: 100}, 0, "asked 75 % node 0, 25 % node 1, got 100 % node 0", True),
        ({1: 100}, {}, 100, "asked node 1, got nothing, 100 % absent", False),
    ],
)  # fmt: skip
def test_a_landing_says_what_was_asked_and_what_was_got(asked, got, absent, text, strayed):
    told = landing(asked, got, absent)
    assert (str(told), told.strayed) == (text, strayed)


def test_a_tier_verifies_each_block():
    journal = Journal()
    with NumaTier(NODE, 32 * MIB, journal=journal) as tier:
        block = tier.allocate(5 * MIB + 1)
        assert tier.landing(block).got.nbytes_by_node == {NODE: block.extent.nbytes}
        assert tier.landing(block).got.absent_nbytes == 0
        assert mempolicy.get_mempolicy(tier.address(block)) == (Mode.BIND, (NODE,))
        assert tier.address(block) % HUGE_PAGE == 0
        assert (tier.spec.name, journal.notices) == (f"numa:{NODE}", [])


def test_strays_are_told_whenever_the_tier_looks(monkeypatch):
    journal = Journal()
    with NumaTier(NODE, 32 * MIB, journal=journal) as tier:
        block = tier.allocate(4 * MIB)
        moved = Placement(
            nbytes_by_node={NODE: 3 * MIB, NODE + 1: MIB}, absent_nbytes=0, huge_nbytes=None
        )
        monkeypatch.setattr(mempolicy, "placement", lambda *_: moved)
        text = f"asked node {NODE}, got 75 % node {NODE}, 25 % node {NODE + 1}"
        assert str(tier.landing(block)) == text
        assert journal.notices == [f"numa:{NODE}: 4.00 MiB: {text}"]


def test_a_full_node_takes_nothing_and_says_what_is_missing(monkeypatch):
    with NumaTier(NODE, 32 * MIB) as tier:
        spilled = Placement(
            nbytes_by_node={NODE: 3 * MIB, NODE + 1: MIB}, absent_nbytes=0, huge_nbytes=None
        )
        full = Topology(nodes=(Node(index=NODE, kind="other", free_nbytes=4096),))
        monkeypatch.setattr(mempolicy, "placement", lambda *_: spilled)
        monkeypatch.setattr(mempolicy, "read_topology", lambda: full)
        with pytest.raises(
            CapacityError,
            match=rf"node {NODE} is full: 1\.00 MiB \(1048576 bytes\) of 4\.00 MiB .* 1048576 by",
        ):
            tier.allocate(4 * MIB)
        assert tier.used_nbytes == 0


def test_a_warning_about_movable_memory_reaches_the_journal():
    journal = Journal()
    movable = Topology(nodes=(Node(index=NODE, kind="cxl", movable=True, memory_nbytes=1 << 40),))
    NumaTier(NODE, MIB, journal=journal, topology=movable).close()
    (notice,) = journal.notices
    assert notice.startswith(f"numa:{NODE}: all memory of node {NODE} is ZONE_MOVABLE")


def test_a_tier_larger_than_its_nodes_is_refused():
    small = Topology(nodes=(Node(index=NODE, kind="cxl", memory_nbytes=MIB),))
    with pytest.raises(CapacityError, match=r"2\.00 MiB \(2097152 bytes\).*at most 1048576 bytes"):
        NumaTier(NODE, 2 * MIB, topology=small)


@pytest.mark.parametrize("weights", [{}, {NODE: 0}, {NODE: -1}])
def test_weights_that_are_none(weights):
    with pytest.raises(ConfigError, match="positive whole numbers"):
        NumaTier(weights, MIB)


def test_a_tier_on_a_node_that_does_not_exist():
    with pytest.raises(ConfigError, match="node 63 does not exist"):
        NumaTier(63, MIB)
