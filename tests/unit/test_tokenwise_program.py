"""Chains found in programs written by hand, and programs recorded."""

from dataclasses import replace

import pytest
import torch

from offload.swap.tokenwise.analyse import find_chain
from offload.swap.tokenwise.program import Node, Program, Ref, Slot, Value
from offload.swap.tokenwise.record import Recorder
from offload.swap.tokenwise.rows import Axis, guess_axis, resized_args

ROWS = 256


class Writing:
    """Writes a program down, operation by operation; each result fills a storage of its own."""

    def __init__(self):
        self.values, self.nodes, self.slots, self.storages = [], [], [], []

    def value(self, kind, shape, storage=None, node=None, name=None):
        stride = [1]
        for size in reversed(shape[1:]):
            stride.insert(0, stride[0] * size)
        if storage is None:
            storage = len(self.storages)
            self.storages.append(4 * torch.Size(shape).numel())
        self.values.append(
            Value(kind, storage, tuple(shape), tuple(stride), 0, "float32", 4, node, name)
        )
        return Ref(len(self.values) - 1)

    def input(self, *shape):
        return self.value("external", shape)

    def weight(self, *shape):
        return self.value("parameter", shape, name=f"weight{len(self.values)}")

    def op(self, name, shape, *args, draws=False, over=None):
        """One operation; ``over`` is the value that it changes in place."""
        storage = self.values[over.value].storage if over is not None else None
        out = self.value("made", shape, storage, len(self.nodes))
        mutated = () if over is None else (over.value,)
        self.nodes.append(Node(f"aten.{name}.default", args, (), (out.value,), mutated, draws))
        return out

    def save(self, ref):
        value = self.values[ref.value]
        root = ref.value if value.kind == "made" else None
        self.slots.append(
            Slot(value.storage, value.shape, value.stride, 0, "float32", root, len(self.nodes))
        )
        return value.storage

    def chain(self, min_nbytes=0, failed=None):
        program = Program(
            rows=ROWS,
            values=tuple(self.values),
            nodes=tuple(self.nodes),
            slots=tuple(self.slots),
            storage_nbytes=tuple(self.storages),
        )
        return find_chain(program, min_nbytes=min_nbytes, failed=failed)


@pytest.fixture
def written():
    return Writing()


def storages(chain):
    return [target.storage for target in chain.targets]


def test_what_comes_from_the_input_row_by_row_is_rebuilt(written):
    x = written.input(ROWS, 8)
    up = written.op("mm", (ROWS, 32), x, written.weight(8, 32))
    gelu = written.op("gelu", (ROWS, 32), up)
    written.save(x)
    expected = [written.save(up), written.save(gelu)]
    chain = written.chain()
    assert storages(chain) == expected
    assert chain.sources == (x.value,)
    assert chain.nodes == (0, 1)
    assert chain.whole == {0: "it comes from outside the block"}
    assert chain.target_nbytes == 2 * ROWS * 32 * 4
    assert (chain.source_nbytes, chain.whole_nbytes) == (0, ROWS * 8 * 4)


def test_an_operation_that_nothing_saved_needs_is_not_executed_again(written):
    x = written.input(ROWS, 8)
    written.save(x)
    written.op("exp", (ROWS, 8), x)
    written.save(written.op("gelu", (ROWS, 8), x))
    assert written.chain().nodes == (1,)


def test_attention_is_a_source_where_it_is_saved(written):
    x = written.input(ROWS, 8)
    written.save(x)
    q = written.op("mm", (ROWS, 8), x, written.weight(8, 8))
    attention = written.op("attention", (ROWS, 8), q, q)
    out = written.op("mm", (ROWS, 8), attention, written.weight(8, 8))
    expected = [written.save(q)]
    whole = written.save(attention)
    expected.append(written.save(out))
    chain = written.chain()
    assert storages(chain) == expected
    assert chain.sources == (x.value, attention.value)
    assert chain.whole[whole] == "aten.attention.default is not row-wise"


@pytest.mark.parametrize(("width", "worth"), [(9, True), (7, False)])
def test_attention_that_is_not_saved_is_one_where_it_pays(written, width, worth):
    x = written.input(ROWS, 8)
    written.save(x)
    attention = written.op("attention", (ROWS, 8), x, x)
    saved = written.save(written.op("mm", (ROWS, width), attention, written.weight(8, width)))
    chain = written.chain()
    assert storages(chain) == [saved] * worth
    assert (attention.value in chain.sources) == worth
    assert chain.source_nbytes == ROWS * 8 * 4 * worth


def test_a_mask_that_was_drawn_is_swapped_and_its_product_rebuilt(written):
    x = written.input(ROWS, 8)
    written.save(x)
    empty = written.op("empty_like", (ROWS, 8), x)
    mask = written.op("bernoulli_", (ROWS, 8), empty, 0.9, draws=True, over=empty)
    scaled = written.op("div_", (ROWS, 8), mask, 0.9, over=mask)
    product = written.op("mul", (ROWS, 8), x, scaled)
    gelu = written.op("gelu", (ROWS, 8), product)
    whole = written.save(scaled)
    expected = [written.save(gelu)]
    chain = written.chain()
    assert storages(chain) == expected
    assert chain.whole[whole] == "aten.bernoulli_.default draws random numbers"
    assert chain.sources == (x.value, scaled.value)


def test_rows_that_did_not_verify_become_a_source(written):
    x = written.input(ROWS, 8)
    written.save(x)
    up = written.op("mm", (ROWS, 32), x, written.weight(8, 32))
    gelu = written.op("gelu", (ROWS, 32), up)
    wrong, right = written.save(up), written.save(gelu)
    chain = written.chain(failed={wrong: "they differ"})
    assert storages(chain) == [right]
    assert chain.whole[wrong] == "they differ"
    assert chain.sources == (up.value,)


@pytest.mark.parametrize("saved", ["product", "view"])
def test_views_of_rows_that_did_not_verify_are_as_right_as_these(written, saved):
    x = written.input(ROWS, 8)
    product = written.op("mm", (ROWS, 32), x, written.weight(8, 32))
    view = written.op("view", (1, ROWS, 32), product, (1, ROWS, 32), over=None)
    written.values[view.value] = replace(
        written.values[view.value], storage=written.values[product.value].storage
    )
    gelu = written.op("gelu", (1, ROWS, 32), view)
    root = product if saved == "product" else view
    wrong, right = written.save(root), written.save(gelu)
    chain = written.chain(failed={wrong: "they differ"})
    assert storages(chain) == [right]
    assert chain.whole[wrong] == "they differ"
    assert chain.sources == (root.value,)


def test_an_input_that_is_changed_in_place_is_no_source(written):
    x = written.input(ROWS, 8)
    saved = written.save(written.op("gelu", (ROWS, 8), x))
    written.op("add_", (ROWS, 8), x, 1, over=x)
    chain = written.chain()
    assert storages(chain) == []
    assert chain.whole == {saved: "it was changed in place"}


def test_a_result_changed_in_place_before_it_is_saved_is_rebuilt_as_it_was_then(written):
    x = written.input(ROWS, 8)
    written.save(x)
    first = written.op("mul", (ROWS, 8), x, 2)
    second = written.op("add_", (ROWS, 8), first, 1, over=first)
    saved = written.save(second)
    chain = written.chain()
    assert [(target.storage, target.root) for target in chain.targets] == [(saved, second.value)]
    assert chain.nodes == (0, 1)


def test_one_storage_saved_at_two_versions_is_swapped_whole(written):
    x = written.input(ROWS, 8)
    written.save(x)
    first = written.op("mul", (ROWS, 8), x, 2)
    storage = written.save(first)
    written.save(written.op("add_", (ROWS, 8), first, 1, over=first))
    assert written.chain().whole[storage] == "parts of it changed in place"


def test_small_tensors_and_weights_are_left_alone(written):
    x = written.input(ROWS, 8)
    written.save(x)
    weight = written.weight(8, 8)
    written.save(weight)
    mean = written.save(written.op("gelu", (ROWS, 8), x))
    big = written.save(written.op("mm", (ROWS, 64), x, written.weight(8, 64)))
    chain = written.chain(min_nbytes=ROWS * 8 * 4 + 1)
    assert storages(chain) == [big]
    assert chain.whole[mean] == f"it is smaller than {ROWS * 8 * 4 + 1} bytes"
    assert written.values[weight.value].storage not in chain.whole


def test_nothing_is_rebuilt_from_sources_larger_than_it(written):
    x = written.input(ROWS, 64)
    saved = written.save(written.op("mm", (ROWS, 8), x, written.weight(64, 8)))
    assert written.chain().whole == {saved: "its sources are larger than what they rebuild"}


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((2, ROWS, 8), Axis(1)),
        ((2, 4, ROWS, 8), Axis(2)),
        ((2, ROWS, 4, 8), Axis(1)),
        ((ROWS, ROWS), Axis(0)),
        ((1, ROWS), Axis(1)),
        ((3 * ROWS, 8), Axis(0, 3)),
        ((3, 8), None),
        ((8,), None),
        ((), None),
    ],
)
def test_rows_of_a_tensor_from_outside(shape, axis):
    assert guess_axis(shape, ROWS) == axis


def test_sizes_follow_the_rows(written):
    node = Node("aten.view.default", (Ref(0), (2 * ROWS, -1)), (), (1,))
    assert resized_args(node, (Axis(0, 2),), ROWS, 64) == (Ref(0), (128, -1))
    inferred = Node("aten.view.default", (Ref(0), (2, -1, 8)), (), (1,))
    assert resized_args(inferred, (Axis(1),), ROWS, 64) == inferred.args


# Recording.


def recorded(function, *inputs, expected=None):
    recorder = Recorder(ROWS, {}, expected)
    with torch.no_grad(), recorder:
        recorder.saved(function(*inputs))
    recorder.finish()
    return recorder


def test_the_same_operations_give_the_same_program():
    x = torch.randn(ROWS, 8)

    def function(x):
        return torch.cat([x[:, 4:], -x[:, :4]], -1).mul_(2)

    first = recorded(function, x)
    again = recorded(function, torch.randn(ROWS, 8), expected=first.program())
    assert again.diverged is None
    assert again.program() == first.program()
    assert [node.op for node in first.program().nodes] == [
        "aten.slice.Tensor", "aten.slice.Tensor", "aten.neg.default", "aten.cat.default",
        "aten.mul_.Tensor",
    ]  # fmt: skip
    assert first.program().slots[0].root == first.program().nodes[-1].outs[0]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda x: x * 3 + 1, "operation 0 was aten.mul.Tensor"),
        (lambda x: x * 2 - 1, "operation 1 was aten.sub.Tensor, in earlier forwards aten.add"),
        (lambda x: (x * 2)[1:] + 1, "operation 1 was aten.slice.Tensor"),
        (lambda x: x * 2, "saved tensor 0"),
        (lambda x: (x * 2 + 1).t(), "operation 2 was aten.t.default, in earlier forwards nothing"),
        (lambda x: x.double() * 2 + 1, "operation 0 was aten._to_copy.default"),
        (lambda x: x[:, :4] * 2 + 1, "operation 0"),
    ],
)
def test_what_differs_is_told(other, message):
    program = recorded(lambda x: x * 2 + 1, torch.randn(ROWS, 8)).program()
    assert message in recorded(other, torch.randn(ROWS, 8), expected=program).diverged


def test_a_forward_that_ends_early_is_told():
    recorder = recorded(lambda x: x * 2 + 1, torch.randn(ROWS, 8))
    shorter = Recorder(ROWS, {}, recorder.program())
    with shorter:
        torch.ones(ROWS, 8)
    shorter = Recorder(ROWS, {}, recorder.program())
    with shorter:
        pass
    shorter.finish()
    assert shorter.diverged == "it ended earlier than in earlier forwards"


def test_an_address_that_is_used_again_is_another_storage():
    recorder = Recorder(ROWS, {})
    with torch.no_grad(), recorder:
        for _ in range(20):
            torch.ones(ROWS, 8)  # freed at once
    program = recorder.program()
    assert [value.storage for value in program.values] == list(range(20))


def test_a_view_of_bytes_changed_under_it_is_unknown():
    def function(x):
        made = x * 2
        part = made[:, :4]
        made.add_(1)
        return part * 3

    program = recorded(function, torch.randn(ROWS, 8)).program()
    assert "unknown" in {value.kind for value in program.values}
    assert find_chain(program, min_nbytes=0).targets == ()


def test_a_sparse_tensor_is_read_by_no_rule():
    sparse = torch.eye(ROWS).to_sparse()
    program = recorded(lambda x: torch.sparse.mm(sparse, x), torch.randn(ROWS, 8)).program()
    assert program.nodes[-1].op.startswith("unreadable.")
    assert find_chain(program, min_nbytes=0).targets == ()
