"""How a store is spread over several directories, and which directory holds which part.

Pure: the commit record holds the layout, each directory a note of its part (``Part``), and a
store is opened only where the two agree.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from offload.allocator.errors import StoreMismatchError
from offload.tiers.health import PathRates
from offload.tiers.stripes import Stripes


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The note in a store's folder: part ``index`` of ``directories`` of the store ``store``."""

    store: str
    index: int
    directories: tuple[str, ...]

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """The note that ``dataclasses.asdict`` and JSON made."""
        return cls(**{**fields, "directories": tuple(fields["directories"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where the bytes of a striped store lie.

    Attributes:
        store: a random name, the same in the notes of all parts.
        directories: as they were given when the store was made, for messages only.
        weights: units of each pattern on each path.
        rates: of each path when the layout was chosen.
    """

    store: str
    directories: tuple[str, ...]
    unit_nbytes: int
    weights: tuple[int, ...]
    rates: tuple[PathRates, ...]

    @property
    def stripes(self) -> Stripes:
        """The places of all bytes."""
        return Stripes(self.unit_nbytes, self.weights)

    def part(self, index: int) -> Part:
        """The note for the directory number ``index``."""
        return Part(store=self.store, index=index, directories=self.directories)

    def to_json(self) -> dict[str, Any]:
        """The layout's entry in the commit record."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """The layout that ``to_json`` made."""
        return cls(
            store=fields["store"],
            directories=tuple(fields["directories"]),
            unit_nbytes=fields["unit_nbytes"],
            weights=tuple(fields["weights"]),
            rates=tuple(PathRates(**rates) for rates in fields["rates"]),
        )


def check_committed(
    given: Sequence[Path], parts: Sequence[Part | None], layout: Layout | None
) -> None:
    """Raise unless the directories are those of the last commit, in its order.

    Raises:
        StoreMismatchError: one is missing, swapped, foreign or too many.
    """
    wanted = [str(given[0])] if layout is None else list(layout.directories)
    if len(given) != len(wanted):
        raise StoreMismatchError(
            f"the store in {given[0]} is spread over {_counted(wanted)}, but "
            f"{_counted([str(path) for path in given])} given: pass "
            f"{','.join(wanted)} with nvme=, or resume='never' to discard it"
        )
    if layout is None:
        return
    for index, (path, part) in enumerate(zip(given, parts, strict=True)):
        if part is None:
            raise StoreMismatchError(
                f"{path} holds no part of the store in {given[0]}; part {index + 1} of "
                f"{len(wanted)} was in {wanted[index]}: mount its disk, or pass its directory, "
                "or resume='never' to discard the store"
            )
        if part.store != layout.store:
            raise StoreMismatchError(
                f"{path} holds a part of another store, that in {part.directories[0]}; part "
                f"{index + 1} of the store in {given[0]} was in {wanted[index]}: pass that one, "
                "or resume='never' to discard both stores"
            )
        if part.index != index:
            raise StoreMismatchError(_swapped(path, part))


def check_uncommitted(
    given: Sequence[Path], parts: Sequence[Part | None], committed: Sequence[bool]
) -> None:
    """Raise if a directory may hold bytes of another store's commit.

    Raises:
        StoreMismatchError: it does.
    """
    first = parts[0]
    if first is not None and first.index:
        raise StoreMismatchError(_swapped(given[0], first))
    for index, (path, part) in enumerate(zip(given[1:], parts[1:], strict=True), 1):
        if committed[index]:
            raise StoreMismatchError(
                f"{path} holds a store of its own: pass it as the first directory to continue "
                "it, another directory to keep it, or resume='never' to discard it"
            )
        ours = part is None or (
            first is not None and (part.store, part.index) == (first.store, index)
        )
        if not ours:
            assert part is not None
            raise StoreMismatchError(_swapped(path, part))


def _swapped(path: Path, part: Part) -> str:
    return (
        f"{path} holds part {part.index + 1} of {len(part.directories)} of the store in "
        f"{part.directories[0]}: pass nvme={','.join(part.directories)} in that order, another "
        "directory to keep that store, or resume='never' to discard it"
    )


def _counted(names: Sequence[str]) -> str:
    many = f"{len(names)} directories" if len(names) > 1 else "1 directory"
    return f"{many} ({', '.join(names)})"
