"""Saved tensors of a device, under every order of events: real autograd on the simulated device."""

from functools import partial

import pytest
import torch
from device_bodies import BODIES, double_backward, steps
from device_worlds import LIMITS, run

from offload.swap import spilling
from offload.swap.ferry import Ferry
from offload.swap.places import DevicePlace
from offload.tiers.accelerator import DeviceMemory
from offload.tiers.cpudevice import CpuAccelerator, DoneEvent
from offload.tiers.device import DeviceTransfer
from offload.tiers.pinned import PinnedTier
from offload.tiers.simulated.races import find_race

SEEDS = 15
MANY_SEEDS = 1000


def look_for_race(body, limits, seeds):
    return find_race(partial(run, body=body, limits=LIMITS[limits]), seeds=seeds)


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_bits_do_not_depend_on_when_things_happen(body, limits):
    assert look_for_race(body, limits, range(SEEDS)) is None


@pytest.mark.slow
@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_nor_under_a_thousand_seeds(body):
    assert look_for_race(body, "nothing stays", range(SEEDS, MANY_SEEDS)) is None


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_the_reference_is_plain_autograd(body):
    """On the device whose calls are over when they return; hooks off against hooks on."""
    swapped = run(CpuAccelerator(), body=body, limits=LIMITS["nothing stays"])

    def plain(world):
        world.saving = torch.enable_grad
        return body(world)

    for one, other in zip(swapped, run(CpuAccelerator(), body=plain, limits=(0, 0)), strict=True):
        assert torch.equal(one, other)


def no_wait_for_kernels(monkeypatch):
    original = Ferry.copy_out

    def copy_out(self, source, at, address, nbytes):
        source = DeviceMemory(tensor=source.tensor, ready=DoneEvent())
        return original(self, source, at, address, nbytes)

    monkeypatch.setattr(Ferry, "copy_out", copy_out)


def no_wait_for_arrivals(monkeypatch):
    original = DevicePlace.order

    def order(self, transfer):
        return isinstance(transfer, DeviceTransfer) or original(self, transfer)

    monkeypatch.setattr(DevicePlace, "order", order)


def memory_let_go_too_early(monkeypatch):
    """As if a copy had ended when it began: the block is read before it is written."""
    monkeypatch.setattr(spilling, "_is_done", lambda unit: unit.transfer is not None)


def blocks_back_too_early(monkeypatch):
    monkeypatch.setattr(PinnedTier, "guard", lambda self, block, transfer: None)


@pytest.mark.parametrize(
    ("fault", "body"),
    [
        (no_wait_for_kernels, steps),
        (no_wait_for_arrivals, steps),
        (memory_let_go_too_early, double_backward),
        (blocks_back_too_early, steps),
    ],
    ids=lambda value: value.__name__,
)
def test_each_edge_that_is_left_out_is_found(fault, body, monkeypatch):
    fault(monkeypatch)
    assert look_for_race(body, "nothing stays", range(60)) is not None
