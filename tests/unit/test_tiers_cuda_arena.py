"""The arena's logic, against a ``torch.cuda`` whose allocator is our model of it.

Nothing here runs on a GPU: ``tools/gpu_check.py --only arena`` does, where there is one.
"""

import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from offload.allocator.caching import CachingModel, is_large
from offload.allocator.errors import UnsupportedError
from offload.tiers import cuda_arena
from offload.tiers.cpudevice import CpuAccelerator
from offload.tiers.cuda import CudaAccelerator
from offload.tiers.cuda_arena import CudaArena

MIB = 1 << 20
CPU = torch.device("cpu")
STEP = (30, -30, 40, 26, -40, 0.5, 12, -26, -0.5, -12)  # MiB that come, and go


class Pool:
    """A pool of segments at addresses of its own; ``snapshot`` as torch tells it."""

    count = 0

    def __init__(self, use_on_oom=False):
        self.use_on_oom = use_on_oom
        Pool.count += 1
        self.base = Pool.count << 50
        self.model = CachingModel()
        self.large_nbytes = 0

    def snapshot(self):
        small = self.model.reserved_nbytes - self.large_nbytes
        told = [("large", self.large_nbytes), ("small", small)]
        address, segments = self.base, []
        for kind, nbytes in told:
            segments.append({"address": address, "total_size": nbytes, "segment_type": kind})
            address += nbytes
        return segments


class Held:
    """A tensor: its bytes go back when nobody has it any more."""

    def __init__(self, fake, pool, nbytes):
        self.fake, self.pool = fake, pool
        before = pool.model.reserved_nbytes
        self.block = pool.model.allocate(nbytes)
        if is_large(nbytes):
            pool.large_nbytes += pool.model.reserved_nbytes - before
        self.address = pool.base + self.block.address
        fake.note("alloc", self.address, nbytes)

    def __del__(self):
        self.pool.model.free(self.block)
        self.fake.note("free_requested", self.address, 0)
        self.fake.note("free_completed", self.address, 0)


class FakeCuda:
    """As much of ``torch.cuda`` as the arena uses."""

    MemPool = Pool

    def __init__(self, room=1 << 40):
        self.room = room
        self.default = Pool()
        self.routed = {}  # pool by thread
        self.log, self.history, self.recording = [], [], False
        self.backend = "native"
        self.memory = SimpleNamespace(
            _record_memory_history=self.record,
            _snapshot=lambda: {"device_traces": [list(self.history)], "segments": []},
        )

    def record(self, enabled, *, context="all", stacks="all", max_entries=0):
        del max_entries
        assert (context, stacks) == (None, "python") or enabled is None
        self.recording, self.history = enabled is not None, []

    def note(self, action, address, nbytes):
        if self.recording:
            self.history.append({"action": action, "addr": address, "size": nbytes})

    @contextmanager
    def use_mem_pool(self, pool, device):
        assert device == CPU
        assert threading.get_ident() not in self.routed, "a pool can be recorded to once at a time"
        self.routed[threading.get_ident()] = pool
        try:
            yield
        finally:
            del self.routed[threading.get_ident()]

    def get_allocator_backend(self):
        return self.backend

    def synchronize(self, device):
        assert device == CPU
        self.log.append("synchronize")

    def empty_cache(self):
        assert self.log[-1] == "synchronize"
        self.log.append("empty cache")

    def empty(self, nbytes, *, dtype=torch.uint8, device=CPU):
        assert (dtype, device) == (torch.uint8, CPU)
        if nbytes > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Held(self, self.routed.get(threading.get_ident(), self.default), nbytes)


@pytest.fixture
def fake(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(torch, "empty", fake.empty)
    return fake


def compute(fake, sizes=STEP):
    """Come and go, on this thread."""
    held = {}
    for size in sizes:
        if size > 0:
            held[size] = fake.empty(int(size * MIB))
        else:
            del held[-size]
    return held


def step(arena, fake, sizes=STEP, form="a"):
    arena.begin(form)
    left = compute(fake, sizes)
    arena.end()
    return left


def test_the_second_step_is_learned_and_the_third_has_its_segment(fake):
    arena = CudaArena(CPU, runtime=fake)
    step(arena, fake)
    assert fake.default.model.reserved_nbytes  # the first one is left alone
    assert (arena.stats().steps, arena.stats().learned) == (1, 0)
    assert arena.stats().verdict() is None
    default = fake.default.model.peak_allocated_nbytes, fake.default.model.reserved_nbytes
    step(arena, fake)
    plan = arena.stats().plan
    assert (plan.live_nbytes, plan.nbytes, plan.packed_nbytes) == (66 * MIB, 66 * MIB, 66 * MIB)
    for _ in range(3):
        step(arena, fake)
    stats = arena.stats()
    assert (stats.steps, stats.learned, stats.served, stats.deviations) == (5, 1, 3, 0)
    assert stats.off is None
    assert stats.verdict() == (
        "one segment of 66.00 MiB serves what a step computes (66.00 MiB alive at once, 66.00 MiB "
        "at planned addresses): 68.00 MiB reserved, 2.9 % fragmented; before it 72.00 MiB and 8.3 %"
    )
    assert stats.after.reserved_nbytes == 66 * MIB + 2 * MIB  # small ones stay among themselves
    assert stats.before.reserved_nbytes > stats.after.reserved_nbytes
    assert stats.before.live_nbytes == stats.after.live_nbytes
    assert stats.before.fragmentation > stats.after.fragmentation
    assert (fake.default.model.peak_allocated_nbytes, fake.default.model.reserved_nbytes) == default


def test_cached_bytes_go_back_before_a_pool_is_filled(fake):
    arena = CudaArena(CPU, runtime=fake)
    for _ in range(5):
        step(arena, fake)
    assert fake.log == ["synchronize", "empty cache"] * 2  # for learning, for the segment


def test_everything_of_a_step_is_in_the_window_and_nothing_else(fake):
    arena = CudaArena(CPU, runtime=fake)
    for _ in range(2):
        step(arena, fake)
    before = fake.default.model.allocated_nbytes
    arena.begin("a")
    arena.begin("another pass of the same step")
    with arena.outside():
        copy = fake.empty(8 * MIB)
    assert copy.pool is fake.default
    mine = fake.empty(8 * MIB)
    assert mine.pool is not fake.default
    others = []
    thread = threading.Thread(target=lambda: others.append(fake.empty(MIB)))
    thread.start()
    thread.join()
    assert others[0].pool is fake.default
    arena.end()
    assert fake.empty(MIB).pool is fake.default
    with arena.outside():  # nothing to be outside of
        assert fake.empty(MIB).pool is fake.default
    assert arena.stats().steps == 3
    others.clear()
    del copy
    assert fake.default.model.allocated_nbytes == before


def test_backward_runs_on_the_thread_that_has_the_pool(fake):
    for enabled in (True, False):
        arena = CudaArena(CPU, runtime=fake)
        with torch.autograd.set_multithreading_enabled(enabled):
            for routed in (False, True, True):
                arena.begin("a")
                assert torch._C._is_multithreading_enabled() == (enabled and not routed)
                compute(fake)
                arena.end()
                assert torch._C._is_multithreading_enabled() == enabled


def test_another_form_is_left_alone_until_it_comes_twice(fake):
    arena = CudaArena(CPU, runtime=fake)
    for form in "aaaba":
        step(arena, fake, (20, -20) if form == "b" else STEP, form)
    assert (arena.stats().learned, arena.stats().served) == (1, 2)
    for form in "bb":
        step(arena, fake, (20, -20), form)
    assert arena.stats().plan.nbytes == 20 * MIB
    step(arena, fake, (20, -20), "b")
    assert (arena.stats().steps, arena.stats().learned, arena.stats().served) == (8, 2, 3)


def test_a_step_that_needs_more_gets_it_and_is_learned_again(fake):
    arena = CudaArena(CPU, runtime=fake)
    more = (*STEP, 90, -90)
    for sizes in (STEP, STEP, STEP, more, more, more, STEP):
        step(arena, fake, sizes)
    stats = arena.stats()
    assert (stats.served, stats.deviations, stats.learned) == (3, 1, 2)
    assert stats.plan.nbytes == 90 * MIB
    assert stats.after.reserved_nbytes == 92 * MIB


def test_a_step_that_always_differs_is_not_learned_for_ever(fake):
    arena = CudaArena(CPU, runtime=fake)
    for size in range(20, 300, 20):
        step(arena, fake, (size, -size))
    stats = arena.stats()
    assert stats.learned == 3
    assert stats.off is None
    assert stats.deviations + stats.served + stats.learned + 1 == stats.steps
    for _ in range(3):  # what the pool has grown to serves
        step(arena, fake, (280, -280))
    assert arena.stats().served == stats.served + 3


def test_what_outlives_a_step_is_counted_with(fake):
    arena = CudaArena(CPU, runtime=fake)
    left = {}
    for _ in range(6):
        now = step(arena, fake, (30, 50, -50))
        left = now  # the one before goes only now
    assert left
    assert arena.stats().deviations == 0
    assert arena.stats().plan.nbytes == 110 * MIB


def test_no_room_for_the_segment_leaves_training_as_it_is(fake):
    arena = CudaArena(CPU, runtime=fake)
    fake.room = 60 * MIB
    for _ in range(5):
        step(arena, fake)
    assert "no room for a segment of 66.00 MiB (69206016 bytes)" in arena.stats().off
    assert not fake.routed
    assert fake.empty(MIB).pool is fake.default


def test_small_requests_need_no_segment(fake):
    arena = CudaArena(CPU, runtime=fake)
    for _ in range(4):
        step(arena, fake, (0.5, -0.5))
    assert "larger than 1 MiB" in arena.stats().off


def test_a_history_of_the_user_is_left_alone(fake, monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_isHistoryEnabled", lambda: True, raising=False)
    fake.recording = True
    arena = CudaArena(CPU, runtime=fake)
    for _ in range(4):
        step(arena, fake)
    assert "history" in arena.stats().off
    assert fake.recording


def test_a_history_that_is_too_long_is_not_believed(fake, monkeypatch):
    monkeypatch.setattr(cuda_arena, "_MOST_ENTRIES", 5)
    arena = CudaArena(CPU, runtime=fake)
    for _ in range(4):
        step(arena, fake)
    assert "more than 5 requests" in arena.stats().off
    assert not fake.recording


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4])
def test_closing_gives_everything_back_whatever_is_open(fake, steps):
    arena = CudaArena(CPU, runtime=fake)
    for _ in range(steps):
        step(arena, fake)
    arena.begin("a")
    arena.close()
    arena.close()
    assert not fake.routed
    assert not fake.recording
    assert torch._C._is_multithreading_enabled()
    assert arena._pool is None
    step(arena, fake)
    assert arena.stats().off == "it is closed"


def test_an_allocator_that_is_not_torchs_own_is_refused(fake):
    fake.backend = "cudaMallocAsync"
    with pytest.raises(UnsupportedError, match="cudaMallocAsync is in its place: leave device_ar"):
        CudaArena(CPU, runtime=fake)


def test_a_torch_without_pools_is_refused(fake):
    fake.MemPool = None
    with pytest.raises(UnsupportedError, match=r"no torch\.cuda\.MemPool, which device_arena"):
        CudaArena(CPU, runtime=fake)


def test_other_devices_have_no_arena():
    with pytest.raises(UnsupportedError, match="device_arena needs a CUDA device"):
        CpuAccelerator().step_arena()


def test_what_the_accelerator_allocates_stays_outside(fake, monkeypatch):
    accelerator = CudaAccelerator.__new__(CudaAccelerator)  # no device to open
    accelerator._device, accelerator._runtime, accelerator._checked = CPU, fake, False
    monkeypatch.setattr(
        CudaAccelerator, "current_stream", lambda _self: SimpleNamespace(record=lambda: None)
    )
    arena = accelerator.step_arena()
    for _ in range(2):
        step(arena, fake)
    arena.begin("a")
    assert accelerator.allocate(4 * MIB).tensor.pool is fake.default
    assert fake.empty(4 * MIB).pool is not fake.default
    arena.end()
