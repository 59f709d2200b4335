"""Every error that Offload raises on purpose.

    OffloadError                      exit code 1: failed while running
    ├── ConfigError (ValueError)      exit code 2: wrong usage or configuration
    ├── BudgetError (MemoryError)     exit code 3: does not fit, decided before the first step
    ├── CapacityError (MemoryError)   a tier or arena has no room left
    ├── TierIOError (OSError)         a read, write or mapping failed
    ├── StoreError                    the durable home of weights and optimizer states
    │   ├── StoreInUseError           another process holds the store
    │   ├── StoreMismatchError        the store belongs to another model or optimizer
    │   └── StoreCorruptError         checksums or the commit record do not agree
    ├── CheckpointError (ValueError)  a checkpoint directory is missing, truncated or foreign
    ├── StaleBlockError (RuntimeError) a block was used after its release
    ├── StepInterruptedError (RuntimeError) a step in backward is neither done nor undone
    ├── ConsumedGradientError (RuntimeError) a gradient was used after the step in backward
    ├── ForkedProcessError (RuntimeError) a child process has no threads that move bytes
    └── UnsupportedError (TypeError)  something Offload can't do exactly, so it refuses

A message says what, how many bytes, where, and the smallest change that mends it.
"""

from typing import ClassVar


class OffloadError(Exception):
    """Base of every error raised on purpose; ``exit_code`` is what the command line returns."""

    exit_code: ClassVar[int] = 1


class ConfigError(OffloadError, ValueError):
    """Wrong usage or configuration; ``problems`` lists every fault found, not only the first."""

    exit_code: ClassVar[int] = 2

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class BudgetError(OffloadError, MemoryError):
    """The job does not fit its budget; raised before the first step.

    Attributes:
        needed_nbytes: the smallest budget that would fit, in bytes.
        budget_nbytes: the budget that was given, in bytes.
    """

    exit_code: ClassVar[int] = 3

    def __init__(self, message: str, *, needed_nbytes: int, budget_nbytes: int) -> None:
        super().__init__(message)
        self.needed_nbytes = needed_nbytes
        self.budget_nbytes = budget_nbytes


class CapacityError(OffloadError, MemoryError):
    """A tier or arena has no room left for a request."""


class TierIOError(OffloadError, OSError):
    """A read, write or mapping failed; ``errno`` is the kernel's where it gave one."""


class StoreError(OffloadError):
    """Something is wrong with the durable store."""


class StoreInUseError(StoreError):
    """Another process holds the store's lock."""


class StoreMismatchError(StoreError):
    """The store belongs to another model or optimizer."""


class StoreCorruptError(StoreError):
    """Bytes read from the store do not match the checksum of their commit record."""


class CheckpointError(OffloadError, ValueError):
    """A checkpoint directory is missing, truncated, or not safetensors."""


class StaleBlockError(OffloadError, RuntimeError):
    """A block was used after its release."""


class StepInterruptedError(OffloadError, RuntimeError):
    """A step in backward is neither done nor undone: only the last commit is whole."""


class ConsumedGradientError(OffloadError, RuntimeError):
    """A gradient was used after a step in backward had used it up."""


class ForkedProcessError(OffloadError, RuntimeError):
    """A process was forked from the one that trains, and needs bytes that only that can move."""


class UnsupportedError(OffloadError, TypeError):
    """Something that Offload can't do exactly, so it refuses."""
