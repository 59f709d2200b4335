"""What each thing that moves takes of the training thread, whatever its bytes."""

from pathlib import Path

import pytest
from planning_models import BASELINE, DRIVE, machine, settings, trace

from offload.planner import rehearsal
from offload.planner.fixed_costs import measure_fixed_costs
from offload.swap.gradients import MIN_NBYTES
from offload.swap.planning.compiled import compile_program
from offload.swap.planning.cost import Costs
from offload.swap.planning.predict import predict
from offload.swap.planning.simulate import SimulatedStep, Simulation
from offload.swap.states import SMALL_NUMEL
from offload.swap.tiles import cut
from offload.tiers.events import ListRecorder, Move
from offload.tiers.machine import Machine, Work

PER_S = 20.0
CHUNK_NUMEL = 200_000
PROGRAM = trace()
WEIGHTS = PROGRAM.census.weights
NUMELS = [weight.nbytes // PROGRAM.itemsizes[weight.name] for weight in WEIGHTS]
SLOW = {work: rehearsal._with(machine(), {work: PER_S}) for work in rehearsal.FIXED}


def stepped(seen: Machine, events: ListRecorder | None = None) -> SimulatedStep:
    """A step whose weights all stream."""
    compiled = compile_program(PROGRAM, Costs(seen, DRIVE))
    plan = predict(PROGRAM, seen, settings(700), BASELINE).steps[0].plan
    simulation = Simulation(compiled, plan, chunk_numel=CHUNK_NUMEL, recorder=events)
    simulation.step()
    simulation.keep_streaming()
    if events is not None:
        events.events.clear()
    return simulation.step()


def more_s(work: Work, part: str) -> float:
    """By how much longer ``part`` works where each of ``work`` takes so long."""
    return stepped(SLOW[work]).busy_s[part] - stepped(machine()).busy_s[part]


def test_each_gradient_that_leaves_takes_its_time_of_computing() -> None:
    leaving = [
        weight.name
        for weight in WEIGHTS
        if weight.nbytes >= MIN_NBYTES and weight.name not in PROGRAM.row_gradients
    ]
    assert more_s("gradients", "compute") == pytest.approx(len(leaving) / PER_S)
    assert more_s("gradients", "optimizer") == pytest.approx(0)


def test_each_weight_that_comes_takes_its_time_of_computing() -> None:
    events = ListRecorder()
    stepped(SLOW["fetches"], events)
    moves = [event for event in events.events if isinstance(event, Move)]
    fetches = [move for move in moves if (move.role, move.dst) == ("weight", "host")]
    assert len(fetches) > len(WEIGHTS) // 2
    assert more_s("fetches", "compute") == pytest.approx(len(fetches) / PER_S)


def test_each_part_of_a_tile_takes_its_time_of_the_optimizer() -> None:
    large = [numel for numel in NUMELS if numel > SMALL_NUMEL]
    parts = sum(map(len, cut(large, CHUNK_NUMEL)))
    assert parts > len(large)
    assert more_s("tile parts", "optimizer") == pytest.approx(parts / PER_S)
    assert more_s("tile parts", "compute") == pytest.approx(0)


def test_each_small_weight_takes_its_time_of_the_optimizer() -> None:
    small = sum(numel <= SMALL_NUMEL for numel in NUMELS)
    each_s = 1 / PER_S - Costs(machine(), DRIVE).hook_s
    assert small > 0
    assert more_s("small steps", "optimizer") == pytest.approx(small * each_s)


def test_the_training_thread_takes_some_time_of_each(tmp_path: Path) -> None:
    rates = measure_fixed_costs(tmp_path, "host=64GiB")
    assert set(rates) == {*rehearsal.FIXED}
    for work, per_s in rates.items():
        assert 1e2 < per_s < 1e6, work  # from a microsecond to ten milliseconds
