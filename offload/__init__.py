"""Train models that are larger than the memory: an exact, budgeted home for every tensor.

    engine = offload.attach(model, optimizer, budget="host=1GiB", nvme="/data/nvme")

The names below are loaded on first use (PEP 562), so ``import offload`` and the command line's
``--help`` do not wait for torch.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offload import errors
    from offload.activations import ActivationSwap
    from offload.attaching import attach
    from offload.building import init
    from offload.config import OffloadConfig
    from offload.engine import Engine
    from offload.pretrained import load_pretrained

__version__ = "0.1.0"

__all__ = [
    "ActivationSwap",
    "Engine",
    "OffloadConfig",
    "attach",
    "errors",
    "init",
    "load_pretrained",
]

# torch reads this once, when it is imported. Its CPU allocator then backs tensors of 2 MiB and more
# by page-aligned, huge-page-advised memory, which direct I/O reads and writes in place: without
# it each such transfer is copied through a bounce buffer. A value set by the user stands.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

_HOMES = {
    "ActivationSwap": "offload.activations",
    "Engine": "offload.engine",
    "OffloadConfig": "offload.config",
    "attach": "offload.attaching",
    "init": "offload.building",
    "load_pretrained": "offload.pretrained",
}


def __getattr__(name: str) -> Any:
    """Load a public name on its first use."""
    if name == "errors":
        return importlib.import_module("offload.errors")
    if name not in _HOMES:
        raise AttributeError(f"module 'offload' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value  # the next access finds it without coming here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
