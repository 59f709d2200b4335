"""The cache on lanes that a seed reorders: bits, limits and leaks; and on every mix of homes."""

import gc

import pytest
import torch
from seeded_lanes import SeededTime

from offload.allocator.errors import CapacityError
from offload.swap.activations import ActivationCache
from offload.swap.homes import FileHome, MemoryHome
from offload.swap.residency import Residency
from offload.tiers.filetier import FileTier, Lanes
from offload.tiers.hostmem import PAGE
from offload.tiers.journal import Journal
from offload.tiers.lanes import Lane
from offload.tiers.ram import RamTier

SEEDS = 1000
NUMEL = PAGE // 4
LIMIT_NBYTES = 3 * PAGE


class World:
    """A cache on two memory homes, the first of few pages."""

    def __init__(self, seed, is_tight=lambda: False):
        self.time = SeededTime(seed)
        self.random = self.time.random
        self.journal = Journal()
        self.tiers = [RamTier(3 * PAGE, name="near"), RamTier(1000 * PAGE, name="far")]
        homes = [
            MemoryHome(tier, *(self.time.lane(tier.spec.name, self.journal) for _ in "rw"))
            for tier in self.tiers
        ]
        self.cache = ActivationCache(
            homes,
            self.journal,
            limit_nbytes=LIMIT_NBYTES,
            min_nbytes=PAGE // 2,
            is_tight=is_tight,
        )
        self.values = 0

    def fresh(self):
        self.values += 1
        return torch.full((NUMEL,), float(self.values))

    def close(self):
        self.time.settle()
        self.cache.close()
        gc.collect(0)
        self.cache.spiller.settle()
        left = self.cache.kept_nbytes, [tier.used_nbytes for tier in self.tiers]
        for tier in self.tiers:
            tier.close()
        return left


class Script:
    """A training script drawn from a seed: what it holds, changes, saves and uses."""

    def __init__(self, world):
        self.world, self.random, self.cache = world, world.random, world.cache
        self.held = {}  # tensors by number
        self.last = {}  # what they were when they were let go of
        self.numbers = iter(range(1 << 30))

    def chance(self, share):
        return self.random.random() < share

    def run_pass(self):
        self.cache.begin_pass("model")
        saved = [self.save() for _ in range(self.random.randrange(4, 14))]
        for _ in range(self.random.choice((1, 1, 2))):
            for entry in reversed(saved):
                if not self.chance(0.1):  # of a branch that nobody needs
                    self.check(*entry)
                    self.world.time.pass_by()
        del entry
        while saved:
            saved.pop(self.random.randrange(len(saved)))
            self.world.time.pass_by()

    def save(self):
        """Save something new, or something held: unchanged, or changed in one of two ways."""
        if self.held and self.chance(0.4):
            number = self.random.choice(list(self.held))
        else:
            number = next(self.numbers)
            self.held[number] = self.world.fresh()
        tensor = self.held[number]
        if self.chance(0.1):
            tensor.add_(0.5)
        if self.chance(0.1):
            tensor.data.add_(0.25)
        start = self.random.choice((0, 0, 0, 7))
        handle = self.cache.pack(tensor[start:])
        del tensor
        self.world.time.pass_by()
        for other in list(self.held):
            if self.chance(0.4):
                self.last[other] = self.held[other].clone()
                del self.held[other]
                self.world.time.pass_by()
        return handle, number, start

    def check(self, handle, number, start):
        """As plain autograd: an error if it was changed, else what the tensor is, or was last."""
        if handle.is_modified():
            with pytest.raises(RuntimeError, match="modified by an inplace"):
                self.cache.unpack(handle)
            return
        right = self.held[number] if number in self.held else self.last[number]
        assert torch.equal(self.cache.unpack(handle), right[start:])


def test_no_order_of_transfers_changes_a_bit_or_leaks():
    for seed in range(SEEDS):
        world = World(seed)
        try:
            script = Script(world)
            for _ in range(3):
                script.run_pass()
            script.held.clear()
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
        assert world.close() == (0, [0, 0]), seed


def test_transfers_that_fail_are_told_and_lose_nothing():
    told = 0
    for seed in range(100):
        world = World(seed)
        tensors = [world.fresh() for _ in range(12)]
        rights = [tensor.clone() for tensor in tensors]
        world.time.failing = 0.2
        handles = []
        while tensors:
            try:
                handles.append(world.cache.pack(tensors[0]))
                tensors.pop(0)
            except OSError:
                told += 1
            world.time.pass_by()
        for handle, right in zip(reversed(handles), reversed(rights), strict=True):
            while True:
                try:
                    back = world.cache.unpack(handle)
                    break
                except OSError:
                    told += 1
            assert torch.equal(back, right), seed
        world.time.failing = 0.0
        handles.clear()
        del handle, back
        left = None
        while left is None:
            try:
                left = world.close()
            except OSError:
                told += 1
        if left[0]:
            gc.collect()  # tracebacks of errors that were told
            left = (world.cache.kept_nbytes,)
        assert left[0] == 0, seed
    assert told > 100


# Which home.


def test_homes_are_filled_in_their_order():
    world = World(0)
    handles = [world.cache.pack(world.fresh()) for _ in range(12)]
    world.time.settle()
    world.cache.close()
    names = [handle.part.unit.home and handle.part.unit.home.name for handle in handles]
    assert names == ["near"] * 3 + ["far"] * 6 + [None] * 3
    assert [tier.used_nbytes for tier in world.tiers] == [3 * PAGE, 6 * PAGE]
    del handles[:2]
    handles.append(world.cache.pack(world.fresh()))
    world.cache.close()
    assert handles[7].part.unit.home.name == "near"  # there is room again


def test_when_every_home_is_full_the_error_says_what_each_has():
    world = World(0)
    for tier in world.tiers:
        tier.spec = tier.spec.__class__(name=tier.spec.name, kind="host", capacity=PAGE, align=PAGE)
    handles = [world.cache.pack(world.fresh()) for _ in range(7)]
    world.cache.close()
    with pytest.raises(CapacityError, match=r"can't leave it: near: .*far: .*smaller batch"):
        handles += [world.cache.pack(world.fresh()) for _ in range(4)]
    for number, handle in enumerate(handles, 1):
        assert torch.equal(world.cache.unpack(handle), torch.full((NUMEL,), float(number)))


@pytest.mark.parametrize("near_pages", [0, 5, 100])
def test_memory_and_file_together(tmp_path, near_pages):
    journal = Journal()
    lanes = Lanes(journal)
    copies = Lane("near→host", 1, journal), Lane("host→near", 1, journal)
    near = RamTier(near_pages * PAGE, name="near")
    with FileTier(tmp_path, None, lanes) as file, near:
        cache = ActivationCache(
            [MemoryHome(near, *copies), FileHome(file)], journal, limit_nbytes=0, min_nbytes=0
        )
        rights = [torch.randn(NUMEL + 3 * number) for number in range(20)]
        handles = [cache.pack(right.clone()) for right in rights]
        cache.close()
        used = {handle.part.unit.home.name for handle in handles}
        assert len(used) == (1 if near_pages in (0, 100) else 2)
        for handle, right in zip(reversed(handles), reversed(rights), strict=True):
            assert torch.equal(cache.unpack(handle), right)
        handles.clear()
        del handle
        cache.close()
        assert near.used_nbytes == 0
    for lane in copies:
        lane.close()
    lanes.close()


# When.


def timed_pass(world):
    """Packs eight units, uses them one second apart; tells what was fetched before each use."""
    cache = world.cache
    cache.begin_pass("model")
    handles = [cache.pack(world.fresh()) for _ in range(8)]
    world.time.settle()
    cache.spiller.settle()
    seen = []
    for position in range(7, -1, -1):
        world.journal.now_s += 1.0
        cache.unpack(handles[position])
        states = [handle.part.unit.residency for handle in handles[:position]]
        seen.append(states.count(Residency.FETCHING) + states.count(Residency.READY))
        del handles[position]
        world.time.settle()
    return seen


class TimedJournal(Journal):
    now_s = 0.0

    def now(self):
        return self.now_s


@pytest.mark.parametrize(("bytes_per_s", "ahead"), [(1e9, 1), (PAGE, 2), (PAGE / 50, 2)])
def test_a_fast_link_fetches_late_and_a_slow_one_early(bytes_per_s, ahead):
    """Seven wait their turn; the limit has room for two beside the one in use."""
    world = World(0)
    world.journal = world.cache.journal = world.cache.spiller.journal = TimedJournal()
    timed_pass(world)
    for link in world.cache.spiller._links._rates.values():
        link._bytes_per_s = bytes_per_s
        link.measured = lambda *_: None
    in_front = timed_pass(world)
    assert max(in_front[3:]) == ahead
    assert min(in_front[3:6]) >= 1


def test_what_the_last_backward_used_first_is_never_written():
    world = World(0)
    for _ in range(2):
        world.cache.begin_pass("model")
        handles = [world.cache.pack(world.fresh()) for _ in range(8)]
        world.time.settle()
        world.cache.spiller.settle()
        absent = [handle.part.memory is None for handle in handles]
        for position in (0, 7, 6, 5, 4, 3, 2, 1):  # a skip from the first to the loss
            world.cache.unpack(handles[position])
            world.time.settle()
        handles.clear()
    assert absent == [False] + [True] * 5 + [False] * 2


@pytest.mark.parametrize("tight", [False, True])
def test_where_memory_is_tight_what_leaves_has_left_before_more_comes(tight):
    world = World(1, is_tight=lambda: tight)
    handles = [world.cache.pack(world.fresh()) for _ in range(5)]
    assert (world.cache.kept_nbytes > LIMIT_NBYTES) is not tight
    del handles
    world.close()


def test_what_is_above_the_limit_by_itself_has_the_room_of_all_that_leave():
    world = World(1)
    handles = [world.cache.pack(world.fresh()) for _ in range(5)]
    large = LIMIT_NBYTES + PAGE
    assert world.cache.kept_nbytes + large > large
    handles.append(world.cache.pack(torch.zeros(large // 4)))
    assert world.cache.kept_nbytes <= large
    del handles
    world.close()
