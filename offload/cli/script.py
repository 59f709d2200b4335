"""The script that a verb is given, looked at before anything runs."""

import ast
from pathlib import Path

from offload.allocator.errors import ConfigError


def read_script(path: Path) -> ast.Module:
    """The Python file ``path``.

    Raises:
        ConfigError: it can't be read, or is none.
    """
    try:
        return ast.parse(path.read_bytes(), filename=str(path))
    except OSError as error:
        raise ConfigError(f"can't read the script {path}: {error.strerror}") from error
    except (SyntaxError, ValueError) as error:  # null bytes are the latter
        raise ConfigError(f"{path} is not a Python script: {error}") from error
