"""The tree of errors that Offload raises on purpose; drawn in ``offload.allocator.errors``."""

from offload.allocator.errors import (
    BudgetError,
    CapacityError,
    CheckpointError,
    ConfigError,
    ConsumedGradientError,
    ForkedProcessError,
    OffloadError,
    StaleBlockError,
    StepInterruptedError,
    StoreCorruptError,
    StoreError,
    StoreInUseError,
    StoreMismatchError,
    TierIOError,
    UnsupportedError,
)

__all__ = [
    "BudgetError",
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "ConsumedGradientError",
    "ForkedProcessError",
    "OffloadError",
    "StaleBlockError",
    "StepInterruptedError",
    "StoreCorruptError",
    "StoreError",
    "StoreInUseError",
    "StoreMismatchError",
    "TierIOError",
    "UnsupportedError",
]
