"""What a commit keeps beside weights and optimizer states.

Random number generators, optimizer settings, buffers: all of it as JSON, bit for bit.
"""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from offload.swap.states import is_large, pack_meta
from offload.tiers.store import Store, checksum, pack_tensor, unpack_tensor


def pack_rng(device: torch.device | None = None) -> dict[str, Any]:
    """The states of the generators of torch (CPU, and ``device``), Python and numpy."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 (the user's)
    on_device = {}
    if device is not None and device.type == "cuda":
        on_device = {"cuda": pack_tensor(torch.cuda.get_rng_state(device))}
    return {
        **on_device,
        "torch": pack_tensor(torch.get_rng_state()),
        "python": [version, list(internal), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
    }


def restore_rng(packed: dict[str, Any], device: torch.device | None = None) -> None:
    """Put the generators back to where ``pack_rng`` saw them."""
    if "cuda" in packed and device is not None and device.type == "cuda":
        torch.cuda.set_rng_state(unpack_tensor(packed["cuda"]), device)
    torch.set_rng_state(unpack_tensor(packed["torch"]))
    version, internal, gauss = packed["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = packed["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002


def pack_groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The settings of each parameter group (learning rate and so on)."""
    return [
        {key: _pack_value(value) for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]


def restore_groups(optimizer: Optimizer, packed: list[dict[str, Any]]) -> None:
    """Put the settings back, as ``optimizer.load_state_dict`` would."""
    for group, settings in zip(optimizer.param_groups, packed, strict=True):
        group.update({key: _unpack_value(value) for key, value in settings.items()})


def _pack_value(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return {"tensor": pack_tensor(value)}
    if isinstance(value, tuple):
        return {"tuple": [_pack_value(item) for item in value]}
    return value


def _unpack_value(value: Any) -> Any:
    if isinstance(value, dict) and "tensor" in value:
        return unpack_tensor(value["tensor"])
    if isinstance(value, dict) and "tuple" in value:
        return tuple(_unpack_value(item) for item in value["tuple"])
    return value


class BufferKeeper:
    """The model's buffers: they stay in memory, and are committed with each step.

    Args:
        chunk_numel: elements per checksummed chunk of a large buffer.
        to_host: gives the values of a buffer that is on a device in host memory.
    """

    def __init__(
        self,
        store: Store,
        model: nn.Module,
        chunk_numel: int,
        to_host: Callable[[torch.Tensor], torch.Tensor] = lambda buffer: buffer,
    ) -> None:
        self._to_host = to_host
        self.store = store
        self.model = model
        self.chunk_numel = chunk_numel

    def _buffers(self) -> dict[str, torch.Tensor]:
        return {name: buffer for name, buffer in self.model.named_buffers() if not buffer.is_meta}

    def record(self) -> dict[str, Any]:
        """Store the large buffers that changed; returns the entry for the commit record."""
        return {name: self._record(name, buffer) for name, buffer in self._buffers().items()}

    def _record(self, name: str, buffer: torch.Tensor) -> dict[str, Any]:
        buffer = self._to_host(buffer)
        if not is_large(buffer):
            return {"tensor": pack_tensor(buffer)}
        key, data = f"{name}#buffer", buffer.detach().contiguous()
        stored = self.store.tensors.get(key)
        if stored is None or stored.dtype != data.dtype or stored.shape != tuple(data.shape):
            if stored is not None:
                self.store.drop(stored)
            chunk_nbytes = self.chunk_numel * data.dtype.itemsize
            stored = self.store.add(key, data.dtype, tuple(data.shape), chunk_nbytes)
        sums = [checksum(data.data_ptr() + at, nbytes) for at, nbytes in stored.chunks()]
        if sums != stored.checksums:
            self.store.write(stored, data)
        return {"stored": pack_meta(data)}

    def restore(self, record: dict[str, Any]) -> None:
        """Put the buffers of a commit record back, in place."""
        for name, buffer in self._buffers().items():
            entry = record.get(name)
            if entry is None:
                continue
            with torch.no_grad():
                if "tensor" in entry:
                    buffer.copy_(unpack_tensor(entry["tensor"]))
                else:
                    chunk_nbytes = self.chunk_numel * buffer.dtype.itemsize
                    key = f"{name}#buffer"
                    stored = self.store.add(key, buffer.dtype, tuple(buffer.shape), chunk_nbytes)
                    self.store.restore(stored)
                    self.store.read_into(stored, buffer)
