"""What the simulator does at once is what it would have done step by step."""

import dataclasses
import gc
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planning_models import BASELINE, DRIVE, machine, settings
from planning_programs import decoder

from offload.allocator.errors import BudgetError
from offload.swap.activations import BATCH_NBYTES
from offload.swap.planning.compiled import compile_program
from offload.swap.planning.cost import Costs
from offload.swap.planning.predict import predict
from offload.swap.planning.program import What
from offload.swap.planning.sim_batch import SimBatch
from offload.swap.planning.sim_memory import Memory
from offload.swap.planning.sim_pipeline import SimPipeline, SimTile
from offload.swap.planning.simulate import SimulatedStep, Simulation
from offload.swap.planning.whatif import changed, parse_changes
from offload.swap.planning.world import Reading, World, read_lane, write_lane
from offload.tiers.events import ListRecorder

RATES = st.floats(1e5, 1e8)


def assert_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Bytes are; times are but for rounding."""
    assert one.keys() == other.keys()
    for key, value in one.items():
        is_time = isinstance(value, float)
        assert other[key] == (pytest.approx(value, rel=1e-6, abs=1e-9) if is_time else value), key


def streamed(
    tiles: list[tuple[SimTile, int]],
    rates: tuple[float, float],
    together: float,
    recorder: ListRecorder | None,
) -> World:
    reads, writes = (
        make(lambda nbytes, rate=rate: nbytes / rate, 1e-4)
        for make, rate in zip((read_lane, write_lane), rates, strict=True)
    )
    world = World(
        reads, writes, together=together, memory=Memory(1 << 40, 1 << 40), recorder=recorder
    )
    pipeline = SimPipeline(world, staging_nbytes=400_000)
    for tile, count in tiles:
        pipeline.add(tile, count)
    pipeline.finish()
    world.drain()
    return world


TILES = st.lists(
    st.tuples(
        st.builds(
            SimTile,
            name=st.sampled_from("ab"),
            numel=st.just(1000),
            read_nbytes=st.sampled_from([80_000, 120_000]),
            staging_nbytes=st.sampled_from([90_112, 131_072]),
            written_nbytes=st.just(80_000),
            seconds=st.floats(0, 0.1),
            temporary_nbytes=st.sampled_from([0, 5000]),
        ),
        st.integers(1, 300),
    ),
    min_size=1,
    max_size=4,
)


@given(
    tiles=TILES,
    layers=st.integers(1, 12),
    rates=st.tuples(RATES, RATES),
    together=st.floats(0.5, 1),
)
def test_tiles_that_repeat_are_counted_as_they_would_be_simulated(
    tiles: list[tuple[SimTile, int]], layers: int, rates: tuple[float, float], together: float
) -> None:
    tiles = [(tile, 1 + count // layers) for tile, count in tiles] * layers
    one = streamed(tiles, rates, together, ListRecorder())
    other = streamed(tiles, rates, together, None)
    totals, counted = one.journal.totals, other.journal.totals
    assert counted.read_nbytes == totals.read_nbytes
    assert counted.written_nbytes == totals.written_nbytes
    assert other.now_s == pytest.approx(one.now_s, rel=1e-6)
    assert counted.stall_s == pytest.approx(totals.stall_s, rel=1e-6, abs=1e-9)
    assert other.drive_busy_s == pytest.approx(one.drive_busy_s, rel=1e-6)
    assert other.memory.peak_nbytes == one.memory.peak_nbytes
    assert other.memory.nbytes == one.memory.nbytes == 0


def test_thousands_of_equal_tiles_take_few_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    plain = SimPipeline.advance_one
    monkeypatch.setattr(SimPipeline, "advance_one", lambda self: steps.append(plain(self)))
    tile = SimTile("a", 1000, 80_000, 90_112, 80_000, 1e-3, 0)
    world = streamed([(tile, 5000), (tile._replace(name="b"), 5000)], (1e7, 1e7), 0.5, None)
    assert world.journal.totals.read_nbytes == 10_000 * 80_000
    assert len(steps) < 200


def test_many_equal_layers_take_few_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    plain = SimPipeline.advance_one
    monkeypatch.setattr(SimPipeline, "advance_one", lambda self: steps.append(plain(self)))
    tile = SimTile("a", 1000, 80_000, 90_112, 80_000, 1e-3, 0)
    layer = [(tile, 40), (tile._replace(name="b", read_nbytes=120_000), 30)]
    layers = [
        (one._replace(name=f"{one.name} {at}"), count) for at in range(200) for one, count in layer
    ]
    world = streamed(layers, (1e7, 1e7), 0.5, None)
    assert world.journal.totals.read_nbytes == 200 * (40 * 80_000 + 30 * 120_000)
    assert len(steps) < 400


@pytest.mark.parametrize("change", ["nvme=20GB/s", "nvme=300MB/s", "compute=0.1x"])
def test_a_recorded_run_is_the_run_that_is_not_recorded(change: str) -> None:
    program = decoder(blocks=2, width=1536, tokens=32, vocabulary=16_000)
    faster, once = changed(machine(), DRIVE, parse_changes(change)), settings(900)
    one = predict(program, faster, once, BASELINE, recorder=ListRecorder())
    other = predict(program, faster, once, BASELINE)
    for here, there in zip(one.steps, other.steps, strict=True):
        assert_same(dataclasses.asdict(here.finished), dataclasses.asdict(there.finished))
        assert here.peak_roles == there.peak_roles


@pytest.mark.parametrize(
    ("blocks", "tokens", "mib", "simulated"),
    # The last two spill; of these the first leaves other bytes of small storages each time.
    [(3, 64, 380, 3), (16, 96, 800, 3), (8, 1024, 560, 3), (8, 1024, 367, 4)],
)
def test_steps_that_begin_as_the_one_before_are_counted(
    monkeypatch: pytest.MonkeyPatch, blocks: int, tokens: int, mib: int, simulated: int
) -> None:
    program = decoder(blocks=blocks, tokens=tokens)
    whole = predict(program, machine(), settings(mib), BASELINE, recorder=ListRecorder())
    begun = []
    plain = Simulation._simulate

    def simulate(self: Simulation, before: Reading) -> SimulatedStep:
        begun.append(before)
        return plain(self, before)

    monkeypatch.setattr(Simulation, "_simulate", simulate)
    counted = predict(program, machine(), settings(mib), BASELINE)
    assert len(begun) == simulated
    for here, there in zip(whole.steps, counted.steps, strict=True):
        assert_same(dataclasses.asdict(here.finished), dataclasses.asdict(there.finished))
        assert_same(here.busy_s, there.busy_s)
        assert here.peak_roles == there.peak_roles
        assert here.plan == there.plan


def test_what_a_pass_has_left_over_is_not_counted_in_the_next_one() -> None:
    batch = SimBatch([BATCH_NBYTES // 4] * 5)
    for _ in range(5):  # no batch is ever closed by what others had waited
        batch.begin()
        assert [batch.add(storage) for storage in range(3)] == [()] * 3
        for storage in range(3):
            batch.forget(storage)
        assert batch.standing() == ()
    batch.begin()
    for storage in range(2):
        batch.add(storage)
    batch.forget(0)
    batch.begin()
    assert batch.standing() == (1,)
    # Within a pass it is: four were counted, of which three are there.
    for storage in range(2, 4):
        batch.add(storage)
    batch.forget(2)
    assert batch.add(4) == (1, 3, 4)
    assert batch.standing() == ()


def test_a_step_after_one_that_was_counted_is_simulated_from_there() -> None:
    compiled = compile_program(decoder(), Costs(machine(), DRIVE))
    plan = predict(decoder(), machine(), settings(375), BASELINE).steps[0].plan
    one, other = (
        Simulation(compiled, plan, chunk_numel=1 << 18, recorder=recorder)
        for recorder in (ListRecorder(), None)
    )
    for at in range(7):
        if at == 5:  # what stays no more has to be read again
            one.keep_streaming()
            other.keep_streaming()
        here, there = one.step(), other.step()
        assert_same(dataclasses.asdict(here.finished), dataclasses.asdict(there.finished))
        assert here.finished.step == there.finished.step == at + 1


def test_what_nobody_decides_upon_is_added_up() -> None:
    program = decoder(blocks=4)
    costs = Costs(machine(), DRIVE)
    moments = compile_program(program, costs).moments
    assert not {what for _, _, _, what, _ in moments[:-1]} & {What.COMPUTE, What.ALLOCATE}
    computing = [event.which for event in program.events if event.what is What.COMPUTE]
    made = [event.which for event in program.events if event.what is What.ALLOCATE]
    calls = sum(event.what in {What.SAVE, What.UNSAVE} for event in program.events)
    uses = sum(event.what is What.USE for event in program.events)
    expected_s = sum(costs.seconds(program.operations[which]) for which in computing)
    expected_s += sum(costs.fresh_s(program.storages[which]) for which in made)
    expected_s += costs.hook_s * (uses + calls / 2)
    assert sum(seconds for seconds, *_ in moments) == pytest.approx(expected_s)
    freed = sum(program.storages[which] for *_, what, which in moments if what is What.FREE)
    assert sum(nbytes for _, _, nbytes, _, _ in moments) == freed
    assert all(list(highs) == sorted(set(highs)) for _, highs, *_ in moments)


def test_no_garbage_is_looked_for_while_a_run_is_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[bool] = []
    plain = Simulation.step

    def step(self: Simulation) -> SimulatedStep:
        looked.append(gc.isenabled())
        return plain(self)

    monkeypatch.setattr(Simulation, "step", step)
    found = predict(decoder(), machine(), settings(375), BASELINE)
    assert looked == [False] * len(found.steps)
    assert gc.isenabled()


@pytest.mark.parametrize("was_enabled", [True, False])
def test_the_collector_goes_on_as_it_was_even_behind_a_refusal(was_enabled: bool) -> None:
    try:
        (gc.enable if was_enabled else gc.disable)()
        with pytest.raises(BudgetError):
            predict(decoder(), machine(), settings(330), BASELINE)
        assert gc.isenabled() is was_enabled
    finally:
        gc.enable()
