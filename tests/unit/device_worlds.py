"""A cache of device tensors on the simulated device, and what may be computed with it."""

import gc
from contextlib import contextmanager

import torch
from seeded_lanes import SeededTime
from torch.nn import functional as F

from offload.swap.activations import ActivationCache
from offload.swap.ferry import Ferry
from offload.swap.homes import MemoryHome
from offload.swap.places import DevicePlace
from offload.swap.selective import put_on, take_off
from offload.tiers.hostmem import PAGE
from offload.tiers.journal import Journal
from offload.tiers.pinned import PinnedTier, SizeClass
from offload.tiers.ram import RamTier
from offload.tiers.simulated.deferred import Deferred

WIDTH = 32  # a square of it fills a page
LIMITS = {"nothing stays": (0, 2 * PAGE), "some stay": (3 * PAGE, 4 * PAGE)}


class World:
    """A cache of device tensors: pinned blocks first, then memory that is not pinned."""

    def __init__(self, device, limits, journal=None):
        self.device = device
        self.rows = None  # rebuilds some of what is saved
        timeline = getattr(device, "timeline", None)
        self.time = SeededTime(timeline.random.random() if timeline else 0)
        self.journal = journal or Journal(clock=device.now)
        self.near = PinnedTier(classes=[SizeClass(nbytes=PAGE, count=4)], name="near", checked=True)
        self.far = RamTier(4096 * PAGE, name="far")
        homes = [
            MemoryHome(tier, *(self.time.lane(tier.spec.name, self.journal) for _ in "rw"))
            for tier in (self.near, self.far)
        ]
        self.ferry = Ferry(device, self.journal, buffers=2)
        self.place = DevicePlace(self.ferry, self.journal)
        self.cache = ActivationCache(
            homes,
            self.journal,
            limit_nbytes=limits[0],
            in_flight_nbytes=limits[1],
            min_nbytes=PAGE // 2,
            place=self.place,
        )

    @contextmanager
    def saving(self):
        self.cache.begin_pass("model")
        put_on(self.cache, self.rows)
        try:
            yield
        finally:
            take_off()

    def close(self):
        self.device.synchronize()
        self.time.settle()
        self.cache.close()
        gc.collect(0)
        self.cache.spiller.settle()
        left = self.cache.kept_nbytes, self.far.used_nbytes
        assert left == (0, 0), f"(kept, used) bytes are left: {left}"
        self.ferry.close()
        self.near.close()
        self.far.close()


def run(device, *, body, limits):
    """What ``body`` computes on ``device``, whose saved tensors are swapped."""
    world = World(device, limits)
    torch.manual_seed(0)
    with Deferred(device, on_launch=world.time.pass_by):
        outcome = body(world)
    world.close()
    return [tensor.detach() for tensor in outcome]


def square(scale=1.0):
    return (torch.randn(WIDTH, WIDTH) * scale).requires_grad_()


def mlp(x, weights):
    for weight in weights:
        x = F.gelu(x @ weight) + x
    return x.square().mean()
