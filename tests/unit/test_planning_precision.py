"""Predictions of states in fewer bits and of masters."""

import dataclasses
from pathlib import Path

import pytest
import torch
from planning_models import BASELINE, DRIVE, MIB, machine, model_in, settings, trace
from real_runs import both, check_moved

from offload.allocator.errors import UnsupportedError
from offload.swap.planning.cost import Costs
from offload.swap.planning.predict import drive_use, predict
from offload.swap.planning.program import Program, StateForm
from offload.swap.state_precision import EXACT, Precision
from offload.tiers.machine import ComputeRate, Machine

BF16 = Precision(states="bf16")
EIGHT = Precision(states="8bit")
MASTERS = Precision(masters="fp32")


def program(dtype: torch.dtype, precision: Precision) -> Program:
    return trace(lambda: model_in(dtype), precision=precision)


@pytest.mark.parametrize(
    ("dtype", "precision", "in_backward"),
    [
        (torch.float32, BF16, False),
        (torch.float32, EIGHT, True),
        (torch.bfloat16, MASTERS, False),
        (torch.bfloat16, Precision(states="8bit", masters="fp32"), False),
        (torch.bfloat16, Precision(states="bf16", masters="fp32"), True),
    ],
    ids=str,
)
def test_it_moves_the_bytes_that_a_real_run_moves(
    tmp_path: Path, dtype: torch.dtype, precision: Precision, in_backward: bool
) -> None:
    real, virtual = both(
        program(dtype, precision),
        tmp_path,
        dtype=dtype,
        step_in_backward=in_backward,
        state_precision=precision.states,
        master_weights=precision.masters,
    )
    check_moved(real, virtual, itemsize=dtype.itemsize, in_backward=in_backward)


@pytest.mark.parametrize(
    ("dtype", "precision", "nbytes"),
    [
        (torch.float32, EXACT, 8.0),
        (torch.float32, BF16, 4.0),
        (torch.float32, EIGHT, 2 * 65 / 64),
        (torch.bfloat16, EXACT, 4.0),
        (torch.bfloat16, MASTERS, 2 + 8.0),
        (torch.bfloat16, Precision(states="bf16", masters="fp32"), 2 + 4.0),
        (torch.bfloat16, Precision(states="8bit", masters="fp32"), 2 + 2 * 65 / 64),
    ],
)
def test_states_take_of_the_drive_what_the_store_keeps(
    dtype: torch.dtype, precision: Precision, nbytes: float
) -> None:
    found = program(dtype, precision)
    assert found.stepping is not None
    assert found.stepping.nbytes == pytest.approx(nbytes * found.parameters, rel=1e-3)
    slots = drive_use(found, settings(400), 0).states_nbytes
    assert slots == pytest.approx(2 * found.stepping.nbytes, rel=0.02)
    assert Program.from_json(found.to_json()) == found


@pytest.mark.parametrize("precision", [BF16, EIGHT])
def test_states_that_are_rounded_are_never_stepped_in_memory(precision: Precision) -> None:
    exact = predict(trace(), machine(), settings(900), BASELINE)
    assert exact.plan.resident_states
    found = predict(program(torch.float32, precision), machine(), settings(900), BASELINE)
    assert not found.plan.resident_states
    assert len(found.plan.resident) == len(exact.plan.resident)


def test_fewer_bits_are_faster_where_the_drive_is_slow_and_slower_where_it_is_not() -> None:
    exact, eight = trace(), program(torch.float32, EIGHT)
    slow, fast = (with_drive(machine(), rate) for rate in (100e6, 100e9))
    budget = dataclasses.replace(settings(400), step_in_backward=True)
    least = settings(360)
    for one, faster in ((slow, eight), (fast, exact)):
        both_s = [predict(each, one, least, BASELINE).step_s for each in (exact, eight)]
        assert min(both_s) == both_s[0 if faster is exact else 1]
    assert predict(eight, slow, budget, BASELINE).peak_nbytes <= 400 * MIB


def with_drive(machine: Machine, bytes_per_s: float) -> Machine:
    links = tuple(
        dataclasses.replace(
            link, **dict.fromkeys(("low_bytes_per_s", "bytes_per_s", "high_bytes_per_s"), rate)
        )
        if DRIVE in {link.source, link.target}
        else link
        for link in machine.links
        for rate in [bytes_per_s]
    )
    return dataclasses.replace(machine, links=links)


def test_a_measured_rate_takes_the_place_of_the_share() -> None:
    forms: tuple[StateForm, ...] = ("bf16", "signed", "unsigned", "low")
    bare = Costs(machine(), DRIVE)
    derived = [bare.recoding_s(form, 1 << 20) for form in forms]
    assert derived[1] == derived[2] > derived[3] > derived[0] > 0
    rate = ComputeRate(processor="cpu", work="8bit states", dtype="float32", size=1, per_s=4e6)
    measured = dataclasses.replace(machine(), compute=(*machine().compute, rate))
    assert Costs(measured, DRIVE).recoding_s("signed", 10**6) == pytest.approx(1.0)


def test_what_may_not_be_rounded_is_refused_as_a_run_refuses_it() -> None:
    with pytest.raises(UnsupportedError, match="amsgrad keeps the largest"):
        trace(precision=EIGHT, amsgrad=True, fused=False)
    with pytest.raises(UnsupportedError, match="are float16, whose exponent is another"):
        program(torch.float16, MASTERS)
