"""The tree of errors: what a caller may catch, and what the command line returns."""

import pytest

from offload import errors
from offload.allocator import errors as ground

BUILTINS = {
    "BudgetError": MemoryError,
    "CapacityError": MemoryError,
    "CheckpointError": ValueError,
    "ConfigError": ValueError,
    "ConsumedGradientError": RuntimeError,
    "ForkedProcessError": RuntimeError,
    "OffloadError": Exception,
    "StaleBlockError": RuntimeError,
    "StepInterruptedError": RuntimeError,
    "StoreCorruptError": Exception,
    "StoreError": Exception,
    "StoreInUseError": Exception,
    "StoreMismatchError": Exception,
    "TierIOError": OSError,
    "UnsupportedError": TypeError,
}
EXIT_CODES = {"ConfigError": 2, "BudgetError": 3}  # every other error: failed while running


def test_whole_tree_is_handed_out():
    defined = {
        name
        for name, value in vars(ground).items()
        if isinstance(value, type) and issubclass(value, ground.OffloadError)
    }
    assert set(errors.__all__) == defined == set(BUILTINS)
    assert all(getattr(errors, name) is getattr(ground, name) for name in defined)


@pytest.mark.parametrize("name", sorted(BUILTINS))
def test_base_class_and_builtin(name):
    error = getattr(errors, name)
    assert issubclass(error, errors.OffloadError)
    assert issubclass(error, BUILTINS[name])


@pytest.mark.parametrize("name", sorted(BUILTINS))
def test_exit_code(name):
    assert getattr(errors, name).exit_code == EXIT_CODES.get(name, 1)


@pytest.mark.parametrize("name", ["StoreInUseError", "StoreMismatchError", "StoreCorruptError"])
def test_store_errors_are_caught_together(name):
    with pytest.raises(errors.StoreError, match=r"^the store is elsewhere$"):
        raise getattr(errors, name)("the store is elsewhere")


def test_config_error_keeps_every_problem():
    error = errors.ConfigError("unknown key 'bugdet'", "budget is missing")
    assert error.problems == ("unknown key 'bugdet'", "budget is missing")
    assert str(error) == "unknown key 'bugdet'\nbudget is missing"


def test_budget_error_says_what_would_fit():
    error = errors.BudgetError("too small", needed_nbytes=512, budget_nbytes=256)
    assert (error.needed_nbytes, error.budget_nbytes) == (512, 256)
    assert str(error) == "too small"


def test_tier_error_carries_the_kernels_errno():
    error = errors.TierIOError(28, "no space left", "store.bin")
    assert (error.errno, error.filename) == (28, "store.bin")
