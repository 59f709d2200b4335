"""``offload plan`` for a machine with a GPU: where everything would go."""

import dataclasses
import re
from pathlib import Path

import pytest
from plan_verb import LAPTOP, answer, refusal

from offload.cli import main
from offload.config import make_config
from offload.planner.machines import library_machine
from offload.tiers.machine import write_machine

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
        "set          --optimizer-device",
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
    assert placement["plan"]["format"] == 2
    for one in placement["plan"]["classes"]:
        assert sum(share["fraction"] for share in one["shares"]) == pytest.approx(1)
    assert placement["tokens_per_s"] == pytest.approx(128 / placement["step_s"])
    assert placement["today_s"] >= placement["attached_step_s"] >= placement["step_s"] * (1 - 1e-6)
    assert (placement["state_precision"], placement["master_weights"]) == ("exact", "none")


@pytest.mark.parametrize(
    ("words", "how", "scale"),
    [
        (["--state-precision", "bf16"], "bf16", 1 / 2),
        (["--state-precision", "8bit"], "8bit", 65 / 256),
        (["--dtype", "bfloat16", "--master-weights", "fp32"], "masters", 10 / 8),
        (
            ["--dtype", "bfloat16", "--master-weights", "fp32", "--state-precision", "bf16"],
            "bf16, masters",
            6 / 8,
        ),
    ],
)
def test_states_are_placed_in_the_form_that_the_store_keeps(
    words: list[str], how: str, scale: float, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exact = answer(capsys, model, *ON_GPU)["placement"]
    found = answer(capsys, model, *ON_GPU, *words)["placement"]
    sizes = [
        {row["name"]: row["nbytes"] for row in one["rows"]}["optimizer states"]
        for one in (found, exact)
    ]
    drive = next(tier for tier in sizes[0] if tier.startswith("file:"))
    assert sizes[0][drive] == pytest.approx(scale * sizes[1][drive], rel=0.01)
    (row,) = [row for row in found["rows"] if row["name"] == "optimizer states"]
    assert row["how"].endswith(how)
    assert main(["plan", str(model), *ON_GPU, *words, "--explain"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"precision: {how.replace(', ', ' and ')}: weights and states of" in out
    assert "changing their form takes" in out


def test_what_may_not_be_rounded_is_refused_for_a_gpu_too(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--dtype", "float16", "--master-weights", "fp32")
    assert main(["plan", str(model), *ON_GPU, *words]) != 0
    assert "are float16, whose exponent is another" in capsys.readouterr().err


def test_the_setting_of_the_step_is_written_for_a_run(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "offload.yaml"
    words = [*ON_GPU, "--nvme", "/data/nvme", "--state-precision", "bf16", "--commit", "never"]
    assert main(["plan", str(model), *words, "-o", str(file)]) == 0
    out = capsys.readouterr().out
    text = file.read_text()
    assert text.startswith("# Written by offload plan, ")
    for word in ("--baseline 300MiB", "--state-precision bf16", "--commit never"):
        assert word in " ".join(text.replace("#", "").split())
    (value,) = re.findall(r"^set +--optimizer-device ([\w.]+):", out, re.MULTILINE)
    config = make_config(file)
    assert str(config.optimizer_device) == value
    assert config.budget == {"device": 256 << 20, "host": 1 << 30}
    assert (config.device, config.nvme) == ("cuda:0", (Path("/data/nvme"),))
    assert (config.state_precision, config.commit) == ("bf16", "never")
    assert main(["plan", str(model), *words, "-o", str(file)]) == 0  # its own, so it is replaced
    capsys.readouterr()
    file.write_text("device: cuda\n")
    assert main(["plan", str(model), *words, "-o", str(file)]) == 2
    assert "was not written by offload" in capsys.readouterr().err
    assert file.read_text() == "device: cuda\n"


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
        (
            ["--budget", "device=8GiB", "--step-in-backward"],
            "--step-in-backward: no placement knows it",
        ),
        (
            ["--budget", "device=8GiB", "--micro-batches", "4"],
            "--micro-batches: no placement knows it",
        ),
        (
            ["--budget", "device=8GiB", "--step-in-forward"],
            "--step-in-forward: no placement knows it",
        ),
        (
            ["--budget", "device=8GiB", "--nvme-write-budget", "1GiB"],
            "--nvme-write-budget: no placement knows it",
        ),
        (
            ["--budget", "device=8GiB", "--recompute", "tokenwise"],
            "--recompute: no placement knows it",
        ),
        (["--budget", "host=1GiB", "-o", "offload.yaml"], "give --budget device=SIZE"),
        (["--budget", "device=8GiB", "-o", "offload.json"], "so name it .yaml"),
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
