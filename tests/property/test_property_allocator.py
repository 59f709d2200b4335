"""The allocator against a plain list of extents."""

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from offload.allocator.adaptors import LimitAdaptor, StatisticsAdaptor
from offload.allocator.errors import CapacityError, StaleBlockError
from offload.allocator.extent import Extent
from offload.allocator.tlsf import TLSF

LIMIT_NBYTES = 40_000


class TlsfMachine(RuleBasedStateMachine):
    """Random allocate, free, reserve and grow; the model is the list of living extents."""

    extents = Bundle("extents")

    def __init__(self) -> None:
        super().__init__()
        self.counted = StatisticsAdaptor(TLSF(1 << 16))
        self.arena = LimitAdaptor(self.counted, LIMIT_NBYTES)
        self.living: list[Extent] = []
        self.peak = self.total = 0

    def _within_limit(self, nbytes: int) -> bool:
        return sum(extent.nbytes for extent in self.living) + nbytes <= LIMIT_NBYTES

    def _fits(self, nbytes: int, align: int) -> bool:
        if not self._within_limit(nbytes):
            return False
        edges = sorted(self.living)
        starts = [0, *(extent.end for extent in edges)]
        ends = [*(extent.offset for extent in edges), self.arena.capacity]
        return any(-(-s // align) * align + nbytes <= e for s, e in zip(starts, ends, strict=True))

    @rule(target=extents, nbytes=st.integers(1, 1 << 14), power=st.integers(0, 12))
    def allocate(self, nbytes: int, power: int) -> Extent:
        try:
            extent = self.arena.allocate(nbytes, align=1 << power)
        except CapacityError:
            assert not self._fits(nbytes, 1 << power)
            return Extent(0, 0)
        assert extent.nbytes == nbytes
        assert extent.offset % (1 << power) == 0
        self.living.append(extent)
        self.total += 1
        self.peak = max(self.peak, sum(other.nbytes for other in self.living))
        return extent

    @rule(target=extents, offset=st.integers(0, 1 << 16), nbytes=st.integers(1, 1 << 12))
    def reserve(self, offset: int, nbytes: int) -> Extent:
        extent = Extent(offset, nbytes)
        free = (
            self._within_limit(nbytes)
            and extent.end <= self.arena.capacity
            and not any(extent.overlaps(other) for other in self.living)
        )
        if not free:
            with pytest.raises(CapacityError):
                self.arena.reserve(extent)
            return Extent(0, 0)
        self.arena.reserve(extent)
        self.living.append(extent)
        self.total += 1
        self.peak = max(self.peak, sum(other.nbytes for other in self.living))
        return extent

    @rule(extent=consumes(extents))
    def free(self, extent: Extent) -> None:
        if extent in self.living:
            self.arena.free(extent)
            self.living.remove(extent)
        with pytest.raises(StaleBlockError):
            self.arena.free(extent)

    @rule(nbytes=st.integers(1, 1 << 12))
    def grow(self, nbytes: int) -> None:
        self.arena.grow(nbytes)

    @invariant()
    def agrees_with_the_model(self) -> None:
        ordered = sorted(self.living)
        for left, right in itertools.pairwise(ordered):
            assert not left.overlaps(right)
        last = ordered[-1].end if ordered else 0
        assert self.arena.last_free_nbytes == self.arena.capacity - last
        stats = self.counted.stats()
        assert stats.current_nbytes == sum(extent.nbytes for extent in self.living)
        assert stats.current_count == len(self.living)
        assert stats.peak_nbytes == self.peak <= LIMIT_NBYTES
        assert stats.total_count == self.total

    def teardown(self) -> None:
        for extent in self.living:
            self.arena.free(extent)
        assert self.arena.largest_free_nbytes == self.arena.capacity


TestTlsf = TlsfMachine.TestCase
TestTlsf.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
