"""What a run will need and how long its steps will take: the plan of ``attach``, simulated.

Pure: the same program, machine and settings always give the same prediction.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial

from offload.allocator.errors import BudgetError, UnsupportedError
from offload.allocator.units import format_nbytes
from offload.swap.gradients import MIN_NBYTES
from offload.swap.homes import SPARE_NBYTES
from offload.swap.plan import Plan, choose_chunk_numel, make_plan, soft_limit_nbytes
from offload.swap.planning.collecting import collection_paused
from offload.swap.planning.compiled import Compiled, compile_program
from offload.swap.planning.cost import Costs
from offload.swap.planning.program import Program
from offload.swap.planning.row_steps import Alpha, RowsFound, row_steps
from offload.swap.planning.sim_memory import Role
from offload.swap.planning.sim_writes import check_writes, must_write_nbytes
from offload.swap.planning.simulate import SimulatedStep, Simulation
from offload.swap.planning.striping import drives_of
from offload.tiers.events import Recorder
from offload.tiers.filetier import LARGE_NBYTES
from offload.tiers.hostmem import PAGE
from offload.tiers.machine import Machine

_STEPS = 4  # the first learns, the second has grown, the third may shrink, the fourth repeats
_MIB = 1 << 20
_STRIDE_MIB = 32  # of a look for a budget, at first
_HESITATING = 8.0  # drives pause for tens of milliseconds, and then more waits to be written


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """What a process takes without a model.

    Attributes:
        attach_nbytes: resident set as ``attach`` finds it: interpreter, libraries, data.
        running_nbytes: more once a step has run: code that the first kernels bring in, the heap.
    """

    attach_nbytes: int
    running_nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a user decides.

    Attributes:
        budget_nbytes: ``host``: bound of the process's resident set.
        drive: the name of the file tier.
        commits: whether anything is made durable, which takes two slots of the drive.
        step_in_backward: weights are stepped as soon as their gradients are complete.
        step_in_forward: they are in the next forward, right before their use.
        align_nbytes: of the drive's large extents: those of a striped store are whole huge pages.
        write_budget_nbytes: that a step may write to the drive.
        alpha: of token-wise recompute: the share of rows that is swapped, or ``auto``; None: off.
        micro_batches: forwards of a step, each with its backward; their gradients add up.
    """

    budget_nbytes: int
    drive: str
    commits: bool = True
    min_swap_nbytes: int = 64 << 10
    step_in_backward: bool = False
    step_in_forward: bool = False
    align_nbytes: int = PAGE
    write_budget_nbytes: int | None = None
    alpha: Alpha | None = None
    micro_batches: int = 1

    def extent_nbytes(self, nbytes: int) -> int:
        """What ``nbytes`` take of the drive."""
        align = self.align_nbytes if nbytes >= LARGE_NBYTES else PAGE
        return -(-max(nbytes, 1) // align) * align


@dataclass(frozen=True, slots=True, kw_only=True)
class DriveUse:
    """Bytes that a run takes of the drive."""

    weights_nbytes: int
    states_nbytes: int
    gradients_nbytes: int
    activations_nbytes: int

    @property
    def nbytes(self) -> int:
        """All together."""
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A run that fits.

    Attributes:
        steps: as simulated; the last one is what every later step is like.
        building_nbytes: resident set while the model is built in its store.
        tokens: of a step.
        rebuilt: by kind of blocks, where rows are rebuilt.
    """

    settings: Settings
    steps: tuple[SimulatedStep, ...]
    building_nbytes: int
    drive: DriveUse
    tokens: int
    rebuilt: tuple[RowsFound, ...] = ()

    @property
    def last(self) -> SimulatedStep:
        """What every later step is like."""
        return self.steps[-1]

    @property
    def plan(self) -> Plan:
        """As it is in the end."""
        return self.last.plan

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return self.last.finished.step_s

    @property
    def peak_nbytes(self) -> int:
        """The process's peak resident set."""
        return max(self.building_nbytes, *(step.finished.peak_nbytes for step in self.steps))

    @property
    def peak_roles(self) -> Mapping[Role, int]:
        """What the resident set is made of at the peak of a step."""
        return self.last.peak_roles

    @property
    def bound_by(self) -> str:
        """The part that is busy longest."""
        return max(self.last.busy_s, key=lambda name: self.last.busy_s[name])


@collection_paused()
def predict(
    program: Program,
    machine: Machine,
    settings: Settings,
    baseline: Baseline,
    *,
    recorder: Recorder | None = None,
) -> Prediction:
    """Simulate the first steps of a run.

    Args:
        recorder: takes the events of the simulated run.

    Raises:
        BudgetError: it does not fit memory, the drive, or what may be written to it; names what
            would.
        ConfigError: a rate or a link is needed that the machine does not tell.
        UnsupportedError: rows are to be rebuilt of a step that was traced without its blocks, or
            that has several micro-batches.
    """
    compiled = compile_program(program, Costs(machine, settings.drive))
    return _predict(compiled, machine, settings, baseline, recorder)


@collection_paused()
def _predict(
    compiled: Compiled,
    machine: Machine,
    settings: Settings,
    baseline: Baseline,
    recorder: Recorder | None = None,
    *,
    names_enough: bool = True,
) -> Prediction:
    """``names_enough``: a budget that a refusal names is enough; else it may be too little."""
    program = compiled.program
    if settings.alpha is not None and settings.micro_batches > 1:
        raise UnsupportedError(
            "rows that are rebuilt are predicted of one micro-batch: a run learns and tries in "
            "single forwards. Plan with --recompute off, or with --micro-batches 1"
        )
    check_writes(program, settings.write_budget_nbytes)
    use = drive_use(program, settings, 0)
    _check_drive(machine, settings, use)
    spare_nbytes = SPARE_NBYTES * len(drives_of(settings.drive))
    room_nbytes = max(machine.tier(settings.drive).free_nbytes - use.nbytes - spare_nbytes, 0)
    chunk_numel = choose_chunk_numel(settings.budget_nbytes)
    plan = make_plan(
        program.census,
        budget_nbytes=settings.budget_nbytes,
        baseline_nbytes=baseline.attach_nbytes,
        chunk_numel=chunk_numel,
        step_in_backward=settings.step_in_backward,
        step_in_forward=settings.step_in_forward,
    )
    rows = None
    if settings.alpha is not None:
        rows = row_steps(
            compiled,
            settings.alpha,
            memory_nbytes=plan.activations_nbytes,
            drive_nbytes=_step_room(program, settings, room_nbytes),
        )
    simulate = partial(
        Simulation,
        compiled if rows is None else rows.compiled,
        plan,
        chunk_numel=chunk_numel,
        resident_nbytes=baseline.running_nbytes,
        commits=settings.commits,
        min_swap_nbytes=settings.min_swap_nbytes,
        write_budget_nbytes=settings.write_budget_nbytes,
        drive_nbytes=room_nbytes,
        micro_batches=settings.micro_batches,
        pages_stay=_pages_stay(program, machine, settings),
    )
    # Whether it fits may not depend on the drive's mood.
    hesitating = partial(simulate, write_slowdown=_HESITATING)
    simulation = simulate(recorder=recorder)
    rebuilt: tuple[RowsFound, ...] = ()
    if rows is None:
        steps = _steps(simulation, hesitating, names_enough=names_enough)
    else:
        hesitating().compute()
        steps, rebuilt = rows.run(simulation)
    spilled_nbytes = max(step.spilled_nbytes for step in steps)
    building = baseline.attach_nbytes + program.census.weight_nbytes
    return Prediction(
        settings=settings,
        steps=steps,
        building_nbytes=min(soft_limit_nbytes(settings.budget_nbytes), building),
        drive=dataclasses.replace(use, activations_nbytes=spilled_nbytes),
        tokens=program.tokens * settings.micro_batches,
        rebuilt=rebuilt,
    )


def _steps(
    simulation: Simulation, hesitating: Callable[[], Simulation], *, names_enough: bool
) -> tuple[SimulatedStep, ...]:
    """The first steps.

    Args:
        hesitating: the same on a drive that hesitates; a budget that it names is enough.
    """
    try:
        first = simulation.step()
    except BudgetError:
        if names_enough:
            hesitating().compute()
        raise
    if parts := simulation.doubtful_parts():
        hesitating().compute(parts)
    return first, *(simulation.step() for _ in range(1, _STEPS))


def _pages_stay(program: Program, machine: Machine, settings: Settings) -> bool:
    """Whether the kernel has room for all gradients in scratch beside the budget."""
    gradients = drive_use(program, settings, 0).gradients_nbytes
    return machine.tier("host").free_nbytes >= settings.budget_nbytes + gradients


def _step_room(program: Program, settings: Settings, room_nbytes: int) -> int:
    """Bytes of saved activations that the drive takes in a step, ``room_nbytes`` at once."""
    most = settings.write_budget_nbytes
    if most is None:
        return room_nbytes
    return max(min(room_nbytes, most - must_write_nbytes(program)), 0)


def drive_use(program: Program, settings: Settings, activations_nbytes: int) -> DriveUse:
    """As ``adopting.reserve_room`` reserves it: two slots of what is trained."""
    slots = 2 if settings.commits else 1
    extent_nbytes = cache(settings.extent_nbytes)  # layers are alike
    weights = gradients = 0
    for weight in program.census.weights:
        nbytes = extent_nbytes(weight.nbytes)
        weights += nbytes * (slots if weight.trainable else 1)
        gradients += nbytes if weight.trainable and weight.nbytes >= MIN_NBYTES else 0
    sizes = program.stepping.states_nbytes.values() if program.stepping else ()
    return DriveUse(
        weights_nbytes=weights,
        states_nbytes=slots * sum(extent_nbytes(nbytes) for each in sizes for nbytes in each),
        gradients_nbytes=gradients,
        activations_nbytes=activations_nbytes,
    )


def _check_drive(machine: Machine, settings: Settings, use: DriveUse) -> None:
    free = machine.tier(settings.drive).free_nbytes
    if use.nbytes > free:
        mend = "" if not settings.commits else ", or --commit never, which takes one slot of two"
        raise BudgetError(
            f"{settings.drive} has {format_nbytes(free)} free, the run takes "
            f"{format_nbytes(use.nbytes)} of it ({use.nbytes} bytes: weights "
            f"{format_nbytes(use.weights_nbytes)}, optimizer states "
            f"{format_nbytes(use.states_nbytes)}, gradients {format_nbytes(use.gradients_nbytes)}, "
            f"activations {format_nbytes(use.activations_nbytes)}): free "
            f"{format_nbytes(use.nbytes - free)} of it{mend}",
            needed_nbytes=use.nbytes,
            budget_nbytes=free,
        )


def least_budget(
    program: Program, machine: Machine, settings: Settings, baseline: Baseline
) -> Prediction:
    """The prediction for the smallest budget, in whole MiB, that is found to fit.

    Found by bisection: a budget that fits by chance below one that does not is not looked for.

    Raises:
        BudgetError: the drive is too small for any budget, or too little may be written to it.
        ConfigError: as ``predict``.
    """

    def attempt(mib: int, *, names_enough: bool = False) -> "Prediction | BudgetError":
        changed = dataclasses.replace(settings, budget_nbytes=mib * _MIB)
        try:
            return _predict(compiled, machine, changed, baseline, names_enough=names_enough)
        except BudgetError as error:
            return error

    _check_drive(machine, settings, drive_use(program, settings, 0))
    check_writes(program, settings.write_budget_nbytes)
    compiled = compile_program(program, Costs(machine, settings.drive))
    low, high, stride = 0, max(1, baseline.attach_nbytes // _MIB), _STRIDE_MIB
    while isinstance(tried := attempt(high, names_enough=True), BudgetError):
        named = -(-(tried.needed_nbytes or 0) // _MIB)
        low, high = high, max(high + stride, named)
        stride = 2 * (high - low)  # terabytes may be missing, and a refusal may name the next unit
    best = tried
    while high - low > 1:
        middle = (low + high) // 2
        tried = attempt(middle)
        if isinstance(tried, BudgetError):
            low = middle
        else:
            high, best = middle, tried
    return best


def largest(fits: Callable[[int], bool], *, start: int, grid: int, most: int) -> int | None:
    """The largest multiple of ``grid`` up to ``most`` that fits; None if ``grid`` itself does not.

    Found by doubling from ``start``, then by bisection.
    """
    low, high = 0, max(start // grid, 1) * grid
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most // grid * grid + grid)
    while high - low > grid:
        middle = (low + high) // 2 // grid * grid
        if fits(middle):
            low = middle
        else:
            high = middle
    return low or None
