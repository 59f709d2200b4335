"""The window decides what a plain one decides: the same moves, in the same order."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_window import PlainTrace, PlainWindow

from offload.allocator.errors import TierIOError
from offload.swap.residency import Residency
from offload.swap.trace import Trace
from offload.swap.window import Window
from offload.tiers.journal import Journal, Label
from offload.tiers.lanes import Transfer

NAMES = "abcdefgh"
SIZES = dict(zip(NAMES, (1, 2, 3, 1, 4, 2, 1, 3), strict=True))


class Move(Transfer):
    """Ends when somebody waits for it."""

    def __init__(self, name):
        super().__init__(Label(name, "weight", "file", "host"), SIZES[name], 1)

    def settle(self):
        if not self.done():
            self._finish_job(None)
            self._complete()

    def fail(self):
        self._finish_job(TierIOError(5, "unreadable"))
        self._complete()

    def wait(self):
        self.settle()
        super().wait()


class Queue:
    name = "file→host"

    def expedite(self, transfer):
        pass


@dataclass(eq=False)
class Weight:
    name: str
    residency: Residency = Residency.ABSENT
    resident: bool = False
    held: bool = False
    landing_nbytes: int = 0
    transfer: Transfer | None = field(default=None, repr=False)

    @property
    def nbytes(self):
        return SIZES[self.name]

    @property
    def in_memory(self):
        return self.residency is Residency.READY


class Place:
    """Room, and a list of all moves; ``full`` refuses fetches that nobody waits for."""

    def __init__(self, room):
        self.weights = {name: Weight(name) for name in NAMES}
        self.room = room
        self.full = False
        self.moves = []

    def left(self):
        return self.room - sum(each.nbytes for each in self.weights.values() if each.in_memory)

    def fetch(self, weight, urgent):
        if self.full and not urgent:
            return False
        self.moves.append(("fetch", weight.name, urgent))
        weight.transfer, weight.landing_nbytes = Move(weight.name), weight.nbytes
        return True

    def gone(self, weight):
        self.moves.append(("evict", weight.name))


class Ours(Window):
    def __init__(self, place, window_nbytes, order):
        super().__init__(Journal(), Queue(), window_nbytes, room=place.left)
        self.place, self.weights = place, place.weights
        self.learn_order(order)

    def _fetch(self, weight, *, urgent=False):
        if not self.place.fetch(weight, urgent):
            return False
        if not weight.resident:
            self._streaming.join(weight.name, weight)
        self._become(weight, Residency.FETCHING)
        return True

    def evict(self, weight):
        self._await(weight, "drain")
        if weight.in_memory:
            self.place.gone(weight)
            self._streaming.leave(weight.name)
            self._become(weight, Residency.ABSENT)

    def _lost(self, weight):
        self.place.moves.append(("lost", weight.name))

    def keep(self, names):
        for weight in self.weights.values():
            weight.resident = weight.name in names
            if weight.resident:
                self._streaming.leave(weight.name)
            elif weight.residency is not Residency.ABSENT:
                self._streaming.join(weight.name, weight)

    def let_go(self, weight):
        weight.held = False
        if weight.residency is Residency.ABSENT:
            self.trace.unsettle(weight.name)

    def give_up(self, nbytes):
        for victim in self._farthest(nbytes, -1):
            self.evict(victim)

    def wait_for(self, weight):
        self._await(weight, "late")


class Plain(PlainWindow):
    def __init__(self, place, window_nbytes, order):
        super().__init__(place.weights, window_nbytes, place.left, order)
        self.place = place

    def _fetch(self, weight, *, urgent=False):
        if not self.place.fetch(weight, urgent):
            return False
        if not weight.resident:
            self.streaming[weight.name] = weight
        weight.residency = Residency.FETCHING
        return True

    def evict(self, weight):
        self._await(weight)
        if weight.in_memory:
            self.place.gone(weight)
            self.streaming.pop(weight.name, None)
            weight.residency = Residency.ABSENT

    def _await(self, weight):
        if weight.residency is not Residency.FETCHING:
            return
        transfer, weight.transfer = weight.transfer, None
        transfer.settle()
        if transfer.error is not None:
            self.place.moves.append(("lost", weight.name))
            self.streaming.pop(weight.name, None)
            weight.residency = Residency.ABSENT
        transfer.wait()
        weight.residency = Residency.READY

    def wait_for(self, weight):
        self._await(weight)


NAME = st.sampled_from(NAMES)
USE = st.tuples(st.just("use"), st.lists(NAME, min_size=1, max_size=3))
# Uses come often, so that passes are learned and the window has something to do.
ACTION = st.one_of(
    USE,
    USE,
    USE,
    st.tuples(st.just("touch"), NAME),
    st.tuples(st.just("begin"), st.sampled_from(["training", "evaluation"])),
    st.tuples(st.just("end"), st.none()),
    st.tuples(st.just("arrive"), NAME),
    st.tuples(st.just("fail"), NAME),
    st.tuples(st.just("hold"), NAME),
    st.tuples(st.just("let go"), NAME),
    st.tuples(st.just("keep"), st.sets(NAME, max_size=5)),
    st.tuples(st.just("give up"), st.integers(0, 8)),
    st.tuples(st.just("evict streaming"), st.none()),
    st.tuples(st.just("window"), st.integers(0, 14)),
    st.tuples(st.just("room"), st.integers(0, 20)),
    st.tuples(st.just("full"), st.booleans()),
)
PASSES = st.lists(
    st.tuples(st.lists(NAME, min_size=4, max_size=20), st.lists(ACTION, max_size=12)),
    min_size=1,
    max_size=4,
)


def fail(window, name):
    transfer = window.weights[name].transfer
    if transfer is not None:
        transfer.fail()


def hold(window, name):
    window.weights[name].held = True
    window.wait_for(window.weights[name])


ACTS = {
    "use": lambda window, names: window.use(names),
    "touch": lambda window, name: window.touch(name),
    "begin": lambda window, kind: window.trace.begin(kind),
    "end": lambda window, _: window.trace.end(),
    "arrive": lambda window, name: window.wait_for(window.weights[name]),
    "fail": fail,
    "hold": hold,
    "let go": lambda window, name: window.let_go(window.weights[name]),
    "keep": lambda window, names: window.keep(names),
    "give up": lambda window, nbytes: window.give_up(nbytes),
    "evict streaming": lambda window, _: window.evict_streaming(),
    "window": lambda window, nbytes: setattr(window, "window_nbytes", nbytes),
    "room": lambda window, nbytes: setattr(window.place, "room", nbytes),
    "full": lambda window, is_full: setattr(window.place, "full", is_full),
}


def act(window, action, value):
    """What the runtime does; an error that it raises."""
    try:
        ACTS[action](window, value)
    except TierIOError as error:
        return str(error)
    return None


def seen(window):
    weights = window.weights.values()
    return (
        window.place.moves,
        [(each.residency, each.resident, each.held) for each in weights],
        window.streaming_nbytes,
        window.landing_nbytes,
        list(window.trace.upcoming()),
    )


@settings(max_examples=300)
@given(
    order=st.lists(NAME, unique=True),
    passes=PASSES,
    room=st.integers(2, 20),
    window_nbytes=st.integers(0, 14),
)
def test_the_window_moves_what_a_plain_one_moves(order, passes, room, window_nbytes):
    ours, plain = (make(Place(room), window_nbytes, order) for make in (Ours, Plain))
    for uses, actions in passes:
        regular = [("begin", "training"), *(("use", [name]) for name in uses)]
        # Whatever happens does so while passes repeat: what was learned is what is expected.
        for action, value in [*regular, *regular, *actions]:
            assert act(ours, action, value) == act(plain, action, value)
            assert seen(ours) == seen(plain)


@given(
    order=st.lists(NAME, unique=True),
    actions=st.lists(
        st.tuples(st.just("use"), st.sampled_from([*NAMES, "stranger"]))
        | st.tuples(st.just("begin"), st.booleans())
        | st.tuples(st.just("end"), st.none())
    ),
)
def test_places_are_those_that_looking_finds(order, actions):
    ours, plain = Trace(order), PlainTrace(order)
    for action, value in actions:
        told = [
            getattr(trace, action)(*(() if value is None else (value,))) for trace in (ours, plain)
        ]
        assert told[0] == told[1]
        assert list(ours.upcoming()) == list(plain.upcoming())
        for key in [*NAMES, "stranger"]:
            assert ours.distance(key) == plain.distance(key)


def test_a_pass_whose_weights_are_all_here_is_not_looked_through(monkeypatch):
    window = Ours(Place(1000), 1000, NAMES)
    looked = []
    plain = Trace.unsettled
    monkeypatch.setattr(
        Trace, "unsettled", lambda self: (looked.append(one) or one for one in plain(self))
    )
    for _ in range(3):
        window.trace.begin("training")
        looked.clear()
        for name in [*NAMES, *reversed(NAMES)]:
            window.use([name])
        window.trace.end()
    assert len(looked) <= 2 * len(NAMES)


@pytest.mark.parametrize("held", [True, False])
def test_what_a_step_held_is_fetched_once_it_is_let_go(held):
    window = Ours(Place(1000), 1000, "ab")
    window.weights["b"].held = held
    window.use(["a"])
    assert (("fetch", "b", False) in window.place.moves) is not held
    window.let_go(window.weights["b"])
    window.use(["a"])
    assert ("fetch", "b", False) in window.place.moves
