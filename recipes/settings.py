"""Settings of a recipe: a YAML file beside the script, and flags that win over it."""

import argparse
import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from offload.errors import ConfigError

T = TypeVar("T")


def read(kind: type[T], parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> T:
    """The dataclass ``kind`` filled from flags, the YAML file, and its defaults, in this order.

    Args:
        parser: knows ``--config`` and each field of ``kind``, and suppresses its defaults. The
            file's values pass through it too, so file and flags take the same words.

    Raises:
        ConfigError: the file can't be read or has an unknown key, or a setting is missing.
        SystemExit: with status 2, a value that the parser refuses.
    """
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]  # a dataclass by contract
    flags = vars(parser.parse_args(argv))
    config = flags.pop("config")
    given = vars(parser.parse_args(_as_flags(config, [field.name for field in fields]))) | flags
    del given["config"]
    missing = [
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.name not in given
    ]
    if missing:
        raise ConfigError(*(f"no {name}: add it to {config} or pass it" for name in missing))
    return kind(**given)


def _as_flags(config: Path, names: Sequence[str]) -> list[str]:
    try:
        values = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"can't read the settings: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{config}: expected lines of `key: value`")
    unknown = [str(key) for key in values if key not in names]
    if unknown:
        nearest = [difflib.get_close_matches(key, names, 1, 0)[0] for key in unknown]
        raise ConfigError(
            *(
                f"{config}: unknown key {key!r}, the nearest is {near!r}"
                for key, near in zip(unknown, nearest, strict=True)
            )
        )
    return [_as_flag(str(name), value) for name, value in values.items() if value is not None]


def _as_flag(name: str, value: Any) -> str:
    flag = name.replace("_", "-")
    if value is True:
        return f"--{flag}"
    if value is False:
        return f"--no-{flag}"
    return f"--{flag}={value}"
