"""Functions in turns: their order, their errors, and no thread that outlives them."""

import contextvars
import signal
import threading
import time

import pytest

from offload.swap.relay import Relay


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def told(count, turns, log):
    """Functions that write down their turns; ``turns`` says how many each has."""

    def make(index):
        def function():
            for turn in range(turns[index]):
                log.append((index, turn))
                relay.turn()
            log.append((index, "end"))
            return index * 10

        return function

    relay = Relay([make(index) for index in range(count)])
    return relay


def test_turns_go_round_in_the_order_of_places():
    log = []
    assert told(3, (2, 2, 2), log).run() == [0, 10, 20]
    assert log == [(index, turn) for turn in (0, 1, "end") for index in range(3)]


def test_a_function_that_ends_early_is_left_out():
    log = []
    assert told(3, (1, 0, 3), log).run() == [0, 10, 20]
    assert log == [(0, 0), (1, "end"), (2, 0), (0, "end"), (2, 1), (2, 2), (2, "end")]


def test_one_by_one_from_some_moment_on():
    log = []
    relay = told(3, (3, 3, 3), log)

    relay._leaving = lambda _index: (1, 1) in log
    relay.run()
    first = [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1)]
    assert log[:5] == first
    assert log[5:] == [(0, 2), (0, "end"), (1, 2), (1, "end"), (2, 1), (2, 2), (2, "end")]


def test_one_waits_for_those_before_it():
    log = []
    ready = [False]

    def first():
        relay.turn()
        relay.turn()
        log.append("first")
        ready[0] = True
        relay.turn()
        log.append("first ends")

    def second():
        relay.wait_until(lambda: ready[0])
        log.append("second")

    relay = Relay([first, second])
    relay.run()
    assert log == ["first", "second", "first ends"]


def test_exactly_one_runs_at_any_moment():
    running, most = [0], [0]

    def function():
        for _ in range(50):
            running[0] += 1
            most[0] = max(most[0], running[0])
            time.sleep(0)
            running[0] -= 1
            relay.turn()

    relay = Relay([function] * 6)
    relay.run()
    assert most == [1]


def test_who_runs_is_known_on_its_thread_only():
    seen = []

    def function():
        seen.append(relay.current)

    relay = Relay([function] * 3)
    relay.run()
    assert seen == [0, 1, 2]
    assert relay.current is None
    relay.turn()  # on a thread that runs none of them: nothing


def test_each_switch_is_told():
    seen = []

    def function():
        relay.turn()

    relay = Relay(
        [function] * 2,
        leaving=lambda index: seen.append(("leaving", index)),
        entering=lambda index: seen.append(("entering", index)),
    )
    relay.run()
    there = [(what, index) for index in (0, 1) for what in ("entering", "leaving")]
    assert seen == [*there, *there, ("entering", None)]


def test_an_error_ends_all_and_says_where_it_was():
    ended = []

    def fine():
        try:
            while True:
                relay.turn()
        finally:
            ended.append(relay.current)

    def failing():
        relay.turn()
        raise ValueError("out of luck")

    relay = Relay([fine, failing, fine], name="micro-batch")
    with pytest.raises(ValueError, match="out of luck") as caught:
        relay.run()
    assert caught.value.__notes__ == ["in micro-batch 1 of 3"]
    assert ended == [0, 2]


def test_what_has_not_begun_does_not_begin():
    begun = []

    def failing():
        raise KeyError("at once")

    with pytest.raises(KeyError):
        Relay([failing, lambda: begun.append(1)]).run()
    assert begun == []


def test_user_code_that_swallows_everything_is_stopped_at_its_next_turn():
    def stubborn():
        for _ in range(3):
            try:
                relay.turn()
            except BaseException:  # noqa: BLE001
                continue
        return "done"

    def failing():
        raise ValueError

    relay = Relay([stubborn, failing])
    with pytest.raises(ValueError):  # noqa: PT011
        relay.run()


def test_an_error_where_the_turn_goes_over_is_not_lost():
    def entering(index):
        if index == 1:
            raise OSError("no turn")

    def function():
        relay.turn()

    relay = Relay([function] * 2, entering=entering)
    with pytest.raises(OSError, match="no turn"):
        relay.run()


def test_an_interrupt_of_the_caller_ends_all():
    entered = threading.Event()
    ended = []

    def function():
        try:
            while True:
                if relay.current == 1:
                    entered.set()
                time.sleep(0.001)
                relay.turn()
        finally:
            ended.append(relay.current)

    relay = Relay([function] * 2)

    def interrupt():
        entered.wait()
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    sender = threading.Thread(target=interrupt)
    sender.start()
    with pytest.raises(KeyboardInterrupt):
        relay.run()
    sender.join()
    assert sorted(ended) == [0, 1]


def test_threads_that_cannot_start(monkeypatch):
    started = threading.Thread.start
    count = [0]

    def start(thread):
        count[0] += 1
        if count[0] == 2:
            raise RuntimeError("can't start new thread")
        started(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    ran = []
    with pytest.raises(RuntimeError, match="can't start"):
        Relay([lambda: ran.append(1)] * 3).run()
    assert ran == []


def test_context_variables_are_the_callers():
    variable = contextvars.ContextVar("variable", default="outside")
    variable.set("inside")
    assert Relay([variable.get] * 2).run() == ["inside", "inside"]
