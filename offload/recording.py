"""The first and the last event of a run, and the files beside them in its directory."""

import json
import platform
import sys
from pathlib import Path

import torch
from torch import nn

from offload.allocator.errors import ConfigError
from offload.runtime import Runtime
from offload.saving import budgets_of
from offload.swap.census import weight_forms
from offload.swap.plan import Plan
from offload.tiers import hostmem
from offload.tiers.events import RunFinished, RunStarted
from offload.tiers.inventory import take_inventory
from offload.tiers.journal import Journal
from offload.tiers.machine import write_machine


def record_start(runtime: Runtime, plan: Plan, model: nn.Module) -> None:
    """Tell what runs, on what, within which budgets; flushed, for a run may be killed.

    Raises:
        ConfigError: the record can't be written.
    """
    config, journal = runtime.config, runtime.journal
    machine = take_inventory([runtime.store.directory.parent])
    cpu, host = machine.processors[0], machine.tier("host")
    journal.record(
        RunStarted(
            t_s=journal.now(),
            command=" ".join(sys.argv),
            versions={"torch": torch.__version__, "python": platform.python_version()},
            host={
                "cpu": cpu.model,
                "cores": cpu.cores,
                "memory_nbytes": host.capacity_nbytes,
                "kernel": machine.kernel,
            },
            budget=budgets_of(config, plan.budget_nbytes),
        )
    )
    if config.record is not None:
        write_machine(machine, config.record / "machine.json")
        _write(config.record / "plan.json", plan.to_json())
        _write(config.record / "weights.json", json.dumps(weight_forms(model), indent=2))
        _write(config.record / "config.json", config.model_dump_json(indent=2))
    journal.recorder.flush()


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text)
    except OSError as error:
        raise ConfigError(
            f"can't write to the record {file} ({len(text)} bytes): {error.strerror}"
        ) from error


def record_finish(journal: Journal, plan: Plan, *, steps: int, status: str) -> None:
    """Tell how it ended."""
    journal.record(
        RunFinished(
            t_s=journal.now(),
            steps=steps,
            peak_nbytes=hostmem.peak_resident_nbytes(),
            budget_nbytes=plan.budget_nbytes,
            status=status,
        )
    )
    journal.recorder.flush()
