"""The first and the last event of a run, and the files beside them in its directory."""

import platform
import sys

import torch

from offload.runtime import Runtime
from offload.saving import budgets_of
from offload.swap.plan import Plan
from offload.tiers import hostmem
from offload.tiers.events import RunFinished, RunStarted
from offload.tiers.inventory import take_inventory
from offload.tiers.journal import Journal
from offload.tiers.machine import write_machine


def record_start(runtime: Runtime, plan: Plan) -> None:
    """Tell what runs, on what, within which budgets; flushed, for a run may be killed."""
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
        (config.record / "plan.json").write_text(plan.to_json())
        (config.record / "config.json").write_text(config.model_dump_json(indent=2))
    journal.recorder.flush()


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
