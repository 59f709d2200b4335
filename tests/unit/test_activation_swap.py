"""Saved activations of any code: nested, recomputed, compiled, custom; the bits are the same."""

import gc
from functools import partial

import pytest
import torch
from swapped_steps import WIDTH, Net, assert_same, gradients, inputs
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from offload import ActivationSwap
from offload.tiers.mempolicy import allowed_nodes


@pytest.fixture(params=["file", "node", "both", "memory"])
def swap(request, tmp_path):
    """Everything that can leave does, at once; what is in memory has no need to."""
    node = allowed_nodes()[0]
    homes = {
        "file": {"nvme": tmp_path},
        "node": {"nodes": {node: "1GiB"}},
        "both": {"nodes": {node: "200KiB"}, "nvme": tmp_path},
        "memory": {"memory": "1GiB"},
    }
    in_flight = {"file": 0, "node": "1MiB", "both": "100KiB", "memory": 0}[request.param]
    swap = ActivationSwap(limit=0, min_nbytes=0, in_flight=in_flight, **homes[request.param])
    yield swap
    swap.cache.spiller.close()
    assert swap.cache.kept_nbytes == 0, "a handle leaks"
    swap.close()


@pytest.fixture
def file_swap(tmp_path):
    with_files = ActivationSwap(limit=0, min_nbytes=0, in_flight=0, nvme=tmp_path)
    yield with_files
    with_files.close()


RECOMPUTE = {
    "keep": None,
    "checkpoint": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
    "no early stop": {"use_reentrant": False, "debug": False, "determinism_check": "default"},
}


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("recompute", RECOMPUTE.values(), ids=RECOMPUTE)
def test_a_step_has_the_same_bits(swap, recompute, inside):
    """With dropout: recomputation draws the same random numbers."""
    model = Net(recompute)
    right = gradients(model, model=model)
    assert_same(gradients(model, swap, inside=inside, model=model), right)
    assert swap.journal.totals.written_nbytes > 0 or swap.cache.spiller.peak_nbytes > 0


def test_inside_of_a_checkpointed_region(swap):
    model = Net()

    def inner(x):
        with swap:
            return model(x)

    right = gradients(model, model=model)
    found = gradients(lambda x: checkpoint(inner, x, use_reentrant=False), model=model)
    assert_same(found, right)


def test_several_forwards_before_a_backward(swap):
    model = nn.Linear(WIDTH, WIDTH)

    def both(x):
        losses = []
        for scale in (1, 2, 3):
            with swap:
                losses.append(model(x * scale).tanh().sum())
        return losses[0] * losses[1] + losses[2]

    right = gradients(lambda x: model(x).tanh().sum() * model(x * 2).tanh().sum()
                      + model(x * 3).tanh().sum(), model=model)  # fmt: skip
    assert_same(gradients(both, model=model), right)


def test_nested_contexts_and_other_hooks_inside(swap):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())

    def nested(x):
        with swap:
            y = model(x)
            with torch.autograd.graph.save_on_cpu():
                y = model(y)
            with swap:
                return model(y).sum()

    right = gradients(lambda x: model(model(model(x))).sum(), model=model)
    assert_same(gradients(nested, model=model), right)


def test_retain_graph_double_unpack_and_grad_fn(swap):
    x = inputs()
    with swap:
        y = x.exp()
        z = y.sin().sum()
    z.backward(retain_graph=True)
    once = x.grad.clone()
    z.backward(retain_graph=True)
    assert torch.equal(x.grad, 2 * once)
    assert torch.equal(y.grad_fn._saved_result, x.detach().exp())
    assert torch.equal(y.grad_fn._saved_result, y.detach())
    z.backward()
    with pytest.raises(RuntimeError, match="second time"):
        z.backward()


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
def test_double_backward(swap, inside):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))

    def penalty(x, context=None):
        if context is None:
            (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        elif inside:
            with context:
                (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        else:
            with context:
                loss = model(x).sum()
            (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        return (slope.norm() - 1) ** 2

    right = gradients(penalty, model=model)
    assert_same(gradients(partial(penalty, context=swap), model=model), right)


def test_a_dead_branch_leaks_nothing(swap):
    for _ in range(3):
        with swap:
            inputs().exp().sin()
            kept = inputs().sin().sum()
    kept.backward()


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        result = x * factor
        ctx.save_for_backward(x, result)
        return result

    @staticmethod
    def backward(ctx, gradient):
        x, result = ctx.saved_tensors
        assert torch.equal(x * ctx.factor, result)
        return gradient * ctx.factor, None


def test_a_custom_function_that_saves_its_inputs_and_result(swap):
    right = gradients(lambda x: Scaled.apply(x.sin(), 3.0).sum())
    assert_same(gradients(lambda x: Scaled.apply(x.sin(), 3.0).sum(), swap), right)


class Hoarder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.mine = [x.detach().clone()]
        ctx.weight = weight
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2, None


def test_what_a_custom_function_keeps_on_its_ctx_is_counted(file_swap):
    model = nn.Linear(WIDTH, WIDTH)
    file_swap.cache.fixed.know_model(model)
    with file_swap:
        loss = Hoarder.apply(model(inputs()), model.weight.detach()).sum()
    file_swap.cache.count_unseen(loss)
    (notice,) = file_swap.journal.notices
    assert f"HoarderBackward keeps 40.00 KiB ({64 * WIDTH * 4} bytes) on its ctx" in notice
    file_swap.cache.count_unseen(loss)  # once
    assert len(file_swap.journal.notices) == 1


# Selective checkpoints.


def policy_of(offloaded):
    def policy(_context, function, *_args, **_kwargs):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            return offloaded
        return CheckpointPolicy.PREFER_RECOMPUTE

    return policy


class CountMatmuls(torch.utils._python_dispatch.TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def selective(policy):
    contexts = partial(create_selective_checkpoint_contexts, policy)
    return Net({"use_reentrant": False, "context_fn": contexts})


@pytest.mark.parametrize("name", ["MUST_CPU_OFFLOAD", "PREFER_CPU_OFFLOAD"])
def test_a_policy_that_offloads_really_does(file_swap, name):
    right_model = selective(policy_of(CheckpointPolicy.MUST_SAVE))
    model = selective(policy_of(CheckpointPolicy[name]))
    model.load_state_dict(right_model.state_dict())
    right = gradients(right_model, model=right_model)
    with CountMatmuls() as counted:
        gradients(right_model, model=right_model)
    least = counted.count
    with CountMatmuls() as counted:
        found = gradients(model, file_swap, model=model)
    assert_same(found, right)
    assert counted.count == least  # nothing was computed again
    # Inputs of the three regions and what is saved outside of them, and one result of each.
    events = file_swap.journal.totals
    assert events.written_nbytes >= 3 * 64 * WIDTH * 4
    with CountMatmuls() as counted:
        gradients(model, model=model)
    assert counted.count == least + 3  # without us it is recomputed, as before


def test_an_offloaded_result_that_was_changed_is_an_error(file_swap):
    def policy(_context, function, *_args, **_kwargs):
        chosen = function is torch.ops.aten.exp.default
        return CheckpointPolicy.MUST_CPU_OFFLOAD if chosen else CheckpointPolicy.PREFER_RECOMPUTE

    def region(x):
        y = x.exp()
        y.detach().add_(1)
        return y.sin()

    contexts = partial(create_selective_checkpoint_contexts, policy)
    with file_swap:
        y = checkpoint(region, inputs(), use_reentrant=False, context_fn=contexts)
    with pytest.raises(RuntimeError, match="has been mutated"):
        y.sum().backward()


# Compiled regions.


def test_compiled_regions_work_inside(swap):
    model = Net().eval()
    compiled = torch.compile(model, backend="aot_eager")
    right = gradients(model, model=model)
    assert_same(gradients(compiled, swap, model=model), right)
    torch.compiler.reset()


def test_entering_inside_a_compiled_region_is_refused(file_swap):
    @torch.compile(backend="eager", fullgraph=True)
    def region(x):
        with file_swap:
            return x.sin().sum()

    with pytest.raises(torch._dynamo.exc.Unsupported, match="ActivationSwap"):
        region(inputs())
    torch.compiler.reset()


# What is more than its bytes.


def mesh():
    return torch.distributed.device_mesh.init_device_mesh("cpu", (1,))


@pytest.fixture
def one_rank(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_distributed_tensors_leave_by_their_local_ones(swap, one_rank):
    placed = [torch.distributed.tensor.Shard(0)]

    def loss(x):
        y = DTensor.from_local(x, mesh(), placed)
        return (y.exp() * y.sin()).to_local().sum()

    right = gradients(loss)
    assert_same(gradients(loss, swap), right)
    assert not swap.cache.left_alone


def test_parameters_that_fsdp_gathers_stay(file_swap, one_rank):
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    for layer in model:
        fully_shard(layer, mesh=mesh())
    fully_shard(model, mesh=mesh())
    file_swap.cache.fixed.know_model(model)
    x = inputs().detach()
    with file_swap:
        loss = model(x).sum()
    file_swap.cache.close()
    # Inputs of the two layers; never a weight, nor its transpose.
    assert file_swap.journal.totals.written_nbytes == 2 * x.nbytes
    loss.backward()
    gc.collect()


def test_a_model_that_checks_its_loss(swap):
    """Cross entropy saves its result twice: once it moves."""
    x = inputs()
    target = torch.zeros(64, dtype=torch.long)
    with swap:
        loss = F.cross_entropy(x, target)
    loss.backward()
    assert swap.cache.spiller.peak_nbytes > 0
