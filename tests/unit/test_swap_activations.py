"""Saved tensors come back as they were saved, and go when nobody needs them."""

import gc
import itertools
import threading

import pytest
import torch
from torch import nn

from offload.allocator.errors import CapacityError, TierIOError
from offload.swap.activations import ActivationCache
from offload.swap.census import storage_key
from offload.swap.homes import FileHome
from offload.swap.residency import Residency
from offload.tiers.events import ListRecorder, ResidencyChange, Stall
from offload.tiers.filetier import FileTier, Lanes
from offload.tiers.journal import Journal

NUMEL = 20_000
NBYTES = 4 * NUMEL
LEAVES_NBYTES = NBYTES // 2  # a limit beyond which one tensor leaves without holding pack up
PATIENCE_S = 60


class Waits(Journal):
    """Tells ``on_stall`` when the training thread is about to wait."""

    on_stall = staticmethod(lambda: None)

    def stall(self, *args):
        self.on_stall()
        return super().stall(*args)


class FakeWeights:
    """Stands for the weight swapper: notes what backward asked for."""

    def __init__(self):
        self.used = []

    def use(self, names):
        self.used += names


@pytest.fixture
def journal():
    return Waits(ListRecorder())


@pytest.fixture
def scratch(tmp_path, journal):
    lanes = Lanes(journal)
    with FileTier(tmp_path, None, lanes) as scratch:
        yield scratch
    lanes.close()


@pytest.fixture
def make_cache(scratch, journal):
    def make(limit_nbytes, min_nbytes=1024):
        return ActivationCache(
            [FileHome(scratch)],
            journal,
            limit_nbytes=limit_nbytes,
            min_nbytes=min_nbytes,
            weights=FakeWeights(),
        )

    return make


class Gate:
    """Holds the scratch file's reads or writes until it is opened."""

    def __init__(self, scratch, monkeypatch, call):
        self.begun, self._open = threading.Event(), threading.Event()
        whole = getattr(scratch.file, call)

        def held(*args):
            self.begun.set()
            assert self._open.wait(PATIENCE_S)
            whole(*args)

        monkeypatch.setattr(scratch.file, call, held)

    def open(self):
        self._open.set()


@pytest.fixture
def make_gate(scratch, monkeypatch):
    gates = []

    def make(call):
        gates.append(Gate(scratch, monkeypatch, call))
        return gates[-1]

    yield make
    for gate in gates:
        gate.open()


def values(seed, numel=NUMEL):
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def packed(cache, count):
    """Handles of ``count`` tensors that nobody else holds."""
    return [cache.pack(values(seed)) for seed in range(count)]


def residencies(handles):
    return [handle.part.unit.residency for handle in handles]


def blocks(scratch):
    return scratch.arena.stats().current_count


def settle(cache):
    """All transfers end, and the cache takes note."""
    cache.spiller.homes[0].tier.lanes.settle()
    cache.pack(torch.zeros(1))


# While they fit.


def test_what_fits_is_not_copied(make_cache):
    cache = make_cache(10 * NBYTES)
    tensor = values(1)
    handle = cache.pack(tensor)
    back = cache.unpack(handle)
    assert back.data_ptr() == tensor.data_ptr()
    assert torch.equal(back, values(1))
    assert cache.kept_nbytes == cache.spiller.peak_nbytes == NBYTES


def test_views_of_one_storage_count_once(make_cache):
    cache = make_cache(10 * NBYTES)
    base = values(1)
    handles = [cache.pack(view) for view in (base, base[10:], base.view(100, 200).t(), base)]
    assert cache.kept_nbytes == NBYTES
    del handles[:3]
    gc.collect()
    assert cache.kept_nbytes == NBYTES
    handles.clear()
    gc.collect()
    assert cache.kept_nbytes == 0


def test_a_view_counts_the_storage_that_it_keeps_alive(make_cache):
    cache = make_cache(10 * NBYTES)
    handle = cache.pack(values(1)[:5])
    assert cache.kept_nbytes == handle.part.nbytes == NBYTES


def test_memory_that_was_freed_and_used_again_is_a_new_storage(make_cache):
    cache = make_cache(100 * NBYTES)
    for seed in range(20):
        handle = cache.pack(values(seed))
        assert torch.equal(cache.unpack(handle), values(seed))
        assert cache.kept_nbytes == NBYTES
        del handle


def test_small_tensors_stay_and_do_not_count(make_cache):
    cache = make_cache(0, min_nbytes=1024)
    small = torch.arange(255.0)
    handle = cache.pack(small)
    assert cache.unpack(handle).data_ptr() == small.data_ptr()
    assert cache.kept_nbytes == 0
    assert cache.pack(torch.arange(256.0)).part.unit.nbytes == 1024


def test_small_tensors_leave_together_when_there_are_many(make_cache, journal):
    cache = make_cache(0, min_nbytes=64 << 10)
    tensors = [values(seed, 1000) for seed in range(300)]
    base = tensors[0].clone()
    part = cache.pack(base[5:])
    handles = [cache.pack(base), *(cache.pack(tensor.clone()) for tensor in tensors[1:])]
    assert part.part is handles[0].part
    del base
    settle(cache)
    gone = [handle.part.memory is None for handle in handles]
    assert 250 < gone.count(True) < 300  # the others wait for the next batch
    assert len({handle.part.unit for handle, left in zip(handles, gone, strict=True) if left}) == 1
    del handles[1:50]  # the batch stays for the others
    for index, handle in zip([0, *range(50, 300)], handles, strict=True):
        assert torch.equal(cache.unpack(handle), tensors[index])
    assert torch.equal(cache.unpack(part), tensors[0][5:])
    moves = [event for event in journal.recorder.events if hasattr(event, "src")]
    assert [move.key for move in moves] == ["saved 0", "saved 0"]
    handles.clear()
    del part, handle
    settle(cache)
    assert cache.kept_nbytes == 0
    assert blocks(cache.spiller.homes[0].tier) == 0


def test_dead_small_tensors_are_not_kept_for_their_batch(make_cache):
    cache = make_cache(0, min_nbytes=64 << 10)
    for seed in range(400):
        cache.pack(values(seed, 1000))
    assert cache._batch_nbytes <= 1 << 20
    assert cache.kept_nbytes == 0


def test_weights_stay_and_are_asked_for(make_cache):
    cache = make_cache(0)
    weight = nn.Parameter(values(1).view(100, 200))
    cache.fixed.know_weights({storage_key(weight): "layer.weight"})
    handles = [cache.pack(weight), cache.pack(weight.detach().t())]
    assert cache.kept_nbytes == 0
    assert cache.weights.used == []
    assert torch.equal(cache.unpack(handles[1]), weight.t())
    assert cache.unpack(handles[0]).data_ptr() == weight.data_ptr()
    assert cache.weights.used == ["layer.weight", "layer.weight"]


def test_parameters_and_buffers_of_a_model_stay(make_cache):
    cache = make_cache(0)
    model = nn.BatchNorm1d(NUMEL)
    model.register_buffer("table", values(1))
    cache.fixed.know_model(model)
    for tensor in (
        model.weight,
        model.table,
        model.running_mean[5:],
        model.table.view(100, 200).t(),
    ):
        handle = cache.pack(tensor.detach())
        assert handle.part is None
        assert cache.unpack(handle).data_ptr() == tensor.data_ptr()
    model.table = values(2)  # looked up again for each pass
    cache.begin_pass("model")
    assert cache.pack(model.table).part is None
    handle = cache.pack(model.table)
    model.table.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cache.unpack(handle)


class Wrapped(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(200).to_sparse(),
        values(1).as_subclass(Wrapped),
        torch.empty(NUMEL, device="meta"),
    ],
    ids=["sparse", "subclass", "meta"],
)
def test_tensors_that_are_more_than_their_bytes_are_left_alone(make_cache, tensor):
    cache = make_cache(0)
    back = cache.unpack(cache.pack(tensor))
    assert cache.kept_nbytes == 0
    assert type(back) is type(tensor)
    assert (back.layout, back.device, back.is_conj(), back.is_neg()) == (
        tensor.layout,
        tensor.device,
        tensor.is_conj(),
        tensor.is_neg(),
    )
    if not tensor.is_meta:
        assert torch.equal(back.to_dense(), tensor.to_dense())
    (reason,) = cache.left_alone
    assert (cache.left_alone[reason].count, cache.left_alone[reason].nbytes > 0) == (1, True)
    cache.pack(tensor)
    (notice,) = cache.journal.notices  # told once, counted at the end
    assert notice.endswith(f"stays in memory: it is {reason}")
    cache.close()
    assert "2 saved tensors" in cache.journal.notices[1]


@pytest.mark.parametrize("seed", range(3))
def test_a_slice_of_something_large_does_not_move_all_of_it(make_cache, seed):
    cache = make_cache(0)
    data = torch.zeros(5 << 20)
    handle = cache.pack(data[seed * 100 : seed * 100 + 50])
    assert list(cache.left_alone) == ["a small slice of a large storage"]
    assert cache.unpack(handle).data_ptr() == data.data_ptr() + 400 * seed
    assert cache.kept_nbytes == 0


# Beyond the limit.

VIEWS = {
    "whole": lambda base: base,
    "offset": lambda base: base[1000:],
    "transposed": lambda base: base.view(100, 200).t(),
    "strided": lambda base: base[5::7],
    "expanded": lambda base: base[:50].view(50, 1).expand(50, 30),
    "scalar": lambda base: base[77],
    "empty": lambda base: base[:0],
    "conjugate": lambda base: torch.view_as_complex(base.view(-1, 2)).conj(),
    "negative": lambda base: torch.view_as_complex(base.view(-1, 2)).conj().imag,
    "complex": lambda base: torch.view_as_complex(base.view(-1, 2))[3:].t(),
    "bytes": lambda base: base.view(torch.uint8)[3:77],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_every_view_comes_back_with_its_shape_and_strides(make_cache, view):
    cache = make_cache(0)
    base = values(1)
    expected = view(base).clone()
    shape, strides = view(base).shape, view(base).stride()
    offset = view(base).storage_offset()
    kind = view(base).dtype, view(base).is_conj(), view(base).is_neg()
    handle = cache.pack(view(base))
    del base
    settle(cache)
    assert handle.part.unit.residency is Residency.ABSENT
    back = cache.unpack(handle)
    assert torch.equal(back, expected)
    assert (back.shape, back.stride(), back.storage_offset()) == (shape, strides, offset)
    assert (back.dtype, back.is_conj(), back.is_neg()) == kind


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64]
)
def test_every_type_comes_back(make_cache, dtype):
    cache = make_cache(0)
    tensor = (values(1) * 9).to(dtype)
    handle = cache.pack(tensor.clone())
    settle(cache)
    back = cache.unpack(handle)
    assert back.dtype == dtype
    assert torch.equal(back, tensor)


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


def stalls(journal):
    return [event for event in journal.recorder.events if isinstance(event, Stall)]


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


# When handles die.


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


# Changed in place.


@pytest.mark.parametrize("limit_nbytes", [LEAVES_NBYTES, 10 * NBYTES], ids=["leaving", "kept"])
def test_a_tensor_changed_in_place_is_an_error(make_cache, make_gate, limit_nbytes):
    cache = make_cache(limit_nbytes)
    gate = make_gate("write")
    tensor = values(1)
    handle = cache.pack(tensor)
    tensor.add_(1)
    with pytest.raises(RuntimeError, match=r"modified by an inplace .* version 1; expected"):
        cache.unpack(handle)
    gate.open()
    settle(cache)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cache.unpack(handle)


def test_a_change_through_another_view_is_an_error_too(make_cache):
    cache = make_cache(10 * NBYTES)
    base = values(1)
    handle = cache.pack(base[:100])
    base[5000:].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cache.unpack(handle)


def test_a_small_tensor_or_weight_changed_in_place_is_an_error(make_cache):
    cache = make_cache(0)
    small = torch.zeros(3)
    handle = cache.pack(small)
    small.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cache.unpack(handle)


def test_a_change_after_the_bytes_have_left_is_an_error_too(make_cache):
    """As in plain autograd, which knows of no leaving."""
    cache = make_cache(0)
    tensor = values(1)
    handle = cache.pack(tensor)
    settle(cache)
    assert handle.part.unit.residency is Residency.ABSENT
    tensor.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cache.unpack(handle)


def test_each_view_has_the_version_at_which_it_was_saved(make_cache):
    cache = make_cache(10 * NBYTES)
    tensor = values(1)
    before = cache.pack(tensor)
    tensor.add_(1)
    after = cache.pack(tensor)
    assert torch.equal(cache.unpack(after), values(1) + 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cache.unpack(before)


@pytest.mark.parametrize("limit_nbytes", [0, 10 * NBYTES], ids=["leaving", "kept"])
def test_a_restored_tensor_changed_in_place_is_an_error(make_cache, limit_nbytes):
    cache = make_cache(limit_nbytes)
    handles = packed(cache, 1)
    settle(cache)
    cache.unpack(handles[0]).add_(1)  # as a custom backward might
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cache.unpack(handles[0])


def test_changing_what_was_saved_through_grad_fn_is_an_error(make_cache):
    cache = make_cache(0)
    with torch.autograd.graph.saved_tensors_hooks(cache.pack, cache.unpack):
        result = values(1).requires_grad_().exp()
    settle(cache)
    assert torch.equal(result.grad_fn._saved_result, values(1).exp())
    result.grad_fn._saved_result.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


# One storage, one handle, for its whole life.


def writes(journal):
    journal.recorder.flush()
    return [event.nbytes for event in journal.recorder.events if getattr(event, "src", "") == "host"
            and event.nbytes]  # fmt: skip


def test_a_storage_that_is_saved_again_after_it_has_left_moves_once(make_cache, journal):
    cache = make_cache(0)
    tensor = values(1)
    first = cache.pack(tensor)
    settle(cache)
    assert first.part.unit.residency is Residency.ABSENT
    second = cache.pack(tensor[100:])
    assert second.part is first.part
    settle(cache)
    settle(cache)
    assert first.part.unit.residency is Residency.ABSENT
    assert writes(journal) == [NBYTES]
    del tensor
    assert torch.equal(cache.unpack(second), values(1)[100:])
    assert torch.equal(cache.unpack(first), values(1))


def test_what_the_user_still_holds_is_not_read_back(make_cache, journal):
    cache = make_cache(0)
    tensor = values(1)
    handle = cache.pack(tensor)
    settle(cache)
    assert cache.unpack(handle).data_ptr() == tensor.data_ptr()
    assert journal.totals.read_nbytes == 0


@pytest.mark.parametrize("change", ["data", "numpy", "counted"])
def test_a_storage_that_was_changed_and_saved_again_is_written_again(make_cache, journal, change):
    cache = make_cache(0)
    tensor = values(1)
    first = cache.pack(tensor)
    settle(cache)
    if change == "data":
        tensor.data.add_(1)
    elif change == "numpy":
        tensor.numpy()[:] += 1
    else:
        tensor.add_(1)
    second = cache.pack(tensor)
    for _ in range(3):
        settle(cache)
    assert second.part.unit.residency is Residency.ABSENT
    assert writes(journal) == [NBYTES, NBYTES]
    del tensor
    assert torch.equal(cache.unpack(second), values(1) + 1)
    if change == "counted":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            cache.unpack(first)


def test_a_storage_that_is_changed_while_it_leaves_and_saved_again(make_cache, make_gate):
    cache = make_cache(LEAVES_NBYTES)
    gate = make_gate("write")
    tensor = values(1)
    handle = cache.pack(tensor)
    assert gate.begun.wait(PATIENCE_S)
    tensor.add_(1)
    changed = cache.pack(tensor)
    assert changed.part is handle.part
    gate.open()
    for _ in range(3):
        settle(cache)
    del tensor
    assert changed.part.unit.residency is Residency.ABSENT
    assert torch.equal(cache.unpack(changed), values(1) + 1)


def test_a_storage_that_is_saved_again_while_it_arrives(make_cache, make_gate, monkeypatch):
    cache = make_cache(4 * NBYTES)
    tensor = values(1)
    handles = [cache.pack(tensor), *(cache.pack(values(seed)) for seed in range(2, 7))]
    settle(cache)
    assert handles[0].part.unit.residency is Residency.ABSENT
    gate = make_gate("read")
    monkeypatch.setattr(handles[0].part.__class__, "living", lambda _self: None)
    cache.spiller._fetch(handles[0].part.unit)
    assert handles[0].part.unit.residency is Residency.FETCHING
    again = cache.pack(tensor)
    assert again.part is handles[0].part
    assert cache.unpack(handles[0]).data_ptr() == tensor.data_ptr()
    gate.open()
    settle(cache)
    handles.clear()
    del again
    settle(cache)
    assert cache.kept_nbytes == 0
    assert blocks(cache.spiller.homes[0].tier) == 0


def test_what_came_back_and_is_saved_by_another_graph_moves_once(make_cache, journal):
    """As in double backward: its new storage stands for the same bytes."""
    cache = make_cache(0)
    handle = cache.pack(values(1))
    settle(cache)
    back = cache.unpack(handle)
    again = cache.pack(back)
    assert again.part is handle.part
    del back
    cache.pack(values(2))
    for _ in range(3):
        settle(cache)
    assert writes(journal) == [NBYTES, NBYTES]
    assert torch.equal(cache.unpack(again), values(1))


def test_views_of_a_storage_that_lives_long_do_not_pile_up(make_cache):
    cache = make_cache(10 * NBYTES)
    tensor = values(1)
    kept = cache.pack(tensor)
    for _ in range(500):
        cache.pack(tensor)
    assert len(kept.part.views) < 50


def test_retained_graphs_stay_within_the_limit(make_cache):
    """Nothing dies in a backward that retains its graph: what was used is given up again."""
    cache = make_cache(3 * NBYTES)
    handles = packed(cache, 12)
    for _ in range(2):
        for seed, handle in reversed(list(enumerate(handles))):
            settle(cache)
            assert torch.equal(cache.unpack(handle), values(seed))
            assert cache.kept_nbytes <= 7 * NBYTES  # with what is being written


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
