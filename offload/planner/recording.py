"""A simulated run as a run directory, which ``offload report`` reads."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from offload.allocator.errors import ConfigError
from offload.swap.planning.predict import Settings
from offload.tiers.events import (
    Event,
    JsonlRecorder,
    ListRecorder,
    Recorder,
    RunFinished,
    RunStarted,
    StepFinished,
)
from offload.tiers.machine import Machine, write_machine


@contextmanager
def recorded(
    directory: Path | None, settings: Settings, machine: Machine
) -> Iterator[Recorder | None]:
    """Takes the events of a simulated run; without a directory there is no recorder.

    Raises:
        ConfigError: the directory holds a record, or can't be written.
    """
    if directory is None:
        yield None
        return
    file = directory / "rank0.jsonl"
    if file.exists():
        raise ConfigError(f"{directory} holds the record of another run: pass another directory")
    taken = ListRecorder()
    yield taken
    try:
        recorder = JsonlRecorder(file)
    except OSError as error:
        raise ConfigError(f"can't write to {directory}: {error.strerror}") from error
    for event in (_start(settings, machine), *taken.events, _end(settings, taken.events)):
        recorder.record(event)
    recorder.close()
    if recorder.failure is not None:
        file.unlink()
        raise ConfigError(
            f"can't write {len(taken.events)} events to {file}: {recorder.failure.strerror}; name "
            "a directory with more room, or leave --record out"
        )
    write_machine(machine, directory / "machine.json")


def _start(settings: Settings, machine: Machine) -> RunStarted:
    cpu, host = machine.processors[0], machine.tier("host")
    return RunStarted(
        t_s=0.0,
        command="simulated by offload plan",
        versions={},
        host={
            "cpu": cpu.model,
            "cores": cpu.cores,
            "memory_nbytes": host.capacity_nbytes,
            "kernel": machine.kernel,
        },
        budget=_budgets_of(settings),
    )


def _budgets_of(settings: Settings) -> dict[str, int]:
    """As ``saving.budgets_of``."""
    named = {"host": settings.budget_nbytes, "nvme_write": settings.write_budget_nbytes}
    return {name: nbytes for name, nbytes in named.items() if nbytes is not None}


def _end(settings: Settings, events: list[Event]) -> RunFinished:
    steps = [event for event in events if isinstance(event, StepFinished)]
    return RunFinished(
        t_s=steps[-1].t_s,
        steps=len(steps),
        peak_nbytes=max(step.peak_nbytes for step in steps),
        budget_nbytes=settings.budget_nbytes,
        status="simulated",
    )
