"""What moves as one of the saved storages of a simulated run, and when it has to come."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from offload.swap.planning.world import Flight

# Between fetching a unit now and later: the arguments of ``is_early``, and what it told.
FetchChoice: TypeAlias = tuple[int, int, int, float, bool]


@dataclass(slots=True, eq=False)
class Unit:
    """What moves as one: ``members`` are its storages that autograd still needs.

    Attributes:
        turn: ``sim_saved`` [Note: turns]; None where no use of it is expected.
        is_batch: of several storages, whoever still needs them.
    """

    position: int
    nbytes: int
    members: set[int]
    turn: int | None
    stays: bool
    in_memory: bool = True
    on_file: bool = False
    writing: Flight | None = None
    fetching: Flight | None = None
    used: bool = False
    is_batch: bool = False


def is_early(
    uses: Sequence[tuple[int, float]], present: int, following: int, turn: int, lead_s: float
) -> bool:
    """Whether the next use is soon enough to fetch a unit.

    Args:
        uses: that are expected, by turn.
        present: the turn of what is used now; ``following``: of what is used next, or the same.
        turn: of the unit.
        lead_s: before its use it has to be fetched.
    """
    now_s = uses[present][1]
    return uses[turn][1] - now_s > lead_s + (uses[following][1] - now_s)
