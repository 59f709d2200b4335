"""What ``alpha: auto`` measures and solves on a device, held against what events tell of it.

A stack of Llama-shaped blocks trains with a pinned pool as the only home. First the time of each
block is taken in passes without any hooks, and set beside what the solver was told. Then the solved
alpha stands beside fixed ones, all in turn in one run, at the full rate of the link and at a
fraction of it.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from gpu_llama import Shape, Stack
from gpu_training import UnderTest
from offload.swap.activations import ActivationCache
from offload.swap.ferry import Ferry
from offload.swap.homes import MemoryHome
from offload.swap.places import DevicePlace
from offload.swap.selective import put_on, take_off
from offload.swap.tokenwise.keeper import CacheKeeper
from offload.swap.tokenwise.plans import PlanReport, Settings
from offload.swap.tokenwise.timing import Timer
from offload.swap.tokenwise.tokenwise import TokenWise
from offload.swap.tokenwise.trials import Choice
from offload.tiers.accelerator import Accelerator, Event, Stream
from offload.tiers.cuda import CudaAccelerator
from offload.tiers.journal import Journal
from offload.tiers.lanes import Lane
from offload.tiers.pinned import PinnedTier
from offload.tiers.simulated.accelerator import SimulatedAccelerator
from offload.tiers.simulated.timeline import Timing

FULL = Shape(width=2048, hidden=5632, heads=16, rows=4096, layers=5)
SMALL = Shape(width=64, hidden=128, heads=2, rows=192, layers=3)  # a check that it runs
FIXED = (0.0, 0.25, 0.5, 0.75, 1.0)
BAND = (0.8, 1.25)  # measured over reference
_LIMIT_NBYTES = 64 << 20  # saved last, so it stays: what the loss needs
_IN_FLIGHT_NBYTES = 1 << 30
_SETTLING, _WARM_UPS, _LEAST_ROUNDS, _STEADY = 40, 3, 3, 4
_REFERENCES = 5
_LINK_NBYTES, _LINK_REPEATS = 64 << 20, 5
_AHEAD_CYCLES = 40_000_000  # some 20 ms, in which the host enqueues a whole pass


class SlowLinkCuda(CudaAccelerator):
    """A CUDA device whose link is ``times`` slower: each copy is made so many times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self._times = times

    def _copy(self, stream: Stream, target: torch.Tensor, source: torch.Tensor) -> Event:
        raw = self._raw(stream)
        start = self._runtime.Event(enable_timing=True)
        start.record(raw)
        with self._runtime.stream(raw):
            for _ in range(self._times):
                target.copy_(source, non_blocking=True)
        return self._record(raw, start)


def open_device(device: UnderTest, times: int) -> Accelerator:
    """The device, with its link ``times`` slower."""
    if device.name != "simulated":
        return SlowLinkCuda(times)
    exact = Timing(jitter=0.0, late=0.0, host_s=1e-7, kernel_s=1e-3, bytes_per_s=2e8 / times)
    return SimulatedAccelerator(timing=exact)


@dataclass
class Blocks:
    """Seconds of one block: the shortest of all blocks and passes."""

    forward_s: float
    backward_s: float
    rebuild_s: float


@dataclass
class Contestant:
    """One way to choose alpha, and the steps that count."""

    alpha: Any
    rows: TokenWise
    steps_s: list[float] = field(default_factory=list)

    @property
    def median_s(self) -> float:
        """Median of the steps."""
        return statistics.median(self.steps_s)

    def reports(self) -> list[PlanReport]:
        """Of the blocks."""
        return self.rows.report()

    @property
    def swapped(self) -> float:
        """The fraction of the rows that is swapped now."""
        return statistics.mean(one.cut / one.rows for one in self.reports())


@dataclass
class Measured:
    """What one link showed.

    Attributes:
        times: how much slower it was made.
        link_bytes_per_s: as the solver knows it; ``plain_bytes_per_s`` is what plain copies told.
    """

    times: int
    relaxed: bool
    plain: Blocks
    plain_bytes_per_s: float
    solved: Contestant
    fixed: list[Contestant]
    link_bytes_per_s: float

    @property
    def report(self) -> PlanReport:
        """Of the first block, under the solved alpha."""
        return self.solved.reports()[0]

    def over(self, other: Contestant) -> float:
        """Median ratio of the solved alpha's steps to those of ``other`` in the same round."""
        pairs = zip(self.solved.steps_s, other.steps_s, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)

    @property
    def best(self) -> Contestant:
        """The fixed alpha with the shortest step."""
        return min(self.fixed, key=lambda one: one.median_s)


class Bench:
    """A stack that trains on a device, and the cache of what it saves."""

    def __init__(self, device: UnderTest, shape: Shape, times: int, opened: ExitStack) -> None:
        self.simulated = device.name == "simulated"
        self.accelerator = opened.enter_context(open_device(device, times))
        opened.enter_context(device.computing(self.accelerator))
        torch.manual_seed(0)
        with torch.device("cpu" if self.simulated else "cuda"):
            self.model = Stack(shape)
        self.x = device.place(torch.randn(1, shape.rows, shape.width)).requires_grad_()
        journal = Journal(clock=self.accelerator.now)
        self._pinners = device.pinners
        room_nbytes = shape.saved_nbytes + (64 << 20)
        pool = PinnedTier(room_nbytes, pinners=device.pinners, journal=journal)
        opened.callback(pool.close)
        lanes = [Lane(f"pool {way}", 1, journal) for way in ("reads", "writes")]
        for lane in lanes:
            opened.callback(lane.close)
        ferry = Ferry(self.accelerator, journal, buffers=0, pinners=device.pinners)
        place = DevicePlace(ferry, journal)
        self.cache = ActivationCache(
            [MemoryHome(pool, *lanes)],
            journal,
            limit_nbytes=_LIMIT_NBYTES if not self.simulated else 0,
            in_flight_nbytes=_IN_FLIGHT_NBYTES if not self.simulated else 1 << 20,
            min_nbytes=64 << 10 if not self.simulated else 1 << 12,
            place=place,
        )
        opened.callback(self._close)
        self.cache.fixed.know_model(self.model)
        self.keeper = CacheKeeper(self.cache)

    def _close(self) -> None:
        self.accelerator.synchronize()
        self.cache.close()

    def contestant(self, alpha: Any, *, relaxed: bool) -> Contestant:
        """Rows rebuilt by ``alpha``; all share the cache, for its memory is the same."""
        settings = Settings(alpha=alpha, relaxed=relaxed, min_nbytes=self.cache.min_nbytes)
        timer = Timer(accelerator=self.accelerator)
        return Contestant(
            alpha, TokenWise(self.model, self.keeper, settings, timer=timer, rounding=True)
        )

    def step(self, contestant: Contestant) -> float:
        """Seconds of one forward and backward, as the device saw them."""
        self.cache.begin_pass(contestant.alpha)
        self.accelerator.synchronize()
        began = self.accelerator.current_stream().record()
        put_on(self.cache, contestant.rows)
        try:
            loss = self.model(self.x)
        finally:
            take_off()
        loss.backward()
        ended = self.accelerator.current_stream().record()
        self.accelerator.synchronize()
        self.model.zero_grad()
        self.x.grad = None
        return ended.seconds_since(began)

    # The reference.

    def reference(self) -> Blocks:
        """What the blocks take without any hooks: events at their borders, read at the end."""
        forwards: list[float] = []
        backwards: list[float] = []
        for _ in range(_REFERENCES + 1):
            marks = _Marks(self.accelerator, simulated=self.simulated)
            self.model.mark = marks
            self._get_ahead()
            self.model(self.x).backward()
            self.accelerator.synchronize()
            self.model.zero_grad()
            seconds = marks.between()
            layers = len(self.model.blocks)
            forwards += seconds[:layers]
            backwards += seconds[-layers:]
        self.model.mark = None
        return Blocks(min(forwards), min(backwards), self._rebuild_s())

    def _rebuild_s(self) -> float:
        """What a rebuild executes of one block, all rows, as its own forward does."""
        block: Any = self.model.blocks[0]
        seconds = []
        with torch.no_grad():
            attended = self.x.detach().clone()
            for _ in range(_REFERENCES + 1):
                marks = _Marks(self.accelerator, simulated=self.simulated)
                self._get_ahead()
                marks()
                block.heads_of(self.x, self.model.cos, self.model.sin)
                block.hidden_of(self.x, attended)
                marks()
                self.accelerator.synchronize()
                seconds += marks.between()
        return min(seconds)

    def _get_ahead(self) -> None:
        """The host is to be ahead of the device, so that no time of enqueueing is in between."""
        self.accelerator.synchronize()
        if not self.simulated:
            torch.cuda._sleep(_AHEAD_CYCLES)

    def plain_bytes_per_s(self) -> float:
        """The slower direction of the link, by copies of the device alone."""
        memory = self.accelerator.allocate(_LINK_NBYTES)
        slowest = []
        with PinnedTier(_LINK_NBYTES, pinners=self._pinners) as pool:
            address = pool.address(pool.allocate(_LINK_NBYTES))
            for copy in (self.accelerator.copy_out, self.accelerator.copy_in):
                stream = self.accelerator.stream("reference")
                stream.wait(memory.ready)
                seconds = []
                for _ in range(_LINK_REPEATS):
                    event = copy(stream, memory, 0, address, _LINK_NBYTES)
                    event.settle()
                    started_s, ended_s = event.span()
                    seconds.append(ended_s - started_s)
                slowest.append(min(seconds))
        return _LINK_NBYTES / max(slowest)


class _Marks:
    """Points of the current stream: ``torch.cuda`` events, or those of a simulated device."""

    def __init__(self, accelerator: Accelerator, *, simulated: bool) -> None:
        self._accelerator = accelerator
        self._simulated = simulated
        self._points: list[Any] = []

    def __call__(self) -> None:
        if self._simulated:
            self._points.append(self._accelerator.current_stream().record())
        else:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._points.append(event)

    def between(self) -> list[float]:
        """Seconds from each to the next, once all is synchronised."""
        pairs = zip(self._points, self._points[1:], strict=False)
        if self._simulated:
            return [later.seconds_since(earlier) for earlier, later in pairs]
        return [earlier.elapsed_time(later) / 1e3 for earlier, later in pairs]


@contextmanager
def _opened(device: UnderTest, shape: Shape, times: int) -> Iterator[Bench]:
    with ExitStack() as opened:
        yield Bench(device, shape, times, opened)


def measure(
    device: UnderTest, shape: Shape, times: int, *, rounds: int, limit_s: float,
    say: Callable[[str], None] = lambda _: None,
) -> Measured:  # fmt: skip
    """Solve alpha behind a link that is ``times`` slower, and hold it against fixed ones.

    Args:
        rounds: steps of each contestant that count; fewer, but some, after ``limit_s``.
    """
    with _opened(device, shape, times) as bench:
        say("reference times of the blocks")
        plain, plain_rate = bench.reference(), bench.plain_bytes_per_s()
        relaxed = not _is_exact(bench, say)
        say("alpha is solved, and tried")
        solved = bench.contestant("auto", relaxed=relaxed)
        steady = 0  # passes since the trials have settled: new figures may open them again
        for _ in range(_SETTLING):
            bench.step(solved)
            report = solved.reports()[0]
            steady = steady + 1 if report.settled is not None and report.cost is not None else 0
            if steady == _STEADY:
                break
        fixed = [bench.contestant(alpha, relaxed=relaxed) for alpha in FIXED]
        say("steps in turn")
        began_s = time.perf_counter()
        everyone = [solved, *fixed]
        for turn in range(_WARM_UPS + rounds):
            if turn >= _WARM_UPS + _LEAST_ROUNDS and time.perf_counter() - began_s > limit_s:
                break
            # Each follows on each.
            shift = turn % len(everyone)
            for one in everyone[shift:] + everyone[:shift]:
                seconds = bench.step(one)
                if turn >= _WARM_UPS:
                    one.steps_s.append(seconds)
        for one in everyone:
            one.rows.remove()
        links = {link.name: link.bytes_per_s for link in bench.keeper.links()}
        link_rate = next((rate for rate in links.values() if rate < float("inf")), 0.0)
        return Measured(times, relaxed, plain, plain_rate, solved, fixed, link_rate)


def _is_exact(bench: Bench, say: Callable[[str], None]) -> bool:
    """Whether most of what may be rebuilt is rebuilt to the bit; else last bits are let differ."""
    trying = bench.contestant(0.5, relaxed=False)
    bench.step(trying)
    reports = trying.reports()
    trying.rows.remove()
    rebuilt = sum(one.rebuilt_nbytes for one in reports)
    whole = sum(one.whole_nbytes for one in reports)
    differing = {why: size for one in reports for why, size in one.whole if "identical" in why}
    say(f"exact: {rebuilt} bytes are rebuilt, {whole} swapped whole; differing: {differing}")
    return rebuilt > whole


def in_band(value: float) -> bool:
    """Whether a measured figure is near enough to its reference."""
    return BAND[0] <= value <= BAND[1]


def name_of(choice: Choice | None) -> str:
    """A word for what trials have settled on."""
    return choice.name.lower() if choice is not None else "nothing yet"


def trial_times(report: PlanReport) -> dict[str, float]:
    """The shortest pass of each choice, by the name that the table gives it."""
    names = {Choice.REBUILT: "0", Choice.SOLVED: "solved", Choice.SWAPPED: "1"}
    return {names[choice]: seconds for choice, seconds in report.trial_s}
