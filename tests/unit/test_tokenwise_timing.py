"""Times are those of where things run: the host, or a device that the host runs ahead of."""

import itertools

import pytest

from offload.allocator.errors import TierIOError
from offload.swap.tokenwise import timing
from offload.swap.tokenwise.timing import Timer
from offload.tiers.cpudevice import CpuAccelerator
from offload.tiers.simulated.accelerator import SimulatedAccelerator
from offload.tiers.simulated.timeline import Timing, VirtualEvent

KERNEL_S = 0.25


@pytest.fixture
def device():
    exact = Timing(jitter=0.0, late=0.0, kernel_s=KERNEL_S, host_s=1e-6)
    return SimulatedAccelerator(timing=exact)


@pytest.fixture
def timer(device):
    return Timer(lambda: pytest.fail("the host's clock says nothing"), device)


def kernels(device, count):
    for _ in range(count):
        device.launch(lambda: None)


# On the host.


def test_the_host_s_clock_tells_at_once():
    clock = itertools.count(start=1.0, step=0.5)
    timer, told = Timer(lambda: next(clock)), []
    timer.stopwatch(running=True).tell(told.append)
    assert told == [0.5]


def test_what_lies_between_pause_and_resumption_does_not_count():
    clock = iter([1.0, 1.5, 10.0, 12.0, 20.0, 24.0])
    timer, told = Timer(lambda: next(clock)), []
    watch = timer.stopwatch()
    for _ in range(3):
        with watch:
            watch.resume()  # it runs already
        watch.pause()  # it stands still already
    watch.tell(told.append)
    assert told == [0.5 + 2.0 + 4.0]
    watch.tell(told.append)  # once
    watch.resume()
    assert len(told) == 1


def test_a_watch_that_never_ran_tells_no_time():
    told = []
    Timer().stopwatch().tell(told.append)
    assert told == [0.0]


def test_the_processor_as_a_device_tells_the_time_that_passes():
    timer, told = Timer(accelerator=CpuAccelerator()), []
    watch = timer.stopwatch(running=True)
    sum(range(1000))
    watch.tell(told.append)
    assert told[0] > 0


# On a device.


def test_a_device_tells_what_its_stream_took_once_it_is_there(device, timer):
    told = []
    kernels(device, 1)  # of an earlier pass
    for count in (3, 2):
        watch = timer.stopwatch(running=True)
        kernels(device, count)
        watch.tell(told.append)
    assert told == []
    device.synchronize()
    timer.tell()
    assert told == pytest.approx([3 * KERNEL_S, 2 * KERNEL_S], rel=1e-4)


def test_a_stream_that_was_idle_before_counts_from_the_mark_on(device, timer):
    told = []
    kernels(device, 1)
    device.timeline.pass_time(100.0)  # the host was busy elsewhere
    watch = timer.stopwatch(running=True)
    kernels(device, 2)
    watch.tell(told.append)
    device.synchronize()
    timer.tell()
    assert told == pytest.approx([2 * KERNEL_S], rel=1e-4)


def test_waiting_for_a_copy_is_no_time_of_its_own(device, timer):
    """Paused before the edge, resumed after it: neither the wait nor what it waits for counts."""
    told = []
    watch = timer.stopwatch(running=True)
    kernels(device, 1)
    watch.pause()
    copied = device.stream("host→device").enqueue("copy", 60.0, None)
    device.current_stream().wait(copied)
    watch.resume()
    kernels(device, 2)
    watch.tell(told.append)
    device.synchronize()
    timer.tell()
    assert told == pytest.approx([3 * KERNEL_S], rel=1e-4)


def test_waiting_of_the_host_is_no_time_of_its_own(device, timer):
    told = []
    watch = timer.stopwatch(running=True)
    kernels(device, 1)
    watch.pause()
    device.timeline.pass_time(60.0)  # it waits for room, and the device has nothing to do
    watch.resume()
    kernels(device, 2)
    watch.tell(told.append)
    device.synchronize()
    timer.tell()
    assert told == pytest.approx([3 * KERNEL_S], rel=1e-4)


def test_nobody_waits_for_the_device(device, timer, monkeypatch):
    monkeypatch.setattr(VirtualEvent, "settle", lambda _: pytest.fail("the host waits"))
    monkeypatch.setattr(device, "synchronize", lambda: pytest.fail("the host waits"))
    told = []
    for _ in range(10):
        with (watch := timer.stopwatch()):
            kernels(device, 1)
        watch.tell(told.append)
    assert told == []
    device.timeline.pass_time(4.5 * KERNEL_S)
    timer.stopwatch()  # whoever comes next tells what is known by then
    assert told == pytest.approx([KERNEL_S] * 4, rel=1e-4)


def test_times_of_a_device_that_failed_are_dropped(device, timer):
    told = []
    memory = device.allocate(4096)
    for fails in (False, True, False):
        kernels(device, 1)  # so that each one's marks are points of their own
        watch = timer.stopwatch(running=True)
        if fails:
            device.fail_next("compute", TierIOError(5, "bad"))
            device.copy_out(device.current_stream(), memory, 0, memory.tensor.data_ptr(), 4096)
        kernels(device, 0 if fails else 1)
        watch.tell(told.append)
    device.synchronize()
    timer.tell()
    assert told == pytest.approx([KERNEL_S] * 2, rel=1e-4)


def test_marks_that_wait_for_the_device_are_bounded(device, timer, monkeypatch):
    monkeypatch.setattr(timing, "_MOST_MARKS", 6)
    told = []
    for _ in range(5):
        with (watch := timer.stopwatch()):
            kernels(device, 1)
        watch.tell(told.append)
    device.synchronize()
    timer.tell()
    assert len(told) == 3
    with (watch := timer.stopwatch()):  # there is room again
        kernels(device, 1)
    watch.tell(told.append)
    device.synchronize()
    timer.tell()
    assert len(told) == 4


def test_a_watch_whose_time_nobody_takes_is_given_up(timer, monkeypatch):
    monkeypatch.setattr(timing, "_MOST_MARKS_EACH", 6)
    told = []
    watch = timer.stopwatch()
    for _ in range(4):
        with watch:
            pass
    watch.tell(told.append)
    timer.tell()
    assert told == []


def test_watches_of_passes_that_are_not_measured_cost_nothing(device, monkeypatch):
    timer, told = Timer(accelerator=device), []
    timer.measures = False
    monkeypatch.setattr(timer, "mark", lambda: pytest.fail("an event was recorded"))
    watch = timer.stopwatch(running=True)
    with watch:
        timer.measures = True  # of what begins from now on
    watch.tell(told.append)
    timer.tell()
    assert told == []
