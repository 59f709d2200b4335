"""What a simulated run may write to the drive in a step: ``swap.writebudget``, virtually.

The budget itself is the runtime's. What it must hold besides saved activations is told by the
program at first, and by the simulated writes from then on.
"""

from offload.allocator.errors import CapacityError
from offload.swap.gradients import MIN_NBYTES
from offload.swap.planning.program import Program
from offload.swap.writebudget import WriteBudget
from offload.tiers.journal import Journal


def must_write_nbytes(program: Program) -> int:
    """What a step writes whatever happens, as ``saving.step_writes_nbytes``."""
    trained = [weight.nbytes for weight in program.census.weights if weight.trainable]
    gradients = sum(nbytes for nbytes in trained if nbytes >= MIN_NBYTES)
    if program.stepping is None:
        return gradients
    return gradients + sum(trained) + program.stepping.nbytes


def check_writes(program: Program, limit_nbytes: int | None) -> None:
    """Refuse a budget that a step can't keep, as ``attach`` does.

    Raises:
        BudgetError: weights, gradients and states write more.
    """
    if limit_nbytes is not None:
        WriteBudget(Journal(), limit_nbytes, must_write_nbytes(program))


class SimDrive:
    """Takes what leaves memory, within the write budget if there is one.

    Args:
        journal: of the simulated run.

    Raises:
        BudgetError: as ``check_writes``.
    """

    def __init__(self, journal: Journal, program: Program, limit_nbytes: int | None) -> None:
        self._budget = (
            None
            if limit_nbytes is None
            else WriteBudget(journal, limit_nbytes, must_write_nbytes(program))
        )

    @property
    def is_bounded(self) -> bool:
        """Whether there is a write budget."""
        return self._budget is not None

    def refusal(self, nbytes: int) -> CapacityError | None:
        """Why it takes no ``nbytes`` more in this step; None if they are taken."""
        if self._budget is None:
            return None
        try:
            self._budget.take(nbytes)
        except CapacityError as refused:
            return refused
        return None

    def room_nbytes(self) -> int | None:
        """Bytes of a step that it takes at most; None: as many as come."""
        return None if self._budget is None else self._budget.step_nbytes

    def finish_step(self) -> None:
        """A step has ended, and all its writes. It owes none: each is committed, or none ever."""
        if self._budget is not None:
            self._budget.finish_step()
