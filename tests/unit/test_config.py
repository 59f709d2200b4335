"""Settings: where they come from, which wins, and what is refused."""

import json
import re
from pathlib import Path

import pytest

from offload.allocator.errors import ConfigError
from offload.config import OffloadConfig, make_config, parse_budget


def test_defaults_file_environment_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "offload.yaml"
    file.write_text("budget: {host: 1GiB}\nio_threads: 3\nresume: must\ncommit: manual\n")
    monkeypatch.setenv("OFFLOAD_IO_THREADS", "5")
    monkeypatch.setenv("OFFLOAD_RESUME", "never")
    config = make_config(file, resume="auto")
    assert config.budget == {"host": 1 << 30}
    assert (config.io_threads, config.resume, config.commit) == (5, "auto", "manual")
    assert config.min_swap_nbytes == OffloadConfig().min_swap_nbytes


@pytest.mark.parametrize("value", ["1GiB", 1 << 30, "host=1GiB", {"host": "1GiB"}])
def test_a_budget_can_be_written_in_four_ways(value: object) -> None:
    assert parse_budget(value) == {"host": 1 << 30}


def test_every_problem_is_told_at_once_with_the_nearest_key(tmp_path: Path) -> None:
    file = tmp_path / "offload.json"
    file.write_text('{"budjet": "1GiB", "io_threads": 0}')
    with pytest.raises(ConfigError) as caught:
        make_config(file, budget="hots=1GiB", resume="perhaps")
    text = str(caught.value)
    assert len(caught.value.problems) == 4
    assert "unknown key 'budjet'; did you mean 'budget'?" in text
    assert "unknown tier 'hots'; did you mean 'host'?" in text
    assert f"file {file}: io_threads" in text
    assert "argument: resume" in text


@pytest.mark.parametrize(
    ("budget", "told"),
    [
        (24, "host=24: 24 bytes of memory hold nothing; a size has a unit: 24GiB?"),
        ("device=10, host=24GiB", "device=10: 10 bytes of memory hold nothing; a size has a unit"),
        ({"host": "24"}, "host=24: 24 bytes of memory hold nothing; a size has a unit: 24GiB?"),
        ("900KiB", "host=900KiB: 921600 bytes of memory hold nothing; write 1MiB or more"),
        ("host=much", "host=much: 'much' is not a size"),
    ],
)
def test_a_budget_without_its_unit_is_refused_wherever_it_stands(
    budget: object, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"argument: budget: {told}")):
        make_config(budget=budget)
    file = tmp_path / "offload.json"
    file.write_text(json.dumps({"budget": budget}))
    with pytest.raises(ConfigError, match=re.escape(f"file {file}: budget: {told}")):
        make_config(file)
    if isinstance(budget, str):
        monkeypatch.setenv("OFFLOAD_BUDGET", budget)
        with pytest.raises(ConfigError, match=re.escape(f"environment: budget: {told}")):
            make_config()


def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "offload.yaml"
    file.write_text("- a\n- b\n")
    with pytest.raises(ConfigError, match="holds a list"):
        make_config(file)
    with pytest.raises(ConfigError, match="No such file"):
        make_config(tmp_path / "missing.yaml")


@pytest.mark.parametrize(
    ("alpha", "parsed"), [("auto", "auto"), ("0.5", 0.5), (1, 1.0), (0.0, 0.0)]
)
def test_alpha_is_a_fraction_or_solved(alpha: object, parsed: object) -> None:
    assert make_config(recompute="tokenwise", alpha=alpha).alpha == parsed


@pytest.mark.parametrize("alpha", [1.5, -0.1, "half", float("nan"), [0.5]])
def test_an_alpha_that_is_no_fraction_is_refused(alpha: object) -> None:
    with pytest.raises(ConfigError, match="is no fraction of the rows: give 0 to 1, or 'auto'"):
        make_config(recompute="tokenwise", alpha=alpha)


def test_settings_of_a_recompute_that_is_off_are_refused() -> None:
    with pytest.raises(ConfigError, match="only recompute='tokenwise' uses alpha, relaxed"):
        make_config(alpha=0.5, relaxed=True)


@pytest.mark.parametrize("precision", ["fp8", "BF16", "", None, 16])
def test_a_precision_of_states_that_there_is_not(precision: object) -> None:
    assert make_config().state_precision == "exact"
    with pytest.raises(
        ConfigError, match="state_precision: Input should be 'exact', 'bf16' or '8bit'"
    ):
        make_config({"state_precision": precision})


@pytest.mark.parametrize("kind", ["bf16", "FP32", "", None, True])
def test_master_weights_that_there_are_not(kind: object) -> None:
    assert make_config().master_weights == "none"
    assert make_config(master_weights="fp32").master_weights == "fp32"
    with pytest.raises(ConfigError, match="master_weights: Input should be 'none' or 'fp32'"):
        make_config({"master_weights": kind})


def test_blocks_may_be_written_with_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_BLOCKS", "encoder.layer, decoder.layer")
    monkeypatch.setenv("OFFLOAD_RECOMPUTE", "tokenwise")
    assert make_config().blocks == ("encoder.layer", "decoder.layer")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/a", ["/a"]),
        ("/a,/b", ["/a", "/b"]),
        (" /a , /b,", ["/a", "/b"]),
        (Path("/a,b"), ["/a,b"]),
        (["/a", "/b,c"], ["/a", "/b,c"]),
        ("", []),
    ],
)
def test_directories_are_a_list_or_separated_by_commas(value: object, expected: list[str]) -> None:
    assert make_config(nvme=value).nvme == tuple(map(Path, expected))


def test_directories_come_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_NVME", "/a,/b")
    assert make_config().nvme == (Path("/a"), Path("/b"))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"nvme_write_budget": "much"}, "nvme_write_budget: 'much' is not a size"),
        ({"nvme_write_budget": -1}, "nvme_write_budget: a size can't be negative: -1"),
        ({"nvme_write_budget": "2"}, "a size has a unit: 2GiB, or 2B?"),
        ({"nvme_write_budget": 2}, "a size has a unit: 2GiB, or 2B?"),
        ({"nvme_endurance": "600"}, "a size has a unit: 600TB, or 600B?"),
        ({"nvme_endurance": 600}, "a size has a unit: 600TB, or 600B?"),
        ({"nvme_endurance": 0}, "nvme_endurance: Input should be greater than 0"),
    ],
)
def test_wear_settings_that_make_no_sense_are_refused(setting, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_config(setting)


def test_sizes_lack_their_units_in_files_and_variables_too(tmp_path, monkeypatch):
    (tmp_path / "offload.yaml").write_text("nvme_write_budget: 2\n")
    monkeypatch.setenv("OFFLOAD_NVME_ENDURANCE", "600")
    with pytest.raises(ConfigError) as refusal:
        make_config(tmp_path / "offload.yaml")
    assert "offload.yaml: nvme_write_budget: 2 bytes are hardly meant" in str(refusal.value)
    assert "environment: nvme_endurance: 600 bytes are hardly meant" in str(refusal.value)


def test_what_is_named_in_bytes_needs_no_unit(monkeypatch):
    monkeypatch.setenv("OFFLOAD_MIN_SWAP_NBYTES", "512")
    assert make_config().min_swap_nbytes == 512
    assert make_config(nvme_write_budget=0, min_swap_nbytes=0).nvme_write_budget == 0


def test_a_device_is_named_as_torch_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_DEVICE", "cuda:1")
    assert make_config().device == "cuda:1"
    assert make_config(device="cpu").device == "cpu"
    with pytest.raises(ConfigError, match="'gpu' is no device to compute on: cpu, cuda"):
        make_config(device="gpu")


@pytest.mark.parametrize(
    ("who", "parsed"), [("auto", "auto"), ("device", "device"), ("0.25", 0.25), (1, 1.0)]
)
def test_who_steps(who: object, parsed: object) -> None:
    assert make_config().optimizer_device == "host"
    assert make_config(optimizer_device=who).optimizer_device == parsed


@pytest.mark.parametrize("who", ["cuda", 1.5, -0.1, float("nan"), ""])
def test_nobody_who_steps(who: object) -> None:
    with pytest.raises(ConfigError, match="is nobody who steps: host, device, auto, or"):
        make_config({"optimizer_device": who})
