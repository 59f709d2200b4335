"""Caches over a scratch file whose requests may be held."""

import pytest
from saved_tensors import FakeWeights, Gate, Waits

from offload.swap.activations import ActivationCache
from offload.swap.homes import FileHome
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
def make_cache(scratch, journal):
    def make(limit_nbytes, min_nbytes=1024):
        return ActivationCache(
            [FileHome(scratch)],
            journal,
            limit_nbytes=limit_nbytes,
            min_nbytes=min_nbytes,
            weights=FakeWeights(),
        )

    return make


@pytest.fixture
def make_gate(scratch, monkeypatch):
    gates = []

    def make(call):
        gates.append(Gate(scratch, monkeypatch, call))
        return gates[-1]

    yield make
    for gate in gates:
        gate.open()
