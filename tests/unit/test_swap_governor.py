"""The governor gives faulted-in pages back, and only those."""

import os
import sys
import threading

import pytest
import torch

from offload.swap.governor import Governor
from offload.tiers import hostmem
from offload.tiers.filetier import FileTier, Lanes
from offload.tiers.journal import Journal
from offload.tiers.mapped import MappedTensor

NBYTES = 32 << 20
FAR = 1 << 50


@pytest.fixture
def tier(tmp_path):
    lanes = Lanes(Journal())
    with FileTier(tmp_path, "data", lanes) as tier:
        yield tier
    lanes.close()


@pytest.fixture
def make_governor():
    made = []

    def make(limit_nbytes):
        made.append(Governor(limit_nbytes))
        return made[-1]

    yield make
    for governor in made:
        governor.close()


def mapped(tier, nbytes=NBYTES, *, shared=False):
    made = MappedTensor(tier.file, torch.uint8, (nbytes,), shared=shared)
    block = tier.allocate(nbytes)
    os.pwrite(tier.file.fd, b"\x05" * nbytes, block.extent.offset)
    tier.file.sync()
    made.file_as(block)
    return made


class Watched:
    """Stands for tensors, and tells when they were shed."""

    def __init__(self, tensors):
        self.tensors = tensors
        self.shed_once = threading.Event()

    def shed(self):
        for tensor in self.tensors:
            tensor.shed()
        self.shed_once.set()


@pytest.mark.own_process
@pytest.mark.parametrize("shared", [True, False])
def test_shedding_gives_back_what_is_watched(tier, make_governor, shared):
    governor = make_governor(FAR)
    tensor = mapped(tier, shared=shared)
    governor.watch(tensor)
    assert tensor.tensor[::4096].sum() == NBYTES // 4096 * 5
    _, before = hostmem.resident_nbytes()
    governor.shed()
    _, after = hostmem.resident_nbytes()
    assert before - after > NBYTES * 3 // 4
    assert tensor.tensor[::4096].sum() == NBYTES // 4096 * 5


@pytest.mark.own_process
def test_a_process_above_its_limit_is_brought_down_by_itself(tier, make_governor):
    """The thread sheds while the reader goes on: the resident set stays far below the reads."""
    tensors = [mapped(tier, shared=True) for _ in range(4)]
    resident, _ = hostmem.resident_nbytes()
    governor = make_governor(resident + (8 << 20))
    watched = Watched(tensors)
    governor.watch(watched)
    while not watched.shed_once.is_set():  # ends by the governor only; a dead one is a time-out
        for tensor in tensors:
            assert tensor.tensor[::4096].sum() == NBYTES // 4096 * 5
    assert governor.peak_nbytes > resident


def test_a_process_below_its_limit_keeps_its_pages(make_governor):
    governor = make_governor(FAR)
    watched = Watched(())
    governor.watch(watched)
    for _ in range(3):
        governor.seen_nbytes = 0
        while governor.seen_nbytes == 0:  # until the thread has looked
            os.sched_yield()
    assert not watched.shed_once.is_set()
    assert governor.room() > 0


@pytest.mark.own_process
def test_room_is_what_is_left_below_the_limit(make_governor):
    resident, _ = hostmem.resident_nbytes()
    assert abs(make_governor(resident + (100 << 20)).room() - (100 << 20)) < 32 << 20
    assert make_governor(0).room() < 0


@pytest.mark.own_process
def test_a_new_measurement_of_the_peak_begins_at_the_present(make_governor):
    governor = make_governor(FAR)
    governor.seen_nbytes = FAR
    assert governor.peak_nbytes == FAR
    governor.restart_peak()
    resident, _ = hostmem.resident_nbytes()
    assert abs(governor.peak_nbytes - resident) < 32 << 20


def test_the_peak_is_the_kernels_where_the_thread_was_too_late(make_governor, monkeypatch):
    kernel = 1000
    monkeypatch.setattr(hostmem, "peak_resident_nbytes", lambda: kernel)
    governor = make_governor(FAR)
    governor.restart_peak()
    governor.close()  # nothing is seen from now on
    governor.seen_nbytes = 900
    assert governor.peak() == (900, False)  # 1000 was before
    kernel = 1001
    assert governor.peak() == (1001, True)
    governor.restart_peak()
    governor.seen_nbytes = 950
    assert governor.peak() == (950, False)


def test_tensors_that_are_gone_are_watched_no_more(tier, make_governor):
    governor = make_governor(FAR)
    governor.watch(mapped(tier, 4096))
    governor.shed()
    assert len(governor._mapped) == 0


def test_tensors_come_and_go_while_the_governor_sheds(make_governor, monkeypatch):
    """New tensors are watched by the training thread while another one sheds."""
    governor = make_governor(FAR)
    kept = [Watched(()) for _ in range(300)]
    for watched in kept:
        governor.watch(watched)
    stop, failed = threading.Event(), []

    def shed():
        try:
            while not stop.is_set():
                governor.shed()
        except RuntimeError as error:
            failed.append(error)

    thread = threading.Thread(target=shed)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns within a line
    try:
        thread.start()
        for _ in range(1000):
            kept.append(Watched(()))
            governor.watch(kept[-1])
            del kept[0]
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(before)
    assert failed == []


def test_close_ends_the_thread_and_may_come_twice(make_governor):
    before = set(threading.enumerate())
    governor = make_governor(FAR)
    (thread,) = set(threading.enumerate()) - before
    governor.close()
    governor.close()
    assert not thread.is_alive()
