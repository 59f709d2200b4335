"""What a step waits for memory that a hypervisor takes back while it lies free."""

import dataclasses
import itertools

import pytest
from planning_models import DRIVE, MIB, machine
from planning_programs import decoder

from offload.swap.planning.compiled import compile_program
from offload.swap.planning.cost import Costs
from offload.swap.planning.program import Event, Program, What
from offload.swap.planning.reclaimed import reclaimed_s
from offload.tiers.hostmem import HUGE_PAGE
from offload.tiers.machine import ComputeRate

GIB = 1 << 30
PASS_S = 2.0


def costs(*, pass_nbytes: int = GIB, per_s: float = 0.5e9) -> Costs:
    """Of a machine whose first touch takes no time, but of what was taken back."""
    others = [rate for rate in machine().compute if rate.work != "first touch"]
    found = [
        ComputeRate(processor="cpu", work=work, dtype="float32", size=size, per_s=rate)
        for work, size, rate in (("first touch", 1, 1e16), ("reclaimed touch", pass_nbytes, per_s))
    ]
    return Costs(dataclasses.replace(machine(), compute=(*others, *found)), DRIVE)


def step(*events: tuple[What, int], storages: tuple[int, ...]) -> Program:
    """A step of these events alone; ``which`` of what is computed is an index of seconds."""
    made = tuple(itertools.starmap(Event, events))
    return dataclasses.replace(decoder(blocks=1), events=made, storages=storages)


def longer(program: Program) -> Program:
    """``program``, whose operations take seconds."""
    operations = tuple(
        dataclasses.replace(one, nbytes=10**12, kind="pointwise") for one in program.operations
    )
    return dataclasses.replace(program, operations=operations)


def held_between(nbytes: int) -> Program:
    """One storage, held while the first operation runs, and free while the second one does."""
    return step(
        (What.ALLOCATE, 0),
        (What.COMPUTE, 0),
        (What.FREE, 0),
        (What.COMPUTE, 1),
        storages=(nbytes,),
    )


def missing_nbytes(
    program: Program, seconds: tuple[float, ...], *, pass_nbytes: int = GIB
) -> float:
    """Bytes of a step that have to come back from the host, which takes next to no time."""
    waits_s = reclaimed_s(program, costs(pass_nbytes=pass_nbytes, per_s=1e12), seconds)
    assert all(program.events[number].what is What.ALLOCATE for number in waits_s)
    return sum(waits_s.values()) * 1e12


def test_what_is_used_again_at_once_is_there() -> None:
    found = missing_nbytes(held_between(512 * MIB), (10.0, 1e-6))
    assert found == pytest.approx(0, abs=1024)


def test_what_lies_free_for_long_comes_back_from_the_host() -> None:
    found = missing_nbytes(held_between(512 * MIB), (1.0, 101.0))
    assert found == pytest.approx(512 * MIB, rel=0.001)


def test_a_pass_takes_no_more_than_it_can() -> None:
    found = missing_nbytes(held_between(8 * GIB), (2 * PASS_S, 3 * PASS_S))
    assert found == pytest.approx(3 * GIB, rel=0.001)


def test_memory_that_is_no_huge_page_is_not_reported() -> None:
    small = held_between(HUGE_PAGE - 1)
    assert reclaimed_s(small, costs(), (1.0, 100.0)) == {}
    more = missing_nbytes(held_between(2 * HUGE_PAGE - 1), (1.0, 101.0))
    assert more == pytest.approx(HUGE_PAGE, rel=0.001)


def test_what_was_let_go_last_is_used_first() -> None:
    # The large one lies free all the time but for a moment, in which the small one takes nothing.
    program = step(
        (What.ALLOCATE, 0),
        (What.FREE, 0),
        (What.COMPUTE, 0),
        *((What.ALLOCATE, 1), (What.FREE, 1)) * 100,
        storages=(512 * MIB, 64 * MIB),
    )
    waits_s = reclaimed_s(program, costs(), (100.0,))
    # The small one takes what has lain free longest once, and has it warm from then on.
    assert waits_s[3] == pytest.approx(64 * MIB / 0.5e9, rel=0.02)
    assert waits_s[0] == pytest.approx(448 * MIB / 0.5e9, rel=0.02)
    assert sum(waits_s.values()) == pytest.approx(waits_s[0] + waits_s[3])


@pytest.mark.parametrize(("held_s", "free_s"), [(0.9, 1.2), (1.8, 0.3), (3.0, 2.9), (1.1, 0.95)])
@pytest.mark.parametrize("nbytes", [512 * MIB, 3 * GIB])
def test_on_average_passes_take_as_much(nbytes: int, held_s: float, free_s: float) -> None:
    """Against passes that come every two seconds, wherever a step is."""
    steps = 20_000
    taken, began_s = 0, 0.0
    for _ in range(steps):
        freed_s = began_s + held_s
        ended_s = freed_s + free_s
        taken += min(int(ended_s // PASS_S - freed_s // PASS_S) * GIB, nbytes)
        began_s = ended_s
    found = missing_nbytes(held_between(nbytes), (held_s, free_s))
    passes = (held_s + free_s) / PASS_S
    assert found == pytest.approx(taken / steps * int(passes) / passes, rel=0.02)


def test_steps_between_two_passes_wait_for_nothing() -> None:
    assert reclaimed_s(held_between(512 * MIB), costs(per_s=1e12), (0.9, 0.9)) == {}
    once, twice = (missing_nbytes(held_between(512 * MIB), (0.1, free_s)) for free_s in (3.8, 4.0))
    assert 1.5 * once < twice  # one pass that is sure, and two


def test_a_compiled_step_waits_where_the_host_brings_memory_back() -> None:
    program, slow = longer(held_between(4 * GIB)), costs(per_s=1e9)
    computing_s = [slow.seconds(operation) for operation in program.operations]
    waits_s = reclaimed_s(program, slow, computing_s)
    plain = dataclasses.replace(machine(), compute=tuple(slow._machine.compute[:-1]))
    seconds = [
        sum(moment[0] for moment in compile_program(program, each).moments)
        for each in (slow, Costs(plain, DRIVE))
    ]
    assert sum(waits_s.values()) > 0
    assert seconds[0] - seconds[1] == pytest.approx(sum(waits_s.values()))


def test_a_host_that_is_faster_than_the_kernel_costs_nothing() -> None:
    found = ComputeRate(
        processor="cpu", work="reclaimed touch", dtype="float32", size=GIB, per_s=1e15
    )
    quick = dataclasses.replace(machine(), compute=(*machine().compute, found))
    assert Costs(quick, DRIVE).reclaimed_s_per_byte == 0.0
    assert Costs(machine(), DRIVE).reclaimed_s_per_byte == 0.0
