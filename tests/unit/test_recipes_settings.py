"""YAML and flags: which wins, and what is refused."""

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from offload.errors import ConfigError
from offload.recipes import finetune_lm
from offload.recipes.finetune_lm import Settings, read_settings

SHIPPED = Path(finetune_lm.__file__).with_suffix(".yaml")


def config(tmp_path: Path, **changes: object) -> str:
    """A flag that names a copy of the shipped file with ``changes``; None removes a key."""
    values = yaml.safe_load(SHIPPED.read_text()) | changes
    file = tmp_path / "settings.yaml"
    kept = {key: value for key, value in values.items() if value is not None}
    file.write_text(yaml.safe_dump(kept))
    return f"--config={file}"


def test_the_shipped_file_knows_every_setting_of_a_run() -> None:
    known = {field.name for field in fields(Settings)} - {"plain", "result"}
    assert set(yaml.safe_load(SHIPPED.read_text())) == known


def test_values_come_from_the_file_with_their_types() -> None:
    settings = read_settings([])
    values = yaml.safe_load(SHIPPED.read_text())
    assert settings.steps == values["steps"]
    assert settings.lr == values["lr"]
    assert settings.checkpoint == Path(values["checkpoint"])
    assert settings.text is None
    assert not settings.plain


def test_a_flag_wins_over_the_file(tmp_path: Path) -> None:
    flag = config(tmp_path, steps=7, seq=16, plain=True)
    settings = read_settings([flag, "--steps", "9", "--weight-decay=0"])
    assert (settings.steps, settings.seq, settings.weight_decay) == (9, 16, 0.0)
    assert settings.plain
    assert not read_settings([flag, "--no-plain"]).plain


def test_numbers_that_yaml_takes_for_words_are_numbers(tmp_path: Path) -> None:
    flag = config(tmp_path, lr="3e-4")
    assert read_settings([flag]).lr == 3e-4


def test_an_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'weight_decy', the nearest is 'weight_decay'"):
        read_settings([config(tmp_path, weight_decy=0.1)])


def test_a_missing_setting_is_named_unless_a_flag_gives_it(tmp_path: Path) -> None:
    flag = config(tmp_path, steps=None, lr=None)
    with pytest.raises(ConfigError) as caught:
        read_settings([flag, "--lr=1e-3"])
    assert len(caught.value.problems) == 1
    assert "no steps" in caught.value.problems[0]


def test_all_bad_values_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        read_settings(["--steps=0", "--lr=nan", "--clip=0", "--weight-decay=-1", "--seq=1"])
    assert {problem.split()[0] for problem in caught.value.problems} == {
        "steps",
        "lr",
        "clip",
        "weight_decay",
        "seq",
    }


@pytest.mark.parametrize("content", ["- a\n- b\n", "steps: [\n", "\xff"])
def test_a_file_that_is_no_mapping_is_an_error(tmp_path: Path, content: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError, match="settings"):
        read_settings([f"--config={file}"])


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        read_settings([f"--config={tmp_path / 'absent.yaml'}"])


@pytest.mark.parametrize("change", [{"steps": 2.5}, {"resume": "perhaps"}, {"plain": 3}])
def test_a_value_of_another_kind_is_wrong_usage(
    tmp_path: Path, change: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        read_settings([config(tmp_path, **change)])
    assert caught.value.code == 2
    assert next(iter(change)) in capsys.readouterr().err
