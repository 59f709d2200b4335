"""The CUDA accelerator's logic, against a runtime that writes down what it is asked.

Nothing here runs on a GPU: tests/gpu does, where there is one.
"""

import itertools
from contextlib import contextmanager

import pytest
import torch

from offload.allocator.errors import BudgetError, CapacityError, TierIOError, UnsupportedError
from offload.tiers.accelerator import POISON
from offload.tiers.cpudevice import CpuAccelerator
from offload.tiers.cuda import CudaAccelerator, DelayedCudaAccelerator
from offload.tiers.device import DeviceTier
from offload.tiers.events import ListRecorder
from offload.tiers.journal import Journal
from offload.tiers.pinned import PinnedTier
from offload.tiers.simulated.accelerator import SimulatedAccelerator

PAGE = 4096
GIB = 1 << 30
SHAPE = (1024,)


class FakeCuda:
    """``torch.cuda`` for the device "cpu": work is done at once, and its order is written down.

    Each piece of work is a node; what came before it on its stream, and the events that the
    stream waited for, are its edges. ``ordered(a, b)`` tells whether b comes after a on every
    device, however late.
    """

    def __init__(self, total=80 * GIB):
        self.total = total
        self.log = []
        self.before = {}  # work -> work that it comes after, directly
        self.streams_made = 0
        self.fraction = None
        self.available = True
        self.broken = None
        self.clock = itertools.count(1)
        fake = self

        class Stream:
            def __init__(self, device=None):
                fake.streams_made += 1
                self.last = set()

            def wait_event(self, event):
                self.last = self.last | event.after

        class Event:
            def __init__(self, enable_timing=False):
                self.timing = enable_timing
                self.after = set()

            def record(self, stream):
                self.after = set(stream.last)
                self.at_ms = float(next(fake.clock))

            def query(self):
                self.synchronize()
                return True

            def synchronize(self):
                if fake.broken:
                    raise RuntimeError(fake.broken)

            def elapsed_time(self, other):
                assert self.timing
                assert other.timing
                return other.at_ms - self.at_ms

        self.Stream, self.Event = Stream, Event
        self.current = self.users = Stream()
        self.streams_made = 0
        self.inside = []

    def work(self, name):
        self.before[name] = set(self.current.last)
        self.current.last = {name}
        self.log.append(name)

    def ordered(self, first, second):
        reached, todo = set(), [second]
        while todo:
            for name in self.before[todo.pop()] - reached:
                reached.add(name)
                todo.append(name)
        return first in reached

    def is_available(self):
        return self.available

    def current_stream(self, device):
        assert not self.inside, "the user's stream was asked for inside a side stream"
        return self.current

    @contextmanager
    def stream(self, stream):
        outside, self.current = self.current, stream
        self.inside.append(stream)
        try:
            yield
        finally:
            self.inside.pop()
            self.current = outside

    def synchronize(self, device):
        self.log.append("synchronize")

    def mem_get_info(self, device):
        return self.total - GIB, self.total

    def set_per_process_memory_fraction(self, fraction, device):
        self.fraction = fraction

    def reset_peak_memory_stats(self, device):
        self.log.append("reset peak")

    def memory_allocated(self, device):
        return 123

    def max_memory_reserved(self, device):
        return 5 * GIB

    def _sleep(self, cycles):
        self.log.append(("sleep", cycles))


@pytest.fixture
def fake(monkeypatch):
    fake = FakeCuda()
    copy = torch.Tensor.copy_

    def watched(target, source, non_blocking=False):
        if fake.inside:
            assert non_blocking
            fake.work(f"copy {sum(str(name).startswith('copy') for name in fake.log)}")
        return copy(target, source)

    monkeypatch.setattr(torch.Tensor, "copy_", watched)
    return fake


@pytest.fixture
def device(fake):
    return CudaAccelerator("cpu", runtime=fake)


@pytest.fixture
def tier(device):
    with DeviceTier(device, 4 * PAGE) as tier:
        yield tier


@pytest.fixture
def pool():
    with PinnedTier(4 * PAGE) as pool:
        yield pool


def view(tier, block):
    return tier.tensor(block, torch.float32, SHAPE)


def test_a_fetch_a_kernel_and_an_eviction_are_in_order(fake, tier, pool):
    block, buffer = tier.allocate(PAGE), pool.allocate(PAGE)
    pool.tensor(buffer, torch.float32, SHAPE).fill_(3)
    tier.fetch(block, buffer)
    values = view(tier, block)
    fake.work("kernel")
    values.mul_(2)
    tier.evict(block, buffer)
    assert pool.tensor(buffer, torch.float32, SHAPE).eq(6).all()
    assert fake.ordered("copy 0", "kernel")
    assert fake.ordered("kernel", "copy 1")


def test_what_lies_between_two_events_is_told_by_the_two_alone(device, fake):
    """After a day the time since the anchor is told to some milliseconds."""
    fake.clock = itertools.count(int(1e8), 0.25)
    earlier, later = device.current_stream().record(), device.current_stream().record()
    assert later.seconds_since(earlier) == 0.25e-3
    assert later.span()[1] > 9e4


def test_a_prefetch_into_fresh_bytes_is_not_held_up(fake, tier, pool):
    fake.work("kernel")
    tier.fetch(tier.allocate(PAGE), pool.allocate(PAGE))
    assert not fake.ordered("kernel", "copy 0")


def test_bytes_that_arrive_are_no_write_to_the_tensors_over_them(device, pool):
    memory, buffer = device.allocate(PAGE), pool.allocate(PAGE)
    pool.tensor(buffer, torch.float32, SHAPE).fill_(3)
    values = memory.view(0, torch.float32, SHAPE)
    version = values._version
    device.copy_in(device.stream("in"), memory, 0, pool.address(buffer), PAGE)
    assert values.eq(3).all()
    assert values._version == version


def test_bytes_are_reused_after_the_last_kernel(fake, tier, pool, monkeypatch):
    monkeypatch.setattr("offload.tiers.cuda.CudaEvent.done", lambda event: False)
    block = tier.allocate(PAGE)
    view(tier, block)
    fake.work("kernel")
    tier.used(block)
    fake.work("other kernel")
    block.release()
    again = tier.allocate(PAGE)
    assert again.extent == block.extent
    tier.fetch(again, pool.allocate(PAGE))
    assert fake.ordered("kernel", "copy 0")
    assert not fake.ordered("other kernel", "copy 0")


def test_there_and_back_has_an_edge_without_the_host(fake, tier, pool, monkeypatch):
    monkeypatch.setattr("offload.tiers.cuda.CudaEvent.done", lambda event: False)
    buffer = pool.allocate(PAGE)
    tier.evict(tier.allocate(PAGE), buffer)
    tier.fetch(tier.allocate(PAGE), buffer)
    assert fake.ordered("copy 0", "copy 1")


def test_memory_of_an_earlier_owner_is_waited_for(fake, device, pool, monkeypatch):
    """torch's allocator orders reuse on the stream that allocates, and on no other."""
    monkeypatch.setattr("offload.tiers.cuda.CudaEvent.done", lambda event: False)
    fake.work("earlier kernel")
    tier = DeviceTier(device, PAGE)
    tier.fetch(tier.allocate(PAGE), pool.allocate(PAGE))
    assert fake.ordered("earlier kernel", "copy 0")


def test_the_users_stream_is_asked_for_at_each_use(fake, device, tier, pool):
    block = tier.allocate(PAGE)
    users, other = fake.current, fake.Stream()
    for stream, name in ((users, "one"), (other, "two")):
        fake.current = stream
        view(tier, block)
        fake.work(name)
    fake.current = users
    tier.evict(block, pool.allocate(PAGE))
    assert fake.ordered("one", "copy 0")
    assert fake.ordered("two", "copy 0")


def test_streams_are_made_once(fake, tier, pool):
    for _ in range(20):
        with tier.allocate(PAGE) as block, pool.allocate(PAGE) as buffer:
            tier.fetch(block, buffer)
            tier.evict(block, buffer)
    assert fake.streams_made == 2


def test_moves_carry_the_times_of_their_events(fake, device, pool):
    recorder = ListRecorder()
    with DeviceTier(device, PAGE, journal=Journal(recorder, clock=device.now)) as tier:
        tier.fetch(tier.allocate(PAGE), pool.allocate(PAGE)).wait()
    (move,) = recorder.events
    assert (move.lane, move.nbytes) == ("host→device", PAGE)
    assert move.duration_s == pytest.approx(1e-3)  # the fake clock ticks once for each event


def test_a_broken_device_is_told_on_the_waiting_thread(fake, tier, pool):
    transfer = tier.fetch(tier.allocate(PAGE), pool.allocate(PAGE))
    fake.broken = "an illegal memory access was encountered"
    assert transfer.done()
    with pytest.raises(TierIOError, match="the CUDA device failed: an illegal memory access"):
        transfer.wait()
    fake.broken = None


def test_a_broken_device_is_told_at_the_step_edge_too(fake, tier, pool):
    tier.fetch(tier.allocate(PAGE), pool.allocate(PAGE))
    fake.broken = "an illegal memory access was encountered"
    with pytest.raises(TierIOError, match="illegal memory access"):
        tier.drain()
    fake.broken = None


def test_the_limit_is_a_fraction_of_the_device_and_the_peak_is_reserved_bytes(fake, device):
    device.set_limit(20 * GIB)
    assert fake.fraction == 0.25
    assert fake.log[-1] == "reset peak"
    assert device.peak_nbytes() == 5 * GIB
    assert device.held_nbytes() == 123
    with pytest.raises(BudgetError, match=r"cpu has 80\.00 GiB .* says 81\.00 GiB") as caught:
        device.set_limit(81 * GIB)
    assert (caught.value.needed_nbytes, caught.value.budget_nbytes) == (81 * GIB, 80 * GIB)


def test_a_device_that_is_full_says_how_much_it_has(fake, device, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(CapacityError, match=r"no room for 90\.00 GiB .*79\.00 GiB of 80\.00 GiB"):
        device.allocate(90 * GIB)


def test_a_machine_without_cuda_is_told_what_to_look_at(fake):
    fake.available = False
    with pytest.raises(UnsupportedError, match="finds no CUDA device: nvidia-smi tells"):
        CudaAccelerator("cpu", runtime=fake)


def test_only_a_checked_device_poisons(fake, pool):
    for checked in (False, True):
        device = CudaAccelerator("cpu", checked=checked, runtime=fake)
        with DeviceTier(device, PAGE) as tier:
            block = tier.allocate(PAGE)
            values = view(tier, block).zero_()
            block.release()
            assert values.view(torch.uint8).eq(POISON).all() == checked


def test_poison_comes_after_the_last_kernel_and_before_the_next_owner(fake, pool, monkeypatch):
    monkeypatch.setattr("offload.tiers.cuda.CudaEvent.done", lambda event: False)
    fill = torch.Tensor.fill_

    def watched(tensor, value):
        if fake.inside:
            fake.work("poison")
        return fill(tensor, value)

    monkeypatch.setattr(torch.Tensor, "fill_", watched)
    tier = DeviceTier(CudaAccelerator("cpu", checked=True, runtime=fake), PAGE)
    block = tier.allocate(PAGE)
    view(tier, block)
    fake.work("kernel")
    block.release()
    tier.fetch(tier.allocate(PAGE), pool.allocate(PAGE))
    assert fake.ordered("kernel", "poison")
    assert fake.ordered("poison", "copy 0")


def test_a_delayed_device_holds_its_streams_up_as_its_seed_says(fake, pool):
    def sleeps(seed):
        fake.log.clear()
        device = DelayedCudaAccelerator(seed, "cpu", runtime=fake)
        with (
            DeviceTier(device, PAGE) as tier,
            tier.allocate(PAGE) as block,
            pool.allocate(PAGE) as buffer,
        ):
            for _ in range(10):
                tier.fetch(block, buffer)
                device.launch(int)
        return [entry for entry in fake.log if isinstance(entry, tuple)]

    assert 4 <= len(sleeps(1)) <= 16
    assert sleeps(1) == sleeps(1)
    assert sleeps(1) != sleeps(2)


def test_work_goes_to_the_stream_that_is_named(fake, device):
    stream = device.stream("side")
    device.launch(lambda: fake.work("side work"), stream=stream)
    device.launch(lambda: fake.work("user's work"))
    assert stream.raw.last == {"side work"}
    assert fake.users.last == {"user's work"}


def test_events_of_another_device_are_waited_for_by_the_host(device):
    for other in (CpuAccelerator(), SimulatedAccelerator()):
        done = []
        other.launch(lambda done=done: done.append(1))
        device.stream("side").wait(other.current_stream().record())
        assert done == [1]
