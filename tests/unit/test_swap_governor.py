"""The governor gives faulted-in pages back, and only those."""

import os
import sys
import threading

import pytest
import torch

from offload.swap.governor import WORTH_NBYTES, Governor
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

    def make(limit_nbytes, budget_nbytes=FAR):
        made.append(Governor(limit_nbytes, budget_nbytes))
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


class Process:
    """The resident set and its file pages, as the governor is told."""

    def __init__(self, resident_nbytes, from_files_nbytes):
        self.resident_nbytes, self.from_files_nbytes = resident_nbytes, from_files_nbytes
        self.sheds = 0

    def shed(self):
        self.sheds += 1
        self.resident_nbytes -= self.from_files_nbytes
        self.from_files_nbytes = 0

    def fault(self, nbytes):
        self.resident_nbytes += nbytes
        self.from_files_nbytes += nbytes


@pytest.fixture
def quiet_governor(make_governor, monkeypatch):
    """A governor of a made-up process, that looks when it is told to expect something."""
    process = Process(100 << 20, 0)
    governor = make_governor(100 << 20, 124 << 20)
    governor.close()
    monkeypatch.setattr(
        hostmem, "resident_nbytes", lambda: (process.resident_nbytes, process.from_files_nbytes)
    )
    governor.watch(process)
    governor.expect(0)
    process.sheds = 0
    return governor, process


def test_few_pages_stay_while_the_budget_has_room_for_twice_as_many(quiet_governor):
    governor, process = quiet_governor
    process.fault(WORTH_NBYTES)
    governor.expect(0)
    assert process.sheds == 0  # 16 MiB are left
    governor.expect(2)
    assert process.sheds == 1
    governor.expect(40 << 20)
    assert process.sheds == 1  # nothing to shed


def test_pages_go_before_what_is_expected_comes(quiet_governor):
    governor, process = quiet_governor
    process.resident_nbytes -= 32 << 20
    process.fault(6 << 20)
    governor.expect(26 << 20)
    assert process.sheds == 0
    governor.expect(39 << 20)
    assert process.sheds == 1


def test_what_was_faulted_in_while_pages_went_is_no_code(quiet_governor, monkeypatch):
    governor, process = quiet_governor
    shed = process.shed
    process.fault(9 << 20)
    monkeypatch.setattr(process, "shed", lambda: (shed(), process.fault(9 << 20)))
    governor.expect(0)  # they came back before the governor looked again
    monkeypatch.undo()
    monkeypatch.setattr(
        hostmem, "resident_nbytes", lambda: (process.resident_nbytes, process.from_files_nbytes)
    )
    process.shed()
    governor.expect(0)  # and have gone meanwhile
    process.fault(9 << 20)
    governor.expect(0)
    assert process.from_files_nbytes == 0


def test_a_measurement_begins_with_the_heaps_free_pages_given_back(make_governor, monkeypatch):
    trimmed = []
    monkeypatch.setattr(hostmem, "trim_heap", lambda: trimmed.append(True))
    roomy = make_governor(FAR)
    roomy.restart_peak()
    assert trimmed == []
    tight = make_governor(1 << 20)
    tight.restart_peak()
    tight.seen_nbytes = 2 << 20
    tight.restart_peak()
    assert trimmed


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
