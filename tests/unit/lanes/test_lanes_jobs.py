"""Lanes run jobs in order, and no error on them is ever lost."""

import gc
import os
import threading
import weakref
from functools import partial

import pytest
from lane_jobs import LABEL, PATIENCE_S, Gate, fail

from offload.allocator.errors import ForkedProcessError
from offload.tiers.events import Move
from offload.tiers.journal import Label


def test_jobs_run_in_the_order_of_their_submission(lane):
    done = []
    transfers = [lane.submit([partial(done.append, index)], LABEL, 1) for index in range(50)]
    transfers[-1].wait()
    assert done == list(range(50))
    assert all(transfer.done() for transfer in transfers)


def test_jobs_run_on_the_lane_s_own_thread(lane):
    threads = []
    lane.submit([lambda: threads.append(threading.current_thread())], LABEL, 1).wait()
    assert threads[0] is not threading.current_thread()
    assert threads[0].name.startswith("offload ")


def test_workers_run_jobs_beside_each_other(make_lane):
    both = threading.Barrier(2)  # one worker alone would wait here for ever
    transfer = make_lane(workers=2).submit(
        [lambda: both.wait(PATIENCE_S), lambda: both.wait(PATIENCE_S)], LABEL, 2
    )
    transfer.wait()


def test_an_urgent_transfer_goes_first_its_jobs_in_order(lane):
    done = []
    gate = Gate(lane)
    lane.submit([partial(done.append, "first")], LABEL, 1)
    lane.submit([partial(done.append, "second")], LABEL, 1)
    lane.submit([partial(done.append, "urgent 1"), partial(done.append, "urgent 2")], LABEL, 1,
                urgent=True)  # fmt: skip
    gate.open()
    lane.drain()
    assert done == ["urgent 1", "urgent 2", "first", "second"]


def test_an_expedited_transfer_overtakes_with_what_is_left_of_it(lane):
    done = []
    gate = Gate(lane)
    lane.submit([partial(done.append, "other 1")], LABEL, 1)
    late = lane.submit([partial(done.append, f"late {part}") for part in (1, 2)], LABEL, 1)
    lane.submit([partial(done.append, "other 2")], LABEL, 1)
    lane.expedite(late)
    gate.open()
    late.wait()
    lane.drain()
    assert done == ["late 1", "late 2", "other 1", "other 2"]


def test_expediting_what_is_not_queued_changes_nothing(lane):
    done = []
    finished = lane.submit([partial(done.append, 0)], LABEL, 1)
    finished.wait()
    gate = Gate(lane)
    for index in (1, 2):
        lane.submit([partial(done.append, index)], LABEL, 1)
    lane.expedite(finished)
    gate.open()
    lane.drain()
    assert done == [0, 1, 2]


def test_a_transfer_is_done_when_its_last_job_is(lane):
    gates = [threading.Event(), threading.Event()]
    transfer = lane.submit(
        [lambda: gates[0].wait(PATIENCE_S), lambda: gates[1].wait(PATIENCE_S)], LABEL, 2
    )
    assert not transfer.done()
    gates[0].set()
    assert not transfer.done()
    assert transfer.duration_s is None
    gates[1].set()
    transfer.settle()
    assert transfer.done()
    assert transfer.duration_s > 0


def test_a_transfer_without_jobs_is_done(lane):
    transfer = lane.submit([], LABEL, 0)
    assert transfer.done()
    transfer.wait()


def test_an_error_is_raised_on_the_thread_that_waits(lane):
    transfer = lane.submit([partial(fail, OSError(5, "bad disk"))], LABEL, 1)
    transfer.settle()  # never raises
    assert transfer.done()
    for _ in range(2):  # each who needs the data is told
        with pytest.raises(OSError, match="bad disk"):
            transfer.wait()


def test_the_first_error_of_a_transfer_is_told_and_its_other_jobs_run(lane):
    done = []
    jobs = [partial(fail, OSError("first")), partial(fail, OSError("second")),
            partial(done.append, "third")]  # fmt: skip
    transfer = lane.submit(jobs, LABEL, 3)
    with pytest.raises(OSError, match="first"):
        transfer.wait()
    assert done == ["third"]


@pytest.mark.parametrize("error", [ValueError("v"), KeyboardInterrupt(), SystemExit(3)])
def test_a_lane_that_has_failed_keeps_serving(lane, error):
    with pytest.raises(type(error)):
        lane.submit([partial(fail, error)], LABEL, 1).wait()
    done = []
    lane.submit([partial(done.append, 1)], LABEL, 1).wait()
    assert done == [1]


def test_drain_raises_what_nobody_waited_for_once(lane):
    lane.submit([partial(fail, OSError("unseen"))], LABEL, 1)
    with pytest.raises(OSError, match="unseen"):
        lane.drain()
    lane.drain()


def test_drain_is_silent_about_errors_that_were_seen(lane):
    transfer = lane.submit([partial(fail, OSError("seen"))], LABEL, 1)
    with pytest.raises(OSError, match="seen"):
        transfer.wait()
    lane.drain()


def test_settling_a_lane_leaves_its_errors_to_drain(lane):
    done = []
    lane.submit([partial(fail, OSError("unseen"))], LABEL, 1)
    lane.submit([partial(done.append, 1)], LABEL, 1)
    lane.settle()
    assert done == [1]
    with pytest.raises(OSError, match="unseen"):
        lane.drain()


@pytest.mark.parametrize("wait", ["drain", "settle"])
def test_waiting_for_a_lane_waits_for_every_job(make_lane, wait):
    lane, done = make_lane(workers=2), []
    for _ in range(20):
        for index in range(50):
            lane.submit([partial(done.append, index), partial(sum, range(1000))], LABEL, 1)
        getattr(lane, wait)()
        assert len(done) == 50
        done.clear()


def test_close_finishes_what_is_queued(make_lane):
    lane, done = make_lane(), []
    gate = Gate(lane)
    for index in range(10):
        lane.submit([partial(done.append, index)], LABEL, 1)
    gate.open()
    lane.close()
    assert done == list(range(10))
    lane.close()
    with pytest.raises(RuntimeError, match="lane file→host is closed"):
        lane.submit([], LABEL, 0)


def test_close_ends_the_threads(make_lane):
    before = set(threading.enumerate())
    lane = make_lane(workers=3)
    threads = set(threading.enumerate()) - before
    assert len(threads) == 3
    lane.close()
    assert not any(thread.is_alive() for thread in threads)


class Held:
    def use(self):
        pass


def test_an_idle_lane_holds_no_reference_to_its_jobs(lane):
    held = Held()
    gone = weakref.ref(held)
    lane.submit([held.use], LABEL, 1)
    del held
    lane.drain()
    gc.collect()
    assert gone() is None


def test_the_owner_of_the_memory_lives_until_the_last_job_has_ended(make_lane):
    lane, held, gates = make_lane(workers=2), Held(), [threading.Event(), threading.Event()]
    gone = weakref.ref(held)
    jobs = [partial(gate.wait, PATIENCE_S) for gate in gates]
    transfer = lane.submit(jobs, LABEL, 1, owner=held)
    del held
    gates[0].set()
    assert gone() is not None
    gates[1].set()
    transfer.wait()
    assert gone() is None
    assert lane.submit([], LABEL, 0, owner=Held()).owner is None


def test_finished_transfers_are_recorded_once_each(lane, recorder):
    moved = Label("layer.1", "state", "host", "file:/data")
    lane.submit([lambda: None, lambda: None], LABEL, 300).wait()
    lane.submit([lambda: None], moved, 50).wait()
    with pytest.raises(OSError, match="no"):
        lane.submit([partial(fail, OSError("no"))], moved, 7000).wait()
    lane.drain()
    first, second = recorder.events
    assert isinstance(first, Move)
    assert (first.key, first.role, first.src, first.dst) == ("key", "weight", "file:/data", "host")
    assert (first.nbytes, first.lane) == (300, "file→host")
    assert 0 <= first.duration_s <= first.t_s <= second.t_s
    assert (second.key, second.nbytes) == ("layer.1", 50)
    totals = lane.journal.totals
    assert (totals.read_nbytes, totals.written_nbytes) == (300, 50)


def test_a_waiting_thread_finds_the_bytes_counted(lane):
    for count in range(1, 200):
        lane.submit([lambda: None], LABEL, 1).wait()
        assert lane.journal.totals.read_nbytes == count


def test_a_forked_process_is_told_that_it_has_no_threads(lane, monkeypatch):
    before = lane.submit([lambda: None], LABEL, 0)
    before.wait()
    gate = Gate(lane)
    with monkeypatch.context() as child:
        child.setattr(os, "getpid", lambda: 0)  # all that a child's lane knows of the fork
        for use in (
            lambda: lane.submit([], LABEL, 0),
            lane.settle,
            lane.drain,
            gate.transfer.settle,
            gate.transfer.wait,
        ):
            with pytest.raises(ForkedProcessError, match="was forked from process"):
                use()
        before.wait()  # it had ended: the child has its bytes
    gate.open()
    gate.transfer.wait()
