"""What one run owns: clock, lanes, store, scratch, governor. Built once, closed once."""

import itertools
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from offload.allocator.errors import ConfigError
from offload.config import OffloadConfig
from offload.swap.governor import Governor
from offload.swap.homes import SPARE_NBYTES
from offload.swap.plan import choose_chunk_numel, soft_limit_nbytes
from offload.swap.state_precision import Precision
from offload.tiers import hostmem
from offload.tiers.cgroups import memory_limit_nbytes
from offload.tiers.directories import check_directories
from offload.tiers.engines.registry import choose_engine
from offload.tiers.events import JsonlRecorder, NullRecorder, Recorder
from offload.tiers.filetier import Lanes
from offload.tiers.journal import Journal
from offload.tiers.store import Store
from offload.tiers.system import System

DEFAULT_DIRECTORY = Path("offload-nvme")
_DEFAULT_SHARE = 0.8  # of the memory that is available, where no budget is given


class Runtime:
    """The parts of a run that stand before the model does.

    Raises:
        ConfigError: a budget, directory or I/O engine that can't be used.
        StoreInUseError: another process holds the store.
        TierIOError: the store directory can't be written.
    """

    def __init__(self, config: OffloadConfig) -> None:
        hostmem.return_freed_memory()
        self.config = config
        self.budget_nbytes = config.budget.get("host") or default_budget()
        self.chunk_numel = choose_chunk_numel(self.budget_nbytes)
        self.journal = Journal(open_record(config.record))
        directories = config.nvme or (DEFAULT_DIRECTORY,)
        self.lanes = open_lanes(
            directories, self.journal, io_engine=config.io_engine, workers=config.io_threads
        )
        with ExitStack() as opened:
            opened.callback(self.lanes.close)
            self.store = Store(directories, self.lanes, discard_damaged=config.resume == "never")
            opened.callback(self.store.close)
            # Apart from each other: what is saved stays in memory where the disk is full, but
            # gradients and the records of commits must have their room.
            self.gradient_scratch = self.store.open_scratch()
            opened.callback(self.gradient_scratch.close)
            self.activation_scratch = self.store.open_scratch(spare_nbytes=SPARE_NBYTES)
            opened.pop_all()
        if self.store.committed is not None:
            self.chunk_numel = self.store.committed.state["chunk_numel"]
        self.governor = Governor(soft_limit_nbytes(self.budget_nbytes), self.budget_nbytes)
        self.guests: list[Callable[[], None]] = []  # closed before all else
        self._numbers = itertools.count()
        self._closed = False

    @property
    def precision(self) -> Precision:
        """How the store keeps what is stepped."""
        return Precision(states=self.config.state_precision, masters=self.config.master_weights)

    def next_number(self) -> int:
        """A number that no other weight of this runtime has."""
        return next(self._numbers)

    def reconfigure(self, config: OffloadConfig) -> None:
        """Settings that ``attach`` adds to those the model was built with.

        Raises:
            ConfigError: another budget, directory or I/O engine than the model was built with.
        """
        given = config.model_fields_set
        problems = [
            f"{name}={getattr(config, name)} differs from the {getattr(self.config, name)} that "
            "the model was built with: pass it to offload.init or load_pretrained only"
            for name in ("budget", "nvme", "io_engine")
            if name in given and getattr(config, name) != getattr(self.config, name)
        ]
        if problems:
            raise ConfigError(*problems)
        built_with = {name: getattr(self.config, name) for name in self.config.model_fields_set}
        self.config = config.model_copy(update={**config.model_dump(), **built_with}).model_copy(
            update={name: getattr(config, name) for name in given}
        )
        if config.record is not None:
            self.journal.recorder.close()  # what was recorded while the model was built
            self.journal.recorder = open_record(config.record)

    def close(self) -> None:
        """End threads, give the store's lock back; safe to call twice."""
        if self._closed:
            return
        self._closed = True
        with ExitStack() as closing:  # the last one first, each of them whatever another raises
            for part in (
                self.journal.recorder,
                self.store,
                self.gradient_scratch,
                self.activation_scratch,
                self.lanes,
                self.governor,
            ):
                closing.callback(part.close)
            for guest in self.guests:
                closing.callback(guest)


def open_record(directory: Path | None) -> Recorder:
    """What takes the events of a run in ``directory``.

    Raises:
        ConfigError: it can't be written.
    """
    if directory is None:
        return NullRecorder()
    try:
        return JsonlRecorder(directory / "rank0.jsonl")
    except OSError as error:
        raise ConfigError(f"can't write to the record {directory}: {error.strerror}") from error


def open_lanes(
    directories: Sequence[Path], journal: Journal, *, io_engine: str, workers: int
) -> Lanes:
    """The links to files in ``directories``; what the user should know of these is noticed.

    Raises:
        ConfigError: a directory or an I/O engine that can't be used.
    """
    for directory, notice in check_directories(directories):
        journal.notice(str(directory), notice)
    chosen = choose_engine(io_engine, *directories)
    if not chosen.expected:
        journal.notice("I/O engine", f"{chosen.name}: {chosen.reason}")
    return Lanes(journal, workers, len(directories), engine=chosen.factory)


def default_budget() -> int:
    """Most of the memory that is available now, a memory cgroup's limit respected."""
    available = os.sysconf("SC_AVPHYS_PAGES") * hostmem.PAGE
    limit = memory_limit_nbytes(System())
    return int(min(available, limit or available) * _DEFAULT_SHARE)
