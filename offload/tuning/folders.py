"""Temporary folders beside the user's store, on the drives that are to be measured.

[Note: what is left] The folders go with the search, however it ends. Only a search that was killed
leaves its own; it has lost the lock in them, so the next search there takes them away.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from offload.allocator.errors import ConfigError
from offload.tiers.directories import check_directories

_PREFIX = "offload-tune-"
_LOCK = "lock"


@contextlib.contextmanager
def trial_folders(directories: Sequence[Path]) -> Iterator[Mapping[Path, Path]]:
    """A folder of its own in each directory, gone at the end.

    Raises:
        ConfigError: a directory that can't be used, or not be written.
    """
    check_directories(directories)
    with ExitStack() as opened:
        yield {directory: opened.enter_context(_folder(directory)) for directory in directories}


@contextlib.contextmanager
def _folder(directory: Path) -> Iterator[Path]:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _sweep(directory)
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=directory))
        lock = _locked(folder)
    except OSError as error:
        raise ConfigError(f"can't write to {directory}: {error.strerror}") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _sweep(directory: Path) -> None:
    """Take away what killed searches have left."""
    for folder in directory.glob(f"{_PREFIX}*"):
        lock = _locked(folder) if folder.is_dir() and not folder.is_symlink() else None
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _locked(folder: Path) -> int | None:
    """Holds the folder's lock; None where another process does, or nobody may."""
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock
