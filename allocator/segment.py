"""The one segment in which PyTorch's caching allocator serves a step that repeats.

Left to itself the allocator takes a segment whenever none of its holes is large enough, and what
it has taken stays cut up. Given one segment that is large enough first, it serves the whole step
by best fit within that. How large is that? ``caching`` is the model of its policy: the step is
replayed in segments of falling size, and the smallest that holds it is the plan. A plan is only
ever a size that a replay has shown to do.

Where each buffer lies stays the allocator's choice, so the plan tells beside it what planned
addresses (``bilevel``) would have taken.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from offload.allocator.bilevel import plan_memory
from offload.allocator.caching import LARGE_UNIT, CachedBlock, CachingModel, is_large
from offload.allocator.extent import align_up
from offload.allocator.lifetimes import Lifetime, events, live_peak_nbytes
from offload.allocator.units import format_nbytes

_STEPS = 3
"""What a step leaves behind is in the way of the next one, and gone after that."""

_CLOSE_ENOUGH = 128
"""The search ends within this part of the live bytes: each try is a replay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRequests:
    """What a step asked for, each request a tick.

    Attributes:
        lifetimes: in the order of the requests; what outlives the step lives to its last tick.
        kept: positions of those that outlive it.
    """

    lifetimes: tuple[Lifetime, ...]
    kept: frozenset[int]

    @property
    def live_nbytes(self) -> int:
        """The most that was alive at once: no allocator can do with less."""
        return live_peak_nbytes(self.lifetimes)

    def large(self) -> "StepRequests":
        """Those that come from large segments; the others share small ones, 2 MiB each."""
        chosen = [index for index, life in enumerate(self.lifetimes) if is_large(life.nbytes)]
        return StepRequests(
            lifetimes=tuple(self.lifetimes[index] for index in chosen),
            kept=frozenset(place for place, index in enumerate(chosen) if index in self.kept),
        )


def requests_of(changes: Iterable[tuple[int, int | None]]) -> StepRequests:
    """From a history: (address, its bytes as they come, or None as they go), in order.

    What goes without having come is from before the step, and none of it.
    """
    came: list[int] = []
    last: list[int | None] = []
    living: dict[int, int] = {}  # number of the request, by address
    for address, nbytes in changes:
        if nbytes is not None:
            living[address] = len(came)
            came.append(nbytes)
            last.append(None)
        elif (number := living.pop(address, None)) is not None:
            last[number] = len(came) - 1
    return StepRequests(
        lifetimes=tuple(
            Lifetime(str(number), nbytes, number, len(came) - 1 if end is None else end)
            for number, (nbytes, end) in enumerate(zip(came, last, strict=True))
        ),
        kept=frozenset(number for number, end in enumerate(last) if end is None),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentPlan:
    """The segment of a step.

    Attributes:
        nbytes: with a segment of so many bytes, the step asks for no other large one.
        live_nbytes: the most large bytes alive at once; no segment is smaller.
        packed_nbytes: what planned addresses would take.
    """

    nbytes: int
    live_nbytes: int
    packed_nbytes: int

    @property
    def gap(self) -> float:
        """How far the segment is above the bound, as a share of it; 0 is optimal."""
        return self.nbytes / self.live_nbytes - 1 if self.live_nbytes else 0.0


def plan_segment(step: StepRequests) -> SegmentPlan:
    """The smallest segment that is known to serve ``step`` again and again. Deterministic.

    Small requests stay aside: they never come from large segments. Nothing large: no bytes.
    """
    step = step.large()
    if not step.lifetimes:
        return SegmentPlan(nbytes=0, live_nbytes=0, packed_nbytes=0)
    live_nbytes = step.live_nbytes
    enough = align_up(_high_water(step), LARGE_UNIT)
    while not serves(step, enough):  # the end of the segment is a hole of other size now
        enough += align_up(enough // _CLOSE_ENOUGH + 1, LARGE_UNIT)
    too_few = align_up(live_nbytes, LARGE_UNIT) - LARGE_UNIT
    while enough - too_few > max(LARGE_UNIT, live_nbytes // _CLOSE_ENOUGH):
        middle = align_up((enough + too_few) // 2, LARGE_UNIT)
        if middle >= enough:
            break
        if serves(step, middle):
            enough = middle
        else:
            too_few = middle
    return SegmentPlan(
        nbytes=enough,
        live_nbytes=live_nbytes,
        packed_nbytes=plan_memory(step.lifetimes).peak_nbytes,
    )


def serves(step: StepRequests, nbytes: int) -> bool:
    """Whether the allocator, given a segment of ``nbytes`` first, needs no other one."""
    model = CachingModel()
    model.free(model.allocate(nbytes))
    reserved_nbytes = model.reserved_nbytes
    return all(model.reserved_nbytes <= reserved_nbytes for _ in _replayed(model, step))


def _high_water(step: StepRequests) -> int:
    """How far the allocator comes in a segment without end."""
    model = CachingModel()
    model.free(model.allocate(_STEPS * sum(2 * life.nbytes for life in step.lifetimes)))
    return max(block.address + block.nbytes for block in _replayed(model, step))


def _replayed(model: CachingModel, step: StepRequests) -> Iterable[CachedBlock]:
    """Each block that ``model`` hands out in some steps, as it does."""
    order: Sequence[tuple[int, bool]] = list(events(step.lifetimes))
    left: list[CachedBlock] = []  # by the step before
    for _ in range(_STEPS):
        blocks: dict[int, CachedBlock] = {}
        for position, comes in order:
            if comes:
                blocks[position] = model.allocate(step.lifetimes[position].nbytes)
                yield blocks[position]
            elif position not in step.kept:
                model.free(blocks.pop(position))
        for block in left:  # when it went, nobody told: as late as can be
            model.free(block)
        left = list(blocks.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolUse:
    """What a pool of segments held for a step.

    Attributes:
        reserved_nbytes: of its segments, small ones too.
        live_nbytes: the most in use at once.
    """

    reserved_nbytes: int
    live_nbytes: int

    @property
    def fragmentation(self) -> float:
        """Share of the reserved bytes that are not in use when most are."""
        return 1 - self.live_nbytes / self.reserved_nbytes if self.reserved_nbytes else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaStats:
    """How far one segment serves the steps.

    Attributes:
        steps: since the beginning.
        learned: those whose requests were written down.
        served: those that needed nothing beside the segment.
        deviations: those that needed more, and got it from the allocator as ever.
        plan: of the step that was learned last.
        before: use of that step, the allocator left to itself.
        after: use of the last step that had the segment.
        off: why there is no segment, and will be none; None: there is, or may be.
    """

    steps: int = 0
    learned: int = 0
    served: int = 0
    deviations: int = 0
    plan: SegmentPlan | None = None
    before: PoolUse | None = None
    after: PoolUse | None = None
    off: str | None = None

    def verdict(self) -> str | None:
        """In a sentence what became of it; None: that is not known yet."""
        if self.off is not None:
            return f"none: {self.off}"
        if self.plan is None or self.before is None or self.after is None:
            return None
        return (
            f"one segment of {format_nbytes(self.plan.nbytes)} serves what a step computes "
            f"({format_nbytes(self.plan.live_nbytes)} alive at once, "
            f"{format_nbytes(self.plan.packed_nbytes)} at planned addresses): "
            f"{format_nbytes(self.after.reserved_nbytes)} reserved, "
            f"{100 * self.after.fragmentation:.1f} % fragmented; before it "
            f"{format_nbytes(self.before.reserved_nbytes)} and "
            f"{100 * self.before.fragmentation:.1f} %"
        )
