"""What the passes of a model that computes on the CPU go through.

``computing`` has the same for a device, under the same names.
"""

from dataclasses import dataclass

from torch import nn

from offload.recomputing import rebuild_rows
from offload.runtime import Runtime
from offload.saving import open_cache
from offload.swap.activations import ActivationCache
from offload.swap.census import Census
from offload.swap.homes import Home
from offload.swap.plan import Plan
from offload.swap.tokenwise.tokenwise import TokenWise
from offload.swap.weights import WeightSwapper


@dataclass(frozen=True, slots=True)
class Hosting:
    """What is used and saved as modules run.

    Attributes:
        census: of the modules that use ``weights``.
        activations: the cache of saved tensors; ``tokenwise`` is on top of it.
        tokenwise: rebuilds token rows, if that was asked for.
    """

    census: Census
    weights: WeightSwapper
    activations: ActivationCache
    tokenwise: TokenWise | None

    @property
    def saved(self) -> TokenWise | None:
        """What takes saved tensors, if that isn't ``activations`` itself."""
        return self.tokenwise


def host_passes(
    model: nn.Module,
    runtime: Runtime,
    plan: Plan,
    census: Census,
    weights: WeightSwapper,
    homes: list[Home],
) -> Hosting:
    """Open the cache of what ``model`` saves, and what rebuilds it.

    Args:
        homes: of saved activations.

    Raises:
        ConfigError: the settings name a block that the model has not.
    """
    activations = open_cache(homes, runtime, plan, model, weights)
    tokenwise = rebuild_rows(model, activations, runtime.config)
    return Hosting(census, weights, activations, tokenwise)
