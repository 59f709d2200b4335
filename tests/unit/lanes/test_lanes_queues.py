"""Several queues of one lane, and transfers that begin when another has ended."""

import threading
from functools import partial

import pytest
from lane_jobs import LABEL, PATIENCE_S, Gate, fail

from offload.tiers.lanes import QueuedJob


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
