"""Tensors of every kind come back as they were, or are left alone with a reason."""

import pytest
import torch
from saved_tensors import NUMEL, settle, values

from offload.swap.residency import Residency


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
