"""Make a small Hugging Face checkpoint to try a recipe on, for no hub is reachable everywhere.

    python recipes/make_checkpoint.py DIR [--text FILE] [--layers 12 --width 768 --heads 12 ...]

The model has GPT-2's shape and random weights (seeded), so it knows nothing yet. Its tokenizer
is a byte-level BPE trained on the text: its ids are the first of the vocabulary, the rest of the
embedding's rows are there as in GPT-2, but no text leads to them. The directory is complete or
absent: it is written beside its place and renamed.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from offload.errors import ConfigError, OffloadError
from offload.recipes.lm_text import text_pieces

END = "<|endoftext|>"


def train_tokenizer(text: Path | None, vocabulary: int) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE of at most ``vocabulary`` ids; fewer where the text is short.

    Raises:
        ConfigError: the text can't be read.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text_pieces(text), trainer=trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END
    )


def gpt2_config(arguments: argparse.Namespace) -> transformers.GPT2Config:
    """The model's shape; by default that of GPT-2 with 124M weights."""
    return transformers.GPT2Config(
        vocab_size=arguments.vocabulary,
        n_positions=arguments.positions,
        n_embd=arguments.width,
        n_layer=arguments.layers,
        n_head=arguments.heads,
        bos_token_id=0,  # the one special token, see ``train_tokenizer``
        eos_token_id=0,
    )


def make_checkpoint(directory: Path, arguments: argparse.Namespace) -> int:
    """Write the checkpoint to ``directory``, replacing it; returns the number of weights."""
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer = train_tokenizer(arguments.text, arguments.vocabulary)
    torch.manual_seed(arguments.seed)
    model = transformers.GPT2LMHeadModel(gpt2_config(arguments))
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)
    return sum(parameter.numel() for parameter in model.parameters())


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make a checkpoint of GPT-2's shape.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--text", type=Path, help="default: the Python language reference")
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--positions", type=int, default=1024)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Make the checkpoint; the return value is the exit code."""
    arguments = make_parser().parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    try:
        if arguments.vocabulary < 257:
            raise ConfigError("--vocabulary must be at least 257: every byte, and the end of text")
        if arguments.width % arguments.heads:
            raise ConfigError("--width must be a multiple of --heads")
        count = make_checkpoint(arguments.directory, arguments)
    except OffloadError as error:
        print(f"make_checkpoint: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{arguments.directory}: {count:,} weights, randomly initialised")
    return 0


if __name__ == "__main__":
    sys.exit(main())
