"""Loading a Hugging Face checkpoint straight into the store: shard to tier, tensor by tensor.

The model is built on the meta device; buffers are computed as usual. Each tensor is then read
from its safetensors shard in pieces and written to its block; peak memory holds one piece.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from offload.allocator.errors import CheckpointError, ConfigError
from offload.building import Building, drop_unclaimed
from offload.checkpoint import DTYPES_BY_NAME
from offload.config import OffloadConfig, make_config
from offload.runtime import Runtime
from offload.tiers.memory import HostBuffer

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PART_NBYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class ShardTensor:
    """One tensor of a shard: where its bytes stand."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # from the start of the file, in bytes
    nbytes: int


def read_header(path: Path) -> dict[str, ShardTensor]:
    """The tensors of one safetensors file, every bound checked.

    Raises:
        CheckpointError: missing, truncated, or not safetensors.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, 100 << 20):
                raise CheckpointError(
                    f"{path} ({size} bytes) is not a safetensors file, or its header is cut off"
                )
            header: dict[str, Any] = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror}") from error
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} ({size} bytes) is not a safetensors file") from error
    header.pop("__metadata__", None)
    base = 8 + length
    return {name: _entry(path, name, fields, base, size) for name, fields in header.items()}


def _entry(path: Path, name: str, fields: Any, base: int, size: int) -> ShardTensor:
    try:
        dtype = DTYPES_BY_NAME[fields["dtype"]]
        shape = tuple(int(length) for length in fields["shape"])
        begin, end = fields["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the header's entry for {name} is malformed") from error
    if end - begin != math.prod(shape) * dtype.itemsize or not 0 <= begin <= end:
        raise CheckpointError(f"{path}: {name} has {end - begin} bytes, {shape} needs others")
    if base + end > size:
        raise CheckpointError(
            f"{path} is truncated: {name} ends at byte {base + end}, the file has {size}; "
            "download or copy it again"
        )
    return ShardTensor(path, dtype, shape, base + begin, end - begin)


def read_checkpoint(directory: Path) -> dict[str, ShardTensor]:
    """All tensors of a checkpoint directory, by name.

    Raises:
        CheckpointError: no checkpoint there, or a damaged one.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory: pass a checkpoint directory")
    index = directory / _INDEX
    if index.exists():
        try:
            names = json.loads(index.read_text())["weight_map"]
            shards = sorted({directory / shard for shard in names.values()})
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index} is not a checkpoint index") from error
    elif (directory / _SINGLE).exists():
        shards = [directory / _SINGLE]
    else:
        raise CheckpointError(
            f"{directory} has neither {_SINGLE} nor {_INDEX}: only safetensors checkpoints are "
            "loaded (a pickle could run code); convert it with "
            "model.save_pretrained(dir, safe_serialization=True)"
        )
    tensors: dict[str, ShardTensor] = {}
    for shard in shards:
        tensors.update(read_header(shard))
    return tensors


def load_pretrained(
    path: str | Path,
    *,
    budget: str | int | Mapping[str, Any] | None = None,
    nvme: str | Path | Sequence[str | Path] | None = None,
    dtype: torch.dtype | None = None,
    config: OffloadConfig | str | Path | Mapping[str, Any] | None = None,
) -> nn.Module:
    """A causal language model from a checkpoint directory, its weights in the store.

    Args:
        path: a Hugging Face directory (``config.json`` and safetensors).
        budget: bytes per tier, as for ``attach``.
        nvme: the directory of the store, or several, as for ``attach``.
        dtype: of the weights; default: the checkpoint's own.
        config: file or mapping with the same keys; arguments win over it.

    Raises:
        CheckpointError: missing, truncated, non-safetensors, or not this model's.
        ConfigError: transformers is not installed.
        StoreInUseError: another process holds the store.
    """
    directory = Path(path)
    tensors = read_checkpoint(directory)
    model: nn.Module = _build_on_meta(directory, dtype or _common_dtype(tensors))
    runtime = Runtime(make_config(config, budget=budget, nvme=nvme))
    try:
        _fill(model, tensors, Building(runtime))
    except BaseException:
        drop_unclaimed(runtime)
        runtime.close()
        raise
    model.eval()
    return model


def _common_dtype(tensors: Mapping[str, ShardTensor]) -> torch.dtype:
    floating = [tensor for tensor in tensors.values() if tensor.dtype.is_floating_point]
    if not floating:
        raise CheckpointError("the checkpoint holds no floating-point weights")
    return max(floating, key=lambda tensor: tensor.nbytes).dtype


def _build_on_meta(directory: Path, dtype: torch.dtype) -> Any:
    """The model with parameters on the meta device and real buffers."""
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            "load_pretrained needs transformers: pip install 'offload[hf]'"
        ) from error
    if not (directory / "config.json").exists():
        raise CheckpointError(f"{directory} has no config.json: not a Hugging Face checkpoint")
    config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)

    def to_meta(_module: nn.Module, _name: str, parameter: Any) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    # The hook may return the parameter to register; torch's annotation does not say so.
    hook = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    finally:
        hook.remove()
    if (directory / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    return model


def _fill(model: Any, tensors: Mapping[str, ShardTensor], building: Building) -> None:
    """Replace each meta parameter by its checkpoint tensor, tied ones together."""
    places = dict(_places(model))
    missing: list[str] = []
    placed: dict[int, nn.Parameter] = {}
    buffer = HostBuffer(_PART_NBYTES)
    try:
        for name, (modules, parameter) in places.items():
            if id(parameter) not in placed:
                source = _find(tensors, name, model)
                if source is None:
                    missing.append(name)
                    continue
                placed[id(parameter)] = _load(name, parameter, source, building, buffer)
            for module, attribute in modules:
                setattr(module, attribute, placed[id(parameter)])
        _fill_buffers(model, tensors, buffer)
    finally:
        buffer.release()
    model.tie_weights()
    absent = [name for name in missing if model.get_parameter(name).is_meta]
    if absent:
        raise CheckpointError(
            f"the checkpoint lacks {len(absent)} weights of {type(model).__name__}, "
            f"such as {', '.join(absent[:3])}"
        )


def _places(model: nn.Module) -> Iterator[tuple[str, tuple[list[Any], nn.Parameter]]]:
    """Each distinct parameter with every (module, attribute) that shows it."""
    found: dict[int, tuple[str, list[Any], nn.Parameter]] = {}
    for prefix, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{prefix}.{attribute}" if prefix else attribute
                entry = found.setdefault(id(parameter), (name, [], parameter))
                entry[1].append((module, attribute))
    for name, modules, parameter in found.values():
        yield name, (modules, parameter)


def _find(tensors: Mapping[str, ShardTensor], name: str, model: Any) -> ShardTensor | None:
    """The checkpoint's tensor for ``name``; bare base-model checkpoints lack its prefix."""
    prefix = f"{model.base_model_prefix}."
    return tensors.get(name) or tensors.get(name.removeprefix(prefix)) or tensors.get(prefix + name)


def _load(
    name: str,
    parameter: nn.Parameter,
    source: ShardTensor,
    building: Building,
    buffer: HostBuffer,
) -> nn.Parameter:
    if source.shape != tuple(parameter.shape):
        raise CheckpointError(
            f"{source.path}: {name} has shape {list(source.shape)}, "
            f"the model's configuration says {list(parameter.shape)}"
        )
    built = building.allocate(parameter.dtype, parameter.shape)
    _copy(source, built.mapped.tensor, buffer)
    built.mapped.shed()
    return nn.Parameter(built.mapped.tensor, requires_grad=parameter.requires_grad)


def _fill_buffers(model: Any, tensors: Mapping[str, ShardTensor], buffer: HostBuffer) -> None:
    for name, target in model.named_buffers():
        source = _find(tensors, name, model)
        if source is not None and source.shape == tuple(target.shape):
            _copy(source, target, buffer)


def _copy(source: ShardTensor, target: torch.Tensor, buffer: HostBuffer) -> None:
    """Bytes of the shard into ``target``, converted to its dtype piece by piece."""
    flat = target.detach().reshape(-1)
    step = _PART_NBYTES // source.dtype.itemsize
    with source.path.open("rb", buffering=0) as file:
        file.seek(source.offset)
        for start in range(0, flat.numel(), step):
            numel = min(step, flat.numel() - start)
            view = buffer.view(0, numel * source.dtype.itemsize)
            done = 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise CheckpointError(f"{source.path} ended {len(view) - done} bytes early")
                done += count
            flat[start : start + numel].copy_(buffer.tensor(source.dtype, (numel,)))
