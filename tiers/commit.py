"""The commit record: the one small file that says which bytes are the durable state.

Its first line is the checksum of the rest, which is JSON. It is replaced as a whole: written
beside the old one, flushed, renamed, and the folder flushed, so that a crash at any moment leaves
one record that is whole.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from offload.allocator.errors import StoreCorruptError, StoreMismatchError, TierIOError

FORMAT = 1
STRIPED_FORMAT = 2  # has a layout; what an older version can't read says so there


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitRecord:
    """What the last commit said.

    Attributes:
        state: the engine's JSON (step, RNG, scalars, extra).
        layout: how the data is striped (``layout.Layout``); None if it is one file.
    """

    step: int
    signature: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, Any]]
    state: Mapping[str, Any]
    layout: Mapping[str, Any] | None = None


def read_record(path: Path) -> CommitRecord | None:
    """The record at ``path``, or None if there is none.

    Raises:
        StoreCorruptError: it does not match its checksum.
        StoreMismatchError: another version of Offload wrote it.
        TierIOError: it can't be read, or is a symbolic link.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            content = file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise TierIOError(
            error.errno, f"can't read the commit record {path}: {error.strerror}"
        ) from error
    digest, _, body = content.partition(b"\n")
    if digest.decode(errors="replace") != xxhash.xxh3_64_hexdigest(body):
        raise StoreCorruptError(
            f"the commit record {path} ({len(content)} bytes) does not match its checksum: "
            "restore it from a copy, or start anew with resume='never'"
        )
    fields = json.loads(body)
    found = fields.pop("format", None)
    if found not in (FORMAT, STRIPED_FORMAT):
        raise StoreMismatchError(
            f"{path} has format {found!r}, this version of Offload writes format {FORMAT} or "
            f"{STRIPED_FORMAT}: use the version that wrote it, or start anew with resume='never'"
        )
    return CommitRecord(**fields)


def write_record(path: Path, record: CommitRecord) -> None:
    """Replace the record at ``path``, atomically and durably.

    Raises:
        TierIOError: the disk could not take it; the previous record stays.
    """
    fields: dict[str, Any] = {
        "format": FORMAT,
        "step": record.step,
        "signature": record.signature,
        "tensors": record.tensors,
        "state": record.state,
    }
    if record.layout is not None:
        fields |= {"format": STRIPED_FORMAT, "layout": record.layout}
    body = json.dumps(fields).encode()
    content = xxhash.xxh3_64_hexdigest(body).encode() + b"\n" + body
    try:
        replace_file(path, content)
    except OSError as error:
        raise TierIOError(
            error.errno,
            f"can't write the commit record {path} ({len(content)} bytes): {error.strerror}; "
            "the previous commit stays valid",
        ) from error


def replace_file(path: Path, content: bytes) -> None:
    """Make ``content`` the file at ``path``, atomically and durably.

    Raises:
        OSError: the disk could not take it; the previous file stays.
    """
    temporary = path.with_suffix(".tmp")
    try:
        _write_file(temporary, content)
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)  # a full disk needs the room
        raise


def remove_file(path: Path) -> None:
    """Make durable that there is no such file: no commit, if it is the record.

    Raises:
        TierIOError: the disk could not take it.
    """
    try:
        path.unlink(missing_ok=True)
        sync_directory(path.parent)
    except OSError as error:
        raise TierIOError(error.errno, f"can't remove {path}: {error.strerror}") from error


def sync_directory(directory: Path) -> None:
    """Make the names in ``directory`` durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_file(path: Path, content: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(path, flags, 0o600)
    try:
        written = 0
        while written < len(content):
            written += os.write(fd, content[written:])
        os.fsync(fd)
    finally:
        os.close(fd)
