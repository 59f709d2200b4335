"""The simulated device: late, out of order where nothing was declared, and right where it was."""

from functools import partial

import pytest
import torch

from offload.allocator.errors import BudgetError, CapacityError, TierIOError
from offload.tiers.accelerator import POISON
from offload.tiers.cpudevice import CpuAccelerator
from offload.tiers.device import DeviceTier
from offload.tiers.events import ListRecorder, Move, Stall
from offload.tiers.journal import Journal, Label
from offload.tiers.memory import HostBuffer
from offload.tiers.simulated.accelerator import Faults, SimulatedAccelerator
from offload.tiers.simulated.timeline import Timing

EXACT = Timing(jitter=0, late=0, latency_s=1e-5, bytes_per_s=1e9, kernel_s=1e-3, host_s=0)
PAGE = 4096


@pytest.fixture
def host():
    buffer = HostBuffer(PAGE)
    buffer.view()[:] = b"\x07" * PAGE
    yield buffer
    buffer.release()


def copied(device, stream, memory, host):
    return device.copy_in(device.stream(stream), memory, 0, host.address, PAGE)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float8_e8m0fnu,
    ],
)
def test_poison_is_nan_in_every_float_type(dtype):
    values = torch.full((8,), POISON, dtype=torch.uint8).view(dtype)
    assert values.to(torch.float64).isnan().all()


def test_fresh_memory_is_poison():
    assert SimulatedAccelerator().allocate(100).tensor.eq(POISON).all()


def test_a_copy_has_its_effect_at_its_end_only(host):
    device = SimulatedAccelerator(timing=EXACT)
    memory = device.allocate(PAGE)
    event = copied(device, "in", memory, host)
    assert not event.done()
    device.timeline.pass_time(1e-6)
    assert memory.tensor.eq(POISON).all()
    event.settle()
    assert memory.tensor.eq(7).all()
    assert event.span() == (0.0, pytest.approx(1e-5 + PAGE / 1e9))
    assert device.now() == event.span()[1]


def test_a_point_of_an_idle_stream_lies_where_it_was_recorded(host):
    """As on a real device: not at the end of what the stream did last."""
    device = SimulatedAccelerator(timing=EXACT)
    stream = device.current_stream()
    first = stream.record()
    copied(device, "compute", device.allocate(PAGE), host)
    busy = stream.record()
    device.timeline.pass_time(5.0)
    idle = stream.record()
    assert first.span() == (0.0, 0.0)
    assert busy.seconds_since(first) == pytest.approx(1e-5 + PAGE / 1e9)
    assert idle.span() == (device.now(), device.now())
    assert idle.seconds_since(busy) == pytest.approx(5.0, rel=1e-4)


def test_a_source_changed_too_early_is_what_arrives(host):
    device = SimulatedAccelerator(timing=EXACT)
    memory = device.allocate(PAGE)
    event = copied(device, "in", memory, host)
    host.view()[:] = b"\x08" * PAGE
    event.settle()
    assert memory.tensor.eq(8).all()


def ends_in_order(seed, *, declared):
    """The order in which two kernels of two streams end."""
    device, order = SimulatedAccelerator(seed), []
    first, second = device.stream("first"), device.stream("second")
    device.launch(partial(order.append, 1), stream=first)
    if declared:
        second.wait(first.record())
    device.launch(partial(order.append, 2), stream=second)
    device.synchronize()
    return order


def test_streams_have_no_order_that_was_not_declared():
    orders = {tuple(ends_in_order(seed, declared=False)) for seed in range(200)}
    assert orders == {(1, 2), (2, 1)}


def test_an_event_edge_holds_under_every_seed():
    assert all(ends_in_order(seed, declared=True) == [1, 2] for seed in range(2000))


def test_a_stream_keeps_its_order_under_every_seed():
    for seed in range(500):
        device, order = SimulatedAccelerator(seed), []
        for index in range(6):
            device.launch(partial(order.append, index))
        device.synchronize()
        assert order == list(range(6))


def test_an_event_lies_behind_what_its_stream_waited_for():
    for seed in range(300):
        device, order = SimulatedAccelerator(seed), []
        a, b, c = (device.stream(name) for name in "abc")
        device.launch(partial(order.append, 1), stream=a)
        b.wait(a.record())
        c.wait(b.record())  # b has no work of its own
        device.launch(partial(order.append, 2), stream=c)
        device.synchronize()
        assert order == [1, 2]


def test_a_seed_repeats_exactly():
    def logs(seed):
        device = SimulatedAccelerator(seed)
        for name in "abcabc":
            device.launch(int, stream=device.stream(name))
        device.synchronize()
        return list(device.timeline.log)

    assert logs(3) == logs(3)
    assert logs(3) != logs(4)


def test_a_loop_that_polls_comes_to_an_end(host):
    device = SimulatedAccelerator()
    event = copied(device, "in", device.allocate(PAGE), host)
    polls = 0
    while not event.done():
        polls += 1
        assert polls < 10_000


def test_a_stream_is_made_once():
    device = SimulatedAccelerator()
    assert device.stream("x") is device.stream("x")
    assert device.stream("x") is not device.stream("y")


def test_the_current_stream_is_the_users_to_change():
    device = SimulatedAccelerator()
    outside = device.current_stream()
    with device.use_stream("mine"):
        assert device.current_stream() is device.stream("mine")
    assert device.current_stream() is outside


def test_cpu_code_runs_after_what_its_stream_waits_for(host):
    device = SimulatedAccelerator(timing=EXACT)
    memory = device.allocate(PAGE)
    with device.compute():
        assert memory.tensor.eq(POISON).all()
    event = copied(device, "in", memory, host)
    with device.compute(seconds=0):
        assert memory.tensor.eq(POISON).all()  # nobody declared a wait
    device.current_stream().wait(event)
    began = device.now()
    with device.compute(seconds=2.0):
        assert memory.tensor.eq(7).all()
    assert device.now() >= began + 2.0


def test_a_failed_copy_leaves_poison_and_its_error(host):
    device = SimulatedAccelerator()
    memory = device.allocate(PAGE)
    copied(device, "in", memory, host).settle()
    device.fail_next("in", TierIOError(5, "planted"))
    event = copied(device, "in", memory, host)
    event.settle()
    assert isinstance(event.error, TierIOError)
    assert memory.tensor.eq(POISON).all()
    copied(device, "in", memory, host).settle()
    assert memory.tensor.eq(7).all()


def test_memory_unmapped_before_its_copy_ended_is_an_error():
    device = SimulatedAccelerator(timing=EXACT)
    memory = device.allocate(PAGE)
    for copy in (device.copy_in, device.copy_out):
        buffer = HostBuffer(PAGE)
        event = copy(device.stream("lane"), memory, 0, buffer.address, PAGE)
        buffer.release()
        event.settle()
        assert isinstance(event.error, TierIOError)
        assert "of 4096 bytes was unmapped before its end" in str(event.error)


def test_a_share_of_the_copies_fails(host):
    device = SimulatedAccelerator(faults=Faults(errors=0.3))
    memory = device.allocate(PAGE)
    events = [copied(device, "in", memory, host) for _ in range(300)]
    device.synchronize()
    failed = sum(event.error is not None for event in events)
    assert 60 <= failed <= 120
    told = next(event.error for event in events if event.error)
    assert str(told) == f"[Errno 5] injected fault: copy of {PAGE} bytes on in"


def test_a_share_of_the_copies_stalls(host):
    device = SimulatedAccelerator(timing=EXACT, faults=Faults(stalls=1.0, stall_s=7.0))
    event = copied(device, "in", device.allocate(PAGE), host)
    event.settle()
    assert device.now() > 7.0


def test_the_error_of_a_kernel_is_raised_by_a_later_call():
    device = SimulatedAccelerator()
    device.launch(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        device.synchronize()
    device.synchronize()  # told once


@pytest.mark.parametrize("make", [SimulatedAccelerator, CpuAccelerator])
def test_memory_is_bounded_and_its_peak_is_told(make):
    device = make(capacity=10 * PAGE)
    held = device.allocate(3 * PAGE)
    with pytest.raises(CapacityError, match=r"28\.00 KiB are free; 32\.00 KiB \(32768 bytes\)"):
        device.allocate(8 * PAGE)
    del held
    device.allocate(4 * PAGE)
    assert device.peak_nbytes() == 4 * PAGE
    device.set_limit(5 * PAGE)
    with pytest.raises(CapacityError, match="24576 bytes"):
        device.allocate(6 * PAGE)
    with pytest.raises(BudgetError, match="write device=40960"):
        device.set_limit(11 * PAGE)


def test_memory_outlives_the_device_with_its_last_tensor():
    device = CpuAccelerator(capacity=PAGE)
    view = device.allocate(PAGE).view(8, torch.float32, (2, 3)).fill_(2)
    assert view.sum() == 12
    with pytest.raises(CapacityError):
        device.allocate(1)
    del view
    device.allocate(1)


def test_moves_and_stalls_are_told_in_virtual_time(host):
    recorder = ListRecorder()
    device = SimulatedAccelerator(timing=EXACT)
    device.timeline.pass_time(100)
    journal = Journal(recorder, clock=device.now)
    with DeviceTier(device, PAGE, journal=journal) as tier:
        block = tier.allocate(PAGE)
        label = Label("w", "weight", "pinned", "device")
        transfer = tier.write(block, host.address, label=label)
        with journal.stall("w", "weight", "host→device", "late"):
            transfer.wait()
    move, stall = sorted(recorder.events, key=lambda event: type(event).__name__)
    seconds = pytest.approx(1e-5 + PAGE / 1e9)
    assert isinstance(move, Move)
    assert (move.key, move.nbytes, move.lane) == ("w", PAGE, "host→device")
    assert (move.t_s, move.duration_s) == (seconds, seconds)
    assert isinstance(stall, Stall)
    assert (stall.t_s, stall.duration_s) == (seconds, seconds)
    assert journal.totals.stall_s == seconds
