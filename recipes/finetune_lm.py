"""Fine-tune a causal language model inside a memory budget.

    python recipes/finetune_lm.py --checkpoint DIR --text FILE --budget host=1GiB --nvme DIR

All weights are trained, in float32, with AdamW, gradient clipping, a learning-rate schedule and
gradient accumulation. The loop in ``train`` is an ordinary PyTorch loop; Offload appears in three
places: it loads the model, it is attached to model and optimizer, and it commits each step.
``--plain`` leaves these three out and computes the same, bit by bit, in memory.

Settings come from the YAML file beside this script; a flag wins over the file. Run the same
command again to go on after an interruption. Progress goes to stderr, the result to stdout.

Exit codes: 0 done, 1 failed, 2 wrong settings, 3 does not fit the budget, 130 interrupted.
"""

import argparse
import contextlib
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import offload
from offload.errors import CheckpointError, ConfigError, OffloadError
from offload.recipes import lm_text
from offload.recipes import settings as recipe_settings
from offload.recipes.measuring import (
    offload_figures,
    peak_resident_nbytes,
    plain_figures,
    weights_xxh3,
)

EVALUATED = 16  # sequences of the held-out part that are evaluated
# Settings that a run keeps from its first step to its last.
FIXED = ("batch", "seq", "accumulate", "lr", "warmup", "weight_decay", "clip", "seed", "tokenizer")


class DivergedError(OffloadError):
    """The loss or the gradients are no longer finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One job. Each field is a key of the YAML file and a flag; the file says what they mean."""

    checkpoint: Path
    steps: int
    batch: int
    seq: int
    accumulate: int
    lr: float
    warmup: int
    weight_decay: float
    clip: float
    seed: int
    budget: str
    nvme: Path
    text: Path | None = None
    tokenizer: str | None = None
    record: Path | None = None
    resume: str = "auto"
    plain: bool = False
    result: Path | None = None

    def __post_init__(self) -> None:
        """Refuse settings that can't be trained with.

        Raises:
            ConfigError: lists every such setting.
        """
        least = {"steps": 1, "batch": 1, "seq": 2, "accumulate": 1, "warmup": 0, "seed": 0}
        problems = [
            f"{name} is {getattr(self, name)}: it must be at least {minimum}"
            for name, minimum in least.items()
            if getattr(self, name) < minimum
        ]
        problems += [
            f"{name} is {getattr(self, name)}: it must be a positive number"
            for name in ("lr", "clip")
            if not 0 < getattr(self, name) < math.inf
        ]
        if not 0 <= self.weight_decay < math.inf:
            problems.append(f"weight_decay is {self.weight_decay}: it must be 0 or positive")
        if problems:
            raise ConfigError(*problems)


def read_settings(argv: Sequence[str] | None = None) -> Settings:
    """Settings from the YAML file and the flags.

    Raises:
        ConfigError: lists what is missing, unknown or out of range.
    """
    parser = argparse.ArgumentParser(
        description="Fine-tune a causal language model inside a memory budget.",
        epilog="The YAML file says what each setting means and holds its default.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, default=Path(__file__).with_suffix(".yaml"))
    for name in ("checkpoint", "nvme", "record"):
        parser.add_argument(f"--{name}", type=Path, metavar="DIR")
    for name in ("text", "result"):
        parser.add_argument(f"--{name}", type=Path, metavar="FILE")
    for name in ("steps", "batch", "seq", "accumulate", "warmup", "seed"):
        parser.add_argument(f"--{name}", type=int, metavar="N")
    for name in ("lr", "weight-decay", "clip"):
        parser.add_argument(f"--{name}", type=float, metavar="X")
    parser.add_argument("--budget", metavar="SIZE")
    parser.add_argument("--tokenizer", choices=("bytes", "checkpoint"))
    parser.add_argument("--resume", choices=("auto", "never", "must"))
    parser.add_argument("--plain", action=argparse.BooleanOptionalAction)
    return recipe_settings.read(Settings, parser, argv)


def next_token_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean loss of predicting each token from those before it; ``batch`` is (batch, seq)."""
    loss: Tensor = model(input_ids=batch, labels=batch, use_cache=False).loss
    return loss


@torch.no_grad()
def evaluate(model: nn.Module, tokens: Tensor, settings: Settings) -> float:
    """Mean loss over up to ``EVALUATED`` sequences spread evenly over ``tokens``."""
    sequences = lm_text.even_windows(tokens, EVALUATED, settings.seq)
    model.eval()
    total = 0.0
    for batch in sequences.split(settings.batch):
        total += next_token_loss(model, batch).item() * len(batch)
    model.train()
    return total / len(sequences)


def read_model_config(settings: Settings) -> Any:
    """The checkpoint's ``config.json``.

    Raises:
        CheckpointError: the directory is no checkpoint.
        ConfigError: ``seq`` is beyond what the model can attend to.
    """
    if not (settings.checkpoint / "config.json").is_file():
        raise CheckpointError(
            f"{settings.checkpoint} has no config.json: pass --checkpoint with the directory that "
            "`save_pretrained` wrote (`make run` makes one)"
        )
    config = transformers.AutoConfig.from_pretrained(settings.checkpoint, local_files_only=True)
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and settings.seq > longest:
        raise ConfigError(f"seq is {settings.seq}: the model takes at most {longest} tokens")
    return config


def load_model(settings: Settings) -> Any:
    """The model, in float32: in memory with ``--plain``, else in Offload's tiers."""
    model: Any
    if settings.plain:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            settings.checkpoint, dtype=torch.float32, local_files_only=True
        )
    else:
        model = offload.load_pretrained(
            settings.checkpoint, budget=settings.budget, nvme=settings.nvme, dtype=torch.float32
        )
    model.loss_type = "ForCausalLM"  # else transformers warns of classes such as GPT-2's
    return model


def attach(
    model: nn.Module, optimizer: torch.optim.Optimizer, settings: Settings
) -> contextlib.AbstractContextManager["offload.Engine | None"]:
    """Offload's engine, as a context; a context of None with ``--plain``."""
    if settings.plain:
        return contextlib.nullcontext()
    return offload.attach(
        model,
        optimizer,
        budget=settings.budget,
        nvme=settings.nvme,
        record=settings.record,
        resume=settings.resume,
        commit="manual",
    )


def fixed(settings: Settings) -> dict[str, Any]:
    """The settings that a run keeps from its first step to its last."""
    return {name: getattr(settings, name) for name in FIXED}


def continued(extra: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """The progress that the last commit carries.

    Raises:
        ConfigError: the run was started with other settings.
    """
    differing = {
        name: (value, getattr(settings, name))
        for name, value in extra["settings"].items()
        if value != getattr(settings, name)
    }
    if differing:
        raise ConfigError(
            *(
                f"{settings.nvme} holds a run with {name} {old}, not {new}: keep it, or start "
                "anew with --resume never, or pass another --nvme"
                for name, (old, new) in differing.items()
            )
        )
    return dict(extra)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters in two groups: weight decay is for matrices, not for biases and norms."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def warmup_cosine(settings: Settings) -> Callable[[int], float]:
    """Factor of the learning rate by step: linear warm-up, then half a cosine down to a tenth."""

    def factor(step: int) -> float:
        if step < settings.warmup:
            return (step + 1) / (settings.warmup + 1)
        done = (step - settings.warmup) / max(settings.steps - settings.warmup, 1)
        return 0.55 + 0.45 * math.cos(math.pi * min(done, 1.0))

    return factor


def draw_batches(training: Tensor, step: int, settings: Settings) -> Tensor:
    """The micro-batches of a step: (accumulate, batch, seq) int64."""
    shape = (settings.accumulate, settings.batch)
    return lm_text.random_windows(training, shape, settings.seq, seed=settings.seed, step=step)


def restore_schedule(scheduler: LambdaLR, state: Mapping[str, Any]) -> None:
    """Bring the scheduler to a saved state, and its optimizer's learning rates with it."""
    scheduler.load_state_dict(dict(state))
    for group, lr in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = lr


def require_finite(value: float, what: str, step: int, settings: Settings) -> None:
    """Stop before a step that would spoil the weights.

    Raises:
        DivergedError: ``value`` is infinite or not a number.
    """
    if not math.isfinite(value):
        kept = "" if settings.plain else f"; {settings.nvme} keeps the step before it"
        raise DivergedError(
            f"step {step + 1}: the {what} is {value}, so the step was not taken{kept}. "
            f"Start anew (--resume never) with a lower --lr (now {settings.lr:g})"
        )


def say(message: str) -> None:
    """Progress, for people."""
    print(message, file=sys.stderr, flush=True)


def read_text(settings: Settings, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Tokens to train on and tokens held out, both 1D int32.

    Raises:
        ConfigError: the text can't be read, is too short, or does not suit the model.
    """
    encode = lm_text.token_encoder(settings.tokenizer, settings.checkpoint)
    pieces = lm_text.text_pieces(settings.text)
    tokens = lm_text.read_tokens(pieces, encode, vocabulary=vocabulary)
    training, held_out = lm_text.split(tokens, settings.seq)
    say(f"{len(training):,} tokens to train on, {len(held_out):,} held out")
    return training, held_out


def train(settings: Settings) -> dict[str, Any]:
    """The job: load, attach, loop. Returns the result that ``--result`` writes.

    Raises:
        OffloadError: see ``offload.errors``; DivergedError when loss or gradients blow up.
    """
    config = read_model_config(settings)
    training, held_out = read_text(settings, config.vocab_size)
    torch.manual_seed(settings.seed)
    model = load_model(settings).train()
    groups = parameter_groups(model, settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95))
    with attach(model, optimizer, settings) as engine:
        scheduler = LambdaLR(optimizer, warmup_cosine(settings))
        if engine is not None and engine.extra:
            progress = continued(engine.extra, settings)
            restore_schedule(scheduler, progress["scheduler"])
            say(f"going on after step {len(progress['losses'])} of {settings.steps}")
        else:
            before = evaluate(model, held_out, settings)
            progress = {"settings": fixed(settings), "heldout_before": before, "losses": []}
            say(f"held-out loss before training: {before:.4f}")

        losses: list[float] = progress["losses"]
        timings: list[tuple[float, float]] = []
        for step in range(len(losses), settings.steps):
            started = time.perf_counter()
            step_loss = 0.0
            for batch in draw_batches(training, step, settings):
                loss = next_token_loss(model, batch)
                require_finite(loss.item(), "loss", step, settings)
                (loss / settings.accumulate).backward()
                step_loss += loss.item() / settings.accumulate
            norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip).item()
            require_finite(norm, "norm of the gradients", step, settings)
            computed = time.perf_counter()
            optimizer.step()
            optimizer_s = time.perf_counter() - computed
            scheduler.step()
            optimizer.zero_grad()
            losses.append(step_loss)
            if engine is not None:
                progress |= {
                    "scheduler": scheduler.state_dict(),
                    "figures": offload_figures(engine.stats),
                }
                engine.commit(extra=progress)
            step_s = time.perf_counter() - started
            timings.append((step_s, optimizer_s))
            say(
                f"step {step + 1}/{settings.steps}: loss {step_loss:.4f}, "
                f"gradients {norm:.2f}, {step_s:.2f} s"
            )

        after = evaluate(model, held_out, settings)
        say(f"held-out loss after training: {after:.4f}")
        return {
            "loss_before": losses[0],
            "loss_after": losses[-1],
            "heldout_before": progress["heldout_before"],
            "heldout_after": after,
            **(plain_figures(timings) if engine is None else progress["figures"]),
            "losses": losses,
            "weights_xxh3": weights_xxh3(model),
            "peak_bytes": peak_resident_nbytes(),
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; the return value is the exit code."""
    transformers.utils.logging.disable_progress_bar()
    try:
        settings = read_settings(argv)
        if settings.result is not None:
            settings.result.parent.mkdir(parents=True, exist_ok=True)
        result = train(settings)
    except OffloadError as error:
        say(f"finetune_lm: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        say("finetune_lm: interrupted; the same command goes on after the last committed step")
        return 130
    text = json.dumps(result, indent=2)
    if settings.result is not None:
        settings.result.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    # As an exception, so that the engine closes its record; what is not committed is discarded.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    sys.exit(main())
