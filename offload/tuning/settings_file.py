"""Files of settings that a verb writes for ``--config``; a user's own file is never replaced."""

import os
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from offload.allocator.errors import ConfigError
from offload.config import OffloadConfig

HEADER = "# Written by offload"  # how such a file begins
_WIDTH = 80
_MIB = 1 << 20


def check_output(path: Path) -> None:
    """A file that can be written, and is not the user's own.

    Raises:
        ConfigError: it can't, or it is.
    """
    if path.suffix not in {".yaml", ".yml"}:
        raise ConfigError(f"-o {path}: the settings are YAML, so name it .yaml")
    if not path.parent.is_dir():
        raise ConfigError(f"can't write {path}: {path.parent} is no directory")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"can't write {path}: this user may not write to {path.parent}")
    if not path.exists():
        return
    try:
        own = path.read_text(encoding="utf-8", errors="replace").startswith(HEADER)
    except OSError as error:
        raise ConfigError(f"can't write {path}: {error.strerror}") from error
    if not own:
        raise ConfigError(f"{path} was not written by offload: name another with -o")


def write_settings(path: Path, text: str) -> None:
    """Whole or not at all.

    Raises:
        ConfigError: it can't be written.
    """
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except OSError as error:
        raise ConfigError(f"can't write {path}: {error.strerror}") from error


def to_yaml(notes: Sequence[str], config: OffloadConfig) -> str:
    """The settings below ``notes``, which are comments, the first of them with ``HEADER``."""
    body = yaml.safe_dump(settings_of(config), sort_keys=False, allow_unicode=True)
    return "\n".join([*notes, body])


def commented(text: str) -> list[str]:
    """``text`` as lines of comments."""
    return [f"# {line}" for line in textwrap.wrap(text, _WIDTH - 2)]


def settings_of(config: OffloadConfig) -> dict[str, Any]:
    """The settings that are not left to their default, as a file holds them."""
    settings: dict[str, Any] = config.model_dump(mode="json", exclude_unset=True)
    settings["budget"] = {tier: _size(nbytes) for tier, nbytes in config.budget.items()}
    return settings


def _size(nbytes: int) -> str | int:
    return f"{nbytes // _MIB}MiB" if nbytes % _MIB == 0 else nbytes
