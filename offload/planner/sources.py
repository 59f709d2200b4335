"""The model of a plan: from a Hugging Face ``config.json``, without its weights."""

import difflib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from offload.allocator.errors import ConfigError
from offload.planner.script_memory import Held
from offload.swap.planning.program import Program

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from offload.swap.state_precision import Precision

Method: TypeAlias = Literal["full", "lora"]
OPTIMIZERS = ("adamw", "adam", "sgd", "adagrad", "rmsprop", "adamax", "nadam", "radam")
_CLASSES = {
    "adamw": "AdamW", "adam": "Adam", "sgd": "SGD", "adagrad": "Adagrad", "rmsprop": "RMSprop",
    "adamax": "Adamax", "nadam": "NAdam", "radam": "RAdam",
}  # fmt: skip
_FUSED = frozenset({"adamw", "adam", "sgd", "adagrad"})  # have a fused kernel on the CPU


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Sequences of one step and their length in tokens."""

    sequences: int
    length: int


class HuggingFaceModel:
    """A causal language model, known by its ``config.json`` alone.

    Args:
        path: the file, or the directory that holds it.
        dtype: of weights; None: what the configuration says.
        precision: of what the optimizer keeps; None: exact.
        rebuild_nbytes: the smallest storage that token-wise recompute would rebuild; None: it is
            not asked for.

    Attributes:
        held: what a process that trains it has imported.

    Raises:
        ConfigError: no such file, not a configuration, or of an unknown model type.
    """

    def __init__(
        self,
        path: Path,
        *,
        dtype: str | None,
        method: Method,
        optimizer: str,
        precision: "Precision | None" = None,
        rebuild_nbytes: int | None = None,
    ) -> None:
        file = path / "config.json" if path.is_dir() else path
        content = _read(file)
        try:
            import transformers
        except ImportError as error:
            raise ConfigError(
                f"{file} is a Hugging Face model: planning it needs transformers: "
                "pip install 'offload[hf]'"
            ) from error
        transformers.logging.set_verbosity_error()
        kind = content["model_type"]
        known = list(transformers.CONFIG_MAPPING)
        if kind not in known:
            near = difflib.get_close_matches(str(kind), known, n=1)
            raise ConfigError(
                f"{file}: transformers {transformers.__version__} knows no model type {kind!r}"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )
        fields = {key: value for key, value in content.items() if key != "model_type"}
        try:
            self.config = transformers.AutoConfig.for_model(kind, **fields)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{file}: {error}") from error
        modules = ("transformers.modeling_utils", _modeling(type(self.config).__module__))
        self.held = Held(imports=modules)
        self.name = path.name if path.is_dir() else path.stem
        self.dtype = dtype or _dtype_of(content)
        self.method = method
        self.optimizer = optimizer
        self.precision = precision
        self.rebuild_nbytes = rebuild_nbytes

    def longest(self) -> int | None:
        """Tokens of the longest sequence that it has positions for, if the configuration says."""
        longest = getattr(self.config, "max_position_embeddings", None)
        return longest if isinstance(longest, int) else None

    def describe(self, batch: Batch) -> str:
        """The work, for a title."""
        return (
            f"{self.method} fine-tune  {self.dtype}  seq {batch.length} x batch {batch.sequences}"
        )

    def trace(self, batch: Batch) -> Program:
        """The program of one training step on ``batch``.

        Raises:
            UnsupportedError: it can't be planned.
            ConfigError: it is no causal language model.
        """
        import torch
        import transformers

        from offload.planner.lora import add_adapters
        from offload.swap.planning.tracing import fake_mode, trace_step
        from offload.swap.state_precision import EXACT

        with fake_mode():
            try:
                model: Any = transformers.AutoModelForCausalLM.from_config(
                    self.config, dtype=getattr(torch, self.dtype)
                )
            except ValueError as error:
                raise ConfigError(
                    f"{self.name}: a {self.config.model_type} is no causal language model: "
                    "plan a script that trains it"
                ) from error
            model.train()
            if self.method == "lora":
                add_adapters(model)
            tokens = torch.zeros(batch.sequences, batch.length, dtype=torch.int64)

            def loss_of(model: Any) -> torch.Tensor:
                loss: torch.Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
                return loss

            return trace_step(
                model,
                loss_of,
                tokens=batch.sequences * batch.length,
                optimizer=make_optimizer(self.optimizer, model),
                precision=self.precision or EXACT,
                rebuild_nbytes=self.rebuild_nbytes,
            )


def make_optimizer(name: str, model: "nn.Module") -> "Optimizer":
    """The optimizer called ``name`` over what is trained, fused where torch can.

    Raises:
        ConfigError: an unknown name; the nearest one is told.
    """
    import torch

    if name not in _CLASSES:
        near = difflib.get_close_matches(name, OPTIMIZERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"--optim {name!r} is none of {', '.join(OPTIMIZERS)}{hint}")
    options: dict[str, Any] = {"fused": True} if name in _FUSED else {}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer: Optimizer = getattr(torch.optim, _CLASSES[name])(trained, lr=1e-4, **options)
    return optimizer


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"can't read the model {file} ({error.strerror}): name a config.json of Hugging Face, "
            "its directory, or a training script (.py)"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict) or "model_type" not in content:
        raise ConfigError(f"{file} is no Hugging Face configuration: it has no 'model_type'")
    return content


def _modeling(configuration: str) -> str:
    """The module of a model's classes, by that of its configuration."""
    name = configuration.replace("configuration_", "modeling_")
    return name if importlib.util.find_spec(name) else configuration


def _dtype_of(content: dict[str, Any]) -> str:
    found = str(content.get("dtype") or content.get("torch_dtype") or "float32")
    return found.removeprefix("torch.")
