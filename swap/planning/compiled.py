"""A program made ready to be simulated often: only what the runtime decides upon is left.

Between two *moments* at which the runtime acts, the training thread computes, and memory comes and
goes that nobody moves. How long that takes and how high memory rises is the same in each step and
under every plan, so it is added up once.
"""

from dataclasses import dataclass
from typing import TypeAlias

from offload.swap.planning.cost import Costs
from offload.swap.planning.program import Program, What
from offload.swap.planning.reclaimed import reclaimed_s

# The runtime acts; what was before it is told, too:
# - seconds of computing since the last moment, what calling the runtime costs included;
# - highs of the memory that nobody moves, in bytes more than at the last moment: each time that it
#   was more than ever since then;
# - bytes that it has become more since the last moment;
# - what makes the runtime act (``FREE``: of a storage that autograd still needs), and which, as of
#   an ``Event``.
Moment: TypeAlias = tuple[float, tuple[int, ...], int, What, int]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Compiled:
    """A program on one machine; equal to itself only, for comparing it takes as long as making it.

    Attributes:
        moments: of one step, in order; behind the last of them the optimizer steps.
    """

    program: Program
    costs: Costs
    moments: tuple[Moment, ...]


def compile_program(program: Program, costs: Costs) -> Compiled:
    """Add up what is the same in each step of ``program``."""
    return Compiled(program=program, costs=costs, moments=tuple(_moments(program, costs)))


def _moments(program: Program, costs: Costs) -> list[Moment]:
    computing_s = [costs.seconds(operation) for operation in program.operations]
    fresh_s = {nbytes: costs.fresh_s(nbytes) for nbytes in set(program.storages)}
    waits_s = reclaimed_s(program, costs, computing_s)
    storages = program.storages
    # What a call of the runtime takes of the training thread before it decides anything.
    calling_s = [0.0] * len(What)
    calling_s[What.USE] = costs.hook_s
    calling_s[What.SAVE] = calling_s[What.UNSAVE] = costs.hook_s / 2
    compute, allocate, free = What.COMPUTE, What.ALLOCATE, What.FREE
    save, forget, record = What.SAVE, What.FORGET, What.RECORD
    moments: list[Moment] = []
    saved: set[int] = set()
    seconds, nbytes, high = 0.0, 0, 0
    highs: tuple[int, ...] = ()
    for number, (what, which) in enumerate(program.events):
        if what is compute:
            seconds += computing_s[which]
        elif what is allocate:
            fresh = storages[which]
            seconds += fresh_s[fresh]
            if number in waits_s:
                seconds += waits_s[number]
            nbytes += fresh
            if nbytes > high:
                high = nbytes
                highs = (*highs, nbytes)
        elif what is free and which not in saved:
            nbytes -= storages[which]
        else:
            seconds += costs.hook_s * which if what is record else calling_s[what]
            moments.append((seconds, highs, nbytes, what, which))
            seconds, nbytes, high, highs = 0.0, 0, 0, ()
            if what is save:
                saved.add(which)
            elif what is forget:
                saved.discard(which)
    moments.append((seconds, highs, nbytes, compute, 0))  # the runtime does nothing there
    return moments
