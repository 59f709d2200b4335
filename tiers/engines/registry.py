"""The engines by name, and the choice among them.

``auto`` is decided by a probe of the directory. Libraries and engines are imported when they are
chosen, so listing the names costs nothing.

[Note: wrapped engines] ``wrapping`` makes each engine that is chosen meanwhile, on this thread, go
through a wrapper (``offload.tiers.wrappers``). So a benchmark throttles, or a test breaks, the
disk of a whole training run without the run's knowing.
"""

import contextlib
import difflib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TypeAlias

from offload.allocator.errors import ConfigError, TierIOError
from offload.tiers.engines.base import EngineFactory, FileEngine, OpenFile

AUTO = "auto"
DEFAULT = "threads"
_CLASSES = {
    "threads": "ThreadsEngine",
    "kvikio": "KvikioEngine",
    "deepspeed": "DeepspeedEngine",
    "aiofiles": "AiofilesEngine",
}
ENGINES = tuple(_CLASSES)
NAMES = (AUTO, *ENGINES)

Wrapper: TypeAlias = Callable[[FileEngine], FileEngine]
_wrapper: ContextVar[Wrapper | None] = ContextVar("wrapper", default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineChoice:
    """An engine, and why it.

    Attributes:
        expected: whether it is what most machines get, not worth a word.
    """

    name: str
    factory: EngineFactory
    reason: str
    expected: bool


def check_name(name: str) -> str:
    """``name``, if there is such an engine.

    Raises:
        ValueError: there is none; names the nearest.
    """
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(NAMES)}"
        raise ValueError(f"unknown I/O engine {name!r}; {hint}")
    return name


def check_engine(name: str) -> None:
    """Raise unless the libraries and drivers that the engine ``name`` needs are there.

    Raises:
        ConfigError: something is missing; names the command that mends it.
    """
    check = getattr(import_module(f"offload.tiers.engines.{name}"), "check", None)
    if check is not None:
        check()


def choose_engine(name: str, *directories: Path) -> EngineChoice:
    """The engine for the files of ``directories``.

    Raises:
        ConfigError: no such engine, or it can't be used here; names what mends it.
    """
    try:
        check_name(name)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    refusing = [directory for directory in directories if not takes_direct_io(directory)]
    direct = not refusing
    how = "by direct I/O" if direct else f"by the page cache, for {refusing[0]} has no O_DIRECT"
    if name == AUTO:
        return EngineChoice(name=DEFAULT, factory=_factory(DEFAULT), reason=how, expected=direct)
    check_engine(name)
    reason = f"asked for; {how}"
    expected = name == DEFAULT and direct
    return EngineChoice(name=name, factory=_factory(name), reason=reason, expected=expected)


def takes_direct_io(directory: Path) -> bool:
    """Whether the file system of ``directory`` takes ``O_DIRECT``, tried on an unlinked file.

    A directory that is not there yet is judged by its nearest parent that is. Where no file can
    be made, the answer is yes: what makes the store there next tells what is wrong.
    """
    from offload.tiers.file import TierFile

    there = next(folder for folder in (directory, *directory.absolute().parents) if folder.is_dir())
    with contextlib.suppress(TierIOError), TierFile(there, None) as file:
        return file.direct
    return True


@contextlib.contextmanager
def wrapping(wrapper: Wrapper) -> Iterator[None]:
    """Engines chosen on this thread meanwhile go through ``wrapper`` ([Note: wrapped engines])."""
    outer = _wrapper.get()
    token = _wrapper.set(wrapper if outer is None else lambda engine: outer(wrapper(engine)))
    try:
        yield
    finally:
        _wrapper.reset(token)


def _factory(name: str) -> EngineFactory:
    """What makes the engine ``name``, wrapped as the caller's thread asks now."""
    wrapper = _wrapper.get()

    def make(file: OpenFile) -> FileEngine:
        kind = getattr(import_module(f"offload.tiers.engines.{name}"), _CLASSES[name])
        engine: FileEngine = kind(file)
        return engine if wrapper is None else wrapper(engine)

    return make
