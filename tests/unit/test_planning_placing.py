"""From a traced program to the work of its blocks, and to a placement of it."""

import pytest
import torch
from planning_models import DRIVE, Model, machine, model_in, trace
from torch import nn

from offload.swap.planning.cost import Costs
from offload.swap.planning.placing.reduce import block_names, reduce_program
from offload.swap.state_precision import Precision

COSTS = Costs(machine(), DRIVE)


def reduced(program):
    kinds, order = reduce_program(program, COSTS.seconds, COSTS.recoding_s)
    return kinds, [kinds[number] for number in order]


def test_every_weight_state_and_second_is_counted_once():
    program = trace()
    _, stages = reduced(program)
    assert sum(one.trained_nbytes for one in stages) == program.trainable_nbytes
    assert sum(one.gradients_nbytes for one in stages) == program.trainable_nbytes
    assert sum(one.states_nbytes for one in stages) == program.stepping.nbytes
    assert sum(one.frozen_nbytes for one in stages) == 0
    seconds = sum(
        COSTS.seconds(program.operations[event.which])
        for event in program.events
        if event.what.name == "COMPUTE"
    )
    assert sum(one.forward_s + one.backward_s for one in stages) == pytest.approx(seconds)
    saved = sum(part.nbytes for one in stages for part in one.saved)
    assert saved == pytest.approx(program.saved_nbytes, rel=0.01)


@pytest.mark.parametrize(
    ("dtype", "precision", "weight", "states", "stepped"),
    [
        (torch.float32, Precision(states="bf16"), 4, 4, (4, 4, 8)),
        (torch.float32, Precision(states="8bit"), 4, 2 * 65 / 64, (4, 4, 8)),
        (torch.bfloat16, Precision(masters="fp32"), 2, 2 + 8, (4, 4, 8)),
        (torch.bfloat16, Precision(states="bf16", masters="fp32"), 2, 2 + 4, (4, 4, 8)),
        (torch.bfloat16, Precision(states="8bit", masters="fp32"), 2, 2 + 65 / 32, (4, 4, 8)),
    ],
    ids=str,
)
def test_bytes_of_a_parameter_are_those_of_its_form(dtype, precision, weight, states, stepped):
    program = trace(lambda: model_in(dtype), precision=precision)
    _, stages = reduced(program)
    head = stages[-1]
    parameters = 1000 * 256
    assert head.trained_nbytes == head.gradients_nbytes == weight * parameters
    assert head.states_nbytes == pytest.approx(states * parameters, rel=1e-3)
    roles = ("weights", "gradients", "states")
    assert [head.stepped_nbytes(role) for role in roles] == [n * parameters for n in stepped]
    forms = {form for one in program.stepping.forms.values() for form in one} - {"plain"}
    seconds = sum(
        COSTS.recoding_s(form, parameters)
        for form in program.stepping.forms["head.weight"]
        if form != "plain"
    )
    assert forms
    assert head.recoded.seconds == pytest.approx(seconds)
    assert sum(one.states_nbytes for one in stages) == program.stepping.nbytes


def test_exact_weights_and_small_ones_have_one_form():
    assert all(one.recoded is None for one in reduced(trace())[1])
    _, stages = reduced(trace(precision=Precision(states="bf16")))
    middle = stages[2]
    small, large = 2 * 256 + 1024 + 256, 256 * 768 + 2 * 256 * 1024  # norm and biases; matrices
    assert middle.states_nbytes == 4 * (small + large)
    assert middle.stepped_nbytes("states") == 4 * small + 8 * large
    assert middle.stepped_nbytes("weights") == middle.trained_nbytes


def test_blocks_that_repeat_are_one_kind():
    kinds, stages = reduced(trace(lambda: Model(blocks=12)))
    assert len(stages) == 14  # the table, blocks, the head
    assert stages[0].name == "embedding"
    assert stages[-1].name == "head"
    assert len(kinds) <= 5
    assert any(kind.name == "blocks.*" for kind in kinds)


def test_what_a_block_saves_is_told_apart():
    _, stages = reduced(trace(length=256))
    middle = stages[2]
    parts = {part.name: part for part in middle.saved}
    assert parts.keys() == {"inputs", "attention", "rows"}
    row = 256 * 256 * 4
    assert parts["inputs"].nbytes == row  # what the block before gave
    assert parts["inputs"].rebuild_s is None
    assert parts["attention"].nbytes >= row
    assert not parts["attention"].rowwise
    assert parts["rows"].rowwise
    assert parts["rows"].nbytes > 8 * row
    assert 0 < parts["rows"].rebuild_s < middle.forward_s
    assert all(part.rebuild_s is None for part in stages[-1].saved)


def test_open_attention_is_rebuilt_whole_or_not_at_all():
    class Open(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(256, 768)

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            return x + torch.softmax(q @ k.transpose(1, 2), -1) @ v

    class Stack(Model):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Open() for _ in range(3))

    _, stages = reduced(trace(Stack, length=256))
    rebuilt = [part for part in stages[2].saved if part.rebuild_s is not None]
    assert rebuilt
    assert not any(part.rowwise for part in rebuilt)


def test_frozen_and_tied_weights_have_one_place():
    def make():
        model = Model()
        model.head.weight = model.embedding.weight
        model.blocks[0].up.weight.requires_grad_(requires_grad=False)
        return model

    program = trace(make)
    _, stages = reduced(program)
    assert sum(one.trained_nbytes for one in stages) == program.trainable_nbytes
    assert sum(one.frozen_nbytes for one in stages) == 256 * 1024 * 4
    assert stages[0].trained_nbytes == 0  # the table only looks rows up
    assert stages[-1].trained_nbytes == 1000 * 256 * 4


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.weight"], [None]),
        (["h.0.w", "h.1.w", "norm.w"], ["h.0", "h.1", None]),
        (["0.w", "1.w"], ["0", "1"]),
        (["t.0.h.0.w", "t.0.h.1.w", "t.0.h.2.w", "t.1.h.0.w"],
         ["t.0.h.0", "t.0.h.1", "t.0.h.2", "t.1"]),
        (["only.0.w"], [None]),
    ],
)  # fmt: skip
def test_the_block_of_a_weight_is_told_by_its_name(names, expected):
    assert list(block_names(names).values()) == expected
