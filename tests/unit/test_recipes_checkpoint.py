"""The checkpoint that the quickstart makes."""

from pathlib import Path

import pytest
import torch
import transformers

from offload.recipes import lm_text, make_checkpoint

TINY = ["--vocabulary=400", "--positions=64", "--width=32", "--layers=2", "--heads=2"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint."""
    directory = tmp_path_factory.mktemp("made") / "checkpoint"
    assert make_checkpoint.main([str(directory), *TINY]) == 0
    return directory


def test_the_default_model_has_124_million_weights() -> None:
    arguments = make_checkpoint.make_parser().parse_args(["unused"])
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(make_checkpoint.gpt2_config(arguments))
    assert sum(parameter.numel() for parameter in model.parameters()) == 124_439_808


def test_it_is_an_ordinary_hugging_face_directory(checkpoint: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer("Assignment statements bind names.", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "Assignment statements bind names."
    assert torch.isfinite(model(ids, labels=ids).loss)
    assert [path.name for path in checkpoint.parent.iterdir()] == ["checkpoint"]


def test_a_seed_fixes_the_weights(checkpoint: Path, tmp_path: Path) -> None:
    def weights(*more: str) -> bytes:
        assert make_checkpoint.main([str(tmp_path / "other"), *TINY, *more]) == 0
        return (tmp_path / "other" / "model.safetensors").read_bytes()

    first = (checkpoint / "model.safetensors").read_bytes()
    assert weights() == first
    assert weights("--seed=1") != first


def test_the_checkpoints_tokenizer_is_the_default(checkpoint: Path) -> None:
    encode = lm_text.token_encoder(None, checkpoint)
    assert len(list(encode("the statement"))) < len("the statement")
    assert list(lm_text.token_encoder("bytes", checkpoint)("the")) == list(b"the")


@pytest.mark.parametrize("wrong", ["--vocabulary=256", "--heads=7"])
def test_a_model_that_cant_be_made_is_wrong_usage(tmp_path: Path, wrong: str) -> None:
    assert make_checkpoint.main([str(tmp_path / "made"), wrong]) == 2
    assert not (tmp_path / "made").exists()
