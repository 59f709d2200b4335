"""Lanes run jobs in order, and no error on them is ever lost."""

import gc
import os
import threading
import time
import weakref
from functools import partial

import pytest

from offload.allocator.errors import ForkedProcessError
from offload.tiers import lanes
from offload.tiers.events import ListRecorder, Move
from offload.tiers.journal import Journal, Label
from offload.tiers.lanes import Lane, QueuedJob, wait_for_all

LABEL = Label("key", "weight", "file:/data", "host")
PATIENCE_S = 60  # far above any wait of a right implementation; a deadlock fails loudly


@pytest.fixture
def recorder():
    return ListRecorder()


@pytest.fixture
def make_lane(recorder):
    lanes = []

    def make(workers=1, queues=1):
        lanes.append(Lane("file→host", workers, Journal(recorder), queues))
        return lanes[-1]

    yield make
    for lane in lanes:
        lane.close()


@pytest.fixture
def lane(make_lane):
    return make_lane()


class Gate:
    """A job that holds its lane until it is opened."""

    def __init__(self, lane):
        self._entered, self._open = threading.Event(), threading.Event()
        self.transfer = lane.submit([self._wait], LABEL, 0)
        assert self._entered.wait(PATIENCE_S)

    def _wait(self):
        self._entered.set()
        assert self._open.wait(PATIENCE_S)

    def open(self):
        self._open.set()


def fail(error):
    raise error


def eventually(holds):
    """Whether ``holds`` comes true; threads are on their way to it."""
    until_s = time.monotonic() + PATIENCE_S
    while not holds() and time.monotonic() < until_s:
        time.sleep(1e-3)
    return holds()


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


# [Note: a queue for each path]


def test_each_queue_has_workers_of_its_own(make_lane):
    lane, done = make_lane(queues=2), []
    gate = Gate(lane)  # holds the first queue
    lane.submit([QueuedJob(1, partial(done.append, index)) for index in range(5)], LABEL, 1).wait()
    assert done == list(range(5))
    assert not gate.transfer.done()
    gate.open()


def test_a_transfer_over_two_queues_is_done_when_both_are(make_lane):
    lane, done = make_lane(queues=2), []
    gate = Gate(lane)
    both = lane.submit(
        [QueuedJob(queue, partial(done.append, queue)) for queue in (0, 1)], LABEL, 1
    )
    lane.submit([QueuedJob(1, lambda: None)], LABEL, 1).wait()
    assert done == [1]
    assert not both.done()
    gate.open()
    both.wait()
    assert done == [1, 0]


def test_urgent_and_expedited_jobs_go_to_the_head_of_each_queue(make_lane):
    lane, done = make_lane(queues=2), {0: [], 1: []}
    gates = [Gate(lane), None]
    entered, opened = threading.Event(), threading.Event()
    lane.submit(
        [QueuedJob(1, lambda: (entered.set(), opened.wait(PATIENCE_S)))], LABEL, 0
    )  # holds the second queue
    assert entered.wait(PATIENCE_S)

    def jobs(name):
        return [
            QueuedJob(queue, partial(done[queue].append, f"{name}{part}"))
            for part in (1, 2)
            for queue in (0, 1)
        ]

    lane.submit(jobs("a"), LABEL, 1)
    late = lane.submit(jobs("b"), LABEL, 1)
    lane.submit(jobs("c"), LABEL, 1, urgent=True)
    lane.expedite(late)
    gates[0].open()
    opened.set()
    lane.drain()
    assert done[0] == done[1] == ["b1", "b2", "c1", "c2", "a1", "a2"]


def test_settling_waits_for_every_queue(make_lane):
    lane, done = make_lane(workers=2, queues=3), []
    for index in range(60):
        lane.submit([QueuedJob(index % 3, partial(done.append, index))], LABEL, 1)
    lane.settle()
    assert sorted(done) == list(range(60))


def test_a_queue_that_is_not_there_is_refused(lane):
    with pytest.raises(IndexError):
        lane.submit([QueuedJob(1, lambda: None)], LABEL, 1)
    lane.settle()


def test_a_transfer_after_another_begins_when_that_has_ended(make_lane):
    writes, reads, done = make_lane(), make_lane(workers=2), []
    gate = Gate(writes)
    written = writes.submit([partial(done.append, "written")], LABEL, 1)
    read = reads.submit([partial(done.append, "read")], LABEL, 1, after=written)
    bare = reads.submit([], LABEL, 0, after=written)
    free = reads.submit([partial(done.append, "free")], LABEL, 1)
    free.wait()
    assert not read.done()
    assert not bare.done()  # nothing of its own has to move, but its memory is still in use
    gate.open()
    read.wait()
    bare.wait()
    assert done == ["free", "written", "read"]


def test_a_transfer_after_one_that_has_ended_begins_at_once(make_lane):
    lane, done = make_lane(), []
    first = lane.submit([], LABEL, 0)
    lane.submit([partial(done.append, "next")], LABEL, 1, after=first).wait()
    assert done == ["next"]


def test_a_transfer_after_one_that_failed_begins_all_the_same(make_lane):
    writes, reads, done = make_lane(), make_lane(), []
    gate = Gate(writes)
    failed = writes.submit([partial(fail, OSError("full"))], LABEL, 1)
    read = reads.submit([partial(done.append, "read")], LABEL, 1, after=failed)
    gate.open()
    read.wait()
    with pytest.raises(OSError, match="full"):
        failed.wait()
    assert done == ["read"]


def test_a_lane_is_not_idle_while_a_transfer_of_it_waits_for_another(make_lane):
    writes, reads, done = make_lane(), make_lane(queues=2), []
    gate = Gate(writes)
    written = writes.submit([], LABEL, 0, after=gate.transfer)
    reads.submit([QueuedJob(1, partial(done.append, "read"))], LABEL, 1, after=written)
    threads = [threading.Thread(target=end) for end in (reads.settle, reads.close)]
    for thread in threads:
        thread.start()
    assert not done
    gate.open()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert done == ["read"]


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


@pytest.fixture
def rings(monkeypatch):
    """The threads that woke a worker, in order."""
    threads, ring = [], lanes._ring

    def counting(bells):
        threads.extend(threading.current_thread() for _ in bells)
        ring(bells)

    monkeypatch.setattr(lanes, "_ring", counting)
    return threads


def test_who_submits_wakes_one_worker_and_that_one_the_next(make_lane, rings):
    lane = make_lane(workers=4)
    queue = lane._queues[0]
    assert eventually(lambda: len(queue._asleep) == 4)
    together = threading.Barrier(5)
    transfer = lane.submit([lambda: together.wait(PATIENCE_S)] * 4, LABEL, 0)
    together.wait(PATIENCE_S)  # all four run at once
    transfer.wait()
    assert rings.count(threading.current_thread()) == 1
    assert len(rings) == 4


def test_a_worker_that_is_waking_up_is_not_called_again(make_lane, rings):
    lane = make_lane(workers=2)
    queue = lane._queues[0]
    assert eventually(lambda: len(queue._asleep) == 2)
    with lane._lock:
        queue._called_s = time.monotonic()  # and it does not come
    first = lane.submit([lambda: None], LABEL, 0)
    assert not rings
    with lane._lock:
        queue._called_s = None
    second = lane.submit([lambda: None], LABEL, 0)  # its worker takes both, or wakes the other
    wait_for_all([first, second])
    assert rings[0] is threading.current_thread()


@pytest.mark.parametrize("whoever", ["submits", "waits", "closes"])
def test_a_call_that_ctrl_c_cut_off_is_made_again(make_lane, monkeypatch, whoever):
    lane, done = make_lane(workers=2), []
    assert eventually(lambda: len(lane._queues[0]._asleep) == 2)
    with monkeypatch.context() as interrupted:
        interrupted.setattr(lanes, "_ring", lambda _bells: fail(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            lane.submit([lambda: done.append("cut off")], LABEL, 0)
    monkeypatch.setattr(lanes, "_LOST_S", 0.0)
    if whoever == "submits":
        lane.submit([lambda: done.append("next")], LABEL, 0).wait()
    elif whoever == "waits":
        lane.settle()
    else:
        lane.close()
    assert done[0] == "cut off"


def test_no_call_is_lost_among_many_threads(make_lane):
    lane = make_lane(workers=3, queues=2)
    transfers, lock = [], threading.Lock()

    def submit(seed):
        for number in range(500):
            jobs = [QueuedJob((seed + number + job) % 2, lambda: None) for job in range(number % 4)]
            after = transfers[-1] if transfers and number % 3 == 0 else None
            transfer = lane.submit(jobs, LABEL, 0, urgent=number % 5 == 0, after=after)
            with lock:
                transfers.append(transfer)
            if number % 7 == 0:
                transfer.settle()

    threads = [threading.Thread(target=submit, args=(seed,), daemon=True) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    lane.drain()
    assert all(transfer.done() for transfer in transfers)
