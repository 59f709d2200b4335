"""Predictions of steps of several micro-batches, whose gradients add up."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planning_models import BASELINE, DRIVE, MIB, check_books, machine, settings, trace
from planning_programs import decoder
from real_runs import both, check_moved, check_moved_in_forward

from offload.allocator.errors import BudgetError, UnsupportedError
from offload.swap.gradients import MIN_NBYTES
from offload.swap.planning.compiled import compile_program
from offload.swap.planning.cost import Costs
from offload.swap.planning.predict import Settings, least_budget, predict
from offload.swap.planning.sim_gradients import SimGradients
from offload.swap.planning.sim_memory import Memory
from offload.swap.planning.sim_pass import SimPass
from offload.swap.planning.sim_writes import must_write_nbytes
from offload.swap.planning.simulate import Simulation
from offload.swap.planning.world import World, read_lane, write_lane
from offload.tiers.events import ListRecorder, Move

PROGRAM = decoder(blocks=6)
TRACED = trace()
WAYS: dict[str, dict[str, Any]] = {
    "behind backward": {},
    "in backward": {"step_in_backward": True},
    "in forward": {"step_in_forward": True},
}
NAMES = list(WAYS)


def several(mib: int, count: int = 3, way: str = "behind backward") -> Settings:
    return dataclasses.replace(settings(mib), micro_batches=count, **WAYS[way])


LEAST = {
    way: least_budget(PROGRAM, machine(), several(1, 3, way), BASELINE).settings.budget_nbytes
    // MIB
    for way in WAYS
}


@pytest.mark.parametrize("window_nbytes", [1 << 20, 3 << 20])
@pytest.mark.parametrize("micro_batches", [2, 3])
@pytest.mark.parametrize("way", ["behind backward", "in backward"])
def test_it_moves_the_bytes_that_a_real_run_moves(
    tmp_path: Path, window_nbytes: int, micro_batches: int, way: str
) -> None:
    real, virtual = both(
        TRACED, tmp_path, window_nbytes=window_nbytes, micro_batches=micro_batches, **WAYS[way]
    )
    check_moved(real, virtual, in_backward=way == "in backward")
    assert virtual["state", "read"] == real["state", "read"]  # no gradient is on its way any more


@pytest.mark.parametrize("micro_batches", [2, 3])
def test_it_moves_the_bytes_of_a_step_in_forward(tmp_path: Path, micro_batches: int) -> None:
    real, virtual = both(TRACED, tmp_path, micro_batches=micro_batches, step_in_forward=True)
    check_moved_in_forward(real, virtual)


def test_weights_are_read_again_and_gradients_moved_by_the_kernel() -> None:
    budget = LEAST["behind backward"] + 4
    one, three = (predict(PROGRAM, machine(), several(budget, count), BASELINE) for count in (1, 3))
    large = sum(weight.nbytes for weight in PROGRAM.census.weights if weight.nbytes >= MIN_NBYTES)
    assert three.last.mapped_nbytes == 2 * large
    assert one.last.mapped_nbytes == 0
    assert three.tokens == 3 * one.tokens == 3 * PROGRAM.tokens
    read = one.last.finished.read_nbytes, three.last.finished.read_nbytes
    assert read[1] - read[0] >= 2 * large  # forwards and backwards stream them, as far as they do
    assert one.step_s < three.step_s < 3 * one.step_s


def test_pages_that_have_no_room_are_read_and_written_for_each_micro_batch() -> None:
    one = several(LEAST["behind backward"] + 4, 4)
    tiers = tuple(
        dataclasses.replace(tier, free_nbytes=one.budget_nbytes) if tier.kind == "host" else tier
        for tier in machine().tiers
    )
    small = dataclasses.replace(machine(), tiers=tiers)
    kept, lost = (predict(PROGRAM, each, one, BASELINE).last for each in (machine(), small))
    assert lost.busy_s["drive"] > kept.busy_s["drive"]
    assert lost.finished.step_s > kept.finished.step_s
    for of in ("read_nbytes", "written_nbytes"):  # what a run records
        assert getattr(lost.finished, of) == getattr(kept.finished, of)


@pytest.mark.parametrize("way", NAMES)
def test_the_least_budget_fits_and_one_mebibyte_less_does_not(way: str) -> None:
    least = LEAST[way]
    assert predict(PROGRAM, machine(), several(least, 3, way), BASELINE).peak_nbytes <= least * MIB
    with pytest.raises(BudgetError, match="is too small"):
        predict(PROGRAM, machine(), several(least - 1, 3, way), BASELINE)


@pytest.mark.parametrize("way", NAMES)
@given(more=st.integers(4, 150), count=st.integers(2, 5))  # others than 3 may need a bit more
def test_the_books_balance_at_any_budget(way: str, more: int, count: int) -> None:
    budget = several(LEAST[way] + more, count, way)
    check_books(predict(PROGRAM, machine(), budget, BASELINE))


@pytest.mark.parametrize("way", NAMES)
def test_nothing_is_left_in_memory_but_what_stays(way: str) -> None:
    found = predict(PROGRAM, machine(), several(LEAST[way] + 8, 3, way), BASELINE)
    compiled = compile_program(PROGRAM, Costs(machine(), DRIVE))
    simulation = Simulation(compiled, found.steps[0].plan, chunk_numel=1 << 18, micro_batches=3)
    for _ in range(3):
        simulation.step()
        now = simulation.world.memory.now
        left = ("saved", "transients", "gradients", "staging", "pages")
        assert not {role: now[role] for role in left if now[role]}  # type: ignore[index]
        assert not any(weight.held for weight in simulation._weights.weights.values())


@pytest.mark.parametrize("way", NAMES)
def test_what_fits_in_memory_stays_there_for_all_parts(way: str) -> None:
    rich = predict(PROGRAM, machine(), several(LEAST[way] + 400, 3, way), BASELINE).last
    assert len(rich.plan.resident_states) == len(PROGRAM.census.weights)
    assert rich.finished.read_nbytes == rich.mapped_nbytes == 0


@pytest.mark.parametrize("way", NAMES)
@pytest.mark.parametrize(("blocks", "count"), [(6, 3), (12, 3), (6, 20)])
def test_what_is_counted_is_what_is_simulated(way: str, blocks: int, count: int) -> None:
    program = decoder(blocks=blocks, tokens=512)  # some activations leave
    budget = several(LEAST[way] + 40, count, way)
    counted = predict(program, machine(), budget, BASELINE)
    recorder = ListRecorder()
    whole = predict(program, machine(), budget, BASELINE, recorder=recorder)
    assert counted.last.spilled_nbytes > 0
    for here, there in zip(whole.steps, counted.steps, strict=True):
        assert here.mapped_nbytes == there.mapped_nbytes
        for of in ("read_nbytes", "written_nbytes", "peak_nbytes", "resident_nbytes"):
            assert getattr(here.finished, of) == getattr(there.finished, of)
        for of in ("step_s", "compute_s", "stall_s", "optimizer_s"):
            assert getattr(here.finished, of) == pytest.approx(getattr(there.finished, of))
    moves = [event for event in recorder.events if isinstance(event, Move)]
    assert not [move for move in moves if move.role == "gradient" and move.dst == "host"]
    steps = [step.finished for step in whole.steps]
    assert sum(move.nbytes for move in moves) == sum(
        step.read_nbytes + step.written_nbytes for step in steps
    )


def test_passes_that_repeat_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    gone_through: list[int] = []
    plain = SimPass.go_through

    def watched(self: SimPass, moments: Any, number: int) -> None:
        gone_through.append(number)
        plain(self, moments, number)

    monkeypatch.setattr(SimPass, "go_through", watched)
    predict(PROGRAM, machine(), several(LEAST["behind backward"] + 8, 100), BASELINE)
    assert len(gone_through) < 40
    assert {0, 1, 2, 99} <= {*gone_through}


def test_a_gradient_that_is_on_its_way_gets_its_part_there_and_leaves_again() -> None:
    rate = 1e6
    lanes = (
        read_lane(lambda nbytes: nbytes / rate, 0.0),
        write_lane(lambda nbytes: nbytes / rate, 0.0),
    )
    world = World(*lanes, together=1.0, memory=Memory(1 << 40, 1 << 40))
    gradients = SimGradients(world, Costs(machine(), DRIVE), limit_nbytes=1 << 30)
    nbytes = 4 << 20
    gradients.take("a", nbytes)
    assert gradients.add("a", nbytes) == 0
    assert world.memory.now["gradients"] == nbytes
    gradients.settle("a")
    assert world.journal.totals.written_nbytes == 2 * nbytes
    assert world.memory.now["gradients"] == 0
    assert gradients.on_file == {"a"}
    # Later parts go through the mapping: read once, for the kernel keeps the pages.
    busy_s = world.drive_busy_s
    for _ in range(2):
        assert gradients.add("a", nbytes) == nbytes
        world.memory.add_pages(-nbytes)
    assert world.drive_busy_s - busy_s == pytest.approx(nbytes / rate)
    assert gradients.take_mapped_nbytes() == 2 * nbytes
    assert world.journal.totals.read_nbytes == 0
    gradients.clear()
    gradients.take("a", nbytes)  # past the pages, which are written first
    gradients.settle("a")
    assert world.journal.totals.written_nbytes == 3 * nbytes
    assert world.drive_busy_s - busy_s == pytest.approx(3 * nbytes / rate)


def test_rows_that_are_rebuilt_are_of_one_micro_batch() -> None:
    asked = dataclasses.replace(several(500), alpha=0.5)
    with pytest.raises(UnsupportedError, match="--micro-batches 1"):
        predict(PROGRAM, machine(), asked, BASELINE)


@pytest.mark.parametrize("allowance", [300 << 10, 1 << 20])
def test_micro_batches_share_what_a_step_may_write(tmp_path: Path, allowance: int) -> None:
    most = must_write_nbytes(TRACED) + allowance
    real, virtual = both(TRACED, tmp_path, micro_batches=2, nvme_write_budget=most)
    assert virtual["activation", "written"] == real["activation", "written"] > 0
    assert sum(nbytes for (_, way), nbytes in virtual.items() if way == "written") <= most
    check_moved(real, virtual, in_backward=False)
