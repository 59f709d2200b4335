"""Settings: defaults, then a file, then ``OFFLOAD_*`` variables, then arguments or flags."""

import difflib
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from offload.allocator.errors import ConfigError
from offload.allocator.units import parse_memory_nbytes, parse_nbytes, parse_size
from offload.tiers.engines.registry import AUTO, check_name

TIERS = ("device", "host")
_DEVICE = re.compile(r"cpu|cuda(:\d+)?")


class OffloadConfig(BaseModel):
    """Every setting of a run; sizes in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    budget: dict[str, int] = Field(default_factory=dict)
    """Hard limits by tier; ``host`` bounds the process's peak resident set."""
    device: str | None = None
    """Where the model computes: ``cpu``, ``cuda`` or ``cuda:1``.

    By default where its parameters are. On a device weights, gradients and optimizer states have
    their homes in host memory and on the drive all the same, and visit the device (docs/gpu.md).
    """
    device_arena: bool = False
    """Serve what torch allocates in forward and backward from one segment of the device's memory.

    Its size is planned from a step that came twice in a row; CUDA only (docs/memory-plan.md).
    """
    nvme: tuple[Path, ...] = ()
    """Directories of the store and of scratch; several are striped over, in this order."""
    record: Path | None = None
    """Run directory for ``offload report``."""
    resume: Literal["auto", "never", "must"] = "auto"
    """Whether to continue the store's last commit."""
    commit: Literal["step", "manual", "never"] = "step"
    """Whether each optimizer step is made durable, ``Engine.commit`` decides, or nothing is.

    ``never`` keeps one slot of weights and states instead of two: half the room on the drive.
    """
    io_threads: int = Field(default=4, ge=1, le=64)
    """Requests in flight in each direction."""
    io_engine: str = AUTO
    """How files are read and written: ``auto``, ``threads``, ``kvikio``, ``deepspeed`` or
    ``aiofiles``."""
    min_swap_nbytes: int = Field(default=64 << 10, ge=0)
    """Saved activations smaller than this move in batches."""

    step_in_backward: bool = False
    """Step each parameter inside backward, as soon as its gradient is complete.

    Saves the gradient's trip to the drive and hides the step behind backward. Nothing can use
    gradients between backward and step then: no clipping, no loss scale.
    """
    step_in_forward: bool = False
    """Put the step off until the next forward, and make it there, each weight before its use.

    Hides a part of the step behind forward. A step is durable when that forward has ended.
    """
    accumulation_steps: int = Field(default=1, ge=1)
    """Backward passes that make one step, where ``step_in_backward`` can't see their end."""
    optimizer_device: float | Literal["host", "device", "auto"] = "host"
    """Who steps the tiles of the optimizer, where the model computes on a device (docs/gpu.md).

    ``device`` has the bits of a loop whose optimizer steps there. A number is the device's share of
    the tiles; ``auto`` measures both before the first step and keeps its choice with the store.
    """
    state_precision: Literal["exact", "bf16", "8bit"] = "exact"
    """In which precision the store keeps the optimizer's large float32 states.

    ``bf16`` halves their bytes, ``8bit`` leaves a quarter of them, by stochastic rounding: results
    are no longer those of memory.
    """

    master_weights: Literal["none", "fp32"] = "none"
    """``fp32``: bfloat16 weights are stepped in float32, with float32 gradients and states.

    The store keeps what such a weight lacks of its master: 2 bytes a parameter.
    """

    recompute: Literal["off", "tokenwise"] = "off"
    """``tokenwise``: of what a block saves, some token rows are swapped and the rest is rebuilt."""
    alpha: float | Literal["auto"] = "auto"
    """The fraction of rows that is swapped, from 0 to 1; ``auto`` solves it from measured times."""
    relaxed: bool = False
    """Accept rebuilt rows that differ in the last bits; off, such tensors are swapped whole."""
    blocks: tuple[str, ...] = ()
    """Names of the blocks, or of the lists that hold them; empty: modules that repeat in a list."""

    nvme_write_budget: int | None = None
    """Bytes that one optimizer step may write to the drive, everything included.

    Weights, gradients and states must be written; saved activations take what these leave, and
    stay in memory beyond that.
    """
    nvme_endurance: int | None = Field(default=None, gt=0)
    """Bytes that may be written to the drive in its life, as its data sheet says (600TB)."""

    @field_validator("budget", mode="before")
    @classmethod
    def _parse_budget(cls, value: Any) -> dict[str, int]:
        return parse_budget(value)

    @field_validator("device")
    @classmethod
    def _check_device(cls, value: str | None) -> str | None:
        if value is not None and not _DEVICE.fullmatch(value):
            raise ValueError(f"{value!r} is no device to compute on: cpu, cuda, cuda:0, cuda:1, …")
        return value

    @field_validator("nvme", mode="before")
    @classmethod
    def _parse_nvme(cls, value: Any) -> Any:
        if isinstance(value, str):  # a flag or a variable
            return [part.strip() for part in value.split(",") if part.strip()]
        return [value] if isinstance(value, os.PathLike) else value

    @field_validator("alpha", mode="before")
    @classmethod
    def _parse_alpha(cls, value: Any) -> Any:
        if value == "auto":
            return value
        try:
            alpha = float(value)
        except (TypeError, ValueError):
            alpha = math.nan
        if not 0 <= alpha <= 1:
            raise ValueError(f"{value!r} is no fraction of the rows: give 0 to 1, or 'auto'")
        return alpha

    @field_validator("optimizer_device", mode="before")
    @classmethod
    def _parse_optimizer_device(cls, value: Any) -> Any:
        if value in ("host", "device", "auto"):
            return value
        try:
            share = float(value)
        except (TypeError, ValueError):
            share = math.nan
        if not 0 <= share <= 1:
            raise ValueError(
                f"{value!r} is nobody who steps: host, device, auto, or the device's share, 0 to 1"
            )
        return share

    @field_validator("blocks", mode="before")
    @classmethod
    def _parse_blocks(cls, value: Any) -> Any:
        return [name.strip() for name in value.split(",")] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_recompute(self) -> Self:
        unused = sorted({"alpha", "relaxed", "blocks"} & self.model_fields_set)
        if self.recompute == "off" and unused:
            raise ValueError(f"only recompute='tokenwise' uses {', '.join(unused)}: set that too")
        return self

    @model_validator(mode="after")
    def _check_step(self) -> Self:
        if "accumulation_steps" in self.model_fields_set and not self.step_in_backward:
            raise ValueError("only step_in_backward uses accumulation_steps: set that too")
        if self.step_in_forward and self.step_in_backward:
            raise ValueError("a step is either in backward or in the next forward: set one of both")
        if self.step_in_forward and self.state_precision == "8bit":
            raise ValueError("step_in_forward has no state_precision='8bit': set 'bf16' or 'exact'")
        return self

    @field_validator("io_engine")
    @classmethod
    def _check_io_engine(cls, value: str) -> str:
        return check_name(value)

    @field_validator("min_swap_nbytes", mode="before")
    @classmethod
    def _parse_nbytes(cls, value: Any) -> int:
        return parse_nbytes(value)

    @field_validator("nvme_write_budget", mode="before")
    @classmethod
    def _parse_write_budget(cls, value: Any) -> int | None:
        return None if value is None else parse_size(value)

    @field_validator("nvme_endurance", mode="before")
    @classmethod
    def _parse_endurance(cls, value: Any) -> int | None:
        return None if value is None else parse_size(value, unit="TB")


def parse_budget(value: Any) -> dict[str, int]:
    """``"device=10GiB,host=24GiB"``, ``"24GiB"`` (host), bytes (host) or a mapping.

    Raises:
        ValueError: an unknown tier, one given twice, a size that can't be read, or one without its
            unit.
    """
    if isinstance(value, str) and "=" in value:
        value = _by_tier(value)
    if not isinstance(value, Mapping):
        value = {"host": value}
    budget: dict[str, int] = {}
    for tier, size in value.items():
        name = str(tier).strip()
        if name not in TIERS:
            raise ValueError(f"unknown tier {name!r}{_nearest(name, TIERS)}")
        try:
            budget[name] = parse_memory_nbytes(size.strip() if isinstance(size, str) else size)
        except ValueError as error:
            raise ValueError(f"{name}={size}: {error}") from error
    return budget


def _by_tier(text: str) -> dict[str, str]:
    sizes: dict[str, str] = {}
    for part in text.split(","):
        tier, _, size = (word.strip() for word in part.partition("="))
        if tier in sizes:
            raise ValueError(f"{tier} is given twice: {sizes[tier]} and {size}")
        if part.strip():
            sizes[tier] = size
    return sizes


def make_config(
    config: OffloadConfig | str | Path | Mapping[str, Any] | None = None, **arguments: Any
) -> OffloadConfig:
    """The settings of a call: ``config`` (or file), environment, then arguments not None.

    Raises:
        ConfigError: every fault found, each with where it stands.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    if isinstance(config, OffloadConfig):
        fields = {name: getattr(config, name) for name in config.model_fields_set}
        return _validated([("argument", {**fields, **given})])
    layers: list[tuple[str, Mapping[str, Any]]] = []
    if isinstance(config, str | Path):
        layers.append((f"file {config}", read_file(Path(config))))
    layers.append(("environment", read_environment(os.environ)))
    if isinstance(config, Mapping):
        layers.append(("config", config))
    layers.append(("argument", given))
    return _validated(layers)


def read_file(path: Path) -> Mapping[str, Any]:
    """The keys of a YAML or JSON file.

    Raises:
        ConfigError: unreadable, or not a mapping.
    """
    try:
        text = path.read_text()
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"can't read the configuration {path}: {error}") from error
    if content is not None and not isinstance(content, Mapping):
        raise ConfigError(f"{path} holds a {type(content).__name__}, not keys and values")
    return content or {}


def read_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """The settings among ``OFFLOAD_*`` variables (``OFFLOAD_BUDGET``, ``OFFLOAD_NVME``, …)."""
    return {
        name: environment[f"OFFLOAD_{name.upper()}"]
        for name in OffloadConfig.model_fields
        if f"OFFLOAD_{name.upper()}" in environment
    }


def _validated(layers: list[tuple[str, Mapping[str, Any]]]) -> OffloadConfig:
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    problems: list[str] = []
    for source, layer in layers:
        for key, value in layer.items():
            if key not in OffloadConfig.model_fields:
                known = tuple(OffloadConfig.model_fields)
                problems.append(f"{source}: unknown key {key!r}{_nearest(str(key), known)}")
                continue
            merged[key], origin[key] = value, source
    try:
        config = OffloadConfig(**merged)
    except ValidationError as error:
        for fault in error.errors():
            message = fault["msg"].removeprefix("Value error, ")
            if fault["loc"]:  # else it is about several
                name = str(fault["loc"][0])
                message = f"{origin.get(name, 'configuration')}: {name}: {message}"
            problems.append(message)
    if problems:
        raise ConfigError(*problems)
    return config


def _nearest(name: str, known: tuple[str, ...]) -> str:
    match = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {match[0]!r}?" if match else f"; known: {', '.join(known)}"
