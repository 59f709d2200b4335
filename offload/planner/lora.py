"""Low-rank adapters for planning: what PEFT's LoRA adds to a model, without PEFT.

Each linear layer but the head gets two matrices, ``A`` (rank x inputs) and ``B`` (outputs x rank);
everything else is frozen (Hu et al., arXiv 2106.09685, section 4.1).
"""

import torch
from torch import nn

from offload.allocator.errors import ConfigError

RANK = 16


class _Adapted(nn.Module):
    """A frozen linear layer and its adapter."""

    def __init__(self, base: nn.Module, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.base = base
        self.lora_a = nn.Linear(inputs, rank, bias=False)
        self.lora_b = nn.Linear(rank, outputs, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (…, inputs)
        y: torch.Tensor = self.base(x) + self.lora_b(self.lora_a(x))
        return y


def add_adapters(model: nn.Module, rank: int = RANK) -> None:
    """Freeze ``model`` and put adapters on its linear layers, in place.

    Raises:
        ConfigError: it has no linear layer besides its head.
    """
    model.requires_grad_(requires_grad=False)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found = [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in parent.named_children()
        if child is not head and _size(child) is not None
    ]
    if not found:
        raise ConfigError(f"{type(model).__name__} has no linear layer for --method lora")
    for parent, name, child in found:
        size = _size(child)
        assert size is not None
        setattr(parent, name, _Adapted(child, *size, rank))


def _size(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer, transformers' ``Conv1D`` included."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = module._parameters.get("weight")
    if type(module).__name__ == "Conv1D" and weight is not None:
        return weight.shape[0], weight.shape[1]
    return None
