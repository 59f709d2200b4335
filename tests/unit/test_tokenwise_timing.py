"""Passes are timed where they run: on the host, or on a device that the host runs ahead of."""

import itertools

import pytest

from offload.swap.tokenwise.timing import PassTimer
from offload.tiers.simulated.accelerator import SimulatedAccelerator
from offload.tiers.simulated.timeline import Timing

KERNEL_S = 0.25


def device_with_exact_times():
    return SimulatedAccelerator(timing=Timing(jitter=0.0, late=0.0, kernel_s=KERNEL_S))


def test_the_host_s_clock_tells_at_once():
    clock = itertools.count(start=1.0, step=0.5)
    timer, told = PassTimer(lambda: next(clock)), []
    began = timer.mark()
    timer.since(began, told.append)
    assert told == [0.5]


def test_a_device_tells_what_its_stream_took_once_it_is_there():
    device = device_with_exact_times()
    timer, told = PassTimer(lambda: pytest.fail("the host's clock says nothing"), device), []
    device.launch(lambda: None)  # of an earlier pass
    for kernels in (3, 2):
        began = timer.mark()
        for _ in range(kernels):
            device.launch(lambda: None)
        timer.since(began, told.append)
    assert told == []
    device.synchronize()
    timer.tell()
    assert told == pytest.approx([3 * KERNEL_S, 2 * KERNEL_S])
