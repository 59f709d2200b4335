"""Reading a run directory; a record cut off by a kill is read as far as it goes."""

from dataclasses import dataclass
from pathlib import Path

from offload.allocator.errors import ConfigError
from offload.tiers.events import FORMAT_VERSION, Event, RunStarted, from_json


@dataclass(frozen=True, slots=True)
class RunEvents:
    """The events of a run's segments (one per start of the process), in order."""

    path: Path
    segments: tuple[tuple[Event, ...], ...]
    truncated: bool  # the last line was cut off


def read_run(path: Path) -> RunEvents:
    """All events under a run directory.

    Raises:
        ConfigError: no record there, a damaged line inside it, or another version's record.
    """
    file = path / "rank0.jsonl"
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(
            f"{path} is not a run directory ({file.name}: {error.strerror}); "
            "record one with: offload run --record DIR script.py"
        ) from error
    segments: list[list[Event]] = []
    truncated = False
    for number, line in enumerate(lines, start=1):
        try:
            event = from_json(line.decode("utf-8"))
        except ValueError as error:
            if number == len(lines):
                truncated = True
                break
            raise ConfigError(
                f"{file}, line {number} of {len(lines)} is damaged: {error}; what stands before it "
                f"can be read: head -n {number - 1} of it into another directory's {file.name}"
            ) from error
        if isinstance(event, RunStarted):
            if event.format != FORMAT_VERSION:
                raise ConfigError(f"{file} was recorded by another version of Offload")
            if segments and any(isinstance(earlier, RunStarted) for earlier in segments[-1]):
                segments.append([])
        if not segments:
            segments.append([])  # building the model moves bytes before the run starts
        segments[-1].append(event)
    if not segments:
        raise ConfigError(f"{file} is empty: the run ended before it began")
    return RunEvents(path, tuple(tuple(segment) for segment in segments), truncated)
