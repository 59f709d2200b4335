"""Writing safetensors tensor by tensor: no moment holds the model in memory.

The format (8 bytes of header length, a JSON header, the tensors' bytes) is safetensors' own;
its Python writer takes all tensors at once, which a streamed model can't afford.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from offload.allocator.errors import TierIOError
from offload.swap.census import storage_key
from offload.swap.masters import master_of

_PART_NBYTES = 16 << 20
_PART_NUMEL = _PART_NBYTES // 4
_NONE: Mapping[int, torch.Tensor | None] = MappingProxyType({})
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES_BY_NAME = {name: dtype for dtype, name in _DTYPES.items()}


def save_pretrained(
    model: nn.Module, directory: Path, low_halves: Mapping[int, torch.Tensor | None] = _NONE
) -> None:
    """Write ``model.safetensors`` and, for a Hugging Face model, its configuration.

    Tied weights are written once, under their first name, as Hugging Face does.

    Args:
        low_halves: of the float32 masters to be written instead of bfloat16 weights, by the
            addresses of these.

    Raises:
        TierIOError: the directory can't be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write_tensors(_distinct(model), directory / "model.safetensors", low_halves)
    except OSError as error:
        raise TierIOError(error.errno, f"can't save to {directory}: {error}") from error
    for name in ("config", "generation_config"):
        settings = getattr(model, name, None)
        if settings is not None and hasattr(settings, "save_pretrained"):
            settings.save_pretrained(directory)


def _distinct(model: nn.Module) -> dict[str, torch.Tensor]:
    seen: set[Any] = set()
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        key = (storage_key(tensor), tensor.storage_offset(), tensor.shape)
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        tensors[name] = tensor
    return tensors


def _write_tensors(
    tensors: dict[str, torch.Tensor], path: Path, low_halves: Mapping[int, torch.Tensor | None]
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        has_master = tensor.data_ptr() in low_halves
        begin, end = end, end + tensor.nbytes * (2 if has_master else 1)
        header[name] = {
            "dtype": _DTYPES[torch.float32 if has_master else tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_suffix(".partial")
    with temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            if tensor.numel() and tensor.data_ptr() in low_halves:
                _write_master(file, tensor, low_halves[tensor.data_ptr()])
            elif tensor.numel():
                _write_bytes(file, tensor)
        file.flush()
    temporary.replace(path)


def _write_master(file: Any, tensor: torch.Tensor, low: torch.Tensor | None) -> None:
    high = tensor.detach().view(-1)
    lower = None if low is None else low.view(-1)
    for at in range(0, high.numel(), _PART_NUMEL):
        part = slice(at, at + _PART_NUMEL)
        values = master_of(high[part], None if lower is None else lower[part])
        file.write(values.numpy().data)


def _write_bytes(file: Any, tensor: torch.Tensor) -> None:
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    for at in range(0, flat.nbytes, _PART_NBYTES):
        file.write(flat[at : at + _PART_NBYTES].data)
