"""Sizes that were meant in another unit."""

from collections.abc import Mapping

from offload.allocator.errors import ConfigError

LEAST_NBYTES = 1 << 20  # a smaller size of memory lacks its unit


def check_budget(budget: Mapping[str, int], text: str | None) -> None:
    """Raise if a budget holds nothing.

    Args:
        text: the option as it was typed; None where the budget comes from elsewhere.

    Raises:
        ConfigError: a size without its unit; tells what it was probably meant to be.
    """
    for tier, nbytes in budget.items():
        if nbytes < LEAST_NBYTES:
            what = f"--budget {text}" if text is not None else f"budget: {tier}: {nbytes}"
            raise ConfigError(
                f"{what}: {nbytes} bytes of memory hold nothing; a size has a unit: {nbytes}GiB?"
            )
