"""What alpha is solved from on a device: time of the device, under known costs in virtual time."""

import gc
import math
from dataclasses import astuple
from functools import partial

import few_rows
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from offload.allocator.errors import TierIOError
from offload.swap.activations import ActivationCache
from offload.swap.ferry import Ferry
from offload.swap.homes import MemoryHome
from offload.swap.places import DevicePlace
from offload.swap.tokenwise.keeper import CacheKeeper, MemoryKeeper
from offload.swap.tokenwise.plans import Settings
from offload.swap.tokenwise.replay import cuts
from offload.swap.tokenwise.solve import BlockCost, Link, step_s, thriftiest
from offload.swap.tokenwise.timing import Timer
from offload.swap.tokenwise.tokenwise import TokenWise
from offload.swap.tokenwise.trials import ALIKE
from offload.tiers.journal import Journal
from offload.tiers.lanes import Lane
from offload.tiers.pinned import PinnedTier
from offload.tiers.simulated.accelerator import SimulatedAccelerator
from offload.tiers.simulated.deferred import Deferred
from offload.tiers.simulated.timeline import Timing, VirtualEvent

ROWS, WIDTH, BLOCKS = 512, 64, 4
NBYTES = ROWS * WIDTH * 4  # of a block's input; all sizes here are whole pages
LAUNCH_S = 1e-6  # of each kernel, however small
DENSE_S, OTHER_S = 20e-9, 1e-9  # for each byte that it makes
PASSES = 10


class PricedDevice(SimulatedAccelerator):
    """Each kernel takes what its operation costs."""

    def __init__(self):
        super().__init__(timing=Timing(jitter=0.0, late=0.0, host_s=1e-9))
        self.price_s = 0.0
        self.spent_s = 0.0

    def _kernel_s(self, seconds):
        self.spent_s += self.price_s
        return self.price_s


class Priced(Deferred):
    """What torch computes costs by the bytes that it makes."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        shapes = [one for one in args if isinstance(one, torch.Tensor)]
        if name == "mm":
            nbytes = 4 * shapes[0].shape[0] * shapes[1].shape[1]
        else:
            nbytes = max((one.numel() * 4 for one in shapes), default=0)
        self._device.price_s = price_s(name, nbytes)
        return super().__torch_dispatch__(func, types, args, kwargs)


def price_s(name, nbytes):
    return LAUNCH_S + nbytes * (DENSE_S if name == "mm" else OTHER_S)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


class LinkKeeper(MemoryKeeper):
    """Copies on the device; what comes back waits for a copy on the stream of a link."""

    def __init__(self, device, bytes_per_s):
        super().__init__()
        self._device = device
        self._bytes_per_s = bytes_per_s

    def unpack(self, packed):
        tensor = super().unpack(packed)
        link = self._device.stream("host→device")
        self._device.current_stream().wait(
            link.enqueue("fetch", tensor.nbytes / self._bytes_per_s, None)
        )
        return tensor

    def links(self):
        return (Link(name="link", bytes_per_s=self._bytes_per_s, free_nbytes=1e15),)


def train(device, rows=None, *, blocks=BLOCKS, passes=1, pause_s=0.0):
    """Losses and gradients, and what forward and backward of the last pass cost the device."""
    results, spent = [], []
    torch.manual_seed(0)
    with Priced(device):
        model = Net(blocks)
        tokenwise = rows(model) if rows is not None else None
        for _ in range(passes):
            model.zero_grad()
            x = torch.randn(1, ROWS, WIDTH).requires_grad_()
            began_s = device.spent_s
            if tokenwise is None:
                loss = model(x)
            else:
                with torch.autograd.graph.saved_tensors_hooks(tokenwise.pack, tokenwise.unpack):
                    loss = model(x)
            between_s = device.spent_s
            loss.backward()
            spent = [between_s - began_s, device.spent_s - between_s]
            device.timeline.pass_time(pause_s)
            results += [loss.detach(), x.grad]
        results += [parameter.grad for parameter in model.parameters()]
    device.synchronize()
    return [one.clone() for one in results], spent, tokenwise


def true_cost():
    """Of one block, by the price of each kernel."""
    with_one_more, with_fewer = (train(PricedDevice(), blocks=n)[1] for n in (BLOCKS, BLOCKS - 1))
    forward_s, backward_s = (
        one - other for one, other in zip(with_one_more, with_fewer, strict=True)
    )
    # The norm and gelu are copied to where they belong; the product is written there.
    per_row = [("norm", 1), ("copy", 1), ("mm", 4), ("gelu", 4), ("copy", 4)]
    row_nbytes = NBYTES // ROWS
    copied_s = sum(2 * price_s("copy", share * NBYTES) for share in (1, 4, 4))
    return BlockCost(
        forward_s=forward_s,
        backward_s=backward_s,
        rebuild_s=sum(
            (price_s(name, share * row_nbytes) - LAUNCH_S) * ROWS for name, share in per_row
        ),
        heads_s=copied_s,
        overhead_s=len(per_row) * LAUNCH_S,
        whole_nbytes=NBYTES + 2 * ROWS * 4,  # with the norm's statistics
        target_nbytes=9 * NBYTES,
    )


def solve_on(device, timer, link):
    """Gradients with alpha solved, and what it was solved from."""
    keeper = LinkKeeper(device, link.bytes_per_s)
    make = partial(TokenWise, keeper=keeper, settings=Settings(min_nbytes=8192), timer=timer)
    results, _, tokenwise = train(device, make, passes=PASSES, pause_s=1.0)
    return results, tokenwise.report()


def a_link(bytes_per_s):
    return Link(name="link", bytes_per_s=bytes_per_s, free_nbytes=1e15)


@pytest.fixture(scope="module")
def truth():
    return true_cost()


@pytest.fixture(scope="module")
def right():
    return train(PricedDevice(), passes=PASSES)[0]


@pytest.fixture
def nobody_waits(monkeypatch):
    """The host never waits for an event. (What compares bits waits for all of the device.)"""
    monkeypatch.setattr(VirtualEvent, "settle", lambda _: pytest.fail("the host waits"))


def forbidden_clock():
    pytest.fail("the host's clock was asked")


@pytest.mark.usefixtures("nobody_waits")
@pytest.mark.parametrize(
    ("bytes_per_s", "alpha"), [(10e6, 0.0), (40e6, 0.25), (70e6, 0.75), (200e6, 1.0)]
)
def test_alpha_is_solved_from_the_time_of_the_device(truth, right, bytes_per_s, alpha):
    device, link = PricedDevice(), a_link(bytes_per_s)
    results, reports = solve_on(device, Timer(forbidden_clock, device), link)
    assert all(map(torch.equal, results, right))
    assert thriftiest(truth, [link], cuts(ROWS), within=ALIKE).alpha == alpha
    for report in reports:
        assert astuple(report.cost) == pytest.approx(astuple(truth), rel=0.01)
        assert report.solution.alpha == alpha


def test_the_host_s_clock_would_have_told_something_else(truth):
    """It sees how long enqueueing takes: so what is compared above can differ."""
    device, link = PricedDevice(), a_link(40e6)
    _, reports = solve_on(device, Timer(lambda: device.timeline.now_s), link)
    assert reports[0].cost.forward_s < truth.forward_s / 100
    assert reports[0].solution.cut != thriftiest(truth, [link], cuts(ROWS), within=ALIKE).cut


# Rows that differ behind some cuts.


@pytest.mark.parametrize("bytes_per_s", [10e6, 70e6, 200e6])
@pytest.mark.parametrize("fewest", [ROWS // 4 + 1, ROWS // 2 + 1, ROWS - 63])
def test_alpha_is_solved_among_cuts_behind_which_rows_are_right(
    truth, right, monkeypatch, bytes_per_s, fewest
):
    few_rows.round_differently(monkeypatch, fewest)
    device, link = PricedDevice(), a_link(bytes_per_s)
    results, reports = solve_on(device, Timer(forbidden_clock, device), link)
    assert all(map(torch.equal, results, right))
    usable = [cut for cut in cuts(ROWS) if ROWS - cut >= fewest or cut == ROWS]
    best = thriftiest(truth, [link], usable, within=ALIKE)
    for report in reports:
        assert report.whole_nbytes + report.rebuilt_nbytes == truth.whole_nbytes + 9 * NBYTES
        assert report.rebuilt_nbytes == truth.target_nbytes  # nothing is given up
        assert {report.cut, report.solution.cut} <= set(usable)
        assert not {*usable} & {*report.refused}
        assert ROWS * 3 // 4 in report.refused
        # With a single cut to measure at, what is spent however few the rows stays unknown.
        assert astuple(report.cost) == pytest.approx(astuple(truth), rel=0.01, abs=6e-6)
        assert step_s(truth, [link], report.solution.alpha) <= 1.05 * best.step_s


def test_what_differs_behind_every_cut_is_given_up_alone(truth, right, monkeypatch):
    few_rows.round_differently(monkeypatch, ROWS + 1)
    device, link = PricedDevice(), a_link(10e6)
    results, reports = solve_on(device, Timer(forbidden_clock, device), link)
    assert all(map(torch.equal, results, right))
    for report in reports:
        assert report.rebuilt_nbytes == truth.target_nbytes - 4 * NBYTES  # all but the product
        assert report.solution.alpha == 0.0
        assert report.refused == ()
        assert any("not bit-identical behind cut" in reason for reason, _ in report.whole)


@pytest.mark.usefixtures("nobody_waits")
def test_a_device_that_fails_tells_nothing_more(monkeypatch):
    """Marks with errors are dropped: alpha stays unsolved, nothing raises here."""
    broken = TierIOError(5, "the device failed")
    monkeypatch.setattr(VirtualEvent, "error", broken)
    device = PricedDevice()
    _, reports = solve_on(device, Timer(forbidden_clock, device), a_link(40e6))
    assert [(report.cost, report.solution) for report in reports] == [(None, None)] * BLOCKS


# The link.


class Swap:
    """The tensor cache of a simulated device, with a pinned pool as its only home."""

    def __init__(self, device, nbytes=64 << 20):
        self.journal = Journal(clock=device.now)
        self.pool = PinnedTier(nbytes)
        self.lanes = [Lane(way, 1, self.journal) for way in ("reads", "writes")]
        self.cache = ActivationCache(
            [MemoryHome(self.pool, *self.lanes)],
            self.journal,
            limit_nbytes=0,
            in_flight_nbytes=NBYTES,
            min_nbytes=8192,
            place=DevicePlace(Ferry(device, self.journal, buffers=0), self.journal),
        )
        self.keeper = CacheKeeper(self.cache)

    def close(self):
        self.cache.close()
        self.pool.close()
        for lane in self.lanes:
            lane.close()


@pytest.fixture
def slow_device():
    exact = Timing(jitter=0.0, late=0.0, host_s=1e-9, latency_s=0.0, bytes_per_s=2e9)
    return SimulatedAccelerator(timing=exact)


@pytest.mark.usefixtures("nobody_waits")
def test_the_rate_of_a_link_is_told_by_its_own_stream(slow_device):
    swap = Swap(slow_device)
    rounds = 0
    while not (links := swap.keeper.links()):
        slow_device.timeline.pass_time(1.0)  # the host looks again much later
        rounds += 1
    assert rounds == 4  # out and back, twice
    memory, pinned = links
    assert (memory.name, memory.bytes_per_s) == ("memory", math.inf)
    assert pinned.bytes_per_s == pytest.approx(2e9)
    assert pinned.free_nbytes == 64 << 20
    swap.pool.allocate(64 << 20).release()  # nothing else holds any of it
    assert swap.keeper.links() == links
    swap.close()


def test_a_home_without_room_for_a_probe_is_no_link(slow_device):
    swap = Swap(slow_device, nbytes=1 << 20)
    assert [link.name for link in swap.keeper.links()] == ["memory"]
    swap.close()


def test_a_link_that_fails_is_told_and_gives_its_bytes_back(slow_device):
    swap = Swap(slow_device)
    slow_device.fail_next("device→host", TierIOError(5, "bad link"))
    assert swap.keeper.links() == ()
    slow_device.timeline.pass_time(1.0)
    with pytest.raises(TierIOError, match="bad link"):
        swap.keeper.links()
    swap.pool.allocate(64 << 20).release()  # nothing else holds any of it
    swap.close()


def test_a_run_may_end_while_a_link_is_measured(slow_device):
    swap = Swap(slow_device)
    assert swap.keeper.links() == ()
    swap.close()
    del swap
    gc.collect()
    slow_device.synchronize()
