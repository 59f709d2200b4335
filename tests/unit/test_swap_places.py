"""Saved tensors of a device, under every order of events: real autograd on the simulated device."""

import gc
import random
from collections import Counter
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from seeded_lanes import SeededTime
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from offload.allocator.errors import CapacityError, TierIOError
from offload.saving import in_flight_by_default
from offload.swap import spilling
from offload.swap.activations import ActivationCache
from offload.swap.ferry import Ferry
from offload.swap.homes import MemoryHome
from offload.swap.places import DevicePlace, Trip
from offload.swap.selective import put_on, take_off
from offload.swap.tokenwise.keeper import CacheKeeper
from offload.swap.tokenwise.plans import Settings
from offload.swap.tokenwise.timing import Timer
from offload.swap.tokenwise.tokenwise import TokenWise
from offload.tiers.accelerator import DeviceMemory
from offload.tiers.cpudevice import CpuAccelerator, DoneEvent
from offload.tiers.device import DeviceTransfer
from offload.tiers.events import ListRecorder, Move
from offload.tiers.hostmem import PAGE
from offload.tiers.journal import Journal
from offload.tiers.pinned import PinnedTier, SizeClass
from offload.tiers.ram import RamTier
from offload.tiers.simulated.accelerator import SimulatedAccelerator
from offload.tiers.simulated.deferred import Deferred
from offload.tiers.simulated.races import find_race

WIDTH = 32  # a square of it fills a page
SEEDS = 15
MANY_SEEDS = 1000
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


def steps(world):
    """Three steps: the second and third know what the first one used."""
    x, weights = square(), [square(0.2) for _ in range(4)]
    for _ in range(3):
        with world.saving():
            loss = mlp(x, weights)
        loss.backward()
    return [loss, x.grad, *(weight.grad for weight in weights)]


def dropout_in_checkpoint(world):
    x, weights = square(), [square(0.2) for _ in range(3)]

    def region(y, weight):
        return F.dropout(torch.tanh(y @ weight), 0.3) + y

    with world.saving():
        y = x
        for weight in weights:
            y = checkpoint(region, y, weight, use_reentrant=False)
        loss = y.square().sum()
    loss.backward()
    return [loss, x.grad, *(weight.grad for weight in weights)]


def several_forwards_and_retained_graphs(world):
    x, weights = square(), [square(0.2) for _ in range(2)]
    losses = []
    for scale in (1.0, 0.5):
        with world.saving():
            losses.append(mlp(x * scale, weights))
    losses[1].backward(retain_graph=True)
    losses[0].backward()
    losses[1].backward()
    return [x.grad, *(weight.grad for weight in weights)]


def double_backward(world):
    x, weights = square(), [square(0.2) for _ in range(2)]
    with world.saving():
        (slope,) = torch.autograd.grad(mlp(x, weights), x, create_graph=True)
        penalty = slope.square().sum()
    penalty.backward()
    return [penalty, x.grad, *(weight.grad for weight in weights)]


def dead_branches(world):
    x = square()
    with world.saving():
        mlp(x, [square(), square()])
        loss = mlp(x.exp(), [square(0.1)])
    loss.backward()
    return [loss, x.grad]


def views_of_one_storage(world):
    """Strided, sliced and transposed views; and small storages that move in batches."""
    x, bias = square(), torch.randn(WIDTH, requires_grad=True)
    with world.saving():
        y = x * 2
        z = (y[::2] * y[1::2]).t() @ y[: WIDTH // 2]
        rows = [torch.sigmoid(z[index] + bias) for index in range(8)]
        loss = torch.stack([row * row.exp() for row in rows]).sum()
    loss.backward()
    return [loss, x.grad, bias.grad]


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        result = x * factor
        ctx.save_for_backward(x, result)
        return result

    @staticmethod
    def backward(ctx, gradient):
        x, result = ctx.saved_tensors
        return gradient * (result - x), None


def custom_functions(world):
    x = square()
    with world.saving():
        loss = Scaled.apply(Scaled.apply(x.sin(), 3.0).cos(), 2.0).sum()
    loss.backward()
    return [loss, x.grad]


def tensors_that_are_used_again(world):
    """What is still held when it is saved a second time, or was changed in between."""
    x = square()
    with world.saving():
        y = x.exp()
        first = y.sin()
        for _ in range(4):
            y = y + first
            first = y.sin() * first
        held = y.detach()
        loss = first.sum() + y.cos().sum()
    loss.backward()
    return [loss, x.grad, held]


def backward_on_another_stream(world):
    """Forward on one stream, backward on a second one that waits for the first."""
    device = world.device
    x, weights = square(), [square(0.2) for _ in range(3)]
    with world.saving():
        loss = mlp(x, weights)
    if not isinstance(device, SimulatedAccelerator):
        loss.backward()
        return [x.grad, *(weight.grad for weight in weights)]
    forward = device.current_stream().record()
    with device.use_stream("backward"):
        device.current_stream().wait(forward)
        loss.backward()
    return [x.grad, *(weight.grad for weight in weights)]


def reentrant_checkpoint_inside(world):
    """Backward runs the region again, inside of the context and outside of the graph."""
    x, weight = square(), square(0.2)
    with world.saving():
        y = checkpoint(lambda z: torch.tanh(z @ weight).exp(), x * 2, use_reentrant=True)
        loss = (y * y).sum()
        loss.backward()
    return [loss, x.grad, weight.grad]


def selective_checkpoint(world):
    """What the policy offloads leaves the device; the rest is computed again."""
    x, weight = square(), square(0.2)

    def policy(_context, function, *_args, **_kwargs):
        offloaded = function is torch.ops.aten.mm.default
        chosen = CheckpointPolicy.MUST_CPU_OFFLOAD
        return chosen if offloaded else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    with world.saving():
        y = checkpoint(
            lambda z: torch.tanh(z @ weight) @ weight, x, use_reentrant=False, context_fn=contexts
        )
        loss = y.square().sum()
    loss.backward()
    return [loss, x.grad, weight.grad]


def modules(world):
    """Parameters and buffers, their transposes and tied ones, stay where they are."""
    first, norm, last = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)
    last.weight = first.weight
    model = nn.Sequential(first, norm, nn.SiLU(), last)
    world.cache.fixed.know_model(model)
    x = square()
    for _ in range(2):
        with world.saving():
            loss = model(x).square().mean()
        loss.backward()
    return [loss, x.grad, norm.running_var, *(one.grad for one in model.parameters())]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return x + self.down(F.silu(self.up(self.norm(x))))


def token_rows(world, alpha=0.5, passes=2):
    """What lies behind the cut is rebuilt from what was fetched; heads are copied out and back."""
    model = nn.Sequential(*(Block() for _ in range(2)))
    world.cache.fixed.know_model(model)
    world.rows = TokenWise(
        model,
        CacheKeeper(world.cache),
        Settings(alpha=alpha, min_nbytes=PAGE),
        timer=Timer(accelerator=world.device),
        rounding=True,
    )
    results = []
    for _ in range(passes):
        x = torch.randn(1, 4 * WIDTH, WIDTH).requires_grad_()
        with world.saving():
            loss = model(x).square().mean()
        loss.backward()
        results += [loss, x.grad]
    reports = world.rows.report()  # none where hooks are off
    assert all(report.rebuilt_nbytes > report.whole_nbytes for report in reports)
    assert alpha == "auto" or all(report.cut == alpha * report.rows for report in reports)
    world.rows.remove()
    return [*results, *(one.grad for one in model.parameters())]


def token_rows_solved(world):
    """Which rows, is found out meanwhile: times are told late, in any order of the host's work."""
    return token_rows(world, alpha="auto", passes=3)


def changes_in_place(world):
    """They are errors, wherever the bytes are; a tensor that nobody saved may be changed."""
    x = square()
    with world.saving():
        y = x.exp()
        z = y.sin()
        loss = z.sum() + (x * 3).add_(1).sum()
    loss.backward(retain_graph=True)
    y.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    return [loss.detach(), x.grad]


BODIES = (
    steps,
    dropout_in_checkpoint,
    several_forwards_and_retained_graphs,
    double_backward,
    dead_branches,
    views_of_one_storage,
    custom_functions,
    tensors_that_are_used_again,
    backward_on_another_stream,
    reentrant_checkpoint_inside,
    selective_checkpoint,
    modules,
    token_rows,
    token_rows_solved,
    changes_in_place,
)


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
    "fault",
    [no_wait_for_kernels, no_wait_for_arrivals, memory_let_go_too_early, blocks_back_too_early],
    ids=lambda fault: fault.__name__,
)
def test_each_edge_that_is_left_out_is_found(fault, monkeypatch):
    fault(monkeypatch)
    assert any(look_for_race(body, "nothing stays", range(60)) is not None for body in BODIES)


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
