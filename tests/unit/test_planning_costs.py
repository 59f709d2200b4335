"""What an operation takes by measured rates, the largest that fits, and changes of a machine."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planning_models import (
    DRIVE,
    MIB,
    machine,
    trace,
)

from offload.allocator.errors import ConfigError
from offload.swap.planning.cost import Costs, Curve
from offload.swap.planning.predict import largest
from offload.swap.planning.whatif import parse_changes
from offload.tiers.machine import ComputeRate

PROGRAM = trace()


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
