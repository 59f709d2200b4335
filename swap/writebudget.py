"""How many bytes may be written to a drive in a step: drives wear out by being written.

The budget is for everything that a step writes. Weights, gradients and optimizer states must be
written; saved activations take what they leave. Beyond that the next home takes them, or they
stay in memory (see ``spilling``).
"""

from offload.allocator.errors import BudgetError, CapacityError
from offload.allocator.units import format_nbytes
from offload.swap.homes import Home
from offload.tiers.base import Block
from offload.tiers.journal import Journal
from offload.tiers.lanes import Job


class WriteBudget:
    """Counts what saved activations write between two optimizer steps.

    Args:
        limit_nbytes: of all writes of one step.
        other_nbytes: what a step must write besides; measured from the first step on.

    Raises:
        BudgetError: the limit is less than what must be written.
    """

    def __init__(self, journal: Journal, limit_nbytes: int, other_nbytes: int) -> None:
        if other_nbytes > limit_nbytes:
            raise BudgetError(
                f"nvme_write_budget={format_nbytes(limit_nbytes)} ({limit_nbytes} bytes) is too "
                f"small: weights, gradients and optimizer states write "
                f"{format_nbytes(other_nbytes)} per step. The smallest budget that fits is "
                f"{other_nbytes} bytes; one more byte for each that saved activations may write",
                needed_nbytes=other_nbytes,
                budget_nbytes=limit_nbytes,
            )
        self.limit_nbytes = limit_nbytes
        self.taken_nbytes = 0
        self._journal = journal
        self._other_nbytes = other_nbytes
        self._written_before = journal.totals.written_nbytes

    @property
    def step_nbytes(self) -> int:
        """What saved activations may write in a step."""
        return max(self.limit_nbytes - self._other_nbytes, 0)

    @property
    def left_nbytes(self) -> int:
        """What saved activations may still write in this step."""
        return max(self.step_nbytes - self.taken_nbytes, 0)

    def take(self, nbytes: int) -> None:
        """Count ``nbytes`` that are about to be written.

        Raises:
            CapacityError: the budget of this step has not so many left.
        """
        if nbytes > self.left_nbytes:
            raise CapacityError(
                f"the step may write {format_nbytes(self.limit_nbytes)}, weights, gradients and "
                f"states take {format_nbytes(self._other_nbytes)}, saved activations have taken "
                f"{format_nbytes(self.taken_nbytes)}: raise nvme_write_budget by "
                f"{nbytes - self.left_nbytes} bytes for {format_nbytes(nbytes)} more"
            )
        self.taken_nbytes += nbytes

    def give_back(self, nbytes: int) -> None:
        """What was taken is not written: the drive has no room for it."""
        self.taken_nbytes -= nbytes

    def finish_step(self, owed_nbytes: int = 0) -> None:
        """An optimizer step has ended, and all its writes.

        Args:
            owed_nbytes: what it changed in memory, which a commit in the next step may write.
        """
        written = self._journal.totals.written_nbytes
        others = written - self._written_before - self.taken_nbytes
        self._other_nbytes = max(others, owed_nbytes, 0)
        self._written_before = written
        self.taken_nbytes = 0


class BudgetedHome(Home):
    """A home on a drive that takes no more than its write budget."""

    def __init__(self, inner: Home, budget: WriteBudget) -> None:
        self.inner, self.budget = inner, budget
        self.name = inner.name
        self.reads, self.writes = inner.reads, inner.writes

    def allocate(self, nbytes: int) -> Block:
        self.budget.take(nbytes)
        try:
            return self.inner.allocate(nbytes)
        except CapacityError:
            self.budget.give_back(nbytes)
            raise

    def room_nbytes(self) -> int:
        return min(self.inner.room_nbytes(), self.budget.step_nbytes)

    def write_jobs(self, block: Block, address: int, nbytes: int, offset: int = 0) -> list[Job]:
        return self.inner.write_jobs(block, address, nbytes, offset)

    def read_jobs(self, block: Block, address: int, nbytes: int, offset: int = 0) -> list[Job]:
        return self.inner.read_jobs(block, address, nbytes, offset)
