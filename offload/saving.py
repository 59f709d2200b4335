"""The homes of an engine's saved activations."""

from torch import nn
from torch.optim import Optimizer

from offload.config import OffloadConfig
from offload.runtime import Runtime
from offload.swap.census import named_weights
from offload.swap.gradients import MIN_NBYTES
from offload.swap.homes import FileHome, Home
from offload.swap.optim_kinds import state_nbytes
from offload.swap.writebudget import BudgetedHome, WriteBudget


def make_homes(
    runtime: Runtime, model: nn.Module, optimizer: Optimizer | None
) -> tuple[list[Home], WriteBudget | None]:
    """Scratch, within the write budget if there is one.

    Raises:
        BudgetError: the step must write more than the budget.
    """
    scratch = FileHome(runtime.scratch)
    limit = runtime.config.nvme_write_budget
    if limit is None:
        return [scratch], None
    budget = WriteBudget(runtime.journal, limit, step_writes_nbytes(model, optimizer))
    return [BudgetedHome(scratch, budget)], budget


def step_writes_nbytes(model: nn.Module, optimizer: Optimizer | None) -> int:
    """What a step writes whatever happens: what is trained, its gradients and states."""
    trained = [
        parameters[0].nbytes
        for _, parameters in named_weights(model)
        if any(parameter.requires_grad for parameter in parameters)
    ]
    gradients = sum(nbytes for nbytes in trained if nbytes >= MIN_NBYTES)
    if optimizer is None:
        return gradients
    return gradients + sum(trained) + state_nbytes(optimizer)


def budgets_of(config: OffloadConfig, host_nbytes: int) -> dict[str, int]:
    """The budgets that a run's record names."""
    named = {
        "host": host_nbytes,
        "nvme_write": config.nvme_write_budget,
        "nvme_endurance": config.nvme_endurance,
    }
    return {name: nbytes for name, nbytes in named.items() if nbytes is not None}
