"""Beyond the limit saved tensors leave, oldest first, and come back in time."""

import itertools

import torch
from saved_tensors import (
    LEAVES_NBYTES,
    NBYTES,
    PATIENCE_S,
    packed,
    residencies,
    settle,
    stalls,
    values,
)

from offload.swap.residency import Residency
from offload.tiers.events import ResidencyChange


def test_views_of_one_storage_still_share_it_when_it_comes_back(make_cache):
    cache = make_cache(NBYTES)
    base = values(1)
    handles = [cache.pack(base), cache.pack(base[100:])]
    del base
    later = cache.pack(values(2))  # it takes the room
    settle(cache)
    assert residencies([*handles, later]) == [Residency.ABSENT] * 2 + [Residency.READY]
    whole, part = (cache.unpack(handle) for handle in handles)
    assert part.data_ptr() == whole.data_ptr() + 400
    assert torch.equal(part, values(1)[100:])


def test_the_oldest_go_first(make_cache):
    cache = make_cache(2 * NBYTES)
    handles = packed(cache, 5)
    settle(cache)
    assert residencies(handles) == [Residency.ABSENT] * 3 + [Residency.READY] * 2
    assert cache.kept_nbytes == 2 * NBYTES
    for seed, handle in reversed(list(enumerate(handles))):
        assert torch.equal(cache.unpack(handle), values(seed))


def test_unpacking_again_and_again_reads_once(make_cache, journal):
    cache = make_cache(0)
    handle = cache.pack(values(1))
    settle(cache)
    for _ in range(3):
        assert torch.equal(cache.unpack(handle), values(1))
    assert journal.totals.read_nbytes == NBYTES
    assert journal.totals.written_nbytes == NBYTES


def test_what_came_back_is_dropped_again_without_a_second_write(make_cache, journal):
    cache = make_cache(NBYTES)
    first = cache.pack(values(1))
    second = cache.pack(values(2))
    settle(cache)
    assert torch.equal(cache.unpack(first), values(1))
    third = cache.pack(values(3))
    settle(cache)
    assert first.part.unit.residency is Residency.ABSENT
    assert torch.equal(cache.unpack(first), values(1))
    assert [second.part.unit.index, third.part.unit.index] == [1, 2]
    writes = {move.key: move.nbytes for move in journal.recorder.events if hasattr(move, "src")
              and move.src == "host"}  # fmt: skip
    assert writes["saved 0"] == NBYTES
    keys = [
        event.key
        for event in journal.recorder.events
        if hasattr(event, "src") and event.src == "host"
    ]
    assert keys.count("saved 0") == 1


def test_what_was_arriving_takes_its_turn_to_go(make_cache, make_gate):
    """A storage on its way in, passed over while others were spilled, is spilled later."""
    cache = make_cache(2 * NBYTES)
    handles = packed(cache, 4)
    settle(cache)
    del handles[3]
    gate = make_gate("read")
    cache.unpack(handles[2])  # fetches what comes before it
    assert residencies(handles) == [Residency.ABSENT, Residency.FETCHING, Residency.READY]
    newer = packed(cache, 3)  # passes the arriving one over
    gate.open()
    assert torch.equal(cache.unpack(handles[1]), values(1))
    newer += packed(cache, 3)
    settle(cache)
    assert residencies(handles) == [Residency.ABSENT] * 3
    assert cache.kept_nbytes <= 2 * NBYTES


def test_backward_finds_the_next_ones_on_their_way(make_cache):
    cache = make_cache(3 * NBYTES)
    handles = packed(cache, 8)
    settle(cache)
    while handles:
        handle = handles.pop()
        seed = len(handles)
        assert torch.equal(cache.unpack(handle), values(seed))
        del handle
        settle(cache)
        arriving = [earlier.part.unit.residency for earlier in handles[-2:]]
        assert Residency.ABSENT not in arriving
        assert cache.kept_nbytes <= 3 * NBYTES
    assert cache.kept_nbytes == 0


def test_a_storage_may_die_while_others_are_fetched(make_cache, monkeypatch):
    cache = make_cache(4 * NBYTES)
    handles = packed(cache, 8)
    settle(cache)
    whole = cache.spiller._fetch

    def fetch(storage):
        if handles:
            del handles[:2]  # as the garbage collector may do at any moment
        whole(storage)

    last = handles.pop()
    del handles[4:]
    monkeypatch.setattr(cache.spiller, "_fetch", fetch)
    assert torch.equal(cache.unpack(last), values(7))


def test_leaving_tensors_hold_the_training_thread_up_when_they_are_too_many(
    make_cache, make_gate, journal
):
    cache = make_cache(2 * NBYTES)
    gate = make_gate("write")
    handles = packed(cache, 4)
    assert cache.kept_nbytes == 4 * NBYTES
    assert not stalls(journal)
    journal.on_stall = gate.open
    handles += [cache.pack(values(4))]
    assert cache.kept_nbytes <= 4 * NBYTES
    assert (stalls(journal)[0].role, stalls(journal)[0].reason) == ("activation", "full")
    for seed, handle in reversed(list(enumerate(handles))):
        assert torch.equal(cache.unpack(handle), values(seed))


def test_a_late_tensor_is_a_stall_that_names_it(make_cache, make_gate, journal):
    cache = make_cache(LEAVES_NBYTES)
    handle = cache.pack(values(0))
    settle(cache)
    gate = make_gate("read")
    journal.on_stall = gate.open
    assert torch.equal(cache.unpack(handle), values(0))
    (stall,) = stalls(journal)
    assert (stall.key, stall.lane, stall.reason) == ("saved 0", "file→host", "late")


def test_a_tensor_on_its_way_out_is_read_from_memory(make_cache, make_gate, journal):
    cache = make_cache(LEAVES_NBYTES)
    gate = make_gate("write")
    tensor = values(1)
    handle = cache.pack(tensor)
    assert gate.begun.wait(PATIENCE_S)
    assert handle.part.unit.residency is Residency.WRITING
    assert cache.unpack(handle).data_ptr() == tensor.data_ptr()
    assert journal.totals.read_nbytes == 0


def test_changes_of_residency_are_recorded(make_cache, journal):
    cache = make_cache(0)
    handle = cache.pack(values(1))
    settle(cache)
    cache.unpack(handle)
    changes = [
        (event.old, event.new)
        for event in journal.recorder.events
        if isinstance(event, ResidencyChange)
    ]
    states = ["ready", "writing", "absent", "fetching", "ready"]
    assert changes == list(itertools.pairwise(states))
