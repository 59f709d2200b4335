"""Several files as one: bytes go to the path that the arithmetic says, whole, in any state."""

import errno
import os
import threading
from functools import partial

import pytest
import torch
from open_files import open_files

from offload.allocator.errors import CapacityError, TierIOError
from offload.tiers import file as file_module
from offload.tiers import hostmem
from offload.tiers.file import TierFile
from offload.tiers.filetier import LARGE_NBYTES, FileTier, Lanes
from offload.tiers.health import PathHealth, PathRates
from offload.tiers.hostmem import HUGE_PAGE, PAGE
from offload.tiers.journal import Journal, Label
from offload.tiers.mapped import MappedTensor
from offload.tiers.pages import PagePool
from offload.tiers.pieces import PIECE_NBYTES
from offload.tiers.striped import StripedFile, open_striped
from offload.tiers.stripes import Stripes
from offload.tiers.testing import Memory, pattern

LABEL = Label("w", "weight", "file", "host")
PATIENCE_S = 60
RATES = PathRates(read_bytes_per_s=1e9, write_bytes_per_s=1e9)
UNIT = 2 * PAGE


def folders(tmp_path, count):
    made = [tmp_path / f"path{index}" for index in range(count)]
    for folder in made:
        folder.mkdir(exist_ok=True)
    return made


def striped(tmp_path, weights, unit=UNIT, name="data"):
    make = [partial(TierFile, folder, name) for folder in folders(tmp_path, len(weights))]
    health = PathHealth([RATES] * len(weights), lambda slow: None)
    return open_striped(make, Stripes(unit, weights), health)


@pytest.fixture(params=["direct", "cached"])
def file(tmp_path, request, monkeypatch):
    if request.param == "cached":
        monkeypatch.setattr(file_module, "_open_direct", lambda fd: fd)
    with striped(tmp_path, (3, 1)) as file:
        assert file.direct == (request.param == "direct")
        file.grow(100 * PAGE)
        yield file


def on_disk(file, offset, nbytes):
    """The bytes of a range, read from each path's own file, page by page."""
    found = b""
    for at in range(offset, offset + nbytes):
        if at == offset or at % PAGE == 0:
            path, place = file.stripes.place(at)
            count = min(PAGE - at % PAGE, offset + nbytes - at)
            found += os.pread(file.files[path].fd, count, place)
    return found


@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [(0, PAGE), (0, 40 * PAGE), (5 * PAGE, 30 * PAGE), (7, 3 * UNIT), (UNIT - 1, 2), (100, 0)],
)
def test_bytes_go_to_their_paths_and_come_back(file, offset, nbytes):
    data = pattern(nbytes)
    with Memory.of(data) as memory:
        file.write(offset, memory.address, nbytes)
    assert on_disk(file, offset, nbytes) == data
    with Memory(nbytes) as memory:
        file.read(offset, memory.address, nbytes)
        assert memory.data() == data


def test_pieces_lie_on_one_path_each_and_are_no_larger_than_a_request(tmp_path):
    with striped(tmp_path, (9, 1), unit=HUGE_PAGE) as file:
        nbytes, offset = 100 << 20, 3 * PAGE
        pieces = file.pieces(offset, nbytes)
        at = 0
        for piece in pieces:
            assert piece.start == at
            assert 0 < piece.nbytes <= PIECE_NBYTES
            ends = {file.stripes.place(offset + byte)[0] for byte in (at, at + piece.nbytes - 1)}
            assert ends == {piece.queue}
            at += piece.nbytes
        assert at == nbytes
        assert max(piece.nbytes for piece in pieces) == PIECE_NBYTES
        assert {piece.queue for piece in pieces} == {0, 1}


def test_each_path_takes_the_room_of_its_share(tmp_path):
    with striped(tmp_path, (3, 1)) as file:
        file.grow(80 * UNIT + PAGE)
        assert [one.nbytes for one in file.files] == [60 * UNIT + PAGE, 20 * UNIT]
        assert file.nbytes == 80 * UNIT + PAGE
        file.grow(UNIT)
        assert file.nbytes == 80 * UNIT + PAGE


def test_a_growth_that_one_path_refuses_leaves_every_path_as_it_was(tmp_path, monkeypatch):
    with striped(tmp_path, (1, 1, 1)) as file:
        file.grow(9 * UNIT)
        whole = os.posix_fallocate

        def second_is_full(fd, offset, nbytes):
            if fd == file.files[1].fd:
                raise OSError(errno.ENOSPC, "No space left on device")
            whole(fd, offset, nbytes)

        monkeypatch.setattr(os, "posix_fallocate", second_is_full)
        with pytest.raises(CapacityError, match=rf"path1/data needs .*\({7 * UNIT} bytes\)"):
            file.grow(30 * UNIT)
        assert file.nbytes == 9 * UNIT
        for one in file.files:
            assert os.fstat(one.fd).st_size == one.nbytes == 3 * UNIT


def test_a_reopened_file_holds_what_its_shortest_path_has(tmp_path):
    with striped(tmp_path, (1, 1)) as file:
        file.grow(10 * UNIT)
    os.truncate(tmp_path / "path1" / "data", UNIT + PAGE)
    with striped(tmp_path, (1, 1)) as file:
        assert file.nbytes == 3 * UNIT + PAGE


@pytest.mark.parametrize("verb", ["read", "write", "sync"])
def test_a_failing_path_is_named(tmp_path, verb, monkeypatch):
    with striped(tmp_path, (1, 1)) as file, Memory(4 * UNIT) as memory:
        file.grow(4 * UNIT)

        def broken(*_args):
            raise OSError(errno.EIO, "Input/output error")

        if verb == "sync":
            whole = os.fdatasync
            monkeypatch.setattr(
                os, "fdatasync", lambda fd: broken() if fd == file.files[1].fd else whole(fd)
            )
        else:
            monkeypatch.setattr(file.files[1].engine, verb, broken)
        arguments = () if verb == "sync" else (0, memory.address, 4 * UNIT)
        with pytest.raises(TierIOError) as raised:
            getattr(file, verb)(*arguments)
        assert raised.value.errno == errno.EIO
        message = str(raised.value)
        assert f"{verb} of" in message
        assert "path1/data" in message
        assert "path 2 of 2" in message
        assert "last commit is whole" in message


def test_clearing_touches_its_range_only(file):
    data = pattern(40 * PAGE)
    with Memory.of(data) as memory:
        file.write(0, memory.address, len(data))
    file.clear(3 * PAGE, 20 * PAGE)
    assert on_disk(file, 0, len(data)) == data[: 3 * PAGE] + bytes(20 * PAGE) + data[23 * PAGE :]


def test_what_can_not_be_opened_leaves_nothing_open(tmp_path):
    (tmp_path / "path0").mkdir()
    make = [partial(TierFile, tmp_path / f"path{index}", "data") for index in range(2)]
    with pytest.raises(TierIOError, match="path1"):
        open_striped(make, Stripes(UNIT, (1, 1)), PathHealth([RATES] * 2, lambda slow: None))
    assert open_files(tmp_path) == []


@pytest.mark.parametrize(("unit", "weights"), [(PAGE + 1, (1,)), (PAGE, (1, 1))])
def test_units_are_whole_pages_and_each_file_has_a_weight(tmp_path, unit, weights):
    with (
        TierFile(tmp_path, "data") as one,
        pytest.raises(ValueError, match="1 files can't be striped"),
    ):
        StripedFile([one], Stripes(unit, weights), PathHealth([RATES], lambda slow: None))


# Under a tier.


@pytest.fixture
def lanes():
    lanes = Lanes(Journal(), 2, 2)
    yield lanes
    lanes.close()


@pytest.fixture(params=["direct", "cached"])
def tier(tmp_path, lanes, request, monkeypatch):
    if request.param == "cached":
        monkeypatch.setattr(file_module, "_open_direct", lambda fd: fd)
    with FileTier(tmp_path, "data", lanes, file=striped(tmp_path, (2, 1))) as tier:
        tier.allocate(PAGE)  # what follows does not begin where a unit does
        yield tier


def test_large_blocks_are_whole_huge_pages(tier):
    block = tier.allocate(LARGE_NBYTES + 5)
    assert block.extent.offset % HUGE_PAGE == 0
    assert block.extent.nbytes == LARGE_NBYTES + HUGE_PAGE == tier.extent_nbytes(LARGE_NBYTES + 5)
    assert tier.allocate(LARGE_NBYTES - 1).extent.nbytes == LARGE_NBYTES
    assert tier.extent_nbytes(5000) == 2 * PAGE


def test_reserved_room_is_enough_for_large_blocks_whatever_was_before(tier):
    tier.reserve_room(3 * tier.extent_nbytes(LARGE_NBYTES + 5))
    before = tier.file.nbytes
    for _ in range(3):
        tier.allocate(LARGE_NBYTES + 5)
    assert tier.file.nbytes == before


def filed(tier, values, *, shared=False):
    mapped = MappedTensor(tier.file, values.dtype, values.shape, shared=shared)
    block = tier.allocate(values.nbytes)
    with Memory.of(values.numpy().tobytes()) as memory:
        tier.write(block, memory.address, nbytes=values.nbytes).wait()
    mapped.file_as(block)
    return mapped


def numbered(count):
    return (torch.arange(count) % 251).to(torch.float32)


def fetch(tier, mapped, pool=None):
    tier.lanes.reads.submit(mapped.fetch_jobs(pool), LABEL, mapped.nbytes).wait()
    mapped.land()


@pytest.mark.parametrize("count", [1, PAGE // 4, 5 * UNIT // 4 + 3, 300_000])
def test_a_mapped_tensor_is_right_in_every_state(tier, count):
    values = numbered(count)
    mapped = filed(tier, values)
    assert torch.equal(mapped.tensor, values)
    for job in mapped.fetch_jobs():
        job()
        assert torch.equal(mapped.tensor, values)
    mapped.land()
    assert torch.equal(mapped.tensor, values)
    assert mapped.held == tier.file.direct
    mapped.file_as(mapped.block)
    assert torch.equal(mapped.tensor, values)


def test_writes_to_a_filed_tensor_are_noticed_on_any_path(tier):
    values = numbered(300_000)
    for at in (0, 2 * UNIT // 4, 299_999):
        mapped = filed(tier, values)
        mapped.tensor.sum()
        assert not mapped.written_while_filed()
        mapped.tensor[at] = -1
        assert mapped.written_while_filed()
        mapped.shed()
        assert mapped.tensor[at] == -1


def test_shared_writes_reach_every_path(tier):
    values = numbered(300_000)
    mapped = filed(tier, values, shared=True)
    mapped.tensor.mul_(2)
    offset, expected = mapped.block.extent.offset, (values * 2).numpy().tobytes()
    assert on_disk(tier.file, offset, values.nbytes) == expected
    tier.file.sync()
    mapped.shed()
    tier.file.uncache(offset, mapped.padded_nbytes)
    assert not hostmem.is_cached(mapped.address, mapped.nbytes)
    assert torch.equal(mapped.tensor, values * 2)


@pytest.mark.parametrize("pooled", [True, False])
def test_another_thread_never_sees_a_wrong_byte(tier, pooled):
    values = numbered(300_000)
    mapped = filed(tier, values)
    pool = PagePool() if pooled else None
    samples = torch.randperm(values.numel())[:2000]
    expected = values[samples]
    stop, started, wrong = threading.Event(), threading.Event(), []

    def read():
        while not stop.is_set():
            if not torch.equal(mapped.tensor[samples], expected):
                wrong.append(1)
            started.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert started.wait(PATIENCE_S)
    for _ in range(10):
        fetch(tier, mapped, pool)
        mapped.file_as(mapped.block, pool)
    stop.set()
    reader.join()
    assert not wrong


@pytest.mark.own_process
def test_evicted_pages_are_used_again(tmp_path, lanes):
    with FileTier(tmp_path, "data", lanes, file=striped(tmp_path, (2, 1))) as tier:
        mapped, pool = filed(tier, numbered(300_000)), PagePool()
        fetch(tier, mapped, pool)
        mapped.file_as(mapped.block, pool)
        assert pool.nbytes == mapped.padded_nbytes
        fetch(tier, mapped, pool)
        assert pool.nbytes == 0
        assert torch.equal(mapped.tensor, numbered(300_000))


def test_too_many_mappings_name_the_limit_to_raise(tier, monkeypatch):
    mapped = filed(tier, numbered(300_000))

    def refuse(*_args, **_kwargs):
        raise TierIOError(errno.ENOMEM, "mmap of 8192 bytes failed: Cannot allocate memory")

    monkeypatch.setattr(hostmem, "map_file", refuse)
    with pytest.raises(TierIOError, match=rf"every {UNIT} bytes.*vm.max_map_count=") as raised:
        mapped.file_as(mapped.block)
    assert raised.value.errno == errno.ENOMEM


def test_a_slow_path_does_not_hold_up_the_others(tier):
    """Its requests wait in their own queue: the other path's go on."""
    gate, entered = threading.Event(), threading.Event()
    whole = tier.file.files[0].read

    def slow(offset, address, nbytes):
        entered.set()
        assert gate.wait(PATIENCE_S)
        whole(offset, address, nbytes)

    tier.file.files[0].read = slow
    data = pattern(30 * UNIT)
    block = tier.allocate(len(data))
    with Memory.of(data) as memory:
        tier.write(block, memory.address).wait()
    offset = block.extent.offset
    with Memory(len(data)) as memory:
        stuck = tier.read(block, memory.address)
        assert entered.wait(PATIENCE_S)
        starts = [p.start for p in tier.file.pieces(offset, len(data)) if p.queue == 1]
        with Memory(PAGE) as other:
            for start in starts:
                tier.read(block, other.address, offset=start, nbytes=PAGE).wait()
                assert other.data() == data[start : start + PAGE]
        assert not stuck.done()
        gate.set()
        stuck.wait()
        assert memory.data() == data


def test_a_stamp_tells_of_a_write_to_any_path(file):
    if not file.stamp():
        pytest.skip("this file system does not tell of writes through mappings")
    assert file.is_stamped()
    memory = Memory(PAGE)
    for unit in (0, 3):  # one on each path
        file.stamp()
        file.write(unit * UNIT, memory.address, PAGE)
        assert not file.is_stamped()
