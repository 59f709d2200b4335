"""Rebuilding what a block saves, where the settings ask for it."""

from collections.abc import Callable

from torch import nn

from offload.config import OffloadConfig
from offload.swap.activations import ActivationCache
from offload.swap.places import DevicePlace
from offload.swap.tokenwise.keeper import CacheKeeper
from offload.swap.tokenwise.passes import Weights
from offload.swap.tokenwise.plans import Settings
from offload.swap.tokenwise.timing import Timer
from offload.swap.tokenwise.tokenwise import TokenWise


def rebuild_rows(
    model: nn.Module,
    activations: ActivationCache,
    config: OffloadConfig,
    weights_of: Callable[[str, nn.Module], Weights] = Weights,
) -> TokenWise | None:
    """Token-wise recompute on top of ``activations``; ``None`` where it is off.

    Args:
        weights_of: a block, as ``TokenWise`` asks for them.

    Raises:
        ConfigError: the settings name a block that the model has not.
    """
    if config.recompute == "off":
        return None
    settings = Settings(
        alpha=config.alpha,
        relaxed=config.relaxed,
        blocks=config.blocks,
        min_nbytes=config.min_swap_nbytes,
    )
    place = activations.spiller.place
    accelerator = place.accelerator if isinstance(place, DevicePlace) else None
    return TokenWise(
        model,
        CacheKeeper(activations),
        settings,
        timer=Timer(accelerator=accelerator),
        weights_of=weights_of,
        notice=lambda text: activations.journal.notice("recompute", text),
    )
