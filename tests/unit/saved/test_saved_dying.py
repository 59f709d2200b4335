"""What nobody needs any more goes, in flight too; errors are told, and nothing is lost."""

import gc

import pytest
import torch
from saved_tensors import (
    LEAVES_NBYTES,
    NBYTES,
    PATIENCE_S,
    blocks,
    packed,
    residencies,
    settle,
    stalls,
    values,
)

from offload.allocator.errors import CapacityError, TierIOError
from offload.swap.residency import Residency


def test_a_dead_handle_gives_its_memory_back(make_cache):
    cache = make_cache(10 * NBYTES)
    handle = cache.pack(values(1))
    del handle
    assert cache.kept_nbytes == 0


def test_a_dead_handle_gives_its_block_back(make_cache, scratch):
    cache = make_cache(0)
    handle = cache.pack(values(1))
    settle(cache)
    assert blocks(scratch) == 1
    del handle
    settle(cache)
    assert blocks(scratch) == 0
    assert cache.kept_nbytes == 0


@pytest.mark.parametrize("call", ["write", "read"])
def test_a_handle_that_dies_in_flight_leaves_nothing_behind(make_cache, scratch, make_gate, call):
    cache = make_cache(NBYTES)
    handles = packed(cache, 2)
    settle(cache)
    assert residencies(handles) == [Residency.ABSENT, Residency.READY]
    if call == "read":
        del handles[1]
    gate = make_gate(call)
    if call == "write":
        handles.append(cache.pack(values(2)))  # the second leaves
    else:
        cache.spiller._fetch(handles[0].part.unit)
    assert gate.begun.wait(PATIENCE_S)
    handles.clear()
    gc.collect()
    cache.pack(torch.zeros(1))
    assert blocks(scratch) > 0  # still in use by the transfer
    other = scratch.allocate(NBYTES)
    gate.open()
    settle(cache)
    other.release()
    assert blocks(scratch) == 0
    assert cache.kept_nbytes == 0


@pytest.mark.parametrize("call", ["write", "read"])
def test_memory_outlives_handle_and_cache_until_its_transfer_has_ended(make_cache, make_gate, call):
    """Jobs know it by its address only: freed memory would be read, or written over."""
    cache = make_cache(LEAVES_NBYTES)
    handle = cache.pack(values(1))
    if call == "read":
        settle(cache)
        gate = make_gate(call)
        cache.spiller._fetch(handle.part.unit)
    else:
        settle(cache)
        gate = make_gate(call)
        handle = cache.pack(values(1))
    assert gate.begun.wait(PATIENCE_S)
    transfer = handle.part.unit.transfer
    memory = handle.part.memory or handle.part.unit.arriving
    lanes = cache.spiller.homes[0].tier.lanes
    del handle, cache
    gc.collect()
    assert transfer.owner is memory
    gate.open()
    lanes.settle()
    assert transfer.owner is None


@pytest.mark.parametrize("limit_nbytes", [0, 100 * NBYTES])
@pytest.mark.parametrize("function", [torch.exp, torch.sigmoid, torch.relu])
def test_a_graph_that_nobody_runs_backward_on_is_freed(make_cache, scratch, function, limit_nbytes):
    """These functions save their own result: its handle must not keep the graph alive."""
    cache = make_cache(limit_nbytes)
    with torch.autograd.graph.saved_tensors_hooks(cache.pack, cache.unpack):
        result = function(values(1).requires_grad_())
    assert cache.kept_nbytes + blocks(scratch) > 0
    del result
    settle(cache)
    assert cache.kept_nbytes == 0
    assert blocks(scratch) == 0


def test_a_small_graph_that_nobody_runs_backward_on_is_freed(make_cache):
    """Tensors that stay must not keep their graph alive either."""
    cache = make_cache(0)
    leaf = values(1, 10).requires_grad_()
    freed = []
    with torch.autograd.graph.saved_tensors_hooks(cache.pack, cache.unpack):
        result = Noted.apply(leaf.exp(), freed).exp()
    assert result.numel() == 10
    del result
    gc.collect()
    assert freed == ["context"]


class Noted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, freed):
        class Token:
            def __del__(self):
                freed.append("context")

        ctx.token = Token()
        return tensor.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


# Errors and the end.


def test_what_no_home_takes_stays_while_there_is_room(make_cache, scratch, monkeypatch):
    def refuse(_nbytes):
        raise CapacityError("the disk is full")

    cache = make_cache(2 * NBYTES)
    monkeypatch.setattr(scratch, "allocate", refuse)
    handles = packed(cache, 4)
    with pytest.raises(CapacityError, match=r"400000 bytes\) are .* too many .*the disk is full"):
        cache.pack(values(4))
    for seed, handle in enumerate(handles):
        assert torch.equal(cache.unpack(handle), values(seed))


def test_a_failed_write_is_raised_and_the_tensor_stays(make_cache, scratch, monkeypatch):
    def refuse(*_args):
        raise TierIOError(28, "no room")

    cache = make_cache(LEAVES_NBYTES)
    monkeypatch.setattr(scratch.file, "write", refuse)
    handle = cache.pack(values(1))
    with pytest.raises(TierIOError, match="no room"):
        settle(cache)
    assert torch.equal(cache.unpack(handle), values(1))
    assert (handle.part.unit.residency, blocks(scratch)) == (Residency.READY, 0)
    del handle
    scratch.lanes.drain()  # told once; its traceback goes
    gc.collect()
    cache.pack(torch.zeros(1))
    assert cache.kept_nbytes == 0
    assert blocks(scratch) == 0


def test_a_failed_read_is_raised_each_time(make_cache, scratch, monkeypatch):
    def refuse(*_args):
        raise TierIOError(5, "bad disk")

    cache = make_cache(0)
    handle = cache.pack(values(1))
    settle(cache)
    monkeypatch.setattr(scratch.file, "read", refuse)
    for _ in range(2):
        with pytest.raises(TierIOError, match="bad disk"):
            cache.unpack(handle)


def test_close_waits_for_what_is_leaving_and_keeps_what_lives(make_cache, make_gate, journal):
    cache = make_cache(LEAVES_NBYTES)
    gate = make_gate("write")
    handles = packed(cache, 1)
    journal.on_stall = gate.open
    cache.close()
    assert residencies(handles) == [Residency.ABSENT]
    assert stalls(journal)[0].reason == "drain"
    assert torch.equal(cache.unpack(handles[0]), values(0))
