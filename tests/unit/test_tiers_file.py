"""The file of a tier: any offset, length and alignment; errors that say what and where."""

import errno
import os
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload.allocator.errors import CapacityError, TierIOError
from offload.allocator.extent import Extent
from offload.tiers import file as file_module
from offload.tiers import hostmem
from offload.tiers.file import TierFile
from offload.tiers.filetier import FileTier, Lanes
from offload.tiers.hostmem import PAGE
from offload.tiers.journal import Journal
from offload.tiers.mapped import MappedTensor
from offload.tiers.memory import memory_at
from offload.tiers.testing import Memory, pattern

FILE_NBYTES = 8 * PAGE


@pytest.fixture(params=["direct", "cached"])
def file(tmp_path, request, monkeypatch):
    """A file of ``FILE_NBYTES`` patterned bytes, with and without ``O_DIRECT``."""
    (tmp_path / "data").write_bytes(pattern(FILE_NBYTES))
    if request.param == "cached":
        monkeypatch.setattr(file_module, "_open_direct", lambda fd: fd)
    with TierFile(tmp_path, "data") as file:
        assert file.direct == (request.param == "direct")
        yield file


@pytest.fixture
def lanes():
    lanes = Lanes(Journal())
    yield lanes
    lanes.close()


def refuse(code):
    """A system call that fails."""

    def call(*_args):
        raise OSError(code, os.strerror(code))

    return call


def on_disk(file):
    return (file.directory / "data").read_bytes()


def test_an_opened_file_has_its_size(file):
    assert file.nbytes == FILE_NBYTES
    assert file.label.endswith("/data")


@pytest.fixture(scope="module")
def shared_file(tmp_path_factory):
    with TierFile(tmp_path_factory.mktemp("file"), "data") as file:
        file.grow(FILE_NBYTES)
        yield file


@given(
    offset=st.integers(0, FILE_NBYTES - 1) | st.sampled_from([0, PAGE, 3 * PAGE]),
    nbytes=st.integers(0, FILE_NBYTES) | st.sampled_from([PAGE, 2 * PAGE]),
    shift=st.integers(0, PAGE) | st.just(0),
    seed=st.integers(0, 250),
)
def test_any_offset_length_and_alignment(shared_file, offset, nbytes, shift, seed):
    file, nbytes = shared_file, min(nbytes, FILE_NBYTES - offset)
    before = on_disk(file)
    data = pattern(nbytes, seed)
    with Memory.of(data, shift=shift) as memory:
        file.write(offset, memory.address, nbytes)
    assert on_disk(file) == before[:offset] + data + before[offset + nbytes :]
    with Memory(nbytes, shift=shift) as memory:
        file.read(offset, memory.address, nbytes)
        assert memory.data() == data


@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [
        (FILE_NBYTES - 10, 11),
        (FILE_NBYTES - PAGE, 2 * PAGE),
        (FILE_NBYTES, 1),
        (2 * FILE_NBYTES, 5),
    ],
)
def test_a_read_past_the_end_of_the_file_is_an_error(file, offset, nbytes):
    with Memory(nbytes) as memory, pytest.raises(TierIOError) as raised:
        file.read(offset, memory.address, nbytes)
    end = max(offset, FILE_NBYTES)
    early = offset + nbytes - end
    assert f"{file.label} ends at byte {end}, {early} bytes early" in str(raised.value)
    assert raised.value.errno == errno.EIO


def test_a_file_that_shrank_to_an_odd_size_is_an_error(file):
    os.truncate(file.directory / "data", PAGE + 100)
    with Memory(4 * PAGE) as memory, pytest.raises(TierIOError, match="ends at byte 4196"):
        file.read(0, memory.address, 4 * PAGE)


def test_short_reads_and_writes_are_continued(file, monkeypatch):
    for name in ("preadv", "pwritev"):
        whole = getattr(os, name)
        monkeypatch.setattr(
            file_module.os,
            name,
            lambda fd, views, offset, whole=whole: whole(fd, [views[0][:PAGE]], offset),
        )
    data = pattern(3 * PAGE + 100, seed=9)
    with Memory.of(data) as memory:
        file.write(PAGE, memory.address, len(data))
    assert on_disk(file)[PAGE : PAGE + len(data)] == data
    with Memory(len(data)) as memory:
        file.read(PAGE, memory.address, len(data))
        assert memory.data() == data


@pytest.mark.parametrize("verb", ["read", "write"])
def test_an_error_of_the_kernel_says_what_failed_and_where(file, verb):
    with Memory(PAGE) as memory:
        file.close()
        with pytest.raises(TierIOError) as raised:
            getattr(file, verb)(2 * PAGE, memory.address, PAGE)
    assert raised.value.errno == errno.EBADF
    assert f"{verb} of 4096 bytes at byte 8192 of {file.label} failed" in str(raised.value)


def test_a_closed_file_never_touches_the_next_owner_of_its_descriptor(file, tmp_path):
    numbers = {file.fd, file.direct_fd}
    file.close()
    others = [os.open(tmp_path / f"other{index}", os.O_RDWR | os.O_CREAT) for index in range(3)]
    assert numbers & set(others)  # the kernel gives out the lowest free number
    with Memory.of(pattern(PAGE)) as memory, pytest.raises(TierIOError):
        file.write(0, memory.address, PAGE)
    file.close()  # twice is safe, and closes nobody else's
    assert [os.fstat(other).st_size for other in others] == [0, 0, 0]
    for other in others:
        os.close(other)


def test_cached_writes_and_direct_reads_agree(file):
    """A tail goes by the page cache, the next read of its page does not."""
    with Memory.of(pattern(100, seed=7)) as memory:
        file.write(PAGE, memory.address, 100)
    with Memory(PAGE) as memory:
        file.read(PAGE, memory.address, PAGE)
        assert memory.data() == pattern(100, seed=7) + pattern(FILE_NBYTES)[PAGE + 100 : 2 * PAGE]


def test_mappings_and_direct_writes_agree(file):
    address = hostmem.map_anonymous(PAGE)
    file.map(address, PAGE, 2 * PAGE, shared=True)
    with Memory.of(pattern(PAGE, seed=8)) as memory:
        file.write(2 * PAGE, memory.address, PAGE)
        assert bytes(memory_at(address, PAGE)) == pattern(PAGE, seed=8)
    memory_at(address, PAGE)[:3] = b"new"
    with Memory(PAGE) as memory:
        file.read(2 * PAGE, memory.address, PAGE)
        assert memory.data() == b"new" + pattern(PAGE, seed=8)[3:]
    hostmem.unmap(address, PAGE)


@pytest.mark.parametrize("can_zero", [True, False])
def test_clear_makes_exactly_its_range_zeros(file, can_zero, monkeypatch):
    if not can_zero:
        monkeypatch.setattr(hostmem, "zero_range", lambda *_: False)
        monkeypatch.setattr(file_module, "_ZEROS_NBYTES", PAGE)
    file.clear(2 * PAGE, 3 * PAGE)
    before = pattern(FILE_NBYTES)
    assert on_disk(file) == before[: 2 * PAGE] + bytes(3 * PAGE) + before[5 * PAGE :]


def test_clear_reports_the_disk_s_errors(file, monkeypatch):
    monkeypatch.setattr(hostmem, "zero_range", lambda *_: False)
    monkeypatch.setattr(file_module.os, "pwritev", refuse(errno.EIO))
    with pytest.raises(TierIOError, match=r"clear of 4096 bytes at byte 8192 of .*data failed"):
        file.clear(2 * PAGE, PAGE)


def test_uncache_drops_pages_but_no_bytes(file):
    file.sync()
    file.uncache(0, FILE_NBYTES)
    assert on_disk(file) == pattern(FILE_NBYTES)


def test_sync_reports_the_disk_s_errors(file, monkeypatch):
    monkeypatch.setattr(file_module.os, "fdatasync", refuse(errno.EIO))
    with pytest.raises(TierIOError, match=r"sync of .*data failed") as raised:
        file.sync()
    assert raised.value.errno == errno.EIO


def test_grow_takes_the_room_at_once_and_never_shrinks(tmp_path):
    with TierFile(tmp_path, "data") as file:
        file.grow(1 << 20)
        facts = (tmp_path / "data").stat()
        assert facts.st_size == file.nbytes == 1 << 20
        assert facts.st_blocks * 512 >= 1 << 20  # not a hole
        file.grow(PAGE)
        assert file.nbytes == (tmp_path / "data").stat().st_size == 1 << 20


def test_grow_reports_what_is_not_about_room(file, monkeypatch):
    monkeypatch.setattr(file_module.os, "posix_fallocate", refuse(errno.EIO))
    with pytest.raises(TierIOError, match=r"can't grow .*data"):
        file.grow(2 * FILE_NBYTES)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_growth_that_finds_no_room_keeps_none(file, monkeypatch, code):
    """ext4 keeps the extents that it had found before the disk was full."""

    def partial(fd, offset, nbytes):
        os.ftruncate(fd, offset + PAGE)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(file_module.os, "posix_fallocate", partial)
    with pytest.raises(CapacityError, match=r"needs 4.00 MiB more \(4194304 bytes\).* free"):
        file.grow(FILE_NBYTES + (4 << 20))
    assert (file.directory / "data").stat().st_size == FILE_NBYTES == file.nbytes


def test_a_file_leaves_its_disk_what_it_is_told_to_spare(tmp_path, monkeypatch):
    stats = os.statvfs(tmp_path)
    free = (10 << 20) // stats.f_frsize * stats.f_frsize
    full = SimpleNamespace(f_bavail=free // stats.f_frsize, f_frsize=stats.f_frsize)
    monkeypatch.setattr(file_module.os, "fstatvfs", lambda _fd: full)
    with TierFile(tmp_path, None, spare_nbytes=4 << 20) as file:
        assert file.growth_nbytes() == free - (4 << 20)
        said = r"needs 6.00 MiB more .*10.00 MiB free, 4.00 MiB of which stay free for records"
        with pytest.raises(CapacityError, match=said):
            file.grow((6 << 20) + PAGE)
        assert file.nbytes == 0
        file.grow(6 << 20)
        assert file.nbytes == 6 << 20
    with TierFile(tmp_path, None, spare_nbytes=11 << 20) as file:
        assert file.growth_nbytes() == 0


def test_files_are_the_owner_s_alone(tmp_path):
    with TierFile(tmp_path, "data"):
        assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o600
    with TierFile(tmp_path, None) as scratch:
        assert stat.S_IMODE(os.fstat(scratch.fd).st_mode) == 0o600


def test_a_symbolic_link_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").write_bytes(b"precious")
    (tmp_path / "data").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TierIOError, match=r"can't open .*data for writing") as raised:
        TierFile(tmp_path, "data")
    assert raised.value.errno == errno.ELOOP
    assert (tmp_path / "elsewhere").read_bytes() == b"precious"


def test_a_missing_directory_says_so(tmp_path):
    with pytest.raises(TierIOError, match="No such file or directory"):
        TierFile(tmp_path / "nowhere", None)


@pytest.mark.parametrize("unnamed", [True, False])
def test_scratch_leaves_no_name_on_the_disk(tmp_path, unnamed, monkeypatch):
    if not unnamed:  # as on file systems without O_TMPFILE
        whole = os.open

        def named_only(path, flags, *mode):
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, "no unnamed files here")
            return whole(path, flags, *mode)

        monkeypatch.setattr(file_module.os, "open", named_only)
    with TierFile(tmp_path, None) as scratch:
        scratch.grow(1 << 20)
        with Memory.of(pattern(PAGE)) as memory:
            scratch.write(0, memory.address, PAGE)
        assert list(tmp_path.iterdir()) == []
        with Memory(PAGE) as memory:
            scratch.read(0, memory.address, PAGE)
            assert memory.data() == pattern(PAGE)
        assert scratch.label == f"scratch in {tmp_path}"


def test_a_file_system_without_direct_io_is_used_through_the_cache(tmp_path, monkeypatch):
    whole = os.open

    def cached_only(path, flags, *mode):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        return whole(path, flags, *mode)

    monkeypatch.setattr(file_module.os, "open", cached_only)
    with TierFile(tmp_path, "data") as file:
        assert not file.direct


# The tier that cuts the file into blocks.


def test_room_is_taken_when_blocks_are_allocated_not_when_they_are_written(tmp_path, lanes):
    with FileTier(tmp_path, "data", lanes) as tier:
        tier.reserve_room(10 << 20)
        assert (tmp_path / "data").stat().st_blocks * 512 >= 10 << 20
        capacity = tier.arena.capacity
        blocks = [tier.allocate(5 << 20) for _ in range(2)]
        assert tier.arena.capacity == capacity
        tier.reserve_room(5 << 20)
        assert tier.arena.capacity >= capacity + (5 << 20)
        for block in blocks:
            block.release()
        capacity = tier.arena.capacity
        tier.reserve_room(10 << 20)
        assert tier.arena.capacity == capacity  # released room counts


def test_a_tier_uses_the_last_pages_of_a_full_disk(tmp_path, lanes, monkeypatch):
    with FileTier(tmp_path, None, lanes) as tier:
        grow = tier.file.grow

        def bounded(nbytes):
            if nbytes > 9 * PAGE:
                raise CapacityError("full")
            grow(nbytes)

        monkeypatch.setattr(tier.file, "grow", bounded)
        blocks = [tier.allocate(4 * PAGE), tier.allocate(PAGE)]
        assert tier.arena.last_free_nbytes == 3 * PAGE  # it doubled
        blocks.append(tier.allocate(4 * PAGE))
        assert tier.arena.current_nbytes == tier.file.nbytes == 9 * PAGE
        with pytest.raises(CapacityError, match="full"):
            tier.allocate(PAGE)
        for block in blocks:
            block.release()


def test_a_reopened_tier_finds_its_bytes_again(tmp_path, lanes):
    with FileTier(tmp_path, "data", lanes) as tier:
        block = tier.allocate(5000)
        with Memory.of(pattern(5000)) as memory:
            tier.write(block, memory.address).wait()
        extent = block.extent
    with FileTier(tmp_path, "data", lanes) as tier:
        adopted = tier.adopt(extent, 5000)
        with Memory(5000) as memory:
            tier.read(adopted, memory.address).wait()
            assert memory.data() == pattern(5000)
        assert not tier.allocate(5000).extent.overlaps(extent)
        with pytest.raises(CapacityError, match="are not free"):
            tier.adopt(extent, 5000)


def test_adopting_beyond_the_end_of_the_file_is_refused(tmp_path, lanes):
    with (
        FileTier(tmp_path, "data", lanes) as tier,
        pytest.raises(CapacityError, match="holds 0 bytes, its record names byte 4096"),
    ):
        tier.adopt(Extent(0, 4096), 100)


def test_a_cleared_block_reads_zeros(tmp_path, lanes):
    with FileTier(tmp_path, "data", lanes) as tier:
        first, second = tier.allocate(PAGE), tier.allocate(5000)
        with Memory.of(pattern(5000)) as memory:
            tier.write(first, memory.address, nbytes=PAGE).wait()
            tier.write(second, memory.address).wait()
            tier.clear(second)
            tier.read(second, memory.address).wait()
            assert memory.data() == bytes(5000)
            tier.read(first, memory.address, nbytes=PAGE).wait()
            assert memory.data()[:PAGE] == pattern(PAGE)


def test_moves_are_counted_by_what_they_read_and_wrote(tmp_path):
    journal = Journal()
    lanes = Lanes(journal)
    with FileTier(tmp_path, "data", lanes) as tier:
        block = tier.allocate(5000)
        with Memory.of(pattern(5000)) as memory:
            tier.write(block, memory.address).wait()
            tier.read(block, memory.address, nbytes=1000).wait()
        assert (journal.totals.written_nbytes, journal.totals.read_nbytes) == (5000, 1000)
    lanes.close()


@pytest.mark.parametrize("write", ["read", "whole page", "tail", "mapped", "mapped again"])
def test_a_stamp_tells_whether_anything_was_written(file, write):
    if not file.stamp():
        pytest.skip("this file system does not tell of writes through mappings")
    buffer, tensor = Memory(PAGE), MappedTensor(file, torch.uint8, (PAGE,), shared=True)
    file.map(tensor.address, PAGE, PAGE, shared=True)
    if write == "mapped again":  # a page that is dirty already
        tensor.tensor[0] = 1
        file.map(tensor.address, PAGE, PAGE, shared=True)
    assert file.stamp()
    assert file.is_stamped()
    if write == "read":
        file.read(0, buffer.address, PAGE)
        assert int(tensor.tensor.sum()) >= 0
    elif write.startswith("mapped"):
        tensor.tensor.numpy()[17] = 3
    else:
        file.write(0, buffer.address, PAGE if write == "whole page" else 5)
    assert file.is_stamped() == (write == "read")


def test_a_file_system_that_does_not_tell_of_mapped_writes(file, monkeypatch):
    monkeypatch.setattr(file_module, "_tells_write", lambda *_args: False)
    assert not file.stamp()
    assert not file.is_stamped()


@pytest.mark.skipif(not os.path.ismount("/dev/shm"), reason="no tmpfs here")
def test_tmpfs_does_not_tell_and_its_probe_says_so(tmp_path):
    assert not file_module.tells_mapped_writes(Path("/dev/shm"))
    assert not file_module.tells_mapped_writes(tmp_path / "nowhere")
