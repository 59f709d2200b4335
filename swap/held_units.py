"""Units of saved bytes that are in memory are counted, and those that left come back.

[Note: just in time] In backward a unit is fetched when its expected use is nearer than twice the
time that the measured link needs for it and for what is queued before it; never beyond the limit.
"""

import weakref
from collections import deque
from collections.abc import Iterable, Sequence

import torch

from offload.allocator.errors import CapacityError
from offload.swap.homes import Home
from offload.swap.links import Links
from offload.swap.places import HostPlace, Place, Trip
from offload.swap.residency import Residency
from offload.swap.saved import Graveyard, Part, Unit
from offload.tiers.journal import Journal

ROLE = "activation"


class HeldUnits:
    """Knows which units are in memory; called by one thread at a time.

    Args:
        homes: where units go.
        limit_nbytes: of units that stay in memory.
        in_flight_nbytes: more, while they leave, and to fetch ahead; by default the limit again.
        place: where units live between their uses; by default host memory.

    Attributes:
        absent: how many units have their bytes in their block only.
        peak_nbytes: the most bytes of units in memory since ``take_peak``.
    """

    def __init__(
        self,
        homes: Sequence[Home],
        journal: Journal,
        limit_nbytes: int,
        in_flight_nbytes: int | None,
        place: Place | None,
    ) -> None:
        self.place = place or HostPlace()
        self.homes = tuple(homes)
        self.journal = journal
        self.limit_nbytes = limit_nbytes
        self.peak_nbytes = 0
        self.graveyard = Graveyard()
        self.absent = 0
        self._links = Links(home.name for home in homes)
        self._kept_nbytes: int = 0  # of units in memory, arriving or leaving
        self._order: deque[weakref.ref[Unit]] = deque()
        self._staying: deque[weakref.ref[Unit]] = deque()
        self._in_flight_nbytes = in_flight_nbytes

    @property
    def kept_nbytes(self) -> int:
        """Bytes of units in memory, arriving or leaving."""
        self._bury()
        return self._kept_nbytes

    def take_peak(self) -> int:
        """The most bytes of units that were in memory since the last call."""
        peak, self.peak_nbytes = self.peak_nbytes, self.kept_nbytes
        return peak

    @property
    def ahead_nbytes(self) -> int:
        """Bytes of units in memory in backward: fetched ahead, or waiting for a second use."""
        return max(self.limit_nbytes, self._in_flight_nbytes or 0)

    def _enqueue(self, unit: Unit) -> None:
        (self._staying if unit.stays else self._order).append(weakref.ref(unit))

    def _bury(self) -> None:
        held_nbytes, absent = self.graveyard.bury()
        self._kept_nbytes -= held_nbytes
        self.absent -= absent

    def _drop(self, unit: Unit) -> None:
        for part in unit.living():
            part.let_go()
        self._count(-unit.nbytes)
        self.absent += 1
        self._become(unit, Residency.ABSENT)

    def _become(self, unit: Unit, residency: Residency) -> None:
        old, unit.residency = unit.residency, residency
        if old is residency:
            return
        self.journal.residency(unit.name, ROLE, old.value, residency.value, unit.nbytes)

    def _count(self, nbytes: int) -> None:
        self._kept_nbytes += nbytes
        if self._kept_nbytes > self.peak_nbytes:  # noqa: PLR1730 (max would be called for each)
            self.peak_nbytes = self._kept_nbytes

    def take_back(self, unit: Unit, part: Part, memory: torch.UntypedStorage) -> None:
        """The user still holds the bytes of an absent unit of one ``part``: hold them too."""
        if unit.residency is Residency.FETCHING:
            unit.arriving = unit.transfer = None  # the transfer keeps its memory until it ends
        else:
            self._count(unit.nbytes)
            self.absent -= 1
        part.hold(memory)
        unit.doubtful = True
        self._become(unit, Residency.READY)
        self._enqueue(unit)

    def bring(self, unit: Unit) -> None:
        """Have the bytes of ``unit`` in memory now.

        Raises:
            TierIOError: they could not be read back.
        """
        if unit.arrival is not None:
            self._check_arrival(unit)
        if unit.residency is Residency.ABSENT:
            self._fetch(unit)
        if unit.residency is not Residency.FETCHING:
            return
        assert unit.transfer is not None
        assert unit.home is not None
        if not self.place.order(unit.transfer):
            unit.home.reads.expedite(unit.transfer)
            with self.journal.stall(unit.name, ROLE, unit.home.reads.name, "late"):
                unit.transfer.settle()
        self._arrive(unit)

    def _fetch(self, unit: Unit) -> None:
        if (living := unit.held_by_user()) is not None:
            self.take_back(unit, *living)
            return
        unit.arriving, unit.transfer = self.place.fetch(trip_of(unit))
        self._count(unit.nbytes)
        self.absent -= 1
        self._become(unit, Residency.FETCHING)
        self._enqueue(unit)

    def _arrive(self, unit: Unit) -> None:
        transfer, memory = unit.transfer, unit.arriving
        assert transfer is not None
        assert memory is not None
        assert unit.home is not None
        unit.transfer = unit.arriving = None
        if transfer.done() and transfer.error is not None:
            self._drop(unit)
            transfer.wait()
        if not transfer.done():  # a stream waits for it, and the host does not
            unit.arrival = transfer
        self._links.arrives(unit.home.name, transfer)
        for part in unit.living():
            whole = part.nbytes == unit.nbytes
            part.hold(memory if whole else memory[part.offset : part.offset + part.nbytes])
        self._become(unit, Residency.READY)

    def _check_arrival(self, unit: Unit) -> None:
        """A stream has waited for the bytes of ``unit``: this one must too, until they are there.

        Raises:
            TierIOError: they could not be read back.
        """
        arrival = unit.arrival
        assert arrival is not None
        if not arrival.done():
            self.place.order(arrival)
            return
        unit.arrival = None
        if arrival.error is not None:
            self._drop(unit)
            arrival.wait()

    def fetch_ahead(self, upcoming: Iterable[tuple[Unit, float]]) -> None:
        """Fetch what is used next; see [Note: just in time].

        Args:
            upcoming: units in the order of their use, with the seconds until then (0: unknown).
        """
        if not self.absent:
            return
        next_use_s: float | None = None
        queued_nbytes = 0
        for unit, due_s in upcoming:
            next_use_s = due_s if next_use_s is None else next_use_s
            if unit.residency is Residency.FETCHING:
                queued_nbytes += unit.nbytes
            if unit.residency is not Residency.ABSENT:
                continue
            assert unit.home is not None
            queued_nbytes += unit.nbytes
            lead_s = 2 * self._links.seconds(unit.home.name, queued_nbytes)
            has_room = self._kept_nbytes + unit.nbytes <= self.ahead_nbytes
            if due_s > lead_s + next_use_s or not has_room or not self._can_fetch(unit):
                return

    def prefetch(self, units: Iterable[Unit]) -> None:
        """Fetch these, in this order, as far as the limit has room; never blocks."""
        for unit in units:
            if unit.residency is Residency.ABSENT:
                has_room = self._kept_nbytes + unit.nbytes <= self.ahead_nbytes
                if not has_room or not self._can_fetch(unit):
                    return

    def _can_fetch(self, unit: Unit) -> bool:
        """Fetch ``unit`` ahead of its use, unless the place has no room for it now."""
        try:
            self._fetch(unit)
        except CapacityError:
            return False
        return True


def trip_of(unit: Unit) -> Trip:
    """The way between memory and its block."""
    assert unit.home is not None
    assert unit.block is not None
    return Trip(home=unit.home, block=unit.block, nbytes=unit.nbytes, key=unit.name)
