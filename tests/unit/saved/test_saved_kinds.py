"""Tensors of every kind come back as they were, or are left alone with a reason."""

import pytest
import torch
from saved_tensors import NUMEL, settle, values
from torch import nn
from torch.nn import functional as F

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


# Saved by a custom Function, as all the kinds that PyTorch's own operations rarely save.


class Keeping(torch.autograd.Function):
    """Saves anything, and shows in backward what it got back."""

    @staticmethod
    def forward(ctx, tensor, saved, returned):
        ctx.save_for_backward(saved)
        ctx.returned = returned
        return tensor.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.returned += ctx.saved_tensors
        return gradient, None, None


def through_backward(cache, make):
    """What backward gets of ``make()``, once nobody else holds it."""
    returned = []
    with torch.autograd.graph.saved_tensors_hooks(cache.pack, cache.unpack):
        result = Keeping.apply(torch.zeros(1, requires_grad=True), make(), returned)
    settle(cache)
    result.sum().backward()
    return returned[0]


def matrix():
    return values(1).view(200, 100)


def complex_matrix():
    return torch.view_as_complex(values(1).view(100, 100, 2))


MOVED = {
    "float8": lambda: matrix().to(torch.float8_e4m3fn),
    "float8 view": lambda: matrix().to(torch.float8_e5m2).t()[3:],
    "float8 scales": lambda: matrix().abs().to(torch.float8_e8m0fnu),
    "bits": lambda: matrix().view(torch.uint8).view(torch.bits8),
    "zero-size view": lambda: matrix()[:, :0],
    "zero stride": lambda: values(1).view(200, 100, 1).expand(200, 100, 5),
    "overlapping": lambda: values(1).as_strided((100, 100), (3, 1)),
    "non-contiguous": lambda: matrix().t()[::3, 5:],
    "complex": complex_matrix,
    "conjugate": lambda: complex_matrix().conj(),
    "negative": lambda: complex_matrix().conj().imag,
    "negative conjugate": lambda: torch._neg_view(complex_matrix()).conj(),
}


def layout(tensor):
    return (
        type(tensor),
        tensor.dtype,
        tensor.shape,
        tensor.stride(),
        tensor.storage_offset(),
        tensor.is_conj(),
        tensor.is_neg(),
    )


def bits(tensor):
    """Its values as bytes, whether or not the type can be compared."""
    raw = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    return tensor.resolve_conj().resolve_neg().view(raw)


@pytest.mark.parametrize("make", MOVED.values(), ids=MOVED)
def test_kinds_that_leave_come_back_the_same(make_cache, scratch, make):
    cache = make_cache(0)
    back = through_backward(cache, make)
    assert layout(back) == layout(make())
    assert torch.equal(bits(back), bits(make()))
    assert not cache.left_alone
    assert cache.journal.totals.written_nbytes == make().untyped_storage().nbytes()
    assert cache.journal.totals.read_nbytes == cache.journal.totals.written_nbytes


LEFT = {
    "per tensor": (
        "quantised",
        lambda: torch.quantize_per_tensor(matrix(), 0.1, 3, torch.qint8),
    ),
    "per channel": (
        "quantised",
        lambda: torch.quantize_per_channel(
            matrix(), torch.arange(1.0, 201), torch.arange(200), 0, torch.quint8
        ),
    ),
    "coo": ("of layout torch.sparse_coo", lambda: matrix().relu().to_sparse()),
    "hybrid": ("of layout torch.sparse_coo", lambda: matrix().relu().to_sparse(1)),
    "csr": ("of layout torch.sparse_csr", lambda: matrix().relu().to_sparse_csr()),
    "csc": ("of layout torch.sparse_csc", lambda: matrix().relu().to_sparse_csc()),
    "bsr": ("of layout torch.sparse_bsr", lambda: matrix().relu().to_sparse_bsr((2, 2))),
    "mkldnn": ("of layout torch._mkldnn", lambda: matrix().to_mkldnn()),
    "symbolic zeros": (
        "a stand-in without bytes",
        lambda: torch._efficientzerotensor((200, 100), dtype=torch.float32),
    ),
}


def dense(tensor):
    if tensor.is_quantized:
        return tensor.dequantize()
    return tensor.to_dense() if tensor.layout is not torch.strided else tensor.clone()


@pytest.mark.filterwarnings("ignore:Sparse")  # in beta
@pytest.mark.filterwarnings("ignore:.*deprecated")  # quantised tensors
@pytest.mark.parametrize(("reason", "make"), LEFT.values(), ids=LEFT)
def test_kinds_that_stay_are_the_same_and_recorded(make_cache, reason, make):
    cache = make_cache(0)
    back, right = through_backward(cache, make), make()
    assert (back.layout, back.dtype, back.shape) == (right.layout, right.dtype, right.shape)
    assert back.is_quantized == right.is_quantized
    if back.is_quantized:
        assert back.qscheme() == right.qscheme()
        assert torch.equal(back.int_repr(), right.int_repr())
    assert torch.equal(dense(back), dense(right))
    assert cache.kept_nbytes == cache.journal.totals.written_nbytes == 0
    left = cache.left_alone[reason]
    assert (list(cache.left_alone), left.count) == ([reason], 1)
    assert left.nbytes == right.numel() * right.element_size()
    (notice,) = cache.journal.notices
    assert notice.endswith(f"(200x100, {right.dtype}) stays in memory: it is {reason}")


@pytest.mark.filterwarnings("ignore:.*deprecated")  # quantised tensors
@pytest.mark.parametrize("name", ["per tensor", "coo"])
def test_what_stays_and_is_changed_in_place_is_an_error(make_cache, name):
    cache = make_cache(0)
    tensor = LEFT[name][1]()
    handle = cache.pack(tensor)
    tensor.copy_(LEFT[name][1]())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cache.unpack(handle)


def test_an_inference_tensor_stays(make_cache):
    cache = make_cache(0)
    with torch.inference_mode():
        tensor = values(1)
        assert torch.equal(cache.unpack(cache.pack(tensor)), values(1))
    assert list(cache.left_alone) == ["an inference tensor"]


# Nested tensors, by what PyTorch's own operations save of them.


def nested_step(shape, context):
    """Gradients of one step over two sequences of different lengths."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 64)
    x = torch.nested.nested_tensor(
        [torch.randn(length, 64) for length in (40, 70)], layout=shape, requires_grad=True
    )
    with context:
        y = F.gelu(linear(x)) * x.sin()
        loss = y.values().sum() if shape is torch.jagged else sum(one.sum() for one in y.unbind())
    loss.backward()
    return [*x.grad.unbind(), linear.weight.grad, linear.bias.grad]


@pytest.mark.filterwarnings("ignore:.*nested tensors")  # a prototype
@pytest.mark.parametrize("shape", [torch.jagged, torch.strided], ids=["jagged", "strided"])
def test_nested_tensors_train_the_same(make_cache, shape):
    cache = make_cache(0)
    hooks = torch.autograd.graph.saved_tensors_hooks(cache.pack, cache.unpack)
    right = nested_step(shape, torch.enable_grad())
    for one, other in zip(nested_step(shape, hooks), right, strict=True):
        assert torch.equal(one, other)
    if shape is torch.jagged:
        assert not cache.left_alone
        assert cache.journal.totals.written_nbytes >= 3 * 110 * 64 * 4
    else:
        assert (
            "(2 tensors, torch.float32) stays in memory: it is nested" in cache.journal.notices[0]
        )
