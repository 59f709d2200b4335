"""What hooks see and must not do: PyTorch's suite; see ``tests/peers/README.md``."""

import gc
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from swapped_rows import NBYTES, ROWS, WIDTH, ones, written
from torch.utils.checkpoint import checkpoint

from offload import ActivationSwap
from offload.allocator.errors import TierIOError


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
def test_saved_through_grad_fn(swap, dtype):
    x = torch.randn(ROWS, WIDTH, dtype=dtype, requires_grad=True)
    with swap:
        y = x * x
    saved = y.grad_fn._saved_self
    assert torch.equal(saved, x)
    assert torch.equal(y.grad_fn._saved_other, x)
    assert (saved.dtype, saved.layout) == (x.dtype, x.layout)
    assert written(swap) == x.nbytes
    y.abs().sum().backward()


def test_a_saved_result_knows_its_function(swap):
    x = ones()
    with swap:
        y = x.exp()
    assert y.grad_fn._saved_result.grad_fn is y.grad_fn
    y.sum().backward()
    assert torch.equal(x.grad, y)


def test_sparse_tensors_stay_and_are_right(swap):
    numbers = torch.tensor([1.0, 2.0, 3.0])
    x = torch.sparse_coo_tensor([[1, 1, 3]], numbers, requires_grad=True, check_invariants=True)
    with swap:
        y = x * x
        assert y.grad_fn._saved_self.layout is torch.sparse_coo
    y.to_dense().sum().backward()
    assert torch.equal(x.grad.to_dense(), 2 * x.detach().to_dense())
    (reason,) = swap.cache.left_alone
    assert "sparse_coo" in reason


class SavesALeaf(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.exp().clone().detach_().requires_grad_())
        return x.exp()

    @staticmethod
    def backward(ctx, gradient):
        (saved,) = ctx.saved_tensors
        assert saved.is_leaf
        assert saved.requires_grad
        return gradient * saved.detach()


def test_a_custom_function_saves_a_leaf_of_its_own(swap):
    x = ones()
    with swap:
        loss = SavesALeaf.apply(x).sum()
    loss.backward()
    assert torch.equal(x.grad, x.exp())


def test_wrapped_numbers_are_not_saved_tensors(swap, monkeypatch):
    monkeypatch.setattr(swap.cache, "pack", pytest.fail)
    monkeypatch.setattr(swap.cache, "unpack", pytest.fail)
    x = ones()
    with swap:
        (x * 3).sum().backward()
    assert torch.equal(x.grad, torch.full((ROWS, WIDTH), 3.0))


def test_each_saved_tensor_is_packed_and_unpacked_once(swap, monkeypatch):
    calls = []
    pack, unpack = swap.cache.pack, swap.cache.unpack
    monkeypatch.setattr(swap.cache, "pack", lambda one: calls.append("pack") or pack(one))
    monkeypatch.setattr(swap.cache, "unpack", lambda one: calls.append("unpack") or unpack(one))
    x, constant = ones(), torch.ones(ROWS, WIDTH)
    with swap:
        y = x * constant
    assert calls == ["pack"]
    y.sum().backward()
    assert calls == ["pack", "unpack"]


def test_packing_changes_nothing_of_a_tensor(swap):
    """PyTorch raises if a pack hook modifies its input in place."""
    x = torch.randn(ROWS, WIDTH)
    before, version = x.clone(), x._version
    handle = swap.cache.pack(x)
    found = swap.cache.unpack(handle)
    assert torch.equal(found, before)
    assert torch.equal(x, before)
    assert x._version == found._version == version
    assert x.untyped_storage().nbytes() == NBYTES


def test_where_hooks_are_disabled_the_context_is_refused(swap):
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):  # noqa: SIM117
        with pytest.raises(RuntimeError, match="not here"), swap:
            pass
    with swap:
        loss = ones().exp().sum()  # as if nothing had been
    assert written(swap) == NBYTES
    loss.backward()


def test_inside_of_the_context_hooks_cannot_be_disabled(swap):
    with swap:
        with (
            pytest.raises(RuntimeError, match="not here"),
            torch.autograd.graph.disable_saved_tensors_hooks("not here"),
        ):
            pass
        loss = ones().exp().sum()
    assert written(swap) == NBYTES
    loss.backward()


def test_errors_come_out_of_forward_and_backward_as_they_are(swap, monkeypatch):
    def broken(*_args):
        raise TierIOError(5, "bad disk")

    (home,) = swap.cache.spiller.homes
    x = ones()
    with swap:
        loss = x.exp().sum()
    with monkeypatch.context() as patched:
        patched.setattr(home.tier.file, "read", broken)
        with pytest.raises(TierIOError, match="bad disk"):
            loss.backward(retain_graph=True)
    loss.backward()  # the bytes are still there
    assert torch.equal(x.grad, x.exp())
    del loss
    with monkeypatch.context() as patched, swap:
        patched.setattr(home.tier.file, "write", broken)
        with pytest.raises(TierIOError, match="bad disk"):
            x.exp()
    home.tier.lanes.drain()  # told once; its traceback goes
    gc.collect()
    with swap:
        loss = x.exp().sum()  # as if nothing had been
    x.grad = None
    loss.backward()
    assert torch.equal(x.grad, x.exp())


THREADS = 3


@pytest.fixture
def at_once():
    """Runs a function on several threads that take turns as often as can be."""

    def run(function):
        together = threading.Barrier(THREADS)

        def one(number):
            together.wait()
            return function(number)

        with ThreadPoolExecutor(THREADS) as pool:
            return [future.result() for future in [pool.submit(one, n) for n in range(THREADS)]]

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield run
    sys.setswitchinterval(before)


def wavy(x):
    for _ in range(12):
        x = torch.sin(x) * torch.cos(x) + 0.3
    return x.sum()


def gradients(loss, x, _number):
    return [torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(3)]


@pytest.mark.parametrize("in_flight", [0, "64KiB"])
def test_several_threads_run_backward_on_one_graph(tmp_path, at_once, in_flight):
    """As autograd's own threads for two devices do, and a TorchScript fork."""
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    (right,) = torch.autograd.grad(wavy(x), x)
    swap = ActivationSwap(limit=0, min_nbytes=0, in_flight=in_flight, nvme=tmp_path)
    with swap:
        loss = wavy(x)
    assert written(swap) > 0
    for found in at_once(partial(gradients, loss, x)):
        assert all(torch.equal(gradient, right) for gradient in found)
    del loss
    assert swap.cache.kept_nbytes == 0
    swap.close()


def test_several_threads_share_a_context(swap, at_once):
    """Each saves, and runs backward, within the one context that all of them enter."""
    inputs = torch.randn(THREADS, ROWS, WIDTH)

    def gradient(number):
        x = inputs[number].clone().requires_grad_()
        with swap:
            loss = wavy(x)
        return torch.autograd.grad(loss, x)[0]

    for number, found in enumerate(at_once(gradient)):
        x = inputs[number].clone().requires_grad_()
        assert torch.equal(found, torch.autograd.grad(wavy(x), x)[0])
    assert written(swap) > 0


def test_nested_checkpoints_and_higher_derivatives(swap):
    def region(function):
        return lambda x: checkpoint(function, x, use_reentrant=False)

    def slope(function):
        return lambda x: torch.autograd.grad(function(x).sum(), x, create_graph=True)[0]

    x = ones()
    right = slope(slope(wavy))(x).detach()
    with swap:
        found = slope(region(slope(region(region(wavy)))))(x)
    assert written(swap) > 0
    assert torch.equal(found, right)


def test_one_pair_of_hooks_for_each_saved_tensor(swap):
    """PyTorch allows no second one: who sets hooks on a tensor that we took is told."""
    x = ones()
    with swap:
        y = x.exp()
    with pytest.raises(RuntimeError, match="hooks have already been set"):
        y.grad_fn._raw_saved_result.register_hooks(lambda one: one, lambda one: one)
    y.sum().backward()
    assert torch.equal(x.grad, y)


def test_what_is_cleared_on_access_is_gone_when_backward_lets_go_of_it(swap):
    if not hasattr(torch.autograd.Function, "clear_saved_tensors_on_access"):
        pytest.skip("this PyTorch's functions can't clear what they saved")
    gone = []

    class Clears(torch.autograd.Function):
        clear_saved_tensors_on_access = True

        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x.clone())
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            (saved,) = ctx.saved_tensors
            known = weakref.ref(saved)
            del saved
            gone.append(known() is None)
            return gradient

    x = ones()
    with swap:
        loss = Clears.apply(x).sum()
    loss.backward()
    assert gone == [True]
