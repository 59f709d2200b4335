"""The tokens of a script's batch are counted however the batch is passed."""

import contextlib

import pytest
import torch
from torch import nn

from offload.planner.script_memory import ScriptMemory
from offload.planner.trace_script import Session

IDS = torch.zeros(2, 48, dtype=torch.int64)
FEW = torch.zeros(2, dtype=torch.int64)
MASK = torch.ones(2, 1, 48, 48)
ROWS = torch.zeros(2, 48, 8)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, *_arguments, **_keywords):
        return self.weight * 2


class SeenError(Exception):
    """The program of the step is there."""


def tokens_of(call):
    """Of the step that ``call`` begins, as a script would."""
    found = []

    def finish(program, _held):
        found.append(program.tokens)
        raise SeenError

    plain = nn.Module.__call__
    with contextlib.suppress(SeenError), Session(finish, ScriptMemory()):
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        call(model).sum().backward()
        optimizer.step()
    assert nn.Module.__call__ is plain
    return found[0]


@pytest.mark.parametrize(
    ("call", "tokens"),
    [
        (lambda model: model(IDS), 96),
        (lambda model: model(IDS, FEW), 96),
        (lambda model: model(IDS, MASK.bool()), 96),
        (lambda model: model(input_ids=IDS, labels=IDS), 96),
        (lambda model: model(labels=MASK.long(), input_ids=IDS), 96),
        (lambda model: model({"input_ids": IDS, "labels": MASK.long()}), 96),
        (lambda model: model(batch=[{"ids": IDS}, {"labels": FEW}]), 96),
        (lambda model: model(inputs_embeds=ROWS, attention_mask=MASK), 96),
        (lambda model: model(ROWS[0]), 48),
        (lambda model: model(), 1),
    ],
    ids=[
        *("positional", "targets beside", "a mask of bools beside", "by name", "a mask of numbers"),
        *("a dict", "a list by name", "rows of floats", "one sequence of rows", "nothing"),
    ],
)
def test_the_tokens_of_a_batch(call, tokens):
    assert tokens_of(call) == tokens


def test_what_an_earlier_call_was_given_counts_no_more():
    def call(model):
        nn.Identity()(input=torch.zeros(7, 7, dtype=torch.int64))
        return model(input_ids=IDS)

    assert tokens_of(call) == 96
