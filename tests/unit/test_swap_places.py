"""Saved tensors of a device: full devices, failing copies, storages and streams that are shared."""

import random
from collections import Counter

import pytest
import torch
from device_bodies import steps
from device_worlds import LIMITS, WIDTH, World, mlp, run, square
from torch import nn
from torch.nn import functional as F

from offload.allocator.errors import CapacityError, TierIOError
from offload.saving import in_flight_by_default
from offload.swap import spilling
from offload.swap.places import DevicePlace, Trip
from offload.tiers.cpudevice import CpuAccelerator
from offload.tiers.events import ListRecorder, Move
from offload.tiers.hostmem import PAGE
from offload.tiers.journal import Journal
from offload.tiers.simulated.accelerator import SimulatedAccelerator
from offload.tiers.simulated.deferred import Deferred


def test_a_device_without_room_to_look_ahead_fetches_at_the_use(monkeypatch):
    right = run(CpuAccelerator(), body=steps, limits=LIMITS["nothing stays"])
    bring, fetch, refused = spilling.Spiller.bring, DevicePlace.fetch, []
    needed = []

    def bring_now(self, unit):
        needed.append(unit)
        try:
            bring(self, unit)
        finally:
            needed.pop()

    def fetch_if_needed(self, trip):
        if not needed:
            refused.append(trip)
            raise CapacityError("the device is full")
        return fetch(self, trip)

    monkeypatch.setattr(spilling.Spiller, "bring", bring_now)
    monkeypatch.setattr(DevicePlace, "fetch", fetch_if_needed)
    found = run(CpuAccelerator(), body=steps, limits=LIMITS["nothing stays"])
    assert refused
    assert all(map(torch.equal, found, right))


def train_once(world, x, weights):
    with world.saving():
        loss = mlp(x, weights)
    loss.backward()
    world.cache.close()


def test_a_copy_that_fails_is_told_and_nothing_wrong_is_used():
    """Out: the bytes stay. In: the next use, or the end, raises."""
    for seed in range(40):
        device = SimulatedAccelerator(seed)
        failing = random.Random(seed).choice(["device→host", "host→device"])
        world = World(device, LIMITS["nothing stays"])
        torch.manual_seed(0)
        device.fail_next(failing, TierIOError(5, "bad link"))
        with Deferred(device, on_launch=world.time.pass_by):
            x, weights = square(), [square(0.2) for _ in range(3)]
            with pytest.raises(TierIOError, match="bad link"):
                train_once(world, x, weights)
        world.time.settle()
        device.synchronize()


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        return self.second(F.silu(self.first(x))).square().mean()


def test_other_places_are_left_alone_with_a_reason():
    world = World(CpuAccelerator(), LIMITS["nothing stays"])
    model, x = Wide(), torch.randn(WIDTH, WIDTH)
    with world.saving():
        model(x).backward()
    assert world.cache.spiller.peak_nbytes == 0
    assert "on cpu, which is another place" in world.cache.left_alone
    world.close()


def neighbours(world):
    """Both halves of each product are saved, one after the other; they share a storage."""
    x = square()
    y = torch.cat([x, x], dim=1)
    with world.saving():
        for _ in range(4):
            one, other = (y * 1.5).chunk(2, dim=1)
            y = torch.cat([one * other, other], dim=1)
        loss = y.sum()
    loss.backward()
    return [loss, x.grad]


def test_a_storage_that_neighbours_save_leaves_once():
    recorder = ListRecorder()
    device = SimulatedAccelerator(1)
    world = World(device, (0, 8 * PAGE), journal=Journal(recorder, clock=device.now))
    with Deferred(device, on_launch=world.time.pass_by):
        neighbours(world)
    world.close()
    moves = [event for event in recorder.events if isinstance(event, Move)]
    left = Counter(move.key for move in moves if move.src == device.name)
    assert left
    assert set(left.values()) == {1}


@pytest.mark.parametrize("same", [True, False])
def test_memory_goes_at_once_where_the_stream_orders_its_next_owner(same):
    """Not the host's knowledge that the copy has ended: it may run far ahead."""
    device = SimulatedAccelerator(1)
    world = World(device, LIMITS["nothing stays"])
    home = world.cache.spiller.homes[0]
    trip = Trip(home=home, block=home.allocate(PAGE), nbytes=PAGE, key="x")
    _, transfer = world.place.fetch(trip)
    with device.use_stream("compute" if same else "other"):
        assert world.place.order(transfer)
    assert (transfer.owner is None) == same
    transfer.settle()
    assert transfer.owner is None
    trip.block.release()
    world.close()


@pytest.mark.parametrize(
    ("capacity", "nbytes"), [(None, 64 << 20), (1 << 30, 64 << 20), (24 << 30, 768 << 20)]
)
def test_a_large_device_has_more_in_flight(capacity, nbytes):
    assert in_flight_by_default(SimulatedAccelerator(capacity=capacity)) == nbytes
    assert in_flight_by_default(None) == 64 << 20
