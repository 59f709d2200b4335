"""The pinned pool: exact sizes, rooms by size class, and the way of a block back into it."""

import math

import pytest
import torch

from offload.allocator.errors import CapacityError, ConfigError, StaleBlockError, TierIOError
from offload.tiers.events import ListRecorder, Notice
from offload.tiers.hostmem import HUGE_PAGE, discard
from offload.tiers.journal import Journal, Label
from offload.tiers.lanes import Transfer
from offload.tiers.pinned import PinnedTier, SizeClass
from offload.tiers.pinning import PinRefusedError
from offload.tiers.testing import pattern, put

PAGE = 4096


class Guard(Transfer):
    """A transfer that ends when it is told to, or when somebody waits for it."""

    def __init__(self, log=None, error=None):
        super().__init__(Label("", "", "", ""), 0, 1)
        self.log = log if log is not None else []
        self.outcome = error

    def end(self):
        self._finish_job(self.outcome)
        self._complete()

    def settle(self):
        if not self.done():
            self.log.append(self)
            self.end()
        super().settle()

    def wait(self):
        self.settle()
        super().wait()


class FakePinner:
    def __init__(self, name="registered", refuses=None, unpin_fails=None, piece_nbytes=None):
        self.name = name
        self.piece_nbytes = piece_nbytes
        self.refuses, self.unpin_fails = refuses, unpin_fails
        self.pinned = []

    def pin(self, address, nbytes):
        if self.refuses:
            raise PinRefusedError(self.refuses)
        self.pinned.append((address, nbytes))

    def unpin(self, address, nbytes):
        if self.unpin_fails:
            raise TierIOError(5, self.unpin_fails)
        self.pinned.remove((address, nbytes))


@pytest.mark.parametrize("nbytes", [1, PAGE, PAGE + 1, 129 << 20, (129 << 20) + 1])
def test_the_pool_holds_the_bytes_asked_for_in_whole_pages(nbytes):
    with PinnedTier(nbytes) as pool:
        assert pool.spec.capacity == math.ceil(nbytes / PAGE) * PAGE
        assert pool.allocate(nbytes).extent.nbytes == pool.spec.capacity


def test_a_pool_of_classes_holds_exactly_these():
    classes = [SizeClass(nbytes=5000, count=3), SizeClass(nbytes=100_000, count=2)]
    with PinnedTier(classes=classes) as pool:
        assert pool.spec.capacity == 3 * 8192 + 2 * 102_400
        held = [pool.allocate(nbytes) for nbytes in (100_000, 5000, 8192, 99_000, 7000)]
        ends = sorted((block.extent.offset, block.extent.end) for block in held)
        assert (ends[0][0], ends[-1][1]) == (0, pool.spec.capacity)
        for nbytes in (5000, 100_000, 1):
            with pytest.raises(CapacityError):
                pool.allocate(nbytes)


def test_a_class_is_never_taken_by_other_sizes():
    with PinnedTier(6 * PAGE, classes=[SizeClass(nbytes=2 * PAGE, count=2)]) as pool:
        rest = [pool.allocate(PAGE), pool.allocate(PAGE)]
        with pytest.raises(CapacityError, match="0 bytes are free beside the size classes"):
            pool.allocate(PAGE)
        pool.allocate(2 * PAGE)
        kept = pool.allocate(2 * PAGE)
        with pytest.raises(CapacityError, match="all 2 blocks of that size class are in use"):
            pool.allocate(2 * PAGE)
        for block in rest:
            block.release()
        pool.allocate(PAGE)
        kept.release()
        assert pool.allocate(2 * PAGE).extent == kept.extent


def test_a_full_pool_says_what_would_mend_it():
    with PinnedTier(3 * PAGE) as pool:
        pool.allocate(2 * PAGE)
        with pytest.raises(
            CapacityError,
            match=r"^pinned pool of 12\.00 KiB has no room for 8192 bytes, and none on its way "
            r"back: 4096 bytes are free beside the size classes, at most 4096 in one piece\. "
            r"Release a block first, or raise the pool by 8\.00 KiB$",
        ):
            pool.allocate(PAGE + 1)


@pytest.mark.parametrize(
    ("capacity", "classes", "told"),
    [
        (None, [], "a pinned pool needs a capacity or size classes: it would have 0 bytes"),
        (0, [], "it would have 0 bytes"),
        (-PAGE, [], "it would have 0 bytes"),
        (PAGE, [SizeClass(nbytes=5000, count=2)], "give it 12288 bytes more"),
        (PAGE, [SizeClass(nbytes=0, count=1)], "not 1 blocks of 0 bytes"),
        (PAGE, [SizeClass(nbytes=1, count=-1)], "not -1 blocks of 1 bytes"),
    ],
)
def test_a_pool_that_can_not_be_is_refused(capacity, classes, told):
    with pytest.raises(ConfigError, match=told):
        PinnedTier(capacity, classes=classes)


def test_large_pools_are_aligned_to_huge_pages():
    with PinnedTier(3 * HUGE_PAGE + PAGE) as pool:
        assert pool.address(pool.allocate(1)) % HUGE_PAGE == 0


def test_a_block_returns_after_its_last_transfer_only():
    with PinnedTier(2 * PAGE, checked=True) as pool:
        first, second = pool.allocate(PAGE), pool.allocate(PAGE)
        guards = Guard(), Guard()
        for guard in guards:
            pool.guard(first, guard)
        address = pool.address(first)
        first.release()
        second.release()
        assert pool.allocate(PAGE).extent == second.extent
        guards[0].end()
        assert not guards[1].done()
        assert pool.allocate(PAGE).extent == first.extent  # waits
        assert guards[1].done()
        assert address == pool._base + first.extent.offset


def test_an_allocation_waits_for_the_oldest_block_that_helps():
    classes = [SizeClass(nbytes=PAGE, count=1), SizeClass(nbytes=2 * PAGE, count=1)]
    log, recorder = [], ListRecorder()
    with PinnedTier(6 * PAGE, classes=classes, journal=Journal(recorder)) as pool:
        guards = {}
        for nbytes in (2 * PAGE, 3 * PAGE, PAGE):
            block = pool.allocate(nbytes)
            guards[nbytes] = Guard(log)
            pool.guard(block, guards[nbytes])
            block.release()
        pool.allocate(PAGE)
        assert log == [guards[PAGE]]
        pool.allocate(3 * PAGE)
        assert log == [guards[PAGE], guards[3 * PAGE]]
        with pytest.raises(CapacityError):
            pool.allocate(PAGE)
        assert [(event.key, event.reason) for event in recorder.events] == [("pinned", "full")] * 2
        pool.allocate(2 * PAGE)


def test_an_allocation_waits_until_enough_is_back_and_then_gives_up():
    with PinnedTier(4 * PAGE) as pool:
        blocks = [pool.allocate(PAGE) for _ in range(4)]
        for block in blocks[:3]:
            pool.guard(block, Guard())
            block.release()
        with pytest.raises(CapacityError, match="at most 12288 in one piece"):
            pool.allocate(4 * PAGE)
        assert pool.allocate(3 * PAGE).extent.offset == 0


def test_a_failed_transfer_still_gives_its_bytes_back():
    with PinnedTier(PAGE) as pool:
        block = pool.allocate(PAGE)
        pool.guard(block, guard := Guard(error=TierIOError(5, "planted")))
        block.release()
        pool.allocate(PAGE)
        assert guard.done()
        assert not guard.observed  # it is raised by whoever the data was for


def test_the_host_waits_before_it_reads_or_writes():
    log = []
    with PinnedTier(PAGE) as pool:
        block = pool.allocate(PAGE)
        for use in (
            lambda: pool.tensor(block, torch.uint8, (8,)),
            lambda: put(pool, block, b"x"),
        ):
            pool.guard(block, Guard(log))
            use()
            assert not pool.guards(block)
        assert len(log) == 2
        pool.guard(block, Guard(error=TierIOError(5, "planted")))
        with pytest.raises(TierIOError, match="planted"):
            pool.tensor(block, torch.uint8, (8,))


def test_a_checked_pool_poisons_what_nobody_may_read():
    with PinnedTier(PAGE, checked=True) as pool:
        block = pool.allocate(PAGE)
        values = pool.tensor(block, torch.float32, (1024,))
        assert values.isnan().all()
        values.zero_()
        pool.guard(block, guard := Guard())
        block.release()
        assert values.eq(0).all()
        guard.end()
        pool._take_back()
        assert values.isnan().all()


def test_stale_use_raises():
    with PinnedTier(PAGE) as pool:
        block = pool.allocate(PAGE)
        block.release()
        for use in (
            pool.address,
            pool.guards,
            lambda block: pool.guard(block, Guard()),
            lambda block: pool.tensor(block, torch.uint8, (1,)),
        ):
            with pytest.raises(StaleBlockError, match="was released"):
                use(block)
        block = pool.allocate(PAGE)
    for use in (pool.address, lambda block: pool.guard(block, Guard())):
        with pytest.raises(StaleBlockError, match="outlived its tier, pinned"):
            use(block)
    with pytest.raises(StaleBlockError, match="pinned pool of 4096 bytes is closed"):
        pool.allocate(1)


def test_a_tensor_that_leaves_its_block_is_refused():
    with (
        PinnedTier(2 * PAGE) as pool,
        pytest.raises(ValueError, match=r"bytes 0\.\.4100 leave a block of 4096 bytes"),
    ):
        pool.tensor(pool.allocate(PAGE), torch.float32, (1025,))


def test_the_first_pinner_that_works_is_taken():
    recorder = ListRecorder()
    refused, taken, unused = FakePinner(refuses="no driver"), FakePinner("locked"), FakePinner()
    with PinnedTier(PAGE, pinners=[refused, taken, unused], journal=Journal(recorder)) as pool:
        assert pool.memory == "locked"
        assert taken.pinned == [(pool._base, PAGE)]
        assert unused.pinned == []
    assert taken.pinned == []
    (notice,) = recorder.events
    assert isinstance(notice, Notice)
    assert notice.subject == "pinned pool"
    assert notice.message.startswith("not registered: no driver; copies to and from the device")
    assert "53-55 GB/s from registered memory, 10-17 GB/s" in notice.message


def test_a_pool_that_nothing_pins_works_and_says_what_it_costs():
    journal = Journal()
    with PinnedTier(PAGE, pinners=[FakePinner(refuses="no driver")], journal=journal) as pool:
        assert pool.memory == "pageable"
        put(pool, block := pool.allocate(100), pattern(100))
        assert bytes(pool.tensor(block, torch.uint8, (100,)).numpy()) == pattern(100)
    assert len(journal.notices) == 1


def test_without_a_wish_to_pin_nothing_is_said():
    journal = Journal()
    with PinnedTier(PAGE, journal=journal) as pool:
        assert pool.memory == "pageable"
    assert journal.notices == []


def test_no_block_lies_on_both_sides_of_a_border_of_pieces():
    piece = 8 * PAGE
    classes = [SizeClass(nbytes=3 * PAGE, count=11), SizeClass(nbytes=PAGE, count=5)]
    with PinnedTier(classes=classes, pinners=[FakePinner(piece_nbytes=piece)]) as pool:
        blocks = [pool.allocate(3 * PAGE) for _ in range(11)]
        blocks += [pool.allocate(PAGE) for _ in range(5)]
        for block in blocks:
            assert block.extent.offset // piece == (block.extent.end - 1) // piece
        assert pool.spec.capacity == (33 + 5) * PAGE + 4 * 3 * PAGE


def test_close_waits_unpins_and_unmaps():
    pinner, log = FakePinner(), []
    pool = PinnedTier(16 * PAGE, pinners=[pinner])
    living, released = pool.allocate(PAGE), pool.allocate(PAGE)
    for block in (living, released):
        pool.guard(block, Guard(log))
    released.release()
    pool.close()
    assert len(log) == 2
    assert pinner.pinned == []
    with pytest.raises(TierIOError, match="madvise"):
        discard(pool._base, PAGE)  # nothing is mapped there
    pool.close()
    living.release()


def test_memory_that_can_not_be_unpinned_stays_mapped():
    pool = PinnedTier(PAGE, pinners=[FakePinner(unpin_fails="busy")])
    values = pool.tensor(pool.allocate(PAGE), torch.uint8, (PAGE,)).fill_(7)
    with pytest.raises(TierIOError, match="busy"):
        pool.close()
    assert values.eq(7).all()
