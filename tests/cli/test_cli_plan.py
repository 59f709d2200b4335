"""``offload plan``, as a user meets it."""

import re
from pathlib import Path

import pytest
from plan_verb import BATCH_SCRIPT, LAPTOP, answer, refusal

from offload.cli import main
from offload.planner import recording
from offload.tiers.events import JsonlRecorder


def test_the_first_screen_answers_the_four_questions(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(model), *LAPTOP, "--budget", "380MiB", "--seq", "128"]) == 0
    out = capsys.readouterr().out
    for words in (
        "tiny-llama (0.8M parameters)", "full fine-tune", "seq 128 x batch 1", "Core i7-13700H",
        "weights", "gradients", "optimizer states", "activations", "workspace", "process",
        "FITS", "step", "tokens/s", "bound by", "try",
    ):  # fmt: skip
        assert words in out
    assert [line for line in out.splitlines() if len(line) > 80] == []
    assert "why" not in out


def test_explain_says_why(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(model), *LAPTOP, "--budget", "380MiB", "--seq", "128", "--explain"]
    assert main(["plan", *words]) == 0
    out = capsys.readouterr().out
    for subject in ("weights:", "states:", "activations:", "compute:"):
        assert re.search(rf"^why +{subject}", out, re.MULTILINE)


def test_json_tells_the_same(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, model, *LAPTOP, "--budget", "380MiB", "--seq", 128)
    assert found["fits"]
    assert found["peak_nbytes"] <= found["budget_nbytes"] == 380 << 20
    assert found["step_s"] > 0
    assert found["tokens_per_s"] == pytest.approx(128 / found["step_s"])
    assert found["bound_by"] in found["busy_s"]
    memory = {row["name"]: row["memory_nbytes"] for row in found["rows"]}
    total = memory.pop("in all")
    assert sum(memory.values()) == total


def test_a_step_in_backward_moves_fewer_bytes(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [model, *LAPTOP, "--budget", "380MiB", "--seq", 128]
    behind, within = answer(capsys, *words), answer(capsys, *words, "--step-in-backward")
    assert within["plan"]["step_in_backward"]
    assert not behind["plan"]["step_in_backward"]
    how = {row["name"]: row["how"] for row in within["rows"]}
    assert how["gradients"] == "used up in backward"
    assert within["step"]["written_nbytes"] <= behind["step"]["written_nbytes"]


def test_a_step_in_forward_overlaps_with_it(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [model, *LAPTOP, "--budget", "420MiB", "--seq", 128]
    behind, ahead = answer(capsys, *words), answer(capsys, *words, "--step-in-forward")
    assert ahead["plan"]["step_in_forward"]
    assert not behind["plan"]["step_in_forward"]
    how = {row["name"]: row["how"] for row in ahead["rows"]}
    assert how["gradients"] == "leave as they are produced, until the next forward steps"
    assert ahead["fits"]
    assert main(["plan", *map(str, words), "--step-in-forward"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if len(line) > 80] == []


def test_micro_batches_of_a_step_add_up_their_gradients(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [model, *LAPTOP, "--budget", "366MiB", "--seq", 128]
    one, four = answer(capsys, *words), answer(capsys, *words, "--micro-batches", 4)
    assert (one["micro_batches"], four["micro_batches"]) == (1, 4)
    assert four["tokens_per_s"] == pytest.approx(4 * 128 / four["step_s"])
    assert four["flops"] == 4 * one["flops"]
    assert one["step_s"] < four["step_s"] < 4 * one["step_s"]
    assert four["accumulated_nbytes"] > one["accumulated_nbytes"] == 0
    assert "x batch 1 x 4 micro-batches" in four["title"]
    within = answer(capsys, *words, "--micro-batches", 4, "--step-in-backward")
    how = {row["name"]: row["how"] for row in within["rows"]}
    assert how["gradients"] == "used up in backward 4"
    assert main(["plan", *map(str, words), "--micro-batches", "4", "--explain"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^added +gradients of .* to others in scratch per step$", out, re.MULTILINE)
    assert re.search(r"^why +micro-batches: gradients of the first of 4 leave", out, re.MULTILINE)


def test_micro_batches_are_solved_with(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [model, *LAPTOP, "--budget", "380MiB", "--seq", 128, "--micro-batches", 3]
    found = answer(capsys, *words, "--solve", "batch")
    assert re.match(r"--batch \d+ is the largest that fits", found["solved"])
    batch = int(found["solved"].split()[1])
    assert found["tokens_per_s"] == pytest.approx(3 * batch * 128 / found["step_s"])
    assert found["peak_nbytes"] <= 380 << 20
    assert not answer(capsys, *words, "--batch", batch + 1)["fits"]


def test_a_count_that_is_no_number_is_wrong_usage(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(model), "--micro-batches", "2.5"])
    assert ended.value.code == 2
    assert "argument --micro-batches: invalid int value: '2.5'" in capsys.readouterr().err


def test_states_in_fewer_bits_take_less_of_the_drive(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [model, *LAPTOP, "--budget", "380MiB", "--seq", 128]
    masters = ["--dtype", "bfloat16", "--master-weights", "fp32"]
    drive = {}
    for given in ([], ["--state-precision", "bf16"], ["--state-precision", "8bit"], masters):
        rows = answer(capsys, *words, *given)["rows"]
        (drive[tuple(given)],) = (
            row["drive_nbytes"] for row in rows if row["name"] == "optimizer states"
        )
    exact, bf16, eight, with_masters = drive.values()
    assert bf16 == pytest.approx(exact / 2, rel=0.05)
    assert exact / 4 < eight < exact / 3.5  # small ones take whole pages
    assert with_masters == pytest.approx(exact * 10 / 8, rel=0.05)
    assert main(["plan", *map(str, words), *masters, "--explain"]) == 0
    assert "rounded or have masters" in " ".join(capsys.readouterr().out.split())


def test_rows_that_are_rebuilt_are_told(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [model, *LAPTOP, "--budget", "364MiB", "--seq", 512, "--recompute", "tokenwise"]
    whole = answer(capsys, *words[:-2])
    some = answer(capsys, *words, "--alpha", "0.25")
    (kind,) = some["rebuilt"]
    assert (kind["alpha"], kind["cut"], kind["rows"], kind["blocks"]) == (0.25, 128, 512, 2)
    assert whole["rebuilt"] == []
    assert some["step"]["written_nbytes"] < whole["step"]["written_nbytes"]
    assert main(["plan", *map(str, words), "--alpha", "0.25", "--explain"]) == 0
    out = capsys.readouterr().out
    assert "recompute    2 blocks: alpha 0.25 (128 of 512 rows swapped, others rebuilt)" in out
    assert "a run sees in its first step" in " ".join(out.split())
    assert main(["plan", *map(str, words), "--solve", "host"]) == 0
    assert "--budget host=" in capsys.readouterr().out


def test_a_write_budget_is_told_kept_and_refused(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [model, *LAPTOP, "--budget", "372MiB", "--seq", 512]
    free = answer(capsys, *words)
    most = free["step"]["written_nbytes"] - (1 << 20)
    bounded = answer(capsys, *words, "--nvme-write-budget", most)
    assert bounded["write_budget_nbytes"] == most
    assert bounded["step"]["written_nbytes"] <= most
    small = answer(capsys, *words, "--nvme-write-budget", "1MiB")
    assert not small["fits"]
    assert "nvme_write_budget=1.00 MiB (1048576 bytes) is too small" in small["message"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--alpha", "0.5"], "only recompute='tokenwise' uses alpha"),
        (["--recompute", "tokenwise", "--alpha", "2"], "'2' is no fraction of the rows"),
        (["--nvme-write-budget", "much"], "nvme_write_budget: 'much' is not a size"),
        (["--step-in-forward", "--step-in-backward"], "either in backward or in the next forward"),
        (["--step-in-forward", "--state-precision", "8bit"], "step_in_forward has no"),
    ],
)
def test_settings_that_a_run_refuses_are_refused(
    words: list[str], message: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(capsys, 2, model, *LAPTOP, *words)


def test_masters_that_a_run_refuses_are_refused(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [model, *LAPTOP, "--dtype", "float16", "--master-weights", "fp32"]
    assert "are float16, whose exponent is another" in refusal(capsys, 1, *words)


def test_what_does_not_fit_is_3_with_a_budget_that_does(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (model, *LAPTOP, "--seq", 512)
    error = refusal(capsys, 3, *words, "--budget", "305MiB")
    found = re.search(r"--budget host=(\d+)MiB fits", error)
    assert found is not None
    mib = int(found[1])
    assert answer(capsys, *words, "--budget", f"host={mib}MiB")["fits"]
    refused = answer(capsys, *words, "--budget", f"host={mib - 1}MiB")
    assert not refused["fits"]
    assert refused["needed_nbytes"] == mib << 20


def test_solve_finds_the_bounds(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (model, *LAPTOP)
    least = answer(capsys, *words, "--solve", "host", "--seq", 128)
    assert re.fullmatch(r"--budget host=\d+MiB is the least that fits", least["solved"])
    budget = ("--budget", least["budget_nbytes"])
    for name, step, others in (("batch", 1, ("--seq", 128)), ("seq", 64, ())):
        found = answer(capsys, *words, *budget, *others, "--solve", name)
        most = int(re.findall(rf"^--{name} (\d+) is", found["solved"])[0])
        assert found["fits"]
        assert not answer(capsys, *words, *budget, *others, f"--{name}", most + step)["fits"]
    longest = answer(capsys, *words, "--budget", "8GiB", "--solve", "seq")
    assert longest["solved"].startswith("--seq 4096 is")  # all the positions that it has


def test_adapters_take_fewer_states(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (model, *LAPTOP, "--budget", "400MiB", "--seq", 128)
    full, lora = (answer(capsys, *words, "--method", method) for method in ("full", "lora"))
    states = [
        next(row["drive_nbytes"] for row in found["rows"] if row["name"] == "optimizer states")
        for found in (full, lora)
    ]
    assert 0 < states[1] < states[0] / 4
    assert lora["parameters"] > full["parameters"]


def test_what_if_the_drive_were_slow(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (model, *LAPTOP, "--budget", "370MiB", "--seq", 128)
    slow = answer(capsys, *words, "--what-if", "nvme=10MB/s")
    assert slow["step_s"] > answer(capsys, *words)["step_s"]
    assert slow["bound_by"] == "drive"
    assert "what if nvme=10MB/s" in slow["machine"]


def test_a_simulated_run_is_reported(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "run"
    answer(capsys, model, *LAPTOP, "--budget", "370MiB", "--seq", 128, "--record", record)
    assert main(["report", str(record)]) == 0
    out = capsys.readouterr().out
    assert "simulated by offload plan" in out
    assert "4 steps; simulated" in out


def test_a_full_disk_for_the_simulated_run_is_told(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_a_full_disk(file: Path) -> JsonlRecorder:
        file.parent.mkdir()
        file.touch()
        return JsonlRecorder(Path("/dev/full"))

    monkeypatch.setattr(recording, "JsonlRecorder", on_a_full_disk)
    words = [model, *LAPTOP, "--seq", 128, "--record", tmp_path / "run"]
    said = refusal(capsys, 2, *words)
    assert "rank0.jsonl: No space left on device; name a directory with more room" in said
    assert not (tmp_path / "run" / "rank0.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budget", "24"], "24 bytes of memory hold nothing; a size has a unit: 24GiB?"),
        (["--budget", "host=24"], "a size has a unit: 24GiB?"),
        (["--budget", "24Gb/s"], "is not a size"),
        (["--budget", "host=8GiB,host=9GiB"], "host is given twice: 8GiB and 9GiB"),
        (["--budget", "device=8GiB,device=9GiB"], "--budget: device is given twice"),
        (["--alpha", "0.5"], "offload: only recompute='tokenwise' uses alpha: set that too"),
        (["--budget", "device=8GiB"], "this machine has no device"),
        (["--baseline", "300"], "300 bytes of memory hold nothing; a size has a unit: 300MiB?"),
        (["--baseline", "24"], "--baseline 24: 24 bytes of memory hold nothing"),
        (["--nvme-write-budget", "2"], "nvme_write_budget: 2 bytes are hardly meant"),
        (["--seq", "0"], "--seq 0: at least 2"),
        (["--batch", "0"], "--batch 0: at least 1"),
        (["--micro-batches", "0"], "--micro-batches 0: at least 1"),
        (["--micro-batches", "-2"], "--micro-batches -2: at least 1"),
        (["--seq", "4097"], "tiny-llama has positions for 4096 tokens"),
        (["--machine", "laptop-16g"], "did you mean 'laptop-16gb'?"),
        (["--machine", "none.json"], "can't read the machine none.json"),
        (["--optim", "adamv"], "did you mean 'adam"),
        (["--what-if", "nvme=7"], "write 7GB/s"),
        (["--what-if", "nvme=9/s"], "write 9GB/s"),
        (["--what-if", "compute=2"], "--what-if compute: '2' is no factor: write 2x"),
        (["--what-if", "compute=infx"], "'infx' is no factor: write 2x or 0.5x"),
        (["--what-if", "nvme=0GB/s"], "--what-if nvme=0GB/s: must be above 0"),
        (["--nvme", "/a", "--nvme", "/b"], "laptop-16gb has one drive"),
        (["--args", "--epochs", "3"], "is no script"),
    ],
)
def test_wrong_usage_is_2_and_says_what_to_write(
    words: list[str], message: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(capsys, 2, model, *LAPTOP, *words)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model_type": "lama"}', "knows no model type 'lama'; did you mean 'llama'?"),
        ('{"hidden_size": 4}', "it has no 'model_type'"),
        ("{", "is not JSON"),
        ('{"model_type": "vit"}', "is no causal language model"),
        ('{"model_type": "foo"}', "knows no model type 'foo'; a newer one may (pip install -U"),
        ('{"model_type": "llama", "hidden_size": "x"}', "has such fields: StrictDataclassField"),
        ('{"model_type": "llama", "num_attention_heads": 0}', "ZeroDivisionError"),
        ('{"model_type": "llama", "hidden_act": "foo"}', "of its fields: KeyError: 'foo'"),
        ('{"model_type": "llama", "torch_dtype": "int8"}', "give --dtype float32 or bfloat16"),
    ],
)
def test_what_is_no_model_is_refused(
    content: str, message: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "config.json").write_text(content)
    assert message in refusal(capsys, 2, model, *LAPTOP)


def test_no_model_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "needs a model" in refusal(capsys, 2, *LAPTOP)
    assert "can't read the model" in refusal(capsys, 2, tmp_path / "none", *LAPTOP)
    assert "can't read the script" in refusal(capsys, 2, tmp_path / "none.py", *LAPTOP)


def test_a_script_is_planned_as_far_as_its_first_backward(
    script: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = answer(capsys, script, *LAPTOP, "--budget", "400MiB")
    weights = 300 * 500 + 500 + 500 * 300 + 300
    assert found["parameters"] == weights
    assert found["title"].startswith("train.py (0.3M parameters)")
    assert "SGD" in found["title"]
    rounded = answer(capsys, script, *LAPTOP, "--budget", "400MiB", "--state-precision", "8bit")
    drive = {row["name"]: row["drive_nbytes"] for row in rounded["rows"]}
    assert drive["optimizer states"] == pytest.approx(2 * weights * 65 / 64, rel=0.05)


def test_tokens_are_counted_that_are_passed_by_name(
    script: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script.write_text(BATCH_SCRIPT)
    assert main(["plan", str(script), *LAPTOP, "--budget", "400MiB"]) == 0
    assert "96 tokens a step" in capsys.readouterr().out


def test_the_blocks_of_a_script_are_seen(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [script, *LAPTOP, "--budget", "400MiB", "--recompute", "tokenwise", "--alpha", 0]
    assert answer(capsys, *words)["rebuilt"] == []
    assert main(["plan", *map(str, words)]) == 0
    assert "no module repeats in a list, so nothing is rebuilt" in capsys.readouterr().out
    layers = "nn.Sequential(*(nn.Sequential(nn.Linear(300, 300), nn.GELU()) for _ in range(3)))"
    text = script.read_text().replace("nn.Linear(300, 500)", layers)
    script.write_text(text.replace("nn.Linear(500, 300)", "nn.Linear(300, 300)"))
    kinds = answer(capsys, *words)["rebuilt"]
    assert sum(kind["blocks"] for kind in kinds) == 3
    assert {(kind["rows"], kind["cut"], kind["target_nbytes"]) for kind in kinds} == {
        (64, 0, 64 * 300 * 4)
    }


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--args", "--log"], 1, "depends on the values of its tensors"),
        (["--args", "--early"], 1, "ended without a backward"),
        (["--seq", "128"], 2, "train.py decides --seq by itself"),
        (["--solve", "batch"], 2, "needs a config.json"),
    ],
)
def test_scripts_that_cannot_be_planned(
    words: list[str],
    code: int,
    message: str,
    script: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert message in refusal(capsys, code, script, *LAPTOP, *words)
