"""Units of saved bytes leave memory while too many are in it.

[Note: what is spilled] The oldest first, for backward uses the oldest last (Belady's rule); and
last of all the ones that the previous pass of this kind used first, as many as fit the limit: the
last blocks and the loss. Bytes that are on their way out are used where they are. Bytes that have
left, but that the user still holds, are taken from there instead of being read.

[Note: a block that is doubted] A unit that came back and is given up again needs no second write,
unless its bytes were changed. What came from its block, nobody changes. What was taken back from
the user, or saved again while it was written, is compared by a checksum with what was written, on
the lane: so a storage that is saved, written, changed and saved again is told from one that is
merely saved again, even if the change went past the version counter (``.data``, numpy). A device
has no such checksum, and writes again. Most storages that are saved twice are so by neighbours (the
parts of a projection, a loss), so the newest units wait a little before they leave it.
"""

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from offload.allocator.errors import CapacityError
from offload.allocator.units import format_nbytes
from offload.swap.held_units import ROLE, HeldUnits, trip_of
from offload.swap.homes import Home, allocate_in
from offload.swap.places import Place
from offload.swap.residency import Residency
from offload.swap.saved import Unit
from offload.tiers.journal import Journal, Label
from offload.tiers.lanes import Job  # noqa: TC001 (as all of ours)

if TYPE_CHECKING:
    from collections import deque


class Spiller(HeldUnits):
    """Holds units within a limit.

    Args:
        homes: where units go, in this order.
        room: bytes left in the budget, asked when no home takes a unit.
        is_tight: whether memory is so full that units which leave must have left before more come.
        limit_nbytes, in_flight_nbytes, place: see ``HeldUnits``.
    """

    def __init__(
        self,
        homes: Sequence[Home],
        journal: Journal,
        limit_nbytes: int,
        in_flight_nbytes: int | None = None,
        room: Callable[[], int] | None = None,
        place: Place | None = None,
        is_tight: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(homes, journal, limit_nbytes, in_flight_nbytes, place)
        self._writing: list[Unit] = []
        self._is_tight = is_tight
        self._room = room or (lambda: self._most_nbytes - self._kept_nbytes)

    @property
    def _most_nbytes(self) -> int:
        """Bytes of units in memory, leaving ones included."""
        more = self._in_flight_nbytes
        return self.limit_nbytes + (self.limit_nbytes if more is None else more)

    @property
    def is_over(self) -> bool:
        """Whether more is in memory than may be in backward."""
        # Asked for each use: most often the first half tells.
        return self._kept_nbytes > self.limit_nbytes and self._kept_nbytes > self.ahead_nbytes

    def add(self, unit: Unit) -> None:
        """Take charge of a unit whose bytes are in memory; others may have to leave.

        Raises:
            CapacityError: as ``spill``.
        """
        self._count(unit.nbytes)
        self._enqueue(unit)
        if self._kept_nbytes > self.limit_nbytes:
            is_large = self._in_flight_nbytes is None and unit.nbytes > self.limit_nbytes
            # What is above the limit by itself has the room of all others that leave.
            self.spill(most_nbytes=unit.nbytes if is_large else None)

    @property
    def is_idle(self) -> bool:
        """Whether ``settle`` has nothing to do; asked for each saved tensor, twice."""
        grave = self.graveyard
        return not (self._writing or grave.dead or grave.buried or self._links.arriving)

    def spill(self, sparing: Unit | None = None, *, most_nbytes: int | None = None) -> None:
        """Let the oldest units leave until the rest fits.

        Args:
            most_nbytes: of units in memory, those that leave included.
            sparing: a unit that backward is about to use. Nothing new has come then, so that
                what no home takes stays in any case.

        Raises:
            CapacityError: no home takes them, and memory has no room for them.
        """
        self._send_excess_away(sparing)
        most = self._most_nbytes if most_nbytes is None else most_nbytes
        while self._writing and (self._kept_nbytes > most or self._is_tight()):
            self._await_written(self._writing[0], "full")
            self._send_excess_away(sparing)  # what had changed meanwhile is written again

    def _send_excess_away(self, sparing: Unit | None) -> None:
        leaving = sum(unit.nbytes for unit in self._writing)
        staying = self.limit_nbytes if sparing is None else self.ahead_nbytes
        excess = self._kept_nbytes - leaving - staying
        for queue in (self._order, self._staying):
            if excess > 0:
                excess = self._spill_from(queue, excess, sparing, self._lag_nbytes - staying)

    @property
    def _lag_nbytes(self) -> int:
        """A unit leaves when there are so many bytes of newer ones.

        See [Note: a block that is doubted].
        """
        return 0 if self.place.digest is not None else (self._in_flight_nbytes or 0) // 4

    def _spill_from(
        self, queue: "deque[weakref.ref[Unit]]", excess: int, sparing: Unit | None, least: int
    ) -> int:
        """What is still in excess after units of ``queue`` have begun to leave.

        ``least`` of it, if that is positive, is too new to leave.
        """
        passed_over: list[weakref.ref[Unit]] = []
        while excess > 0 and queue:
            known = queue.popleft()
            unit = known()
            if unit is None:
                continue
            if unit is sparing or unit.residency is Residency.FETCHING:
                passed_over.append(known)  # its turn comes
            elif unit.residency is Residency.READY:
                if excess - unit.nbytes < least:
                    passed_over.append(known)
                    break
                excess -= unit.nbytes
                if not self._try_to_send_away(unit, refusable=sparing is None):
                    passed_over.append(known)
                    break
        queue.extendleft(reversed(passed_over))
        return excess

    def _try_to_send_away(self, unit: Unit, *, refusable: bool) -> bool:
        """Whether a home takes the bytes of ``unit``; if not, they stay."""
        try:
            self._send_away(unit)
        except CapacityError as error:
            if refusable:
                self._check_room(error)
            return False
        return True

    def _check_room(self, refusal: CapacityError) -> None:
        """No home takes more: raise unless memory has room."""
        while self._room() < 0 and self._writing:
            self._await_written(self._writing[0], "full")
        missing = -self._room()
        if missing > 0:
            raise CapacityError(
                f"saved activations of {format_nbytes(self._kept_nbytes)} "
                f"({self._kept_nbytes} bytes) are {format_nbytes(missing)} too many for memory, "
                f"and can't leave it: {refusal}. Take a smaller batch, or a larger budget"
            ) from refusal

    def _send_away(self, unit: Unit) -> None:
        if self._must_rewrite(unit):
            self._give_up_block(unit)
        if unit.block is None:
            self._write(unit)
        elif unit.doubtful:
            self._compare(unit)
        else:
            self._drop(unit)

    def _must_rewrite(self, unit: Unit) -> bool:
        """Whether its block, if there is one, does not hold the bytes of ``unit``."""
        return unit.changed or (unit.doubtful and self.place.digest is None)

    def _write(self, unit: Unit) -> None:
        unit.home, unit.block = allocate_in(self.homes, unit.nbytes)
        if unit.arrival is not None:
            self.place.order(unit.arrival)
        memory = unit.gathered(self.place)
        before: list[Job] = []
        if self.place.digest is not None:
            digest = partial(self.place.digest, memory.data_ptr(), memory.nbytes())
            before = [partial(_note_digest, weakref.ref(unit), digest)]
        unit.transfer = self.place.send(trip_of(unit), memory, before)
        self._become(unit, Residency.WRITING)
        self._writing.append(unit)

    def _compare(self, unit: Unit) -> None:
        """See [Note: a block that is doubted]: compare instead of writing again."""
        assert unit.home is not None
        unit.doubtful = False
        memory = unit.gathered(self.place)
        assert self.place.digest is not None
        digest = partial(self.place.digest, memory.data_ptr(), memory.nbytes())
        job: Job = partial(_compare_digest, unit, digest)
        label = Label(unit.name, ROLE, "host", "host")
        unit.transfer = unit.home.writes.submit([job], label, 0, owner=memory)
        self._become(unit, Residency.WRITING)
        self._writing.append(unit)

    def settle(self) -> None:
        """Take note of what has ended and of what has died; never blocks.

        Raises:
            TierIOError: bytes could not be read back that streams have been waiting for.
        """
        if self._writing:
            self._finish_ended()
        self._bury()
        if self._links.arriving:
            self._links.look()

    def _finish_ended(self) -> None:
        stayed = False
        for unit in [unit for unit in self._writing if _is_done(unit)]:
            self._finish_write(unit)
            stayed = stayed or unit.residency is Residency.READY
        if stayed:
            self.spill()  # it has to be written again

    def _await_written(self, unit: Unit, reason: str) -> None:
        assert unit.transfer is not None
        assert unit.home is not None
        with self.journal.stall(unit.name, ROLE, unit.home.writes.name, reason):
            unit.transfer.settle()
        self._finish_write(unit)

    def _finish_write(self, unit: Unit) -> None:
        self._writing.remove(unit)
        transfer, unit.transfer = unit.transfer, None
        assert transfer is not None
        if transfer.error is not None or self._must_rewrite(
            unit
        ):  # memory is whole: as if never begun
            self._give_up_block(unit)
            self._become(unit, Residency.READY)
            self._enqueue(unit)
            transfer.wait()
        elif unit.doubtful:
            self._compare(unit)
        else:
            self._drop(unit)

    def _give_up_block(self, unit: Unit) -> None:
        assert unit.block is not None
        unit.block.release()
        unit.block = unit.home = unit.digest = None
        unit.doubtful = unit.changed = False

    def close(self) -> None:
        """Wait for writes in flight; saved tensors that still live stay usable."""
        while self._writing:
            self._await_written(self._writing[0], "drain")
        self._links.settle()
        self.settle()


def _note_digest(known: "weakref.ref[Unit]", digest: Callable[[], int]) -> None:
    unit = known()
    if unit is not None:
        unit.digest = digest()


def _compare_digest(unit: Unit, digest: Callable[[], int]) -> None:
    unit.changed = unit.changed or unit.digest != digest()


def _is_done(unit: Unit) -> bool:
    return unit.transfer is not None and unit.transfer.done()
