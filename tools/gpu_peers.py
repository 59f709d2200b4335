"""Other implementations of swapped activations, from checkouts that the environment names.

    OFFLOAD_PEER_TORCHTUNE, OFFLOAD_PEER_TRL, OFFLOAD_PEER_DEEPSPEED

One file is loaded of each, unchanged. What it imports of its own package, and what would need a
compiler or a release of its own, is stood in for here: loggers, a type that nothing here has, and
the part of DeepSpeed's accelerator that is ``torch.cuda`` under other names.
"""

import importlib.util
import logging
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_FILES = {
    "torchtune": "torchtune/training/_activation_offloading.py",
    "trl": "trl/models/activation_offloading.py",
    "deepspeed": "deepspeed/runtime/activation_checkpointing/offload_activations.py",
}


class _Absent:
    """A type of which there is no instance."""


class _CudaAccelerator:
    """What DeepSpeed's file asks of its accelerator."""

    Stream = torch.cuda.Stream
    current_stream = staticmethod(torch.cuda.current_stream)
    stream = staticmethod(torch.cuda.stream)

    def is_synchronized_device(self) -> bool:
        return False

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        return tensor.is_cuda

    def pin_memory(self, tensor: torch.Tensor, *, make_copy: bool) -> torch.Tensor:
        del make_copy
        return tensor.pin_memory()


def _stand_in_for_packages(peer: str) -> list[str]:
    """Put modules in the place of packages of ``peer``; their names."""
    modules: dict[str, dict[str, Any]] = {}
    if peer == "torchtune":
        modules = {
            "torchao": {"__version__": "1"},
            "torchao.quantization": {"NF4Tensor": _Absent},
            "torchtune": {},
            "torchtune.modules": {"TiedLinear": _Absent},
            "torchtune.utils": {"get_logger": logging.getLogger},
        }
    elif peer == "deepspeed":
        modules = {"deepspeed": {}, "deepspeed.accelerator": {"get_accelerator": _CudaAccelerator}}
    modules = {name: names for name, names in modules.items() if name not in sys.modules}
    for name, names in modules.items():
        module = types.ModuleType(name, "Stands in for a package of a peer.")
        module.__path__ = []
        vars(module).update(names)
        sys.modules[name] = module
    return list(modules)


def load(peer: str) -> types.ModuleType:
    """The module of ``peer`` that swaps activations.

    Raises:
        LookupError: the environment names no checkout.
        ImportError: it can't be imported here.
    """
    variable = f"OFFLOAD_PEER_{peer.upper()}"
    if variable not in os.environ:
        raise LookupError(f"{variable} names no checkout")
    path = Path(os.environ[variable]) / _FILES[peer]
    stood_in = _stand_in_for_packages(peer)
    name = f"peer_{peer}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        for name in stood_in:
            del sys.modules[name]  # others take a package that they find for the real one
    return module


def contexts(notes: list[str]) -> dict[str, Callable[[], Any]]:
    """By name, what makes the context of each peer that is here; ``notes`` tell of the others."""
    found: dict[str, Callable[[], Any]] = {}
    for peer, kind in (("torchtune", "OffloadActivations"), ("trl", "OffloadActivations"),
                       ("deepspeed", "CheckpointHiddenStatesOffload")):  # fmt: skip
        try:
            found[peer] = getattr(load(peer), kind)
        except (LookupError, ImportError, OSError) as error:
            notes.append(f"{peer} has no part: {error}")
    return found
