"""An arena that learns the requests of a step and serves them at planned addresses from then on.

[Note: the region] A step repeats. Its requests are recorded, planned (``bilevel``), and from the
next step on served inside one *region* of the plan's size, taken from the arena beneath. As long
as requests come in the planned order, size by size, and each planned place is free by then,
nothing is searched for and nothing fragments. At the first request that is anything else the
region *dissolves*: what lives in it becomes ordinary extents of the arena beneath, all holes
between them are usable at once, and the step goes on there. At the next edge the step as it now
was is planned. A buffer that outlives its step is left to the arena beneath, in every step.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

from offload.allocator.adaptors import Arena, ArenaAdaptor
from offload.allocator.bilevel import plan_memory
from offload.allocator.errors import CapacityError
from offload.allocator.extent import Extent
from offload.allocator.lifetimes import Lifetime, live_peak_nbytes

_Form: TypeAlias = tuple[tuple[int, int, int, int | None], ...]
"""Of each request bytes, alignment, first and last tick; None: it outlives the step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepUse:
    """What one step's buffers took of the arena; those that outlive it aside.

    Attributes:
        live_nbytes: the most that was alive at once.
        span_nbytes: from the first to the last byte that any of them had.
    """

    live_nbytes: int
    span_nbytes: int

    @property
    def fragmentation(self) -> float:
        """Share of the span that is not alive when most is."""
        return 1 - self.live_nbytes / self.span_nbytes if self.span_nbytes else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanningStats:
    """How far planned addresses are used.

    Attributes:
        steps: since the first edge.
        planned_steps: those that asked for what was planned, to the last request.
        deviations: those that a plan was made for, and that asked for something else.
        before: use of the last step without a plan, or that deviated from it.
        after: use of the last planned one.
    """

    steps: int = 0
    planned_steps: int = 0
    deviations: int = 0
    before: StepUse | None = None
    after: StepUse | None = None


class PlannedArena(ArenaAdaptor):
    """``inner``, and a region of it for the step that repeats; see [Note: the region].

    Nothing is recorded or planned before the first ``next_step``.
    """

    def __init__(self, inner: Arena) -> None:
        super().__init__(inner)
        self._step: _Recording | None = None
        self._form: _Form = ()  # what the plan is of
        self._places: list[Extent | None] = []  # in the region; None: it outlives the step
        self._position = 0  # of the next request in both
        self._region: Extent | None = None
        self._held: list[Extent] = []  # living extents in the region, sorted
        self._expects = False  # whether the step began with a region
        self._stats = PlanningStats()

    def stats(self) -> PlanningStats:
        """Steps, and what the last ones used, as of the last edge."""
        return self._stats

    def next_step(self) -> None:
        """A step is over, if one had begun, and the next one begins.

        Planning takes time only where the step was not what the plan is of.
        """
        step, self._step = self._step, _Recording()
        if step is not None:
            form = step.form()
            self._count(step, planned=self._region is not None and form == self._form)
            if form != self._form:
                self._dissolve()
                self._plan(form, step.places())
            if self._region is None:
                self._take_region()
        self._position = 0
        self._expects = self._region is not None

    def allocate(self, nbytes: int, *, align: int = 4096) -> Extent:
        """See ``TLSF.allocate``.

        Raises:
            CapacityError: there is no room, in the region's holes neither.
            ValueError: ``nbytes`` is not positive, or ``align`` no power of two.
        """
        if nbytes <= 0 or align <= 0 or align & (align - 1):
            raise ValueError(
                f"can't allocate {nbytes} bytes aligned to {align}: one byte at least, and a "
                "power of two"
            )
        extent = self._from_region(nbytes, align) or self._from_inner(nbytes, align)
        if self._step is not None:
            self._step.came(extent, align)
        return extent

    def reserve(self, extent: Extent) -> None:
        """See ``TLSF.reserve``."""
        self._dissolve()  # it may be meant to lie there
        super().reserve(extent)

    def free(self, extent: Extent) -> None:
        """See ``TLSF.free``."""
        place = bisect_left(self._held, extent)
        if self._held[place : place + 1] == [extent]:
            del self._held[place]
        else:
            super().free(extent)
        if self._step is not None:
            self._step.went(extent)

    @property
    def current_nbytes(self) -> int:
        """Bytes in use; those of the region that nobody has are free."""
        held = sum(extent.nbytes for extent in self._held)
        return self.inner.current_nbytes + held - (self._region.nbytes if self._region else 0)

    @property
    def current_count(self) -> int:
        """Extents in use."""
        return self.inner.current_count + len(self._held) - (self._region is not None)

    @property
    def largest_free_nbytes(self) -> int:
        """Bytes of the largest hole, of the region's, too."""
        holes = [self.inner.largest_free_nbytes]
        if self._region is not None:
            end = self._region.offset
            for extent in self._held:
                holes.append(extent.offset - end)
                end = extent.end
            holes.append(self._region.end - end)
        return max(holes)

    def _from_region(self, nbytes: int, align: int) -> Extent | None:
        """The planned place of this request; None: the arena beneath has to serve it."""
        if self._region is None:
            return None
        position = self._position
        self._position += 1
        if position < len(self._form) and self._form[position][:2] == (nbytes, align):
            place = self._places[position]
            if place is None:
                return None
            extent = Extent(self._region.offset + place.offset, nbytes)
            held = bisect_left(self._held, extent)
            beside = self._held[max(held - 1, 0) : held + 1]
            if not any(extent.overlaps(other) for other in beside):
                self._held.insert(held, extent)
                return extent
        self._dissolve()
        return None

    def _from_inner(self, nbytes: int, align: int) -> Extent:
        try:
            return self.inner.allocate(nbytes, align=align)
        except CapacityError:
            if self._region is None:
                raise
            self._dissolve()
            return self.inner.allocate(nbytes, align=align)

    def _dissolve(self) -> None:
        """Leave what lives in the region to the arena beneath. See [Note: the region]."""
        if self._region is not None:
            self.inner.free(self._region)
            for extent in self._held:
                self.inner.reserve(extent)
            self._held.clear()
            self._region = None

    def _plan(self, form: _Form, served: list[Extent | None]) -> None:
        """Places for the step; those that it had without a plan where these take less."""
        extents = plan_memory(_lifetimes(form)).packing.extents
        planned = [extents.get(str(number)) for number in range(len(form))]
        self._form = form
        self._places = min(planned, served, key=_end_of)

    def _take_region(self) -> None:
        """The bytes of the plan, if the arena beneath has them in one piece."""
        nbytes = _end_of(self._places)
        align = max((align for _, align, _, _ in self._form), default=1)
        if nbytes:
            try:
                self._region = self.inner.allocate(nbytes, align=align)
            except CapacityError:
                return  # what outlives steps lies in between: without a plan until it is gone

    def _count(self, step: "_Recording", *, planned: bool) -> None:
        stats = self._stats
        self._stats = replace(
            stats,
            steps=stats.steps + 1,
            planned_steps=stats.planned_steps + planned,
            deviations=stats.deviations + (self._expects and not planned),
            before=stats.before if planned else step.use(),
            after=step.use() if planned else stats.after,
        )


class _Recording:
    """The requests of a step, in their order; each is a tick."""

    def __init__(self) -> None:
        self._extents: list[Extent] = []
        self._aligns: list[int] = []
        self._last: list[int | None] = []
        self._living: dict[int, int] = {}  # numbers of requests, by offset

    def came(self, extent: Extent, align: int) -> None:
        self._living[extent.offset] = len(self._extents)
        self._extents.append(extent)
        self._aligns.append(align)
        self._last.append(None)

    def went(self, extent: Extent) -> None:
        number = self._living.pop(extent.offset, None)
        if number is not None:  # else it is from before the step
            self._last[number] = len(self._extents) - 1

    def form(self) -> _Form:
        return tuple(
            (extent.nbytes, align, number, last)
            for number, (extent, align, last) in enumerate(
                zip(self._extents, self._aligns, self._last, strict=True)
            )
        )

    def places(self) -> list[Extent | None]:
        """Where each request lay, from the beginning of a region; None: it outlives the step."""
        align = max(self._aligns, default=1)
        inside = [extent.offset for extent, last in self._served() if last is not None]
        start = min(inside, default=0) // align * align
        return [
            None if last is None else Extent(extent.offset - start, extent.nbytes)
            for extent, last in self._served()
        ]

    def _served(self) -> Iterator[tuple[Extent, int | None]]:
        return zip(self._extents, self._last, strict=True)

    def use(self) -> StepUse:
        inside = [extent for extent, last in self._served() if last is not None]
        start = min((extent.offset for extent in inside), default=0)
        exact = [replace(life, align=1) for life in _lifetimes(self.form())]  # padding is unused
        return StepUse(
            live_nbytes=live_peak_nbytes(exact),
            span_nbytes=max((extent.end for extent in inside), default=0) - start,
        )


def _end_of(places: list[Extent | None]) -> int:
    return max((place.end for place in places if place is not None), default=0)


def _lifetimes(form: _Form) -> list[Lifetime]:
    """Of the requests that end within their step; keys are their numbers."""
    return [
        Lifetime(str(number), nbytes, first, last, align)
        for number, (nbytes, align, first, last) in enumerate(form)
        if last is not None
    ]
