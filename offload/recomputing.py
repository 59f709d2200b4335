"""Rebuilding what a block saves, where the settings ask for it."""

from torch import nn

from offload.runtime import Runtime
from offload.swap.activations import ActivationCache
from offload.swap.tokenwise.home import CacheHome
from offload.swap.tokenwise.plans import Settings
from offload.swap.tokenwise.tokenwise import TokenWise


def rebuild_rows(
    model: nn.Module, activations: ActivationCache, runtime: Runtime
) -> TokenWise | None:
    """Token-wise recompute on top of ``activations``; ``None`` where it is off.

    Raises:
        ConfigError: the settings name a block that the model has not.
    """
    config = runtime.config
    if config.recompute == "off":
        return None
    settings = Settings(
        alpha=config.alpha,
        relaxed=config.relaxed,
        blocks=config.blocks,
        min_nbytes=config.min_swap_nbytes,
    )
    return TokenWise(
        model,
        CacheHome(activations),
        settings,
        notice=lambda text: runtime.journal.notice("recompute", text),
    )
