"""Text for language models: read in pieces, tokenized, split, drawn from by step number."""

import array
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from offload.errors import ConfigError

HELD_OUT = 0.1  # the share of the text that is never trained on: its end
PIECE_CHARS = 1 << 16
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")

Encoder = Callable[[str], Iterable[int]]


def text_pieces(text: Path | None) -> Iterator[str]:
    """The text in pieces of whole lines, so that a long one needs little memory.

    Args:
        text: a UTF-8 file; None is the language reference that ships with this Python.

    Raises:
        ConfigError: the file can't be read or is not UTF-8.
    """
    if text is None:
        from pydoc_data.topics import topics

        yield from (f"{topics[name]}\n" for name in sorted(topics))
        return
    try:
        with text.open(encoding="utf-8") as file:
            while lines := file.readlines(PIECE_CHARS):
                yield "".join(lines)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"can't read the text {text}: {error}") from error


def utf8(piece: str) -> Iterable[int]:
    """Token ids of the byte tokenizer: 0 to 255."""
    return piece.encode()


def token_encoder(kind: str | None, checkpoint: Path) -> Encoder:
    """The function from text to token ids.

    Args:
        kind: ``checkpoint`` or ``bytes``; None is the checkpoint's tokenizer if it has one.

    Raises:
        ConfigError: the checkpoint's tokenizer was asked for, and it has none.
    """
    has_tokenizer = any((checkpoint / name).is_file() for name in TOKENIZER_FILES)
    if kind == "checkpoint" and not has_tokenizer:
        raise ConfigError(f"{checkpoint} has no tokenizer: pass --tokenizer bytes")
    if kind == "bytes" or not has_tokenizer:
        return utf8
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    return lambda piece: tokenizer.encode(piece, add_special_tokens=False, verbose=False)


def read_tokens(pieces: Iterable[str], encode: Encoder, *, vocabulary: int) -> Tensor:
    """Token ids of the whole text, 1D int32 (4 bytes a token in memory).

    Raises:
        ConfigError: the text is empty, or an id is beyond ``vocabulary``.
    """
    ids = array.array("i")
    for piece in pieces:
        ids.extend(encode(piece))
    if not ids:
        raise ConfigError("the text is empty: pass a --text file with something to learn")
    tokens = torch.from_numpy(np.frombuffer(ids, dtype=np.int32).copy())
    if (largest := int(tokens.max())) >= vocabulary:
        raise ConfigError(
            f"token {largest} is beyond the model's vocabulary of {vocabulary}: the tokenizer "
            "belongs to another model, see --tokenizer"
        )
    return tokens


def split(tokens: Tensor, seq: int) -> tuple[Tensor, Tensor]:
    """The training part and the held-out part: the last tenth of the text.

    Raises:
        ConfigError: the held-out part is shorter than one sequence of ``seq`` tokens.
    """
    held_out = int(len(tokens) * HELD_OUT)
    if held_out < seq:
        shorter = f", or --seq {held_out}" if held_out >= 2 else ""
        raise ConfigError(
            f"the text has {len(tokens)} tokens, {held_out} of them held out, but a sequence "
            f"takes {seq}: pass a text of at least {math.ceil(seq / HELD_OUT)} tokens{shorter}"
        )
    return tokens[:-held_out], tokens[-held_out:]


def windows(tokens: Tensor, starts: Tensor, seq: int) -> Tensor:
    """The ``seq`` tokens from each start: (*starts.shape, seq) int64."""
    return tokens[starts[..., None] + torch.arange(seq)].long()


def random_windows(
    tokens: Tensor, shape: tuple[int, ...], seq: int, *, seed: int, step: int
) -> Tensor:
    """(*shape, seq) int64, a pure function of ``seed`` and ``step``.

    A run that goes on at some step therefore sees the data that it would have seen anyway, and
    drawing takes nothing from the global random state.
    """
    # NumPy's seeding mixes both numbers; torch.Generator heeds only 32 bits of its seed.
    starts = np.random.default_rng([seed, step]).integers(len(tokens) - seq + 1, size=shape)
    return windows(tokens, torch.from_numpy(starts), seq)


def even_windows(tokens: Tensor, count: int, seq: int) -> Tensor:
    """Up to ``count`` windows spread evenly over ``tokens``, not overlapping: (n, seq) int64."""
    count = min(count, len(tokens) // seq)
    stride = (len(tokens) - seq) // max(count - 1, 1)
    return windows(tokens, torch.arange(count) * stride, seq)
