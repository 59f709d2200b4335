"""The plan: how the bytes of a budget are shared out, decided before the first step.

Pure: the same census, budget and facts always give the same plan.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from offload.allocator.errors import BudgetError
from offload.allocator.units import format_nbytes
from offload.swap.census import Census

# What Offload itself and glibc need beside the classes below: thread stacks, page tables of the
# mappings, heap below the mmap threshold.
OVERHEAD_NBYTES = 24 << 20
# Two starts of the same script differ by so much, and later steps from the first: a budget that an
# error names must fit again.
VARIATION_NBYTES = 6 << 20
# Kept free when spare bytes are handed out: steps differ a little.
MARGIN_NBYTES = 12 << 20
_LEAST_ACTIVATIONS_NBYTES = 4 << 20  # with less, each saved tensor waits for the one before it
_SMALLEST = "The smallest budget that fits is host="  # in a refusal, read by who started the run
_NOTHING: Mapping[str, int] = MappingProxyType({})
_CHUNK_NUMELS = (2 << 20, 1 << 20, 1 << 18)
_STAGED_PER_TILE = 4  # parameter, gradient and two states: the Adam family
_STAGED_ITEMSIZE = 4
_TILES_IN_FLIGHT = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Shares of the host budget, in bytes.

    Attributes:
        budget_nbytes: the hard limit on the process's peak resident set.
        baseline_nbytes: resident before training: interpreter, libraries, the user's own data.
        working_nbytes: the largest module's weights and gradients.
        window_nbytes: weights that may be in memory at once, the working set's included.
        gradients_nbytes: gradients that may wait for their write.
        activations_nbytes: saved activations kept in memory before they are swapped.
        staging_nbytes: tiles of the optimizer step in flight.
        resident: weights that stay in memory; the others stream.
        resident_states: weights whose gradients and optimizer states stay in memory, too: they are
            stepped in place.
        resident_states_nbytes: bytes of these gradients and states.
        step_in_backward: tiles of the step are in flight while backward runs.
        step_in_forward: they are while forward runs.
        tile_nbytes: of one tile of the optimizer step.
        in_turns_nbytes: weights of one block that micro-batches use in turns; 0 if none do. Where
            there is room the window holds all of them, and so many gradients wait for all parts.
    """

    budget_nbytes: int
    baseline_nbytes: int
    working_nbytes: int
    window_nbytes: int
    gradients_nbytes: int
    activations_nbytes: int
    staging_nbytes: int
    resident: tuple[str, ...] = ()
    resident_nbytes: int = 0
    resident_states: tuple[str, ...] = ()
    resident_states_nbytes: int = 0
    step_in_backward: bool = False
    step_in_forward: bool = False
    tile_nbytes: int = 0
    in_turns_nbytes: int = 0

    @property
    def steps_beside(self) -> bool:
        """Whether tiles need memory beside what a pass needs."""
        return self.step_in_backward or self.step_in_forward

    @property
    def ahead_nbytes(self) -> int:
        """Bytes that the plan allows only so that moves overlap with compute and each other."""
        window = self.window_nbytes - self.working_nbytes // 2
        staging = self.staging_nbytes - self.tile_nbytes if self.steps_beside else 0
        return window + self.gradients_nbytes + staging

    @property
    def kept_nbytes(self) -> int:
        """Bytes of weights, gradients and states that stay in memory."""
        return self.resident_nbytes + self.resident_states_nbytes

    def to_json(self) -> str:
        """The plan as versioned JSON."""
        return json.dumps({"format": 1, **dataclasses.asdict(self)}, indent=2)


def choose_chunk_numel(budget_nbytes: int) -> int:
    """Elements of one tile of the optimizer step, and of one checksummed chunk of the store.

    A multiple of 64 keeps fused kernels bit-identical; large requests are fast ones; all tiles
    in flight take at most a quarter of the budget.
    """
    fitting = (numel for numel in _CHUNK_NUMELS if _staging(numel) <= budget_nbytes // 4)
    return next(fitting, _CHUNK_NUMELS[-1])


def make_plan(
    census: Census,
    *,
    budget_nbytes: int,
    baseline_nbytes: int,
    chunk_numel: int,
    step_in_backward: bool = False,
    step_in_forward: bool = False,
) -> Plan:
    """Share ``budget_nbytes`` out for the first step.

    The first step keeps no weight resident and has little room to move ahead of time: what its
    activations and kernels need is not known before it has run. Its peak tells, and ``grow`` hands
    out what turned out to be spare. A step in backward or in forward needs its tiles beside
    weights, gradients and activations, a step between them can have their room.

    Raises:
        BudgetError: the largest module does not fit; names the smallest budget that does.
    """
    working = census.working_set_nbytes()
    fixed = baseline_nbytes + OVERHEAD_NBYTES
    beside = step_in_backward or step_in_forward
    if budget_nbytes < fixed + _at_once(working, chunk_numel, beside):
        needed = _smallest_budget(fixed, working, chunk_numel, beside)
        by_module = census.module_nbytes()
        largest = max(by_module, key=lambda name: by_module[name], default="none")
        raise BudgetError(
            f"the host budget of {format_nbytes(budget_nbytes)} is too small: the process holds "
            f"{format_nbytes(baseline_nbytes)} before training, its largest layer "
            f"({largest}) needs {format_nbytes(working)} for weights and gradients, "
            f"{'beside it' if beside else 'then'} a "
            f"tile of the optimizer step {format_nbytes(_tile(chunk_numel))}, the runtime "
            f"{format_nbytes(OVERHEAD_NBYTES)}. {_SMALLEST}"
            f"{_mib_ceil(needed + VARIATION_NBYTES)}MiB, and activations come on top: offload "
            "plan counts them, too",
            needed_nbytes=needed,
            budget_nbytes=budget_nbytes,
        )
    staging, spare = budget_nbytes - fixed, budget_nbytes - fixed - working
    if beside:
        staging = _tile(chunk_numel)
        spare -= staging
    bare = Plan(
        budget_nbytes=budget_nbytes,
        baseline_nbytes=baseline_nbytes,
        working_nbytes=working,
        window_nbytes=working // 2,
        gradients_nbytes=0,
        activations_nbytes=spare // 4,
        staging_nbytes=min(staging, _staging(chunk_numel)),
        step_in_backward=step_in_backward,
        step_in_forward=step_in_forward,
        tile_nbytes=_tile(chunk_numel),
    )
    return _move_ahead(bare, census, spare // 4)


def named_nbytes(refusal: str) -> int | None:
    """The smallest budget that a refusal of ``make_plan`` names; None if it is another one's."""
    found = re.search(rf"{_SMALLEST}(\d+)MiB", refusal)
    return int(found[1]) << 20 if found else None


def fits_in_no_case(named_nbytes: int, budget_nbytes: int) -> bool:
    """Whether no other settings bring a run below ``budget_nbytes`` that ``make_plan`` refuses.

    Settings may change what the runtime takes, but for a step beside a pass, which takes more. The
    size of a tile follows the budget, and two starts of a script differ.
    """
    doubtful = OVERHEAD_NBYTES + _tile(_CHUNK_NUMELS[0]) + 2 * VARIATION_NBYTES
    return named_nbytes - doubtful > budget_nbytes


def enough_nbytes(plan: Plan, peak_nbytes: int) -> int:
    """A budget that holds the steps of a run whose first took ``peak_nbytes`` with ``plan``.

    Of each byte that a larger budget has more, at most a half is shared out before the first step,
    and it may choose larger tiles.
    """
    missing = max(peak_nbytes + MARGIN_NBYTES - plan.budget_nbytes, 0)
    enough = plan.budget_nbytes + 2 * missing
    tile = _tile(choose_chunk_numel(_mib_ceil(enough) << 20))
    if plan.steps_beside and tile > plan.tile_nbytes:
        larger = dataclasses.replace(plan, tile_nbytes=tile)
        return enough_nbytes(larger, peak_nbytes + tile - plan.tile_nbytes)
    return enough


def soft_limit_nbytes(budget_nbytes: int) -> int:
    """Where moves begin to wait for room, and faulted-in pages are given back.

    Below the budget, because the watcher must win against faults that go on meanwhile.
    """
    return budget_nbytes - max(budget_nbytes >> 5, 16 << 20)


def grow(
    plan: Plan, census: Census, *, peak_nbytes: int, states_nbytes: Mapping[str, int] = _NOTHING
) -> Plan:
    """The plan for the steps after the first, whose measured peak was ``peak_nbytes``.

    Spare bytes first let moves overlap: weights that come ahead of time, gradients and tiles that
    wait. Others hold weights resident, smallest first: each saves its reads in forward, backward
    and optimizer step, and a small transfer costs more per byte than a large one. Bytes that all
    weights leave hold gradients and states, smallest first: they save less per byte.

    Args:
        states_nbytes: of the gradient and the states of each weight that could be stepped in
            memory, whether or not they are there yet.
    """
    spare = plan.budget_nbytes - MARGIN_NBYTES - peak_nbytes
    if plan.step_in_forward:  # the first step has none, so its forward's peak is without a tile
        spare -= plan.tile_nbytes
    before, plan = plan, _move_ahead(plan, census, max(spare, 0))
    spare -= plan.ahead_nbytes - before.ahead_nbytes
    weights_nbytes = {weight.name: weight.nbytes for weight in census.weights}
    resident, total = _fitting(weights_nbytes, spare)
    states: list[str] = []
    states_total = 0
    if len(resident) == len(census.weights):
        # So much stays free that gradients and activations need not wait for each other's room.
        spare -= total + plan.budget_nbytes - soft_limit_nbytes(plan.budget_nbytes)
        states, states_total = _fitting(states_nbytes, spare)
    return dataclasses.replace(
        plan,
        resident=tuple(resident),
        resident_nbytes=total,
        resident_states=tuple(states),
        resident_states_nbytes=states_total,
    )


def shrink(
    plan: Plan, census: Census, *, excess_nbytes: int, states_nbytes: Mapping[str, int] = _NOTHING
) -> Plan:
    """The plan with so many bytes fewer, in the reverse of the order of ``grow``.

    Gradients and states go before weights, the largest first, and these before what lets moves
    overlap. Saved activations leave memory at last, down to what moves at once. ``states_nbytes``
    as for ``grow``.
    """
    weights_nbytes = {weight.name: weight.nbytes for weight in census.weights}
    resident = _smallest_first(plan.resident, weights_nbytes)
    states = _smallest_first(plan.resident_states, states_nbytes)
    given_up = states_given_up = 0
    while states and states_given_up < excess_nbytes:
        states_given_up += states_nbytes[states.pop()]
    while resident and states_given_up + given_up < excess_nbytes:
        given_up += weights_nbytes[resident.pop()]
    if (missing := excess_nbytes - states_given_up - given_up) > 0:
        left = plan.ahead_nbytes - missing
        plan = _move_ahead(_move_nothing_ahead(plan), census, max(left, 0))
        least = min(plan.activations_nbytes, _LEAST_ACTIVATIONS_NBYTES)
        activations = max(plan.activations_nbytes + min(left, 0), least)
        plan = dataclasses.replace(plan, activations_nbytes=activations)
    return dataclasses.replace(
        plan,
        resident=tuple(resident),
        resident_nbytes=plan.resident_nbytes - given_up,
        resident_states=tuple(states),
        resident_states_nbytes=plan.resident_states_nbytes - states_given_up,
    )


def streaming(plan: Plan) -> Plan:
    """The plan with nothing resident."""
    return dataclasses.replace(
        plan, resident=(), resident_nbytes=0, resident_states=(), resident_states_nbytes=0
    )


def _move_ahead(plan: Plan, census: Census, spare_nbytes: int) -> Plan:
    """The plan with at most ``spare_nbytes`` more for weights, gradients and tiles on their way."""
    most = 2 * max((weight.nbytes for weight in census.weights), default=0)
    window_most, gradients_most = plan.working_nbytes // 2 + most, most
    # Else a block's weights would come once for each micro-batch.
    lacking = min(max(plan.in_turns_nbytes - plan.window_nbytes, 0), spare_nbytes)
    spare_nbytes -= lacking
    staging = plan.staging_nbytes
    if plan.steps_beside:
        staging = min(staging + spare_nbytes // 5, _TILES_IN_FLIGHT * plan.tile_nbytes)
    if plan.in_turns_nbytes:
        window_most = max(window_most, plan.in_turns_nbytes + most // 2)
        gradients_most = max(gradients_most, plan.in_turns_nbytes)
        window = gradients = 2 * spare_nbytes // 5
        window += lacking
    elif plan.step_in_backward:  # gradients wait for tiles, weights are needed for one use less
        window, gradients = spare_nbytes // 6, spare_nbytes // 3
    else:
        window, gradients = spare_nbytes // 3, spare_nbytes // 6
    return dataclasses.replace(
        plan,
        window_nbytes=min(plan.window_nbytes + window, window_most),
        gradients_nbytes=min(plan.gradients_nbytes + gradients, gradients_most),
        staging_nbytes=staging,
    )


def _move_nothing_ahead(plan: Plan) -> Plan:
    staging = plan.tile_nbytes if plan.steps_beside else plan.staging_nbytes
    return dataclasses.replace(
        plan, window_nbytes=plan.working_nbytes // 2, gradients_nbytes=0, staging_nbytes=staging
    )


def _fitting(sizes: Mapping[str, int], spare_nbytes: int) -> tuple[list[str], int]:
    """The smallest ones that fit, and their bytes in all."""
    fitting: list[str] = []
    total = 0
    for name in _smallest_first(sizes, sizes):
        if total + sizes[name] > spare_nbytes:
            break
        total += sizes[name]
        fitting.append(name)
    return fitting, total


def _smallest_first(names: Iterable[str], sizes: Mapping[str, int]) -> list[str]:
    return sorted(names, key=lambda name: (sizes[name], name))


def _staging(chunk_numel: int) -> int:
    return _TILES_IN_FLIGHT * _STAGED_PER_TILE * chunk_numel * _STAGED_ITEMSIZE


def _tile(chunk_numel: int) -> int:
    return _staging(chunk_numel) // _TILES_IN_FLIGHT


def _at_once(working_nbytes: int, chunk_numel: int, beside: bool) -> int:
    """What backward of the largest module and a tile of the step hold, in turn or beside it."""
    both = (working_nbytes, _tile(chunk_numel))
    return sum(both) if beside else max(both)


def _smallest_budget(fixed_nbytes: int, working_nbytes: int, chunk_numel: int, beside: bool) -> int:
    """Bytes that fit with the tiles that ``choose_chunk_numel`` picks for the budget to name."""
    needed = fixed_nbytes + _at_once(working_nbytes, chunk_numel, beside)
    while True:
        chosen = choose_chunk_numel(_mib_ceil(needed + VARIATION_NBYTES) << 20)
        fitting = fixed_nbytes + _at_once(working_nbytes, chosen, beside)
        if fitting <= needed:
            return needed
        needed = fitting


def _mib_ceil(nbytes: int) -> int:
    """Whole MiB that hold ``nbytes``."""
    return -(-nbytes // (1 << 20))
