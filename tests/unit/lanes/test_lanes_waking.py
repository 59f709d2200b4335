"""Who wakes the workers of a lane, and how often."""

import threading
import time

import pytest
from lane_jobs import LABEL, PATIENCE_S, eventually, fail

from offload.tiers import lane_queue, lanes
from offload.tiers.lanes import QueuedJob, wait_for_all


@pytest.fixture
def rings(monkeypatch):
    """The threads that woke a worker, in order."""
    threads, ring = [], lanes.ring

    def counting(bells):
        threads.extend(threading.current_thread() for _ in bells)
        ring(bells)

    monkeypatch.setattr(lanes, "ring", counting)
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
        interrupted.setattr(lanes, "ring", lambda _bells: fail(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            lane.submit([lambda: done.append("cut off")], LABEL, 0)
    monkeypatch.setattr(lane_queue, "_LOST_S", 0.0)
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
