"""A store's own folder in one directory: who may write to it, who has it now, which part it is."""

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path

from offload.allocator.errors import StoreCorruptError, StoreInUseError, TierIOError
from offload.tiers.commit import remove_file, replace_file, sync_directory
from offload.tiers.layout import Part

DIRECTORY = "offload-store"
DATA = "data"
_RECORD, _LOCK, _PART = "commit.json", "lock", "part.json"


class StoreFolder:
    """``directory/offload-store``, mode 0700, under an exclusive lock until ``close``.

    Raises:
        StoreInUseError: another process holds it.
        TierIOError: it can't be made or written, is a symbolic link, or is not Offload's.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / DIRECTORY
        self.record = self.path / _RECORD
        self._prepare()
        self._lock_fd = self._lock()

    def _prepare(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self.path.mkdir(mode=0o700, exist_ok=True)
            sync_directory(self.directory)  # the store's own name is durable too
            if self.path.is_symlink():
                raise TierIOError(
                    f"{self.path} is a symbolic link: remove it, or pass another directory"
                )
            names = {entry.name for entry in self.path.iterdir()}
            if names and not names & {_LOCK, _RECORD}:
                raise TierIOError(
                    f"{self.path} holds {len(names)} files, but neither {_LOCK} nor {_RECORD}: it "
                    "is not a store of Offload's; move it away, or pass another directory with "
                    "nvme="
                )
            self.path.chmod(0o700)
        except TierIOError:
            raise
        except OSError as error:
            raise TierIOError(
                error.errno,
                f"can't make the store directory {self.path}: {error.strerror}; "
                "pass a writable directory with nvme=",
            ) from error

    def _lock(self) -> int:
        path = self.path / _LOCK
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise TierIOError(
                error.errno,
                f"can't open {path} for writing: {error.strerror}; "
                "pass a writable directory with nvme=",
            ) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(fd)
            raise StoreInUseError(
                f"the store {self.path} is in use by process {holder}: "
                "wait for it to end, or pass another directory with nvme="
            ) from error
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        return fd

    def read_part(self) -> Part | None:
        """Which part of which striped store this is; None if it is none.

        Raises:
            StoreCorruptError: the note can't be read.
        """
        path = self.path / _PART
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with os.fdopen(fd, "rb") as file:
                return Part.from_json(json.loads(file.read()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise StoreCorruptError(
                f"can't read {path}, which says what part of a store this is: {error}; "
                "restore it from a copy, or start anew with resume='never'"
            ) from error

    def write_part(self, part: Part) -> None:
        """Make ``part`` the durable note of this folder.

        Raises:
            TierIOError: the disk could not take it.
        """
        content = json.dumps(dataclasses.asdict(part)).encode()
        try:
            replace_file(self.path / _PART, content)
        except OSError as error:
            raise TierIOError(
                error.errno,
                f"can't write {self.path / _PART} ({len(content)} bytes): {error.strerror}",
            ) from error

    def remove_data(self) -> None:
        """Remove the data that no commit names."""
        (self.path / DATA).unlink(missing_ok=True)

    def remove_part(self) -> None:
        """Be no part of a striped store any more.

        Raises:
            TierIOError: the disk could not take it.
        """
        if (self.path / _PART).exists():
            remove_file(self.path / _PART)

    def discard(self) -> None:
        """Give up whatever store or part of one is here.

        Raises:
            TierIOError: the disk could not take it.
        """
        remove_file(self.record)
        self.remove_part()

    def close(self) -> None:
        """Give the lock back."""
        os.close(self._lock_fd)


def open_folders(directories: Sequence[Path]) -> list[StoreFolder]:
    """The folders of all directories, locked: all of them or none.

    Raises:
        StoreInUseError, TierIOError: as ``StoreFolder``.
    """
    with contextlib.ExitStack() as opened:
        folders: list[StoreFolder] = []
        for directory in directories:
            folders.append(StoreFolder(directory))
            opened.callback(folders[-1].close)
        opened.pop_all()
        return folders
