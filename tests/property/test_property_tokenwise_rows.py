"""Each operation of the tables, on a slice of rows: what it gives on all rows, there."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.swap.tokenwise.analyse import find_chain
from offload.swap.tokenwise.record import Recorder
from offload.swap.tokenwise.replay import Replay, cuts, rows_of, sliced
from offload.swap.tokenwise.rows import FACTORIES, RULES, Axis, base_name

aten = torch.ops.aten
WIDTH = 6

pytestmark = pytest.mark.usefixtures("several_threads")


class Tails:
    """Keeps rebuilt rows, written straight where that is possible."""

    def __init__(self, tails):
        self.tails = tails

    def place(self, value):
        tail = self.tails[value]
        return tail if tail.ndim == 2 and tail.is_contiguous() else None

    def take(self, value, rows):
        if rows is not self.tails[value]:
            self.tails[value].copy_(rows.reshape(self.tails[value].shape))
        return rows


def rebuilt_and_saved(function, inputs, rows, cut, batch_first=None):
    """Record ``function(*inputs)``, save its results, rebuild the rows behind ``cut``.

    Gives pairs of rebuilt and saved rows, the names of the operations, and the chain.
    """
    recorder = Recorder(rows, {})
    sources = {}
    recorder.on_wanted = sources.__setitem__
    with torch.no_grad(), recorder:
        results = function(*inputs)
    results = [results] if isinstance(results, torch.Tensor) else list(results)
    for tensor in (*inputs, *results):
        recorder.saved(tensor)
    program = recorder.program()
    chain = find_chain(program, min_nbytes=0)
    saved = {recorder.saved(result).storage: result for result in results}
    replay = Replay(chain, cut)
    wholes = {}
    for target in chain.targets:
        value = program.values[target.root]
        storage = saved[target.storage].untyped_storage()
        whole = torch.empty(0, dtype=value.dtype).set_(
            storage, value.offset, value.shape, value.stride
        )
        wholes[target.root] = rows_of(whole, target.axis, cut, rows)
    tails = {root: torch.empty_like(whole) for root, whole in wholes.items()}
    replay.run(tails, sources, {}, Tails(tails))
    names = [base_name(node.op) for node in program.nodes]
    return [(tails[root], wholes[root]) for root in tails], names, chain


WEIGHT = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(3))


def noise(x):
    return WEIGHT if x.dtype == WEIGHT.dtype else WEIGHT.to(x.dtype)


def heads(x):  # (batch, rows, width) -> (batch, 2, rows, width / 2)
    return x.view(x.shape[0], x.shape[1], 2, WIDTH // 2).transpose(1, 2)


def flat(x):
    return x.reshape(-1, WIDTH)


UNARY = [
    "abs", "alias", "bitwise_not", "celu", "clone", "cos", "detach", "elu", "erf", "exp", "expm1",
    "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "lift_fresh", "log", "log1p",
    "logical_not", "mish", "neg", "reciprocal", "relu", "round", "rsqrt", "sigmoid", "sign", "silu",
    "sin", "softplus", "sqrt", "tanh", "ones_like", "zeros_like", "_to_copy", "zero",
]  # fmt: skip
BINARY = [
    "add", "bitwise_and", "bitwise_or", "copy", "div", "eq", "ge", "gt", "le", "logical_and",
    "logical_or", "lt", "maximum", "minimum", "mul", "ne", "remainder", "rsub", "sub",
]  # fmt: skip
INTEGER = {"bitwise_and", "bitwise_or", "bitwise_not"}


def unary(name):
    packet = getattr(aten, name)
    overload = packet.default

    def call(x):
        x = (x * 4).to(torch.int32) if name in INTEGER else x.abs() + 0.5
        made = overload(x)
        # A view or a constant is no storage of its own that depends on the rows.
        return made if made.is_complex() or made.dtype == torch.int32 else made * 1

    return call


def binary(name):
    packet = getattr(aten, name)
    overload = packet.default if name in ("copy", "maximum", "minimum", "logical_and",
                                          "logical_or") else packet.Tensor  # fmt: skip

    def call(x):
        y = x.square() + 0.5
        if name in INTEGER:
            return overload((x * 4).to(torch.int32), (y * 4).to(torch.int32))
        return overload(x, y)

    return call


CALLS = {
    **{name: [unary(name)] for name in UNARY},
    **{name: [binary(name)] for name in BINARY},
    "add": [
        lambda x: aten.add.Tensor(x, noise(x)[0]),  # a row of parameters
        lambda x: aten.add.Tensor(x, x[:1], alpha=2),  # one sequence for all
        lambda x: aten.add_.Tensor(x * 2, x),  # in place
        lambda x: aten.add_.Tensor((x * 2).bfloat16(), x),  # in place, narrower
    ],
    "addcmul": [lambda x: aten.addcmul.default(x, x, x * 2)],
    "addcdiv": [lambda x: aten.addcdiv.default(x, x, x.abs() + 1)],
    "addmm": [lambda x: aten.addmm.default(noise(x)[0], flat(x), noise(x))],
    "amax": [lambda x: aten.amax.default(x, [-1], True)],
    "amin": [lambda x: aten.amin.default(x, [2], False)],
    "baddbmm": [
        lambda x: aten.baddbmm.default(
            noise(x)[0], x, noise(x).expand(x.shape[0], WIDTH, WIDTH).contiguous()
        )
    ],
    "bmm": [lambda x: aten.bmm.default(x, noise(x).expand(x.shape[0], WIDTH, WIDTH).contiguous())],
    "cat": [
        lambda x: aten.cat.default([-x, heads(x).transpose(1, 2).flatten(2)], -1),
        lambda x: aten.cat.default([x.new_empty(0), x * 2], -2),  # an empty cache
        lambda x: aten.cat.default([x, x], 0),
    ],
    "clamp": [lambda x: aten.clamp.default(x, -0.5, 0.5)],
    "clamp_max": [lambda x: aten.clamp_max.default(x, 0.5)],
    "clamp_min": [lambda x: aten.clamp_min.default(x, 0.5)],
    "cumprod": [lambda x: aten.cumprod.default(x, -1)],
    "cumsum": [lambda x: aten.cumsum.default(x, 2)],
    "expand": [lambda x: heads(x)[:, :, None].expand(-1, 2, 3, -1, -1) * 2],
    "fill": [lambda x: aten.fill_.Scalar(x * 2, 1.5) + x],
    "floor": [lambda x: aten.floor.default(x * 4)],
    "full_like": [lambda x: aten.full_like.default(x, 2.0) * x],
    "glu": [lambda x: aten.glu.default(x, -1)],
    "linalg_vector_norm": [lambda x: aten.linalg_vector_norm.default(x, 2, [-1], True)],
    "_log_softmax": [lambda x: aten._log_softmax.default(x, -1, False)],
    "masked_fill": [lambda x: aten.masked_fill.Scalar(x, x > 0, -1.0)],
    "mean": [lambda x: aten.mean.dim(x, [-1], True), lambda x: aten.mean.dim(heads(x), [1])],
    "mm": [lambda x: aten.mm.default(flat(x), noise(x))],
    "native_layer_norm": [
        lambda x: aten.native_layer_norm.default(x, [WIDTH], noise(x)[0], noise(x)[1], 1e-5)
    ],
    "_fused_rms_norm": [lambda x: aten._fused_rms_norm.default(x, [WIDTH], noise(x)[0], 1e-5)],
    "permute": [lambda x: aten.permute.default(x, [2, 0, 1]) * 2],
    "pow": [lambda x: aten.pow.Tensor_Scalar(x, 2), lambda x: aten.pow.Scalar(2, x)],
    "rsub": [lambda x: aten.rsub.Scalar(x, 2.0)],
    "_safe_softmax": [lambda x: aten._safe_softmax.default(x, -1)],
    "select": [lambda x: heads(x)[:, 1] * 2],
    "slice": [
        lambda x: aten.slice.Tensor(x, 2, 1, 4) * 2,
        lambda x: aten.slice.Tensor(x, 1, 0, 9223372036854775807) * 2,
    ],
    "_softmax": [
        lambda x: aten._softmax.default(x, -1, False),
        lambda x: aten._softmax.default(heads(x), 1, False),
    ],
    "split": [lambda x: [part * 2 for part in aten.split.Tensor(x, 2, -1)]],
    "split_with_sizes": [
        lambda x: [part * 2 for part in aten.split_with_sizes.default(x, [1, 5], 2)]
    ],
    "squeeze": [
        lambda x: aten.squeeze.dim(x[:, None], 1) * 2,
        lambda x: aten.squeeze.dims(x[None, ..., None], [0, 4]) * 2,
    ],
    "stack": [lambda x: aten.stack.default([x, -x], 1), lambda x: aten.stack.default([x, x], -1)],
    "sum": [lambda x: aten.sum.dim_IntList(x, [-1])],
    "t": [lambda x: aten.t.default(flat(x)) * 2],
    "threshold": [lambda x: aten.threshold.default(x, 0.1, 0.0)],
    "transpose": [lambda x: heads(x) * 2],
    "unbind": [lambda x: [part * 2 for part in aten.unbind.int(heads(x), 1)]],
    "unsqueeze": [lambda x: x[:, None] * 2, lambda x: x[..., None] * 2],
    "_unsafe_view": [lambda x: aten._unsafe_view.default(x * 2, [x.shape[0], -1, 2, 3]) * 2],
    "var": [lambda x: aten.var.correction(x, [-1], correction=1)],
    "var_mean": [lambda x: aten.var_mean.correction(x, [-1], correction=0, keepdim=True)],
    "view": [
        lambda x: x.view(-1, 2, 3) * 2,
        lambda x: x.view(x.shape[0], -1, 1, WIDTH) * 2,
        lambda x: (x * 2).view(1, -1, WIDTH) * 2,
    ],
    "where": [lambda x: aten.where.self(x > 0, x, x * 0.1)],
}


def test_every_operation_of_the_tables_has_a_call():
    assert set(CALLS) == set(RULES)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("cut", [0, 64])
def test_rows_alone_give_the_rows(name, batch, cut):
    for call in CALLS[name]:
        x = torch.randn(batch, 192, WIDTH, generator=torch.Generator().manual_seed(1))
        pairs, names, chain = rebuilt_and_saved(call, [x], 192, cut)
        assert chain.targets
        assert name in names or name == "_fused_rms_norm"  # taken apart on the CPU
        for rebuilt, saved in pairs:
            assert rebuilt.dtype == saved.dtype
            assert torch.equal(rebuilt, saved)


MIXERS = [
    lambda x: x.mean(1, keepdim=True) + x,
    lambda x: x.cumsum(1),
    lambda x: x.softmax(1),
    lambda x: x.flip(1),
    lambda x: x[:, 1:] * 2,
    lambda x: x.narrow(1, 0, 100) * 2,
    lambda x: torch.cat([x, x], 1),
    lambda x: torch.bmm(x, x.transpose(1, 2)),
    lambda x: flat(x).t() @ flat(x),
    lambda x: x.reshape(x.shape[0], -1) * 2,
    lambda x: x + torch.ones(x.shape[1], 1),  # rows that are not known to be rows
    lambda x: torch.nn.functional.layer_norm(x, x.shape[1:]),
    lambda x: x.std(),
    lambda x: torch.roll(x, 1, 1),
]


@pytest.mark.parametrize("call", MIXERS, ids=range(len(MIXERS)))
def test_what_mixes_rows_is_not_rebuilt(call):
    x = torch.randn(2, 192, WIDTH)
    _, _, chain = rebuilt_and_saved(call, [x], 192, 64)
    assert chain.targets == ()
    assert chain.whole


def test_factories_make_the_same_again():
    calls = {
        "arange": lambda x: x * torch.arange(WIDTH),
        "full": lambda x: x * torch.full((WIDTH,), 2.0),
        "ones": lambda x: x * torch.ones(1, WIDTH),
        "scalar_tensor": lambda x: x * torch.scalar_tensor(3.0),
        "zeros": lambda x: x + torch.zeros(WIDTH),
    }
    assert set(calls) == set(FACTORIES)
    for call in calls.values():
        pairs, _, chain = rebuilt_and_saved(call, [torch.randn(2, 128, WIDTH)], 128, 64)
        assert chain.targets
        assert all(torch.equal(rebuilt, saved) for rebuilt, saved in pairs)


STEPS = {
    "norm": lambda x: torch.nn.functional.layer_norm(x, x.shape[-1:]),
    "linear": lambda x: x @ noise(x) if x.shape[-1] == WIDTH else x * 2,
    "heads": lambda x: x.unflatten(-1, (2, -1)).transpose(-2, -3).transpose(-2, -3).flatten(-2),
    "flat": lambda x: x.reshape(-1, x.shape[-1]).reshape(x.shape),
    "gelu": torch.nn.functional.gelu,
    "rotate": lambda x: torch.cat([-x[..., 3:], x[..., :3]], -1),
    "outer": lambda x: (x[..., None] * x[..., None, :]).sum(-1),
    "gate": lambda x: x * torch.sigmoid(x),
    "in place": lambda x: (x + 1).mul_(2),
    "bfloat16": lambda x: x.bfloat16().float(),
}


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    rows=st.integers(128, 300),
    names=st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=6),
    data=st.data(),
)
def test_chains_of_operations(batch, rows, names, data):
    cut = data.draw(st.sampled_from(cuts(rows)[:-1]))
    x = torch.randn(batch, rows, WIDTH, generator=torch.Generator().manual_seed(rows))

    def chain_of(x):
        kept = []
        for name in (*names, "gate"):
            x = STEPS[name](x)
            kept.append(x)
        return kept

    pairs, _, chain = rebuilt_and_saved(chain_of, [x], rows, cut)
    assert chain.targets
    for rebuilt, saved in pairs:
        torch.testing.assert_close(rebuilt, saved, rtol=1e-5, atol=1e-6)


@given(
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=3),
    dim=st.integers(0, 3),
    rows=st.integers(2, 9),
    outer=st.integers(1, 3),
    order=st.randoms(use_true_random=False),
    data=st.data(),
)
def test_slices_keep_the_order_of_dimensions(shape, dim, rows, outer, order, data):
    dim = min(dim, len(shape))
    sizes = [*shape[:dim], outer * rows, *shape[dim:]]
    memory = list(range(len(sizes)))
    order.shuffle(memory)
    x = torch.arange(torch.Size(sizes).numel()).reshape([sizes[d] for d in memory])
    x = x.permute([memory.index(d) for d in range(len(sizes))])
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    part = sliced(x, Axis(dim, outer), start, stop)
    index = [row for o in range(outer) for row in range(o * rows + start, o * rows + stop)]
    assert torch.equal(part, x.index_select(dim, torch.tensor(index)))
    assert part.reshape(-1).shape[0] == part.untyped_storage().nbytes() // 8 or outer == 1


@given(rows=st.integers(1, 2000))
def test_cuts_leave_enough_rows_on_each_side(rows):
    found = cuts(rows)
    assert found[-1] == rows
    assert list(found) == sorted(set(found))
    for cut in found[:-1]:
        assert cut % 64 == 0
        assert cut == 0 or cut >= 64
        assert rows - cut >= 64
