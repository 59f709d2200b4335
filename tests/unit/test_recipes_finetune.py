"""The fine-tuning job in plain PyTorch: what it learns, and how it fails."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from offload.errors import ConfigError
from offload.recipes import finetune_lm, make_checkpoint
from offload.recipes.finetune_lm import Settings

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.\n"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of two layers of width 32."""
    directory = tmp_path_factory.mktemp("made") / "checkpoint"
    shape = ["--vocabulary=400", "--positions=64", "--width=32", "--layers=2", "--heads=2"]
    assert make_checkpoint.main([str(directory), *shape]) == 0
    return directory


@pytest.fixture
def flags(checkpoint: Path, tmp_path: Path) -> list[str]:
    """Flags of a job of a second."""
    text = tmp_path / "text"
    text.write_text(TEXT * 40)
    return [
        f"--checkpoint={checkpoint}",
        f"--text={text}",
        f"--nvme={tmp_path / 'store'}",
        f"--record={tmp_path / 'record'}",
        f"--result={tmp_path / 'result.json'}",
        *("--tokenizer=bytes", "--steps=6", "--seq=16", "--lr=0.01", "--warmup=1"),
    ]


def run(flags: list[str], *more: str) -> dict[str, Any]:
    """Run the job and return its result."""
    settings = finetune_lm.read_settings([*flags, *more])
    return finetune_lm.train(settings)


def test_plain_job_learns_and_writes_its_result(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune_lm.main([*flags, "--plain"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result == json.loads(Path(flags[4].partition("=")[2]).read_text())
    assert len(result["losses"]) == 6
    assert result["loss_before"] == result["losses"][0]
    assert result["loss_after"] == result["losses"][-1] < result["loss_before"] - 0.5
    assert result["heldout_after"] < result["heldout_before"] - 0.5
    assert result["peak_bytes"] > 100 << 20
    assert result["step_s"] == pytest.approx(result["compute_s"] + result["optimizer_s"])
    assert "step 6/6" in captured.err


def test_a_seed_fixes_the_run(flags: list[str]) -> None:
    first, again = run(flags, "--plain"), run(flags, "--plain")
    other = run(flags, "--plain", "--seed=1")
    assert again["losses"] == first["losses"]
    assert again["weights_xxh3"] == first["weights_xxh3"]
    assert other["weights_xxh3"] != first["weights_xxh3"]


def test_accumulation_draws_other_data_for_each_micro_batch(flags: list[str]) -> None:
    settings = finetune_lm.read_settings([*flags, "--accumulate=3", "--batch=2"])
    batches = finetune_lm.draw_batches(torch.arange(2000), 0, settings)
    assert batches.shape == (3, 2, 16)
    assert len({int(start) for start in batches[..., 0].flatten()}) == 6


def test_missing_checkpoint_is_told(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = finetune_lm.main([*flags, "--plain", f"--checkpoint={tmp_path / 'absent'}"])
    assert code == 1
    assert "absent has no config.json" in capsys.readouterr().err


def test_empty_text_is_wrong_usage(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("")
    assert finetune_lm.main([*flags, "--plain"]) == 2
    assert "the text is empty" in capsys.readouterr().err


def test_text_shorter_than_one_sequence_is_wrong_usage(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text(TEXT)
    assert finetune_lm.main([*flags, "--plain"]) == 2
    assert "pass a text of at least 160 tokens, or --seq 7" in capsys.readouterr().err


def test_a_sequence_beyond_the_models_positions_is_wrong_usage(flags: list[str]) -> None:
    with pytest.raises(ConfigError, match="seq is 65: the model takes at most 64"):
        run(flags, "--plain", "--seq=65")


def test_a_diverging_run_stops_before_the_weights_are_spoilt(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune_lm.main([*flags, "--plain", "--lr=1e30", "--warmup=0"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "step 2: the loss is" in captured.err
    assert "lower --lr (now 1e+30)" in captured.err


def test_ctrl_c_ends_with_130(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune_lm, "draw_batches", interrupt)
    assert finetune_lm.main([*flags, "--plain"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_weight_decay_is_for_matrices(flags: list[str]) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    decayed, spared = finetune_lm.parameter_groups(model, 0.1)
    assert [tuple(p.shape) for p in decayed["params"]] == [(2, 3)]
    assert len(spared["params"]) == 3
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)


def schedule(settings: Settings) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """An optimizer of one weight, and its schedule."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    return optimizer, LambdaLR(optimizer, finetune_lm.warmup_cosine(settings))


def rates(optimizer: torch.optim.Optimizer, scheduler: LambdaLR, steps: int) -> list[float]:
    """The learning rates of the next ``steps`` steps."""
    found = []
    for _ in range(steps):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return found


def test_learning_rate_warms_up_and_falls_to_a_tenth(flags: list[str]) -> None:
    settings = replace(finetune_lm.read_settings(flags), steps=12, warmup=3)
    found = rates(*schedule(settings), 13)
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[4:] == sorted(found[4:], reverse=True)
    assert found[12] == pytest.approx(0.1)


def test_a_restored_schedule_goes_on_exactly(flags: list[str]) -> None:
    settings = replace(finetune_lm.read_settings(flags), steps=12, warmup=3)
    whole = rates(*schedule(settings), 12)
    optimizer, scheduler = schedule(settings)
    rates(optimizer, scheduler, 5)
    saved = json.loads(json.dumps(scheduler.state_dict()))
    optimizer, scheduler = schedule(settings)
    finetune_lm.restore_schedule(scheduler, saved)
    assert rates(optimizer, scheduler, 7) == whole[5:]


def test_a_run_does_not_go_on_with_other_settings(flags: list[str]) -> None:
    settings = finetune_lm.read_settings(flags)
    extra = {"settings": finetune_lm.fixed(settings), "losses": [1.0]}
    saved = json.loads(json.dumps(extra))
    assert finetune_lm.continued(saved, replace(settings, steps=99)) == extra
    with pytest.raises(ConfigError) as caught:
        finetune_lm.continued(saved, replace(settings, lr=0.5, batch=9))
    assert len(caught.value.problems) == 2
    assert "lr 0.01, not 0.5" in str(caught.value)
    assert "--resume never" in str(caught.value)


def test_plain_and_offload_are_bit_identical(flags: list[str]) -> None:
    plain = run(flags, "--plain")
    offloaded = run(flags, "--budget=host=8GiB")
    for name in ("losses", "heldout_before", "heldout_after", "weights_xxh3"):
        assert offloaded[name] == plain[name], name
    assert offloaded["read_bytes_per_step"] == 0  # all of it stays in memory
    assert offloaded["written_bytes_per_step"] > 0
    assert offloaded["budget_bytes"] == 8 << 30


def test_an_interrupted_run_goes_on_exactly(
    flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run(flags, "--plain")
    draw_batches = finetune_lm.draw_batches

    def draw(training: torch.Tensor, step: int, settings: Settings) -> torch.Tensor:
        if step == 3:
            raise KeyboardInterrupt
        return draw_batches(training, step, settings)

    with monkeypatch.context() as patched:
        patched.setattr(finetune_lm, "draw_batches", draw)
        assert finetune_lm.main([*flags, "--budget=host=8GiB"]) == 130
    resumed = run(flags, "--budget=host=8GiB", "--resume=must")
    for name in ("losses", "heldout_before", "heldout_after", "weights_xxh3"):
        assert resumed[name] == plain[name], name
