"""While saved tensors fit in memory they stay as they are."""

import gc

import pytest
import torch
from saved_tensors import NBYTES, NUMEL, blocks, settle, values
from torch import nn

from offload.swap.census import storage_key


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
