"""Text for language models: pieces, tokens, split, windows."""

from pathlib import Path

import pytest
import torch

from offload.errors import ConfigError
from offload.recipes import lm_text


def test_reference_text_is_real_english_in_a_fixed_order() -> None:
    text = "".join(lm_text.text_pieces(None))
    assert "statement" in text
    assert len(text) > 300_000
    assert text == "".join(lm_text.text_pieces(None))


def test_pieces_of_a_file_are_the_file(tmp_path: Path) -> None:
    text = "".join(f"line {number} à ∑\n" for number in range(20_000)) + "no newline"
    file = tmp_path / "text"
    file.write_text(text, encoding="utf-8")
    pieces = list(lm_text.text_pieces(file))
    assert "".join(pieces) == text
    assert len(pieces) > 3
    assert all(piece.endswith("\n") for piece in pieces[:-1])


def test_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent"):
        list(lm_text.text_pieces(tmp_path / "absent"))
    (tmp_path / "latin").write_bytes(b"\xe9t\xe9")
    with pytest.raises(ConfigError, match="latin"):
        list(lm_text.text_pieces(tmp_path / "latin"))


def test_bytes_are_tokens_without_a_tokenizer(tmp_path: Path) -> None:
    encode = lm_text.token_encoder(None, tmp_path)
    tokens = lm_text.read_tokens(["é", "a"], encode, vocabulary=256)
    assert tokens.tolist() == [0xC3, 0xA9, ord("a")]
    assert tokens.dtype == torch.int32


def test_absent_tokenizer_is_an_error_when_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--tokenizer bytes"):
        lm_text.token_encoder("checkpoint", tmp_path)


def test_empty_text_is_an_error() -> None:
    with pytest.raises(ConfigError, match="empty"):
        lm_text.read_tokens([], lm_text.utf8, vocabulary=256)


def test_tokens_beyond_the_vocabulary_are_an_error() -> None:
    with pytest.raises(ConfigError, match="token 120 is beyond the model's vocabulary of 100"):
        lm_text.read_tokens(["ax"], lm_text.utf8, vocabulary=100)


def test_split_holds_out_the_tail() -> None:
    training, held_out = lm_text.split(torch.arange(1000), 8)
    assert torch.equal(torch.cat([training, held_out]), torch.arange(1000))
    assert len(held_out) == 100


def test_text_shorter_than_a_sequence_says_what_would_do() -> None:
    with pytest.raises(ConfigError, match=r"79 tokens, 7 of them.* 80 tokens, or --seq 7"):
        lm_text.split(torch.arange(79), 8)
    assert len(lm_text.split(torch.arange(80), 8)[1]) == 8


def test_random_windows_depend_on_seed_and_step_alone() -> None:
    tokens = torch.arange(500)

    def draw(seed: int, step: int) -> torch.Tensor:
        return lm_text.random_windows(tokens, (2, 3), 8, seed=seed, step=step)

    first = draw(0, 5)
    torch.rand(7)
    state = torch.get_rng_state()
    assert torch.equal(draw(0, 5), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(draw(0, 6), first)
    assert not torch.equal(draw(1, 5), first)
    assert first.shape == (2, 3, 8)
    assert first.dtype == torch.int64
    assert torch.equal(first - first[..., :1], torch.arange(8).expand(2, 3, 8))


def test_random_windows_reach_both_ends() -> None:
    drawn = lm_text.random_windows(torch.arange(9), (200,), 8, seed=0, step=0)
    assert set(drawn[:, 0].tolist()) == {0, 1}


@pytest.mark.parametrize(("length", "count"), [(8, 1), (23, 2), (80, 4), (1000, 4)])
def test_even_windows_spread_without_overlap(length: int, count: int) -> None:
    starts = lm_text.even_windows(torch.arange(length), 4, 8)[:, 0]
    assert len(starts) == count
    assert starts[0] == 0
    assert bool((starts.diff() >= 8).all())
    assert starts[-1] + 8 <= length
    assert count == 1 or starts[-1] + 8 + count > length - 8
