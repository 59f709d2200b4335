"""Token rows of saved tensors rebuilt in backward on a device, for ``gpu_check``."""

from dataclasses import dataclass

import torch
from torch import nn

from offload.swap.activations import ActivationCache
from offload.swap.places import DevicePlace
from offload.swap.selective import put_on, take_off
from offload.swap.tokenwise.keeper import CacheKeeper
from offload.swap.tokenwise.plans import Settings
from offload.swap.tokenwise.timing import Timer
from offload.swap.tokenwise.tokenwise import TokenWise

_WIDTH, _BATCH, _ROWS, _LAYERS, _STEPS = 256, 2, 1024, 3, 4


class _Layer(nn.Module):
    """A residual MLP, with an operation that no row of another can enter."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(_WIDTH)
        self.up, self.down = nn.Linear(_WIDTH, 4 * _WIDTH), nn.Linear(4 * _WIDTH, _WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, rows, width) to the same."""
        result: torch.Tensor = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return result


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer() for _ in range(_LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, rows, width) to a loss."""
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


@dataclass(frozen=True)
class Rebuilt:
    """What some steps computed, and how.

    Attributes:
        results: losses and gradients.
        nbytes, whole_nbytes: saved bytes that were rebuilt, and those that were swapped whole.
        why_whole: the reasons for the latter.
    """

    results: list[torch.Tensor]
    nbytes: int = 0
    whole_nbytes: int = 0
    why_whole: tuple[str, ...] = ()


def train(
    place: torch.device, dtype: torch.dtype, cache: ActivationCache | None, settings: Settings
) -> Rebuilt:
    """Some steps on ``place``; with ``cache``, rows are rebuilt from what it swaps."""
    torch.manual_seed(7)
    model = _Model().to(place, dtype)
    batches = [torch.randn(_BATCH, _ROWS, _WIDTH).to(place, dtype) for _ in range(_STEPS)]
    tokenwise = None
    if cache is not None:
        cache.fixed.know_model(model)
        at = cache.spiller.place
        timer = Timer(accelerator=at.accelerator if isinstance(at, DevicePlace) else None)
        tokenwise = TokenWise(model, CacheKeeper(cache), settings, timer=timer, rounding=True)
    results = []
    for batch in batches:
        if cache is not None:
            cache.begin_pass("model")
            put_on(cache, tokenwise)
        try:
            loss = model(batch)
        finally:
            if cache is not None:
                take_off()
        loss.backward()
        results.append(loss.detach())
    results += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    results = [result.cpu() for result in results]
    if tokenwise is None:
        return Rebuilt(results)
    tokenwise.remove()
    reports = tokenwise.report()
    return Rebuilt(
        results,
        nbytes=sum(report.rebuilt_nbytes for report in reports),
        whole_nbytes=sum(report.whole_nbytes for report in reports),
        why_whole=tuple(dict.fromkeys(why for report in reports for why, _ in report.whole)),
    )
