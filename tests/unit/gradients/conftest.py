"""A swapper of gradients over a scratch file, the stream through it, and lookups that give rows."""

import copy

import pytest
import torch
from gradients_in_scratch import CHUNK, PLENTY, SHAPE, Gate, Twins, Waits
from torch import nn

from offload.swap.governor import Governor
from offload.swap.gradient_stream import GradientStream
from offload.swap.gradients import GradientSwapper
from offload.swap.row_gradients import RowGradients
from offload.swap.torch_seams import lead, leave
from offload.tiers.events import ListRecorder
from offload.tiers.filetier import FileTier, Lanes


@pytest.fixture
def journal():
    return Waits(ListRecorder())


@pytest.fixture
def scratch(tmp_path, journal):
    lanes = Lanes(journal)
    with FileTier(tmp_path, None, lanes) as scratch:
        yield scratch
    lanes.close()


@pytest.fixture
def governor():
    governor = Governor(PLENTY, PLENTY)
    yield governor
    governor.close()


@pytest.fixture
def swapper(scratch, journal, governor):
    swapper = GradientSwapper(scratch, journal, governor, PLENTY)
    yield swapper
    swapper.stop()


@pytest.fixture
def parameter(swapper):
    parameter = nn.Parameter(torch.zeros(SHAPE))
    swapper.watch("layer.weight", parameter)
    return parameter


@pytest.fixture(params=["before", "after"])
def gate(scratch, monkeypatch, request):
    gate = Gate(scratch, monkeypatch, request.param)
    yield gate
    gate.open()


@pytest.fixture
def stream(swapper):
    stream = GradientStream(swapper, chunk_numel=CHUNK, staging_nbytes=4 * 4 * CHUNK)
    lead(stream)
    yield stream
    leave(stream)


@pytest.fixture
def twins(swapper, stream):
    return Twins(swapper)


@pytest.fixture
def watched(swapper, journal):
    """Makes a copy of a model whose lookups give rows; hooks go when the test ends."""
    installed = []

    def watch(model):
        twin = copy.deepcopy(model)
        for name, parameter in twin.named_parameters():
            swapper.watch(name, parameter)
        installed.append(RowGradients(twin, swapper, journal))
        return twin

    yield watch
    for rows in installed:
        rows.remove()
    swapper.drain()
