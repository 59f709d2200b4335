"""Saved tensors that are changed in place, or saved again: errors, and one move for one storage."""

import pytest
import torch
from saved_tensors import LEAVES_NBYTES, NBYTES, PATIENCE_S, blocks, packed, settle, values, writes

from offload.swap.residency import Residency


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
