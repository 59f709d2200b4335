"""Pages of evicted tensors serve the next fetch, unseen (``pages`` [Note: recycled pages])."""

import threading

import pytest
import torch
from mapped_values import PATIENCE_S, fetch, filed, numbered

from offload.allocator.errors import TierIOError
from offload.tiers import hostmem, pages
from offload.tiers.hostmem import HUGE_PAGE
from offload.tiers.mapped import MappedTensor
from offload.tiers.memory import memory_at
from offload.tiers.pages import PagePool, alone


@pytest.mark.own_process
def test_evicted_pages_are_used_by_the_next_fetch(tier):
    assert alone()
    first, second = numbered((HUGE_PAGE,)), numbered((HUGE_PAGE,), first=9)
    one, two = filed(tier, first), filed(tier, second)
    pool = PagePool()
    fetch(tier, one, pool)
    assert pool.nbytes == 0
    one.file_as(one.block, pool)
    assert pool.nbytes == one.padded_nbytes
    assert torch.equal(one.tensor, first)
    fetch(tier, two, pool)
    assert pool.nbytes == 0
    assert torch.equal(two.tensor, second)
    assert torch.equal(one.tensor, first)


def test_a_tensor_that_never_had_a_home_gives_no_pages(tier):
    mapped = MappedTensor(tier.file, torch.uint8, (HUGE_PAGE,))
    pool = PagePool()
    mapped.file_as(tier.allocate(HUGE_PAGE), pool)
    assert pool.nbytes == 0


@pytest.mark.own_process
def test_no_page_is_recycled_while_another_thread_could_be_reading(tier):
    mapped, pool = filed(tier, numbered((HUGE_PAGE,))), PagePool()
    fetch(tier, mapped, pool)
    done = threading.Event()
    thread = threading.Thread(target=done.wait, args=(PATIENCE_S,))
    thread.start()
    try:
        assert not alone()
        mapped.file_as(mapped.block, pool)
        assert pool.nbytes == 0
    finally:
        done.set()
        thread.join()
    assert alone()


@pytest.mark.own_process
def test_offload_s_own_threads_and_progress_bars_are_no_readers(monkeypatch):
    done = threading.Event()
    own = threading.Thread(target=done.wait, args=(PATIENCE_S,), name=f"{pages.OWN_THREAD}x")
    bar = type("TMonitor", (threading.Thread,), {"__module__": "tqdm._monitor"})(
        target=done.wait, args=(PATIENCE_S,)
    )
    for thread in (own, bar):
        thread.start()
    try:
        assert alone()
    finally:
        done.set()
        own.join()
        bar.join()


def test_a_trimmed_pool_keeps_at_most_its_limit(tier):
    pool, nbytes = PagePool(), 4 * HUGE_PAGE
    source = hostmem.map_anonymous(4 * nbytes)
    for index in range(4):
        pool.move_from(source + index * nbytes, nbytes)
    assert pool.nbytes == 4 * nbytes
    pool.trim(2 * nbytes + 1)
    assert pool.nbytes == 2 * nbytes
    pool.trim(-5)
    assert pool.nbytes == 0
    hostmem.unmap(source, 4 * nbytes)


def test_a_range_is_cut_from_the_smallest_larger_one(tier):
    pool = PagePool()
    sizes = [8 * HUGE_PAGE, 3 * HUGE_PAGE]
    source = hostmem.map_anonymous(sum(sizes))
    pool.move_from(source, sizes[0])
    pool.move_from(source + sizes[0], sizes[1])
    first = pool.take(HUGE_PAGE)  # of three
    assert pool.take(HUGE_PAGE + hostmem.PAGE) is None  # no huge page is cut
    rest = pool.take(2 * HUGE_PAGE)
    assert rest == first + HUGE_PAGE
    assert first % HUGE_PAGE == 0
    assert pool.nbytes == sizes[0]
    assert pool.take(9 * HUGE_PAGE) is None
    large = [pool.take(5 * HUGE_PAGE), pool.take(3 * HUGE_PAGE)]
    assert pool.nbytes == 0
    for address, nbytes in zip([first, rest, *large], [1, 2, 5, 3], strict=True):
        memory_at(address, nbytes * HUGE_PAGE)[-1] = 1  # it is there
        hostmem.unmap(address, nbytes * HUGE_PAGE)
    hostmem.unmap(source, sum(sizes))


def test_tensors_in_pages_of_larger_ones_have_their_own_bytes(tier):
    large, small = numbered((2 * HUGE_PAGE,)), numbered((HUGE_PAGE // 4,), first=7)
    victim, pool = filed(tier, large), PagePool()
    fetch(tier, victim, pool)
    victim.file_as(victim.block, pool)
    mapped = [filed(tier, small + number) for number in range(8)]
    for one in mapped:
        fetch(tier, one, pool)
    assert pool.nbytes == 0
    assert torch.equal(victim.tensor, large)
    for number, one in enumerate(mapped):
        assert torch.equal(one.tensor, small + number)
        one.file_as(one.block, pool)
    assert pool.nbytes == 8 * HUGE_PAGE
    pool.trim()
    assert pool.nbytes == 0


def test_a_kernel_that_can_not_move_pages_aside_recycles_none(tier, monkeypatch):
    def refuse(*_args):
        raise TierIOError(22, "mremap(MREMAP_DONTUNMAP) failed")

    monkeypatch.setattr(hostmem, "move_leaving_zeros", refuse)
    values = numbered((HUGE_PAGE,))
    mapped, pool = filed(tier, values), PagePool()
    fetch(tier, mapped, pool)
    mapped.file_as(mapped.block, pool)
    assert pool.nbytes == 0
    assert torch.equal(mapped.tensor, values)
