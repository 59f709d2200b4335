"""Which weights stay near, which are fetched next, which are given up: one policy for every tier.

A *window* bounds the bytes of streaming weights that are in one tier or on their way to it. What
is used next, in the order that earlier passes showed, is fetched ahead as far as the window
reaches; what is used last is given up first (Belady's rule). ``weights`` has a window over host
memory, ``device_weights`` one over the memory of a device.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

import torch

from offload.swap.residency import Residency
from offload.swap.streaming import Streaming
from offload.swap.trace import Trace
from offload.tiers.journal import Journal
from offload.tiers.lanes import Lane, Transfer


class Streamed(Protocol):
    """What comes and goes."""

    residency: Residency
    resident: bool  # the plan keeps it
    held: bool  # a step is changing it: neither fetched nor evicted
    landing_nbytes: int  # of a fetch in flight, that the room may not show yet
    transfer: Transfer | None

    @property
    def name(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def in_memory(self) -> bool: ...


_Item = TypeVar("_Item", bound=Streamed)


def in_backward() -> bool:
    """Whether this thread is inside autograd's backward."""
    return torch._C._current_graph_task_id() != -1


class Window(ABC, Generic[_Item]):
    """Fetches ahead and gives up; ``_fetch``, ``evict`` and ``_lost`` say what that means.

    Args:
        lane: on which fetches travel.
        window_nbytes: bytes of streaming weights that may be here or on their way. One module's
            own weights may exceed it while it computes.
        role: what records call the weights here.
        room: bytes left until the budget; the window shrinks where others take more than was
            planned.
    """

    def __init__(
        self,
        journal: Journal,
        lane: Lane,
        window_nbytes: int,
        *,
        role: str = "weight",
        room: Callable[[], int] = lambda: sys.maxsize,
    ) -> None:
        self.journal = journal
        self.window_nbytes = window_nbytes
        self.weights: dict[str, _Item] = {}
        self.trace: Trace[str] = Trace(())
        self._lane = lane
        self._role = role
        self._room = room
        # Here or on their way, and not resident.
        self._streaming: Streaming[str, _Item] = Streaming(self.trace)
        self._fetching: dict[str, _Item] = {}  # all that are on their way
        self._in_use: list[tuple[str, ...]] = []
        self._another_way: int | None = 0  # the pass that first took one; None once told

    @abstractmethod
    def _fetch(self, weight: _Item, *, urgent: bool = False) -> bool:
        """Begin to fetch; False where there is no room, if it is not urgent.

        Raises:
            CapacityError: it is urgent, and there is no room.
        """

    @abstractmethod
    def evict(self, weight: _Item) -> None:
        """Give up the bytes of ``weight`` here."""

    @abstractmethod
    def _lost(self, weight: _Item) -> None:
        """The fetch of ``weight`` failed: it is as absent as before."""

    def _arrived(self, weight: _Item) -> None:
        """The fetch of ``weight`` has ended, well or not."""

    def _spare_nbytes(self) -> int:
        """Bytes that a fetch gets without asking for more."""
        return 0

    def _can_leave(self, weight: _Item) -> bool:
        """Whether giving ``weight`` up makes room."""
        return weight.in_memory and not weight.held

    @property
    def streaming_nbytes(self) -> int:
        """Bytes of streaming weights that are here or on their way."""
        return self._streaming.nbytes

    @property
    def landing_nbytes(self) -> int:
        """Bytes that fetches in flight may still take from the room."""
        return sum(
            weight.landing_nbytes
            for weight in self._fetching.values()
            if weight.name in self._streaming
        )

    def resident_nbytes(self) -> int:
        """Bytes of all weights that are here."""
        return sum(weight.nbytes for weight in self.weights.values() if weight.in_memory)

    def learn_order(self, order: Sequence[str]) -> None:
        """The order of first use, as the model's structure suggests it."""
        self.trace = Trace(order)
        self._streaming.follow(self.trace)

    def use(self, names: Sequence[str]) -> None:
        """Have ``names`` here now, and the next ones on their way.

        Raises:
            TierIOError: a read failed.
            CapacityError: there is no room for them.
        """
        self._in_use = [*self._in_use[-1:], tuple(names)]
        for name in names:
            if not self.trace.use(name):
                self._note_another_way(name)
            weight = self.weights[name]
            if weight.residency is Residency.ABSENT and not weight.held:
                self._make_room(weight, force=True)
                self._fetch(weight, urgent=True)
                self._await(weight, "cold")
        for name in names:
            self._await(self.weights[name], "late")
        self._prefetch()

    def _note_another_way(self, name: str) -> None:
        """Tell once that forwards differ; what is used after what is learned anew each time.

        Not of the first pass that differs: what the first forward of all used may be more than
        the model's own, such as what is rebuilt on trial.
        """
        if self._another_way is None or in_backward():
            return
        self._another_way = self._another_way or self.trace.passes
        if self._another_way == self.trace.passes:
            return
        self._another_way = None
        self.journal.notice(
            "control flow",
            f"{name} is used where the last forward used another {self._role} or none: the model "
            "does not take the same way each time. The order is learned anew from each pass; what "
            "is used against it is fetched late",
        )

    def touch(self, name: str) -> None:
        """Note that backward has just finished with ``name``; moves nothing.

        Inside ``torch.utils.checkpoint`` this is the only sign of a weight's use in backward.
        """
        self.trace.use(name)

    def settle(self) -> None:
        """Wait for fetches in flight.

        Raises:
            TierIOError: one failed.
        """
        for weight in self.weights.values():
            self._await(weight, "drain")

    def _await(self, weight: _Item, reason: str) -> None:
        if weight.residency is not Residency.FETCHING:
            return
        assert weight.transfer is not None
        if not weight.transfer.done():
            self._lane.expedite(weight.transfer)
            with self.journal.stall(weight.name, self._role, self._lane.name, reason):
                weight.transfer.settle()
        transfer, weight.transfer = weight.transfer, None
        try:
            self._arrived(weight)
            transfer.wait()
        except BaseException:
            self._lost(weight)
            self._streaming.leave(weight.name)
            self._become(weight, Residency.ABSENT)
            raise
        self._become(weight, Residency.READY)

    def _prefetch(self) -> None:
        """Fetch what is used next, as far as the window reaches."""
        if self.trace.is_settled:
            return
        in_use, settled = self._names_in_use(), sys.maxsize
        for place, name in self.trace.unsettled():
            weight = self.weights[name]
            if weight.residency is not Residency.ABSENT or weight.held:
                continue
            if name in in_use:  # it went although it is: fetched when it is needed
                settled = min(settled, place)
            elif not (self._make_room(weight) and self._fetch(weight)):
                settled = min(settled, place)
                break
        self.trace.settle(settled)

    def _names_in_use(self) -> set[str]:
        """What this use and the one before need."""
        return {name for names in self._in_use for name in names}

    def _make_room(self, weight: _Item, *, force: bool = False) -> bool:
        """Evict the weights used farthest ahead until ``weight`` fits; False if it can't.

        Belady's rule: what is used last goes first, never what is used before ``weight``.
        """
        if weight.resident:
            return True
        beyond_window = self.streaming_nbytes + weight.nbytes - self.window_nbytes
        coming = weight.nbytes + self.landing_nbytes - self._spare_nbytes()
        beyond_budget = coming - self._room()
        excess = max(beyond_window, beyond_budget)
        victims = self._farthest(excess, -1 if force else self.trace.place(weight.name))
        if excess > sum(victim.nbytes for victim in victims) and not force:
            return False
        for victim in victims:
            self.evict(victim)
        return True

    def _farthest(self, nbytes: int, limit: int) -> list[_Item]:
        """The streaming weights used last, behind the place ``limit``: so many bytes."""
        found: list[_Item] = []
        if nbytes <= 0:
            return found
        in_use = self._names_in_use()
        for other in self._streaming.farthest(limit):
            if other.name not in in_use and self._can_leave(other):
                found.append(other)
                nbytes -= other.nbytes
                if nbytes <= 0:
                    break
        return found

    def evict_streaming(self) -> None:
        """Give up all weights that are not resident."""
        self._in_use = []
        for weight in list(self._streaming):
            self.evict(weight)

    def _become(self, weight: _Item, residency: Residency) -> None:
        old, weight.residency = weight.residency, residency
        if residency is Residency.FETCHING:
            self._fetching[weight.name] = weight
        elif old is Residency.FETCHING:
            del self._fetching[weight.name]
        if residency is Residency.ABSENT:
            self.trace.unsettle(weight.name)
        self.journal.residency(weight.name, self._role, old.value, residency.value, weight.nbytes)
