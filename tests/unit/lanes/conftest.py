"""Lanes that are closed when a test ends."""

import pytest

from offload.tiers.events import ListRecorder
from offload.tiers.journal import Journal
from offload.tiers.lanes import Lane


@pytest.fixture
def recorder():
    return ListRecorder()


@pytest.fixture
def make_lane(recorder):
    lanes = []

    def make(workers=1, queues=1):
        lanes.append(Lane("file→host", workers, Journal(recorder), queues))
        return lanes[-1]

    yield make
    for lane in lanes:
        lane.close()


@pytest.fixture
def lane(make_lane):
    return make_lane()
