"""A prediction corrected by a run: on runs that were simulated on another machine."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from planning_models import BASELINE, DRIVE, MIB, Model, machine, model_in, settings, trace

from offload.allocator.errors import ConfigError
from offload.config import OffloadConfig
from offload.planner.baseline import RUNNING_NBYTES
from offload.planner.recording import recorded
from offload.planner.refine import read_recorded, refine, unpredicted
from offload.swap.planning.predict import Baseline, Prediction, Settings, predict
from offload.swap.planning.program import Program
from offload.swap.planning.whatif import changed
from offload.tiers.machine import Machine

PROGRAM = trace()
BUDGET = settings(500)


def run_of(
    path: Path,
    real: Machine,
    baseline: Baseline,
    *,
    program: Program = PROGRAM,
    config: OffloadConfig | None = None,
    run: Settings = BUDGET,
) -> Prediction:
    """A run directory: what happened on ``real``, of a process like ``baseline``."""
    with recorded(path, run, real) as recorder:
        found = predict(program, real, run, baseline, recorder=recorder)
    plan = dataclasses.replace(found.steps[0].plan, baseline_nbytes=baseline.attach_nbytes)
    (path / "plan.json").write_text(plan.to_json())
    (path / "weights.json").write_text(json.dumps(program.weight_forms))
    (path / "config.json").write_text((config or OffloadConfig()).model_dump_json())
    return found


@pytest.mark.parametrize("compute", [0.4, 1.0, 2.5])
@pytest.mark.parametrize("extra_mib", [0, 17])
def test_a_processor_and_a_process_that_differ_are_found(
    compute: float, extra_mib: int, tmp_path: Path
) -> None:
    real = changed(machine(), DRIVE, {"compute": compute})
    baseline = Baseline(
        attach_nbytes=BASELINE.attach_nbytes + 5 * MIB,
        running_nbytes=RUNNING_NBYTES + extra_mib * MIB,
    )
    happened = run_of(tmp_path, real, baseline)
    refined = refine(PROGRAM, machine(), DRIVE, read_recorded(tmp_path))
    assert refined.baseline == baseline
    again = predict(PROGRAM, refined.machine, BUDGET, refined.baseline)
    plain = predict(PROGRAM, machine(), BUDGET, BASELINE)
    assert again.last.finished.compute_s == pytest.approx(happened.last.finished.compute_s, rel=0.1)
    assert abs(again.step_s - happened.step_s) <= abs(plain.step_s - happened.step_s) + 1e-9
    assert again.steps[0].finished.peak_nbytes == happened.steps[0].finished.peak_nbytes
    assert f"compute x{compute:.1f}" in refined.note
    assert "measured" in refined.note


def test_a_drive_that_is_slower_than_it_seemed_is_found(tmp_path: Path) -> None:
    real = changed(machine(), DRIVE, {"nvme-read": 100e6, "nvme-write": 80e6})
    happened = run_of(tmp_path, real, BASELINE)
    refined = refine(PROGRAM, machine(), DRIVE, read_recorded(tmp_path))
    again = predict(PROGRAM, refined.machine, BUDGET, refined.baseline)
    plain = predict(PROGRAM, machine(), BUDGET, BASELINE)
    assert abs(again.step_s / happened.step_s - 1) < 0.15
    assert abs(plain.step_s / happened.step_s - 1) > 0.5
    assert "nvme-write x0." in refined.note


@pytest.mark.parametrize("told", [True, False])
def test_a_run_of_several_micro_batches_is_predicted_with_as_many(
    tmp_path: Path, told: bool
) -> None:
    real = changed(machine(), DRIVE, {"compute": 0.4})
    config = OffloadConfig()
    if told:  # by its setting
        config = OffloadConfig(step_in_backward=True, accumulation_steps=3)
    ran = dataclasses.replace(BUDGET, micro_batches=3, step_in_backward=told)
    happened = run_of(tmp_path, real, BASELINE, config=config, run=ran)
    recorded = read_recorded(tmp_path)
    assert recorded.micro_batches == (3 if told else None)
    refined = refine(PROGRAM, machine(), DRIVE, recorded, micro_batches=1 if told else 3)
    again = predict(PROGRAM, refined.machine, ran, refined.baseline)
    assert again.last.finished.compute_s == pytest.approx(happened.last.finished.compute_s, rel=0.1)
    assert again.steps[0].finished.peak_nbytes == happened.steps[0].finished.peak_nbytes
    assert "compute x0.4" in refined.note


def test_a_drive_with_little_to_do_is_left_alone(tmp_path: Path) -> None:
    real = changed(machine(), DRIVE, {"compute": 0.001})
    run_of(tmp_path, real, BASELINE)
    refined = refine(PROGRAM, machine(), DRIVE, read_recorded(tmp_path))
    assert refined.machine.links == machine().links


def test_other_processors_and_models_are_refused(tmp_path: Path) -> None:
    run_of(tmp_path / "run", machine(), BASELINE)
    found = read_recorded(tmp_path / "run")
    elsewhere = dataclasses.replace(found, processor="abacus")
    with pytest.raises(ConfigError, match="ran on another processor, abacus"):
        refine(PROGRAM, machine(), DRIVE, elsewhere)

    with pytest.raises(ConfigError, match="trained another model"):
        refine(_renamed(PROGRAM), machine(), DRIVE, found)


@pytest.mark.parametrize(
    ("other", "ran", "planned"),
    [
        (
            lambda: Model(width=128),
            "'embedding.weight' is float32 [1000, 256]",
            "'embedding.weight' is float32 [1000, 128]",
        ),
        (
            lambda: Model(vocabulary=999),
            "'embedding.weight' is float32 [1000, 256]",
            "'embedding.weight' is float32 [999, 256]",
        ),
        (
            lambda: model_in(torch.bfloat16),
            "'embedding.weight' is float32 [1000, 256]",
            "'embedding.weight' is bfloat16 [1000, 256]",
        ),
        (
            lambda: Model(blocks=2),
            "'blocks.2.norm.weight' is float32 [256]",
            "'blocks.2.norm.weight' is not there",
        ),
        (
            lambda: Model(blocks=4),
            "'blocks.3.norm.weight' is not there",
            "'blocks.3.norm.weight' is float32 [256]",
        ),
    ],
)
def test_models_whose_weights_share_names_are_told_apart(
    other: Callable[[], Model], ran: str, planned: str, tmp_path: Path
) -> None:
    run_of(tmp_path, machine(), BASELINE)
    with pytest.raises(ConfigError, match="trained another model") as refusal:
        refine(trace(other), machine(), DRIVE, read_recorded(tmp_path))
    assert f"its weight {ran}, this one's weight {planned}. Plan that model" in str(refusal.value)


def test_a_record_without_weights_is_taken_as_ever(tmp_path: Path) -> None:
    run_of(tmp_path, machine(), BASELINE)
    (tmp_path / "weights.json").unlink()
    refine(PROGRAM, machine(), DRIVE, read_recorded(tmp_path))


def test_a_run_that_kept_states_in_another_precision_is_refused(tmp_path: Path) -> None:
    run_of(tmp_path, machine(), BASELINE, config=OffloadConfig(state_precision="bf16"))
    with pytest.raises(ConfigError, match="plan with --state-precision bf16, or record a run"):
        refine(PROGRAM, machine(), DRIVE, read_recorded(tmp_path))


def test_a_run_on_another_number_of_drives_is_refused(tmp_path: Path) -> None:
    config = OffloadConfig(nvme=(tmp_path / "a", tmp_path / "b"))
    run_of(tmp_path, machine(), BASELINE, config=config)
    with pytest.raises(ConfigError, match="ran on 2 directories, this plan on 1: give --nvme"):
        refine(PROGRAM, machine(), DRIVE, read_recorded(tmp_path))


def _renamed(program: Program) -> Program:
    census = program.census
    weights = tuple(
        dataclasses.replace(weight, name=f"other.{weight.name}") for weight in census.weights
    )
    forms = {f"other.{name}": form for name, form in program.weight_forms.items()}
    return dataclasses.replace(
        program, census=dataclasses.replace(census, weights=weights), weight_forms=forms
    )


def test_records_that_cannot_correct_anything(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run directory"):
        read_recorded(tmp_path / "none")
    simulated = tmp_path / "simulated"
    with recorded(simulated, BUDGET, machine()) as recorder:
        predict(PROGRAM, machine(), BUDGET, BASELINE, recorder=recorder)
    with pytest.raises(ConfigError, match="not the record of a real run"):
        read_recorded(simulated)
    other = tmp_path / "other"
    run_of(other, machine(), BASELINE, config=OffloadConfig(recompute="tokenwise", io_threads=8))
    with pytest.raises(ConfigError, match="ran with io_threads, recompute, which is not"):
        read_recorded(other)
    run_of(tmp_path / "run", machine(), BASELINE)
    for name, content, message in (
        ("config.json", "[]", "holds no keys and values"),
        ("plan.json", "{", "is damaged"),
        ("plan.json", "{}", "is damaged: 'budget_nbytes'"),
        ("config.json", json.dumps({"io_threads": "many"}), "is damaged"),
    ):
        file = tmp_path / "run" / name
        kept = file.read_text()
        file.write_text(content)
        with pytest.raises(ConfigError, match=message):
            read_recorded(tmp_path / "run")
        file.write_text(kept)
    events = tmp_path / "run" / "rank0.jsonl"
    lines = events.read_text().splitlines()
    steps = [number for number, line in enumerate(lines) if '"StepFinished"' in line]
    events.write_text("\n".join(lines[: steps[1] + 1]) + "\n")
    with pytest.raises(ConfigError, match="has 2 steps: 3 are the least"):
        read_recorded(tmp_path / "run")


def test_what_the_simulation_does_not_know_is_named(tmp_path: Path) -> None:
    assert unpredicted(OffloadConfig(commit="never", nvme=(tmp_path,), device="cpu")) == []
    assert unpredicted(OffloadConfig(nvme=(tmp_path, tmp_path / "b"), step_in_backward=True)) == []
    assert unpredicted(OffloadConfig(nvme_write_budget=1 << 30, step_in_forward=True)) == []
    assert unpredicted(OffloadConfig(step_in_backward=True, accumulation_steps=4)) == []
    config = OffloadConfig(device="cuda", io_engine="aiofiles", commit="manual")
    assert len(unpredicted(config)) == 3
