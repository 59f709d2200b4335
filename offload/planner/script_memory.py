"""What a script holds in memory when its model is first called: libraries, data, its own objects.

Measured in the process that traces it, whose model has no bytes, as the growth of the resident
set. That process has imported what tracing needs; what the script imports of that again takes
nothing more here, and would take something in a run. Such modules are told by name.
"""

import builtins
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from offload.tiers import hostmem

_EVERYWHERE = {*sys.stdlib_module_names, "offload"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What a script holds beside the model.

    Attributes:
        nbytes: resident, beside a process that has imported Offload, torch and ``imports``.
        imports: modules that the script imports and that were there before.
    """

    nbytes: int = 0
    imports: tuple[str, ...] = ()


class ScriptMemory:
    """Measures from its entry on; what is imported before counts as known."""

    def __init__(self) -> None:
        self._import: Any = builtins.__import__
        self._known: frozenset[str] = frozenset()
        self._asked: set[str] = set()
        self._before_nbytes = 0

    def __enter__(self) -> Self:
        hostmem.return_freed_memory()  # as a run does
        self._known = frozenset(sys.modules)
        builtins.__import__ = self._note
        hostmem.trim_heap()
        self._before_nbytes, _ = hostmem.resident_nbytes()
        return self

    def __exit__(self, *_error: object) -> None:
        builtins.__import__ = self._import

    def _note(
        self,
        name: str,
        globals: Mapping[str, object] | None = None,  # noqa: A002 (the names of __import__)
        locals: Mapping[str, object] | None = None,  # noqa: A002
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        # Imports within functions are those of tracing, as a rule: it has them everywhere.
        if level == 0 and name in self._known and locals is globals:
            self._asked.add(name)
        return self._import(name, globals, locals, fromlist, level)

    def measure(self) -> Held:
        """What has come until now."""
        hostmem.trim_heap()
        grown = hostmem.resident_nbytes()[0] - self._before_nbytes
        imports = sorted(name for name in self._asked if name.partition(".")[0] not in _EVERYWHERE)
        return Held(nbytes=max(grown, 0), imports=tuple(imports))
