"""A mapped tensor reads right in every state, from every thread, at one address."""

import errno
import gc
import os
import threading
import weakref
from pathlib import Path

import pytest
import torch
from mapped_values import PATIENCE_S, fetch, filed, numbered, on_disk, stored

from mappings import is_mapped
from offload.allocator.errors import StaleBlockError, TierIOError
from offload.tiers import file as file_module
from offload.tiers import hostmem
from offload.tiers.filetier import FileTier
from offload.tiers.hostmem import HUGE_PAGE, PAGE
from offload.tiers.mapped import FETCH_NBYTES, MappedTensor
from offload.tiers.pages import PagePool


def count_areas():
    with Path("/proc/self/maps").open() as maps:
        return sum(1 for _ in maps)


SHAPES = [
    (0,),
    (),
    (1,),
    (3, 5),
    (PAGE // 4,),
    (PAGE // 4 + 1,),
    (HUGE_PAGE // 4 - 1,),
    (HUGE_PAGE // 4 + 3,),
    (FETCH_NBYTES // 4 + 1000,),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_are_right_in_every_state(any_tier, shape):
    values = numbered(shape)
    mapped = filed(any_tier, values)
    assert torch.equal(mapped.tensor, values)  # filed
    for job in mapped.fetch_jobs():
        assert torch.equal(mapped.tensor, values)  # fetching
        job()
    mapped.land()
    assert torch.equal(mapped.tensor, values)  # held
    assert mapped.held == any_tier.file.direct
    mapped.file_as(mapped.block)
    assert torch.equal(mapped.tensor, values)  # given up
    assert not mapped.held


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]
)
def test_any_type_has_a_home(tier, dtype):
    values = numbered((7, 11), dtype)
    mapped = filed(tier, values)
    assert mapped.tensor.dtype == dtype
    assert mapped.nbytes == values.nbytes
    assert torch.equal(mapped.tensor, values)
    fetch(tier, mapped)
    assert torch.equal(mapped.tensor, values)


def test_a_new_tensor_is_held_zero_and_without_a_home(tier):
    mapped = MappedTensor(tier.file, torch.float32, (100,))
    assert mapped.held
    assert mapped.block is None
    assert torch.equal(mapped.tensor, torch.zeros(100))
    assert not mapped.written_while_filed()


def test_large_tensors_stand_on_huge_pages(tier):
    assert MappedTensor(tier.file, torch.uint8, (HUGE_PAGE,)).address % HUGE_PAGE == 0
    assert MappedTensor(tier.file, torch.uint8, (5,)).address % PAGE == 0


def test_held_memory_is_apart_from_the_file(tier):
    values = numbered((5000,))
    mapped = filed(tier, values)
    fetch(tier, mapped)
    mapped.tensor.add_(1)
    assert on_disk(tier, mapped.block, values.nbytes) == values.numpy().tobytes()
    os.pwrite(tier.file.fd, bytes(100), mapped.block.extent.offset)
    assert torch.equal(mapped.tensor, values + 1)


def test_views_and_addresses_stay_valid(any_tier):
    values = numbered((600, 1000))
    mapped = filed(any_tier, values)
    view, rows = mapped.tensor.t(), mapped.tensor[3:5]
    address = mapped.tensor.data_ptr()
    for _ in range(3):
        fetch(any_tier, mapped)
        assert torch.equal(view, values.t())
        assert torch.equal(rows, values[3:5])
        mapped.file_as(mapped.block)
        assert torch.equal(view, values.t())
        assert torch.equal(rows, values[3:5])
    assert mapped.tensor.data_ptr() == rows.data_ptr() - 3 * 4000 == address == mapped.address


def test_filing_at_another_block_shows_the_other_bytes(any_tier):
    old, new = numbered((5000,)), numbered((5000,), first=7)
    mapped = filed(any_tier, old)
    view = mapped.tensor[10:20]
    other = stored(any_tier, new)
    mapped.file_as(other)
    assert mapped.block is other
    assert torch.equal(view, new[10:20])
    fetch(any_tier, mapped)
    assert torch.equal(mapped.tensor, new)


def test_a_released_or_smaller_block_is_no_home(tier):
    mapped = filed(tier, numbered((5000,)))
    with pytest.raises(ValueError, match="leave a block of 4096 bytes"):
        mapped.file_as(tier.allocate(PAGE))
    block = tier.allocate(20_000)
    block.release()
    with pytest.raises(StaleBlockError):
        mapped.file_as(block)
    assert torch.equal(mapped.tensor, numbered((5000,)))


@pytest.mark.parametrize("shape", [(5000,), (FETCH_NBYTES // 4 + 5000,)], ids=str)
@pytest.mark.parametrize("pooled", [True, False])
def test_another_thread_never_sees_a_wrong_byte(any_tier, shape, pooled):
    """Reads go on in another thread while the tensor is fetched and evicted."""
    values = numbered(shape)
    mapped = filed(any_tier, values)
    pool = PagePool() if pooled else None
    samples = torch.randperm(values.numel())[:2000]
    expected = values[samples]
    stop, started, wrong, reads = threading.Event(), threading.Event(), [], []

    def read():
        while not stop.is_set():
            seen = mapped.tensor[samples]
            reads.append(1)
            if not torch.equal(seen, expected):
                wrong.append(seen)
            started.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert started.wait(PATIENCE_S)
    for _ in range(15):
        fetch(any_tier, mapped, pool)
        mapped.file_as(mapped.block, pool)
    stop.set()
    reader.join()
    assert len(reads) > 1
    assert not wrong
    assert pool is None or pool.nbytes == 0  # [Note: recycled pages]: not while a reader lives


def test_a_write_to_filed_private_memory_is_noticed_and_leaves_the_block_alone(any_tier):
    values = numbered((5000,))
    mapped = filed(any_tier, values)
    mapped.tensor.sum()
    assert not mapped.written_while_filed()
    mapped.tensor[4321] = -1
    assert mapped.written_while_filed()
    assert on_disk(any_tier, mapped.block, values.nbytes) == values.numpy().tobytes()
    mapped.file_as(mapped.block)
    assert not mapped.written_while_filed()
    assert torch.equal(mapped.tensor, values)


def test_a_write_to_held_memory_is_not_the_page_map_s_to_notice(tier):
    mapped = filed(tier, numbered((5000,)))
    fetch(tier, mapped)
    mapped.tensor.zero_()
    assert not mapped.written_while_filed()


def test_a_cached_fetch_is_no_write(tmp_path, lanes, monkeypatch):
    monkeypatch.setattr(file_module, "_open_direct", lambda fd: fd)
    with FileTier(tmp_path, "data", lanes) as tier:
        mapped = filed(tier, numbered((5000,)))
        fetch(tier, mapped)
        assert not mapped.written_while_filed()
        mapped.tensor[0] = 5
        assert mapped.written_while_filed()


def test_shared_writes_go_to_the_file(any_tier):
    values = numbered((5000,))
    mapped = filed(any_tier, values, shared=True)
    mapped.tensor.mul_(2)
    assert on_disk(any_tier, mapped.block, values.nbytes) == (values * 2).numpy().tobytes()
    mapped.shed()
    assert torch.equal(mapped.tensor, values * 2)


@pytest.mark.parametrize("shared", [True, False])
def test_shedding_keeps_values_in_every_state(any_tier, shared):
    values = numbered((HUGE_PAGE // 4 + 3,))
    mapped = filed(any_tier, values, shared=shared)
    mapped.shed()
    mapped.tensor[7] = -1
    values[7] = -1
    mapped.shed()
    assert torch.equal(mapped.tensor, values)
    mapped = MappedTensor(any_tier.file, torch.float32, (5000,))
    mapped.tensor.fill_(3)
    mapped.shed()  # held, the only copy
    assert torch.equal(mapped.tensor, torch.full((5000,), 3.0))


@pytest.mark.own_process
def test_shedding_gives_faulted_pages_back(tier):
    values = numbered((8 << 20,))
    mapped = filed(tier, values, shared=True)
    tier.file.sync()
    mapped.tensor.sum()
    _, before = hostmem.resident_nbytes()
    mapped.shed()
    _, after = hostmem.resident_nbytes()
    assert before - after > values.nbytes * 3 // 4


@pytest.mark.own_process
def test_eviction_gives_held_memory_back(tier):
    values = numbered((16 << 20,))
    mapped = filed(tier, values)
    fetch(tier, mapped)
    held, _ = hostmem.resident_nbytes()
    mapped.file_as(mapped.block)
    filed_, _ = hostmem.resident_nbytes()
    assert held - filed_ > values.nbytes * 7 // 8


@pytest.mark.own_process
def test_memory_lives_as_long_as_the_last_view(tier):
    values = numbered((100, 100))
    mapped = filed(tier, values)
    address, gone = mapped.address, weakref.ref(mapped)
    view = mapped.tensor[50:]
    del mapped
    gc.collect()
    assert gone() is None
    assert torch.equal(view, values[50:])
    del view
    gc.collect()
    assert not is_mapped(address)


@pytest.mark.own_process
def test_a_failed_fetch_is_an_error_and_filing_again_mends_it(tier):
    values = numbered((FETCH_NBYTES // 4 + 5000,))
    mapped = filed(tier, values)
    tier.file.sync()
    whole = os.fstat(tier.file.fd).st_size
    os.truncate(f"/proc/self/fd/{tier.file.fd}", mapped.block.extent.offset + FETCH_NBYTES)
    areas = count_areas()
    with pytest.raises(TierIOError, match="bytes early"):
        fetch(tier, mapped)
    assert count_areas() <= areas + 2  # the part that was read; no pages left over
    os.truncate(f"/proc/self/fd/{tier.file.fd}", whole)
    mapped.file_as(mapped.block)
    assert torch.equal(mapped.tensor[: FETCH_NBYTES // 4], values[: FETCH_NBYTES // 4])


def test_mapped_again_it_keeps_writes_from_the_file_or_not(any_tier):
    values = numbered((3000,))
    mapped = MappedTensor(any_tier.file, torch.float32, (3000,), shared=True)
    mapped.file_as(stored(any_tier, values))
    mapped.tensor[5] = -1  # reaches the file
    mapped.map_again(shared=False)
    assert not mapped.written_while_filed()
    mapped.tensor[6] = -2  # does not
    assert mapped.written_while_filed()
    mapped.shed()
    assert mapped.tensor[5:7].tolist() == [-1, -2]
    mapped.map_again(shared=True)
    assert mapped.tensor[5:7].tolist() == [-1, 6]
    mapped.tensor[6] = -3
    mapped.shed()
    found = torch.frombuffer(bytearray(on_disk(any_tier, mapped.block, 12_000)), dtype=values.dtype)
    assert found[5:7].tolist() == [-1, -3]


def jobs_of(mapped):
    for job in mapped.fetch_jobs():
        job()


@pytest.mark.parametrize("place", [7, FETCH_NBYTES // 4 + 7])
def test_what_was_written_while_it_was_read_stays(tier, place):
    """On any of its pieces; and no page that was read is left."""
    values = numbered((FETCH_NBYTES // 4 + 1000,))
    areas = count_areas()
    mapped = filed(tier, values)
    jobs_of(mapped)
    mapped.tensor[place] = values[place] = -1
    mapped.land()
    assert mapped.held
    assert torch.equal(mapped.tensor, values)
    mapped.tensor[place + 1] = values[place + 1] = -2
    mapped.land()  # once more: there is nothing to move
    assert torch.equal(mapped.tensor, values)
    del mapped
    gc.collect()
    assert count_areas() <= areas + 1


def test_what_was_read_before_it_was_filed_anew_at_the_same_block_does_not_land(tier):
    old, new = numbered((5000,)), numbered((5000,), first=7)
    mapped = filed(tier, old)
    jobs_of(mapped)
    os.pwrite(tier.file.fd, new.numpy().tobytes(), mapped.block.extent.offset)
    mapped.file_as(mapped.block)
    mapped.land()
    assert not mapped.held
    assert torch.equal(mapped.tensor, new)
    fetch(tier, mapped)
    assert mapped.held
    assert torch.equal(mapped.tensor, new)


def test_pages_that_the_kernel_does_not_move_leave_it_filed(tier, monkeypatch):
    values = numbered((FETCH_NBYTES // 4 + 1000,))
    mapped = filed(tier, values)
    jobs_of(mapped)
    areas, move_over, moved = count_areas(), hostmem.move_over, []

    def refuse(source, target, nbytes):
        if moved:
            raise TierIOError(errno.ENOMEM, "too many areas")
        moved.append(target)
        move_over(source, target, nbytes)

    monkeypatch.setattr(hostmem, "move_over", refuse)
    with pytest.raises(TierIOError, match="too many areas"):
        mapped.land()
    assert not mapped.held
    assert torch.equal(mapped.tensor, values)
    assert count_areas() <= areas
    monkeypatch.undo()
    fetch(tier, mapped)
    assert mapped.held


def test_what_was_read_of_another_block_does_not_land(tier):
    old, new = numbered((5000,)), numbered((5000,), first=7)
    mapped = filed(tier, old)
    jobs_of(mapped)
    mapped.file_as(stored(tier, new))
    mapped.land()
    assert torch.equal(mapped.tensor, new)
    assert not mapped.held


def test_what_was_read_in_part_does_not_land(tier):
    values = numbered((FETCH_NBYTES // 4 + 1000,))
    mapped = filed(tier, values)
    first, *_ = mapped.fetch_jobs()
    first()
    mapped.land()
    assert not mapped.held
    assert not mapped.written_while_filed()
    assert torch.equal(mapped.tensor, values)
