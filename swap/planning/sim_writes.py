"""What the drive of a simulated run takes: room for saved activations, and ``swap.writebudget``.

The write budget itself is the runtime's. What it must hold besides saved activations is told by
the program at first, and by the simulated writes from then on.
"""

from offload.allocator.errors import CapacityError
from offload.allocator.units import format_nbytes
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
    """Takes what leaves memory, as far as it has room, within the write budget if there is one.

    Args:
        journal: of the simulated run.
        limit_nbytes: the write budget.
        room_nbytes: what saved activations may take of it at once.

    Attributes:
        is_bounded: whether it may refuse anything.

    Raises:
        BudgetError: as ``check_writes``.
    """

    def __init__(
        self,
        journal: Journal,
        program: Program,
        limit_nbytes: int | None,
        room_nbytes: int | None = None,
    ) -> None:
        self._budget = (
            None
            if limit_nbytes is None
            else WriteBudget(journal, limit_nbytes, must_write_nbytes(program))
        )
        self._room_nbytes = room_nbytes
        may_be_full = room_nbytes is not None and room_nbytes < sum(program.storages)
        self.is_bounded = self._budget is not None or may_be_full

    @property
    def counts_writes(self) -> bool:
        """Whether what it takes depends on what was written in this step."""
        return self._budget is not None

    def refusal(self, nbytes: int, held_nbytes: int) -> CapacityError | None:
        """Why it takes no ``nbytes`` more, beside ``held_nbytes``; None if they are taken."""
        room_nbytes = self._room_nbytes
        if room_nbytes is not None and held_nbytes + nbytes > room_nbytes:
            return CapacityError(
                f"the drive has room for {format_nbytes(room_nbytes)} of them beside weights, "
                "optimizer states and gradients: free more of it"
            )
        if self._budget is None:
            return None
        try:
            self._budget.take(nbytes)
        except CapacityError as refused:
            return refused
        return None

    def finish_step(self) -> None:
        """A step has ended, and all its writes. It owes none: each is committed, or none ever."""
        if self._budget is not None:
            self._budget.finish_step()
