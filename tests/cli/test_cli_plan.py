"""``offload plan``, as a user meets it."""

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offload.allocator.errors import OffloadError
from offload.cli import main
from offload.doctor import examine
from offload.planner.baseline import measure_baseline
from offload.planner.machines import library_machine, list_machines
from offload.planner.stored import calibrated
from offload.tiers.machine import Machine, write_machine

CONFIG = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2000,
    "max_position_embeddings": 4096,
}  # fmt: skip
LAPTOP = ["--machine", "laptop-16gb", "--baseline", "300MiB"]
SCRIPT = """
import sys, torch
import offload
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(300, 500)
        self.b = nn.Linear(500, 300)
        self.register_buffer("scale", torch.ones(300))
    def forward(self, x):
        return self.b(torch.relu(self.a(x * self.scale)))
with offload.init(budget="host=1GiB"):
    model = Net()
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
engine = offload.attach(model, optimizer, budget="host=1GiB")
print("on stdout", engine.step)
for step in range(3):
    x = torch.randn(64, 300)
    loss = ((model(x) - x) ** 2).mean()
    if "--log" in sys.argv:
        print(loss.item())
    if "--early" in sys.argv:
        sys.exit()
    loss.backward()
    raise AssertionError("backward has been seen")
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "tiny-llama"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "train.py"
    file.write_text(SCRIPT)
    return file


def answer(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert main(["plan", *map(str, words), "--json"]) in {0, 3}
    document = json.loads(capsys.readouterr().out)
    assert document["format"] == 1
    return document


def refusal(capsys: pytest.CaptureFixture[str], code: int, *words: object) -> str:
    assert main(["plan", *map(str, words)]) == code
    output = capsys.readouterr()
    assert output.out == ""
    return output.err


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


GPU = ["--machine", "desktop-4090", "--baseline", "300MiB", "--seq", "128"]
ON_GPU = [*GPU, "--budget", "device=256MiB,host=1GiB"]


def test_a_placement_on_the_gpu_stands_beside(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = answer(capsys, model, *GPU)
    (note,) = found["notes"]
    assert note == "computing on the CPU is predicted; for the GPU see the placement"
    assert found["placement"]["fits"]
    assert found["placement"]["step_s"] < found["step_s"]
    assert main(["plan", str(model), *GPU]) == 0
    out = capsys.readouterr().out
    assert "on device:0" in out
    assert [line for line in out.splitlines() if len(line) > 80] == []


def test_a_machine_without_a_gpu_has_no_placement(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = answer(capsys, model, *LAPTOP, "--budget", "380MiB", "--seq", 128)
    assert found["placement"] is None


def test_a_device_budget_asks_for_the_placement(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(model), *ON_GPU]) == 0
    out = capsys.readouterr().out
    for words in (
        "weights", "gradients", "optimizer states", "activations", "peak", "budget", "device:0",
        "drive", "step", "tokens/s", "bound by", "micro-batch", "today",
    ):  # fmt: skip
        assert words in out
    assert "why" not in out
    assert [line for line in out.splitlines() if len(line) > 80] == []


def test_explain_says_why_each_class_is_where(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(model), *ON_GPU, "--explain"]) == 0
    out = capsys.readouterr().out
    for subject in ("weights:", "gradients:", "optimizer states:", "activations:", "host:"):
        assert re.search(rf"^why +{subject}", out, re.MULTILINE)


def test_json_tells_where_every_byte_is(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, model, *ON_GPU)
    assert found["fits"]
    placement = found["placement"]
    rows = {row["name"]: row["nbytes"] for row in placement["rows"]}
    assert all(rows["peak"][tier] <= rows["budget"][tier] for tier in rows["budget"])
    assert rows["budget"]["device:0"] == 256 << 20
    assert rows["budget"]["host"] == 1 << 30
    assert placement["plan"]["format"] == 1
    for one in placement["plan"]["classes"]:
        assert sum(share["fraction"] for share in one["shares"]) == pytest.approx(1)
    assert placement["tokens_per_s"] == pytest.approx(128 / placement["step_s"])
    assert placement["today_s"] >= placement["step_s"] * (1 - 1e-6)


def test_a_device_that_is_too_small_is_3_with_the_smallest_change(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (model, *GPU)
    error = refusal(capsys, 3, *words, "--budget", "device=65MiB,host=1GiB")
    found = re.search(r"The smallest change that fits: device=(\d+)MiB", error)
    assert found is not None
    mib = int(found[1])
    assert answer(capsys, *words, "--budget", f"device={mib}MiB,host=1GiB")["fits"]
    refused = answer(capsys, *words, "--budget", f"device={mib - 1}MiB,host=1GiB")
    assert not refused["fits"]
    assert refused["needed_nbytes"] == mib << 20


def test_placements_are_solved_for_length_batch_and_memory(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (model, "--machine", "desktop-4090", "--baseline", "300MiB")
    budget = ("--budget", "device=160MiB,host=1GiB")
    for name, step, others in (("batch", 1, ("--seq", 128)), ("seq", 64, ())):
        found = answer(capsys, *words, *budget, *others, "--solve", name)["placement"]
        most = int(re.findall(rf"^--{name} (\d+) is", found["solved"])[0])
        if most < 4096:
            # Its own micro-batches may fit where the whole one does not: only lengths have none.
            again = answer(capsys, *words, *budget, *others, f"--{name}", most + step)
            assert name == "batch" or not again["fits"]
    least = answer(capsys, *words, "--seq", 128, *budget, "--solve", "host")["placement"]
    mib = int(re.findall(r"^host=(\d+)MiB is the least", least["solved"])[0])
    smaller = ("--budget", f"device=160MiB,host={mib - 1}MiB")
    assert not answer(capsys, *words, "--seq", 128, *smaller)["fits"]


def test_memory_nodes_are_placed_on(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine, file = library_machine("desktop-4090"), tmp_path / "machine.json"
    host, rate = machine.tier("host"), machine.link("host", "host")
    node = dataclasses.replace(host, name="numa:1", kind="numa", medium="cxl")
    links = [
        dataclasses.replace(rate, source=source, target=target)
        for source, target in (("numa:1", "host"), ("host", "numa:1"))
    ]
    write_machine(
        dataclasses.replace(machine, tiers=(*machine.tiers, node), links=(*machine.links, *links)),
        file,
    )
    words = (model, "--machine", file, "--baseline", "300MiB", "--seq", 128, "--budget")
    found = answer(capsys, *words, "device=128MiB,host=1GiB,numa:1=8GiB")["placement"]
    assert found["rows"][-1]["nbytes"]["numa:1"] == 8 << 30
    assert main(["plan", *map(str, words), "device=128MiB,host=1GiB,numa:1=8GiB"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budget", "device=20"], "20 bytes of memory hold nothing; a size has a unit: 20GiB?"),
        (["--budget", "device=20Gb/s"], "--budget device=20Gb/s: '20Gb/s' is not a size"),
        (["--budget", "device=8GiB,host=24"], "a size has a unit: 24GiB?"),
        (["--budget", "device=48GiB"], "device:0 of this machine holds 24.00 GiB"),
        (["--budget", "device=8GiB,numa:1=8GiB"], "no tier 'numa:1'"),
        (["--budget", "device=8GiB", "--record", "run"], "leave device= out"),
    ],
)
def test_wrong_device_budgets_are_2_and_say_what_to_write(
    words: list[str], message: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(capsys, 2, model, *GPU, *words)


def test_a_device_whose_links_or_rates_are_unknown_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, machine = tmp_path / "machine.json", library_machine("desktop-4090")
    words = (model, "--baseline", "300MiB", "--machine", file, "--budget", "device=8GiB")
    links = tuple(link for link in machine.links if link.target != "device:0")
    write_machine(dataclasses.replace(machine, links=links), file)
    assert "the link host → device:0 was not measured" in refusal(capsys, 2, *words)
    rates = tuple(rate for rate in machine.compute if rate.processor == "cpu")
    write_machine(dataclasses.replace(machine, compute=rates), file)
    assert "no rate of cuda:0 is known" in refusal(capsys, 2, *words)
    found = answer(capsys, *words[:-2])["placement"]
    assert not found["fits"]
    assert "no rate of cuda:0 is known" in found["message"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budget", "24"], "24 bytes of memory hold nothing; a size has a unit: 24GiB?"),
        (["--budget", "host=24"], "a size has a unit: 24GiB?"),
        (["--budget", "24Gb/s"], "is not a size"),
        (["--budget", "device=8GiB"], "this machine has no device"),
        (["--baseline", "300"], "300 bytes; a size has a unit: 300MiB?"),
        (["--seq", "0"], "--seq 0: at least 2"),
        (["--batch", "0"], "--batch 0: at least 1"),
        (["--seq", "4097"], "tiny-llama has positions for 4096 tokens"),
        (["--machine", "laptop-16g"], "did you mean 'laptop-16gb'?"),
        (["--machine", "none.json"], "can't read the machine none.json"),
        (["--optim", "adamv"], "did you mean 'adam"),
        (["--what-if", "nvme=7"], "write 7GB/s"),
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


def test_a_machine_that_lacks_measurements_names_them(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, machine = tmp_path / "machine.json", library_machine("laptop-16gb")
    words = (model, "--baseline", "300MiB", "--machine", file)
    write_machine(dataclasses.replace(machine, links=machine.links[:2]), file)
    error = refusal(capsys, 2, *words)
    assert "the link host → file:samsung-970-evo-plus-2tb was not measured" in error
    write_machine(dataclasses.replace(machine, compute=()), file)
    assert "offload doctor -o machine.json" in refusal(capsys, 2, *words)
    memory_only = dataclasses.replace(machine, tiers=machine.tiers[:1], links=machine.links[:1])
    write_machine(memory_only, file)
    assert "this machine has no drive" in refusal(capsys, 2, *words)


def test_a_script_is_planned_as_far_as_its_first_backward(
    script: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = answer(capsys, script, *LAPTOP, "--budget", "400MiB")
    weights = 300 * 500 + 500 + 500 * 300 + 300
    assert found["parameters"] == weights
    assert found["title"].startswith("train.py (0.3M parameters)")
    assert "SGD" in found["title"]


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


def test_the_library_is_whole_and_names_its_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--machine", "list"]) == 0
    out = capsys.readouterr().out.rstrip("\n")
    assert out == list_machines()
    names = [line.split()[0] for line in out.partition("\n\n")[0].splitlines()]
    assert len(names) >= 6
    for name in names:
        library_machine(name).check_measured()
    sources = out.partition("Published figures of:\n")[2].splitlines()
    assert len(sources) >= 10
    assert len(set(sources)) == len(sources)
    assert all(source.startswith("https://") for source in sources)


def test_a_baseline_that_cannot_be_measured_says_what_to_give() -> None:
    with pytest.raises(OffloadError, match=r"No module named 'no_such_module'.*--baseline"):
        measure_baseline(("no_such_module",))


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.usefixtures("cached")
def test_a_machine_that_was_measured_is_used_at_once(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, made_up: Callable[[Path, float], Machine],
) -> None:  # fmt: skip
    nvme = tmp_path / "nvme"
    nvme.mkdir()
    calibrated(
        nvme, care="full", again=True, say=print, measure=lambda path, _care: made_up(path, 3e9)
    )

    def never(*_args: object, **_options: object) -> None:
        raise RuntimeError("it was measured")

    monkeypatch.setattr(examine, "bench_links", never)
    words = (model, "--nvme", nvme, "--seq", 128, "--baseline", "300MiB", "--budget", "400MiB")
    found = answer(capsys, *words)
    assert found["machine"].startswith("this machine, measured just now: ")
    assert "3.00 GB/s read" in found["machine"]
    with pytest.raises(RuntimeError, match="it was measured"):
        main(["plan", *map(str, words), "--measure"])


def test_a_recorded_run_corrects_the_plan(
    script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    made_up: Callable[[Path, float], Machine],
) -> None:  # fmt: skip
    plain = tmp_path / "plain.py"
    plain.write_text(
        SCRIPT.replace('with offload.init(budget="host=1GiB"):\n    model', "model")
        .replace('engine = offload.attach(model, optimizer, budget="host=1GiB")', "")
        .replace("engine.step", "0")
        .replace('raise AssertionError("backward has been seen")', "optimizer.step()")
        .replace("range(3)", "range(5)")
    )
    nvme, run, file = tmp_path / "nvme", tmp_path / "run", tmp_path / "machine.json"
    words = ["--budget=1GiB", f"--nvme={nvme}", f"--record={run}", str(plain)]
    code = f"import sys; from offload.cli import main; sys.exit(main(['run', *{words!r}]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "plan against measured: at most 1.00 GiB, peak" in done.stderr
    write_machine(made_up(nvme, 1e9), file)
    given = (plain, "--machine", file, "--budget", "400MiB")
    found = answer(capsys, *given, "--from", run)
    (note,) = (note for note in found["notes"] if "corrected by" in note)
    assert re.search(r"compute x\d+\.\d\d, .*measured \d", note)
    process = next(row for row in found["rows"] if row["name"] == "process")
    held = json.loads((run / "plan.json").read_text())["baseline_nbytes"]
    assert process["memory_nbytes"] >= held > 100 << 20
    faster = answer(capsys, *given, "--from", run, "--what-if", "compute=4x")
    assert faster["step_s"] < found["step_s"]
    assert "ran on another processor" in refusal(capsys, 2, plain, *LAPTOP, "--from", run)
    assert "not a run directory" in refusal(capsys, 2, plain, *LAPTOP, "--from", nvme)


@pytest.mark.slow
@pytest.mark.usefixtures("cached")
def test_this_machine_is_measured_where_none_is_kept(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (model, "--nvme", tmp_path, "--seq", 128)
    found = answer(capsys, *words)
    assert found["machine"].startswith("this machine, measured just now: ")
    process = next(row for row in found["rows"] if row["name"] == "process")
    assert 100 << 20 < process["memory_nbytes"] < 2 << 30
    assert main(["plan", *map(str, words)]) == 0
    assert "measuring this machine" not in capsys.readouterr().err
