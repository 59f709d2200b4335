"""The simulated run: it moves what a real run moves, and its books balance."""

import dataclasses
import math
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planning_models import (
    BASELINE,
    DRIVE,
    MIB,
    Model,
    machine,
    settings,
    trace,
)
from real_runs import both, check_moved

from offload.allocator.errors import BudgetError, ConfigError
from offload.planner.recording import recorded
from offload.report.model import summarise
from offload.report.reader import read_run
from offload.swap.plan import MARGIN_NBYTES, soft_limit_nbytes
from offload.swap.planning.compiled import compile_program
from offload.swap.planning.cost import Costs, Curve
from offload.swap.planning.predict import drive_use, largest, least_budget, predict
from offload.swap.planning.sim_memory import Memory, Role
from offload.swap.planning.simulate import Simulation
from offload.swap.planning.whatif import changed, parse_changes
from offload.swap.planning.world import World, read_lane, write_lane
from offload.tiers.events import ListRecorder, Move, Stall
from offload.tiers.machine import ComputeRate

PROGRAM = trace()
LEAST = least_budget(PROGRAM, machine(), settings(1), BASELINE).settings.budget_nbytes // MIB


@pytest.mark.parametrize("window_nbytes", [1 << 20, 3 << 20])
@pytest.mark.parametrize("in_backward", [False, True])
def test_it_moves_the_bytes_that_a_real_run_moves(
    tmp_path: Path, window_nbytes: int, in_backward: bool
) -> None:
    real, virtual = both(
        PROGRAM, tmp_path, window_nbytes=window_nbytes, step_in_backward=in_backward
    )
    check_moved(real, virtual, in_backward=in_backward)


def test_the_same_questions_get_the_same_answers() -> None:
    first, second = (ListRecorder(), ListRecorder())
    for recorder in (first, second):
        predict(PROGRAM, machine(), settings(LEAST + 8), BASELINE, recorder=recorder)
    assert first.events == second.events
    assert any(isinstance(event, Stall) for event in first.events)


@given(more=st.integers(0, 200))
def test_the_books_balance_at_any_budget(more: int) -> None:
    recorder = ListRecorder()
    found = predict(PROGRAM, machine(), settings(LEAST + more), BASELINE, recorder=recorder)
    moves = [event for event in recorder.events if isinstance(event, Move)]
    steps = [step.finished for step in found.steps]
    assert sum(step.read_nbytes for step in steps) == sum(
        move.nbytes for move in moves if move.src.startswith("file")
    )
    assert sum(step.written_nbytes for step in steps) == sum(
        move.nbytes for move in moves if move.dst.startswith("file")
    )
    for step, each in zip(steps, found.steps, strict=True):
        parts = step.compute_s + step.stall_s + step.optimizer_s + step.commit_s
        assert parts == pytest.approx(step.step_s)
        assert all(nbytes >= 0 for nbytes in each.peak_roles.values())
        assert step.peak_nbytes <= each.plan.budget_nbytes
    # In order on each lane, and never two at once beyond the drive's rate.
    for lane in ("file→host", "host→file"):
        ends = [move.t_s for move in moves if move.lane == lane]
        assert ends == sorted(ends)


def test_nothing_is_left_in_memory_but_what_stays() -> None:
    found = predict(PROGRAM, machine(), settings(LEAST + 8), BASELINE)
    compiled = compile_program(PROGRAM, Costs(machine(), DRIVE))
    simulation = Simulation(compiled, found.steps[0].plan, chunk_numel=1 << 18)
    for _ in range(3):
        simulation.step()
        now = simulation.world.memory.now
        held = {role for role in ("saved", "transients", "gradients", "staging") if now[role]}
        assert not held
        assert now["weights"] >= 0
        assert now["states"] >= 0


def test_more_memory_saves_reads_until_nothing_streams() -> None:
    reads = [
        predict(PROGRAM, machine(), settings(mib), BASELINE).last.finished.read_nbytes
        for mib in (LEAST, LEAST + 16, LEAST + 64, LEAST + 256)
    ]
    assert reads == sorted(reads, reverse=True)
    assert reads[-1] == 0
    rich = predict(PROGRAM, machine(), settings(LEAST + 256), BASELINE)
    assert len(rich.plan.resident) == len(PROGRAM.census.weights)
    assert len(rich.plan.resident_states) > 0


def test_what_is_never_committed_is_written_only_as_it_leaves() -> None:
    rich = settings(LEAST + 256)
    durable = predict(PROGRAM, machine(), rich, BASELINE).last.finished
    volatile = dataclasses.replace(rich, commits=False)
    never = predict(PROGRAM, machine(), volatile, BASELINE).last.finished
    assert durable.written_nbytes > 3 * PROGRAM.trainable_nbytes * 0.9
    assert never.written_nbytes < durable.written_nbytes / 10
    assert never.commit_s < durable.commit_s


def test_a_faster_machine_is_never_slower() -> None:
    one = settings(LEAST + 8)
    before = predict(PROGRAM, machine(), one, BASELINE).step_s
    for changes in ("nvme=20GB/s", "compute=3x", "nvme=20GB/s,compute=3x"):
        faster = changed(machine(), DRIVE, parse_changes(changes))
        assert predict(PROGRAM, faster, one, BASELINE).step_s < before
    slower = changed(machine(), DRIVE, parse_changes("nvme=100MB/s"))
    slow = predict(PROGRAM, slower, one, BASELINE)
    assert slow.bound_by == "drive"
    assert slow.step_s > 3 * before


def test_the_least_budget_fits_and_one_mebibyte_less_does_not() -> None:
    assert predict(PROGRAM, machine(), settings(LEAST), BASELINE).peak_nbytes <= LEAST * MIB
    with pytest.raises(BudgetError, match="is too small") as refusal:
        predict(PROGRAM, machine(), settings(LEAST - 1), BASELINE)
    assert refusal.value.needed_nbytes > (LEAST - 1) * MIB


def test_long_batches_are_refused_as_a_run_refuses_them() -> None:
    long = trace(length=2048)
    with pytest.raises(BudgetError, match="with this batch, forward and backward take") as refusal:
        predict(long, machine(), settings(LEAST), BASELINE)
    assert refusal.value.needed_nbytes > LEAST * MIB + MARGIN_NBYTES


def test_a_drive_that_is_too_small_is_named_with_what_is_missing() -> None:
    tiers = tuple(
        dataclasses.replace(tier, free_nbytes=20 * MIB) if tier.name == DRIVE else tier
        for tier in machine().tiers
    )
    small = dataclasses.replace(machine(), tiers=tiers)
    with pytest.raises(BudgetError, match=f"{DRIVE} has 20.00 MiB free.*--commit never") as refusal:
        predict(PROGRAM, small, settings(LEAST + 8), BASELINE)
    assert refusal.value.budget_nbytes == 20 * MIB
    once = drive_use(PROGRAM, dataclasses.replace(settings(LEAST), commits=False), 0)
    twice = drive_use(PROGRAM, settings(LEAST), 0)
    assert twice.weights_nbytes == 2 * once.weights_nbytes
    assert twice.gradients_nbytes == once.gradients_nbytes


def test_a_simulated_run_is_a_run_to_the_report(tmp_path: Path) -> None:
    with recorded(tmp_path / "run", settings(LEAST + 8), machine()) as recorder:
        found = predict(PROGRAM, machine(), settings(LEAST + 8), BASELINE, recorder=recorder)
    report = summarise(read_run(tmp_path / "run"))
    assert report.headline.steps == 4
    assert report.headline.budget_nbytes == (LEAST + 8) * MIB
    assert report.headline.status == "simulated"
    assert report.headline.step_s == pytest.approx(found.step_s, rel=0.2)
    with (
        pytest.raises(ConfigError, match="holds the record of another run"),
        recorded(tmp_path / "run", settings(LEAST + 8), machine()),
    ):
        pass


def test_a_deep_model_is_simulated_whole() -> None:
    deep = trace(lambda: Model(width=64, blocks=40), length=16)
    found = predict(deep, machine(), settings(400), BASELINE)
    assert found.last.finished.step == 4


# The world.


def world(together: float = 0.5) -> World:
    rate = 1e6
    lanes = (
        read_lane(lambda nbytes: nbytes / rate, 0.0),
        write_lane(lambda nbytes: nbytes / rate, 0.0),
    )
    return World(*lanes, together=together, memory=Memory(1 << 40))


def test_lanes_that_work_at_once_share_the_drive() -> None:
    for together, end_s in ((0.5, 2.0), (1.0, 1.0)):
        both = world(together)
        reading = both.submit(both.reads, "a", "weight", 1_000_000)
        writing = both.submit(both.writes, "b", "state", 1_000_000)
        both.wait(both.reads, reading, "late")
        both.wait(both.writes, writing, "full")
        assert both.now_s == pytest.approx(end_s)
        assert both.journal.totals.stall_s == pytest.approx(end_s)


def test_time_that_is_computed_away_is_no_stall() -> None:
    one = world()
    flight = one.submit(one.reads, "a", "weight", 1_000_000)
    one.compute(0.4)
    assert flight.ended_s > one.now_s
    one.wait(one.reads, flight, "late")
    assert one.now_s == pytest.approx(1.0)
    assert one.journal.totals.stall_s == pytest.approx(0.6)
    assert one.drive_busy_s == pytest.approx(1.0)


def test_what_is_waited_for_overtakes_what_is_not_served_yet() -> None:
    one = world()
    first, second, third = (one.submit(one.reads, key, "weight", 1_000_000) for key in "abc")
    one.compute(0.1)
    one.wait(one.reads, third, "late")
    assert one.now_s == pytest.approx(2.0)
    assert first.ended_s <= one.now_s
    assert second.ended_s > one.now_s


@given(st.lists(st.tuples(st.booleans(), st.integers(4096, 10**7)), max_size=20), st.floats(0.5, 1))
def test_no_byte_is_lost_and_none_is_faster_than_the_drive(
    transfers: list[tuple[bool, int]], together: float
) -> None:
    one = world(together)
    for reading, nbytes in transfers:
        lane = one.reads if reading else one.writes
        one.submit(lane, "x", "state", nbytes)
    one.drain()
    sums = [sum(n for r, n in transfers if r is way) for way in (True, False)]
    assert one.journal.totals.read_nbytes == sums[0]
    assert one.journal.totals.written_nbytes == sums[1]
    alone_s = max(sums) / 1e6
    assert alone_s - 1e-6 <= one.now_s <= sum(sums) / 1e6 + 1e-6


def ends_of(arrivals: list[tuple[float, bool, int]], together: float) -> tuple[list[float], float]:
    """When each of ``arrivals`` (gap, reading, nbytes) ends at 1 MB/s, and the seconds of work."""
    queues: dict[bool, list[list[float]]] = {True: [], False: []}  # (which, work that is left)
    ends, now_s, busy_s = [0.0] * len(arrivals), 0.0, 0.0

    def go_on(until_s: float) -> None:
        nonlocal now_s, busy_s
        while any(queues.values()):
            firsts = [queue[0] for queue in queues.values() if queue]
            speed = together if len(firsts) == 2 else 1.0
            span_s = min(min(first[1] for first in firsts) / speed, until_s - now_s)
            now_s, busy_s = now_s + span_s, busy_s + span_s
            for first in firsts:
                first[1] -= span_s * speed
            for queue in queues.values():
                if queue and queue[0][1] <= 1e-9:
                    ends[int(queue.pop(0)[0])] = now_s
            if now_s >= until_s:
                break
        now_s = max(now_s, until_s) if until_s < math.inf else now_s

    for which, (gap_s, reading, nbytes) in enumerate(arrivals):
        go_on(now_s + gap_s)
        queues[reading].append([which, nbytes / 1e6])
    go_on(math.inf)
    return ends, busy_s


@given(
    st.lists(
        st.tuples(st.floats(0, 5), st.booleans(), st.integers(4096, 10**7)), min_size=1, max_size=20
    ),
    st.floats(0.25, 1),
)
def test_lanes_go_on_as_their_work_that_is_left_tells(
    arrivals: list[tuple[float, bool, int]], together: float
) -> None:
    one = world(together)
    flights = []
    for gap_s, reading, nbytes in arrivals:
        one.compute(gap_s)
        lane = one.reads if reading else one.writes
        flights.append(one.submit(lane, "x", "state", nbytes))
    one.drain()
    expected, busy_s = ends_of(arrivals, together)
    assert [flight.ended_s for flight in flights] == pytest.approx(expected, abs=1e-6)
    assert one.drive_busy_s == pytest.approx(busy_s, abs=1e-6)


MOVES = st.lists(
    st.tuples(st.booleans(), st.integers(1, 10**7), st.floats(0, 3), st.booleans()), max_size=30
)


@given(MOVES, st.floats(0.5, 1))
def test_what_moves_on_an_idle_drive_takes_what_a_queued_transfer_takes(
    moves: list[tuple[bool, int, float, bool]], together: float
) -> None:
    at_once, queued = world(together), world(together)
    for reading, nbytes, gap_s, waits in moves:
        for one in (at_once, queued):
            lane = one.reads if reading else one.writes
            if not waits:
                one.submit(lane, "x", "weight", nbytes)
            elif one is at_once:
                one.move(lane, "x", "weight", nbytes, "cold")
            else:
                one.wait(lane, one.submit(lane, "x", "weight", nbytes), "cold")
            one.compute(gap_s)
    for one in (at_once, queued):
        one.drain()
    assert at_once.reading() == queued.reading()  # to the bit


def test_clean_pages_give_way_to_what_is_needed() -> None:
    memory = Memory(100)
    memory.add_pages(60)
    memory.add("weights", 70)
    assert memory.resident_nbytes == 100
    assert memory.room() == 0
    memory.add("weights", 50)
    assert memory.resident_nbytes == 120
    assert memory.peak_nbytes == 120


def test_transients_are_what_is_there_beside_all_else() -> None:
    memory = Memory(1000)
    memory.add("weights", 100)
    memory.nbytes += 30
    memory.keep("saved", 20)
    assert {role: nbytes for role, nbytes in memory.now.items() if nbytes} == {
        "weights": 100, "saved": 20, "transients": 10
    }  # fmt: skip
    memory.pass_through([5, 40])
    assert memory.peak_nbytes == 170
    assert memory.peak_roles["transients"] == 50
    assert list(memory.peak_roles) == list(get_args(Role))
    assert memory.nbytes == sum(memory.now.values()) == 130


def test_soft_limit_is_where_the_simulated_runtime_waits() -> None:
    found = predict(PROGRAM, machine(), settings(LEAST + 8), BASELINE)
    assert found.building_nbytes <= soft_limit_nbytes(found.settings.budget_nbytes)


# Costs and solving.


def test_rates_are_interpolated_and_clamped() -> None:
    curve = Curve([(10, 100.0), (1000, 10_000.0)])
    assert curve.rate(1) == pytest.approx(100)
    assert curve.rate(10**9) == pytest.approx(10_000)
    assert curve.rate(100) == pytest.approx(1000)


def test_an_operation_takes_the_slower_of_arithmetic_and_memory() -> None:
    costs = Costs(machine(), DRIVE)
    product = next(o for o in PROGRAM.operations if o.kind == "matmul")
    assert costs.seconds(product) >= costs.call_s
    heavy = dataclasses.replace(product, flops=10**12)
    wide = dataclasses.replace(product, nbytes=10**12)
    assert costs.seconds(heavy) > 100 * costs.seconds(product)
    assert costs.seconds(wide) > 100 * costs.seconds(product)
    view = next(o for o in PROGRAM.operations if o.kind == "view")
    assert costs.seconds(view) < costs.call_s


def test_a_machine_without_rates_names_the_command() -> None:
    bare = dataclasses.replace(machine(), compute=())
    with pytest.raises(ConfigError, match=r"offload doctor -o machine\.json"):
        Costs(bare, DRIVE)


@given(st.integers(0, 500), st.integers(1, 64), st.integers(1, 16))
def test_the_largest_that_fits_is_found(bound: int, start: int, grid: int) -> None:
    found = largest(lambda value: value <= bound, start=start, grid=grid, most=400)
    expected = min(bound, 400) // grid * grid
    assert (found or 0) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nvme=7", "7GB/s"),
        ("nvme", "write one of"),
        ("ram=2x", "write one of"),
        ("compute=2", "write 2x"),
        ("nvme=0GB/s", "must be above 0"),
    ],
)
def test_changes_without_their_units_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_changes(text)


def test_small_fresh_results_have_a_rate_of_their_own() -> None:
    others = [rate for rate in machine().compute if rate.work != "first touch"]
    rates = [
        ComputeRate(processor="cpu", work="first touch", dtype="float32", size=size, per_s=per_s)
        for size, per_s in ((MIB, 2e9), (64 * MIB, 20e9))
    ]
    costs = Costs(dataclasses.replace(machine(), compute=(*others, *rates)), DRIVE)
    assert costs.fresh_s(MIB) == pytest.approx(MIB / 2e9)
    assert costs.fresh_s(64 * MIB) == pytest.approx(64 * MIB / 20e9)
    assert costs.fresh_s(MIB // 8) == 0.0  # the heap's own, which is there


@pytest.mark.parametrize(
    ("keys", "computed"), [(100, 2.0), (512, 2.0), (1024, 1.5), (4096, 1.125), (768, 14 / 9)]
)
def test_causal_attention_computes_whole_blocks_of_keys(keys: int, computed: float) -> None:
    costs = Costs(machine(), DRIVE)
    attention = next(o for o in PROGRAM.operations if o.kind == "attention")
    assert attention.causal_keys == 64
    whole = dataclasses.replace(attention, flops=10**12, causal_keys=0)
    causal = dataclasses.replace(whole, causal_keys=keys)
    assert costs.seconds(causal) == pytest.approx(computed * costs.seconds(whole))
