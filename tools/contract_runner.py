"""Runs a tier's contract (``offload.tiers.testing``) where pytest and hypothesis may be missing.

The contract is written for pytest. On a machine that has torch and numpy only, small modules
stand in for what it imports, and this runner does what pytest would: each test with each of its
parameters on a fresh tier. The random state machine needs hypothesis, and is not run here.
"""

import contextlib
import importlib.util
import itertools
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


class _Inert:
    """Takes any call and subscription; as a decorator it changes nothing."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) and not options else self

    def __getitem__(self, key: Any) -> Any:
        return self


def _parametrize(names: Any, values: Any) -> Callable[[Any], Any]:
    def mark(test: Any) -> Any:
        mark = types.SimpleNamespace(name="parametrize", args=(names, values))
        test.pytestmark = [*getattr(test, "pytestmark", []), mark]
        return test

    return mark


@contextlib.contextmanager
def _raises(expected: Any, match: str = "") -> Iterator[None]:
    try:
        yield
    except expected as error:
        if not re.search(match, str(error)):
            raise AssertionError(f"{error!r} does not match {match!r}") from error
    else:
        raise AssertionError(f"{expected} was not raised")


def _stand_in(name: str, **names: Any) -> types.ModuleType:
    module = types.ModuleType(name, "Stands in for a package that is not installed.")
    vars(module).update(names)
    sys.modules[name] = module
    return module


def import_contract() -> list[str]:
    """Import the contract; returns the packages that were stood in for meanwhile."""
    missing = _stand_in_for_missing()
    importlib.import_module("offload.tiers.testing")
    for name in ("pytest", "hypothesis", "hypothesis.strategies", "hypothesis.stateful"):
        if name.partition(".")[0] in missing:
            del sys.modules[name]  # torch takes a package that it finds for the real one
    return missing


def _stand_in_for_missing() -> list[str]:
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    inert = _Inert()
    if "pytest" in missing:
        mark = types.SimpleNamespace(parametrize=_parametrize)
        _stand_in("pytest", fixture=inert, mark=mark, raises=_raises)
    if "hypothesis" in missing:
        package = _stand_in("hypothesis", settings=inert, HealthCheck=inert)
        for name in ("strategies", "stateful"):
            module = _stand_in(
                f"hypothesis.{name}",
                __getattr__=lambda _: inert,
                RuleBasedStateMachine=object,
                precondition=lambda _condition: lambda rule: rule,
            )
            setattr(package, name, module)
    return missing


def _parameters(test: Any) -> Iterator[dict[str, Any]]:
    """Each set of parameters of a test; decorators that stand upon each other multiply."""
    axes = []
    for mark in getattr(test, "pytestmark", []):
        if mark.name != "parametrize":
            continue
        names, values = mark.args
        if isinstance(names, str):
            axes.append([{names: value} for value in values])
        else:
            axes.append([dict(zip(names, value, strict=True)) for value in values])
    for combination in itertools.product(*axes):
        yield {name: value for part in combination for name, value in part.items()}


def run_contract(contract: Any) -> tuple[int, list[str]]:
    """Run every test of ``contract``; how many ran, and a line for each that failed."""
    count, failures = 0, []
    for name in dir(contract):
        if not name.startswith("test_"):
            continue
        test = getattr(contract, name)
        for parameters in _parameters(test):
            count += 1
            try:
                with (
                    TemporaryDirectory(prefix="offload-contract-") as folder,
                    contract.open_tier(Path(folder)) as tier,
                ):
                    test(tier=tier, **parameters)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # noqa: BLE001  pytest's failures are no Exceptions
                failures.append(f"{name}{parameters or ''}: {type(error).__name__}: {error}")
    return count, failures
