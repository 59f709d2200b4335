"""Figures of a block: the shortest time counts, the real thing beats an estimate."""

import pytest

from offload.swap.tokenwise.analyse import Chain, Target
from offload.swap.tokenwise.measure import Measurements
from offload.swap.tokenwise.program import Program
from offload.swap.tokenwise.rows import Axis


def chain_of(*storages, nbytes=100):
    """A chain that rebuilds these storages; where its rows come from does not matter here."""
    program = Program(rows=1024, values=(), nodes=(), slots=(), storage_nbytes=())
    targets = tuple(
        Target(storage=one, root=one, axis=Axis(0), nbytes=nbytes // len(storages))
        for one in storages
    )
    return Chain(
        program=program, targets=targets, nodes=(), sources=(), axes={}, whole={},
        source_nbytes=0, whole_nbytes=10,
    )  # fmt: skip


CHAIN = chain_of(0)


def cost(measurements):
    return measurements.cost(CHAIN)


@pytest.fixture
def measured():
    made = Measurements()
    made.forward(1.0)
    made.recording(0.1)
    made.of(CHAIN).rebuild(512, 0.6)
    made.of(CHAIN).estimate_heads(1024, 0.2)
    return made


def test_too_few_figures_give_no_cost():
    assert cost(Measurements()) is None


def test_the_shortest_time_counts(measured):
    measured.forward(3.0)
    measured.of(CHAIN).rebuild(512, 0.7)
    measured.recording(0.3)
    found = cost(measured)
    assert (found.forward_s, found.overhead_s) == (1.0, 0.1)
    assert found.rebuild_s == pytest.approx(1.2)
    assert (found.whole_nbytes, found.target_nbytes) == (10, 100)


def test_backward_is_twice_forward_until_it_is_measured(measured):
    assert cost(measured).backward_s == 2.0
    measured.backward(5.0)
    measured.backward(4.0)
    assert cost(measured).backward_s == 4.0


def test_two_cuts_tell_what_is_spent_however_few_the_rows(measured):
    measured.of(CHAIN).rebuild(768, 0.4)  # 256 rows fewer take 0.2 seconds less
    found = cost(measured)
    assert found.rebuild_s == pytest.approx(0.8)
    assert found.overhead_s == pytest.approx(0.1 + 0.2)


def test_heads_that_were_really_copied_beat_an_estimate(measured):
    assert cost(measured).heads_s == pytest.approx(0.2)
    measured.of(CHAIN).heads(0, 0.0)  # nothing was copied: nothing is learned
    measured.of(CHAIN).heads(512, 0.4)
    measured.of(CHAIN).estimate_heads(1024, 0.1)
    assert cost(measured).heads_s == pytest.approx(0.8)
    measured.of(CHAIN).heads(512, 0.3)
    assert cost(measured).heads_s == pytest.approx(0.6)


def test_recording_is_taken_off_a_forward_that_was_recorded():
    measured = Measurements()
    measured.recording(0.1)
    measured.recorded_forward(1.1)
    measured.of(CHAIN).rebuild(512, 0.6)
    measured.of(CHAIN).estimate_heads(1024, 0.2)
    found = cost(measured)
    assert (found.forward_s, found.overhead_s) == (pytest.approx(1.0), pytest.approx(0.1))


def test_recording_that_holds_up_a_device_is_told_by_a_forward_without_it():
    """A device's time contains nothing of the host's: recording takes what forwards differ by."""
    measured = Measurements()
    measured.recording(0.0)
    measured.recorded_forward(1.5)
    measured.of(CHAIN).rebuild(512, 0.6)
    measured.of(CHAIN).estimate_heads(1024, 0.2)
    assert (cost(measured).forward_s, cost(measured).overhead_s) == (1.5, 0.0)
    measured.forward(1.2)
    assert (cost(measured).forward_s, cost(measured).overhead_s) == (1.2, pytest.approx(0.3))


def test_no_cost_is_told_while_a_figure_is_on_its_way():
    measured = Measurements()
    measured.recording(0.0)
    for tell in (
        lambda: measured.of(CHAIN).rebuild(512, 0.6),
        lambda: measured.recorded_forward(1.0),
    ):
        tell()
        assert cost(measured) is None
    measured.of(CHAIN).estimate_heads(1024, 0.2)
    assert cost(measured) is not None


def test_figures_belong_to_the_chain_that_they_were_measured_on(measured):
    """Of one that lost most of its targets they would say that rebuilding takes no time."""
    fewer = chain_of(1, nbytes=5)
    assert measured.cost(fewer) is None
    for cut in (256, 768):
        measured.of(fewer).rebuild(cut, 0.001)
    measured.of(fewer).estimate_heads(1024, 0.01)
    assert measured.cost(fewer).rebuild_s == 0.0
    assert measured.cost(fewer).target_nbytes == 5
    assert cost(measured).rebuild_s == pytest.approx(1.2)
    assert cost(measured).heads_s == pytest.approx(0.2)
