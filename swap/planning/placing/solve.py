"""The placement with the shortest step, as a mixed-integer program over every tier and class.

Columns are the shares of the choices (``choices``); rows are: every byte is placed once; at no tick
does a tier hold more than its budget; a phase is as long as each of its limits. MEMO (SIGMOD'25,
section 4) solves the same for one class, one link and one fraction; FlexGen (ICML'23, section 4.3)
as a linear program over three tiers, with equal fractions in all layers. Blocks of one kind have
equal shares here, too, so that the program is as small as the model has different blocks.

Of plans with the same step the one with the least traffic and the least rebuilding is taken. The
size of the micro-batch and the room for one block ahead change the program itself: all their
combinations are solved.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from offload.allocator.errors import BudgetError, ConfigError
from offload.allocator.units import format_nbytes
from offload.swap.planning.placing.choices import (
    PHASES,
    Bytes,
    Choice,
    Cost,
    Phase,
    Rules,
    choices_of,
    constant_cost,
    cost_of,
    limit_seconds,
    stepped_roles,
)
from offload.swap.planning.placing.network import Network
from offload.swap.planning.placing.placement import Placement, Price, make_placement
from offload.swap.planning.placing.program import INFINITY, LinearProgram, Solved
from offload.swap.planning.placing.work import Role, Work

_SAME = 1e-7  # of a step: plans that differ less are equally fast
_MIB = 1 << 20


def place(works: Sequence[Work], network: Network, rules: Rules | None = None) -> Placement:
    """The placement with the shortest step.

    Args:
        works: the same step with micro-batches of different sizes, the first of equals preferred.
        rules: what the plan may do; ``ahead`` is chosen where the rules allow it.

    Raises:
        BudgetError: nothing fits; names the binding tier, the moment, and the smallest change.
        ConfigError: a role that may be nowhere, or a link that was not measured.
    """
    rules = rules or Rules()
    best: Placement | None = None
    for candidate in _programs(works, network, rules):
        found = candidate.solve()
        if found is not None and (best is None or found.step_s < best.step_s * (1 - _SAME)):
            best = found
    if best is None:
        raise _refusal(works, network, rules)
    return best


def least_budget(
    works: Sequence[Work], network: Network, tier: str, rules: Rules | None = None
) -> int | None:
    """The least bytes of ``tier`` with which something fits, the other budgets as they are.

    None: no budget of this tier alone would do.
    """
    needed = [
        least
        for candidate in _programs(works, network, rules or Rules())
        if (least := candidate.least(tier)) is not None
    ]
    return min(needed, default=None)


def _programs(works: Sequence[Work], network: Network, rules: Rules) -> Iterator["_Program"]:
    for work in works:
        for ahead in (True, False) if rules.ahead else (False,):
            yield _Program(work, network, dataclasses.replace(rules, ahead=ahead))


@dataclass(frozen=True, slots=True)
class _Row:
    """The bytes of one tier at one tick: of the constant, and of each choice."""

    tier: str
    tick: int
    constant: float
    terms: Bytes


@dataclass(frozen=True, slots=True)
class _Built:
    """The program, the columns of choices and of phases, what a relaxed tier has more, its rows."""

    program: LinearProgram
    columns: list[int]
    times: dict[Phase, int]
    excess: int
    bytes_rows: dict[int, str]


class _Program:
    """One micro-batch, with or without room for a block ahead."""

    def __init__(self, work: Work, network: Network, rules: Rules) -> None:
        self.work, self.network, self.rules = work, network, rules
        self.choices = tuple(choices_of(work, network, rules))
        self.costs = [cost_of(choice, work, network, rules) for choice in self.choices]
        self.constant = constant_cost(work, network)
        self._rows = list(self._byte_rows())
        # Programs of seconds far from 1 lose digits.
        self._unit_s = sum(self.constant.seconds.values()) or 1.0

    def solve(self) -> Placement | None:
        """The best placement; None if none fits."""
        built = self._build()
        program = built.program
        first = program.solve()
        if first is None:
            return None
        priced = _priced(program, first)
        shares = self._shares(self._calmest(built, first), built.columns)
        prices = tuple(self._prices(priced, built.bytes_rows))
        return make_placement(
            self.work,
            self.network,
            self.rules,
            list(zip(self.choices, self.costs, shares, strict=True)),
            prices,
        )

    def least(self, tier: str) -> int | None:
        """The least budget of ``tier``."""
        built = self._build(relaxed=tier)
        excess, columns = built.excess, range(len(built.program.upper))
        solved = built.program.solve([float(at == excess) for at in columns])
        if solved is None:
            return None
        scale = self._scale(tier)
        budget = self.network.budgets[tier]
        return max(budget, 0) + int(np.ceil(solved.values[excess] * scale))

    def moment(self, tier: str) -> str:
        """When ``tier`` is needed most if everything that may be elsewhere is."""
        rows = [row for row in self._rows if row.tier == tier]
        if not rows:
            return "the step"
        tightest = max(rows, key=lambda row: row.constant + self._least(row))
        return self.work.tick_name(tightest.tick)

    def _least(self, row: _Row) -> float:
        """Bytes of a row where each class is placed to take the fewest."""
        fewest: dict[tuple[int, str, int], float] = {}
        for choice, nbytes in zip(self.choices, row.terms, strict=True):
            key = choice.kind, choice.role, choice.part
            fewest[key] = min(fewest.get(key, INFINITY), float(nbytes))
        return sum(fewest.values())

    # Building.

    def _build(self, relaxed: str | None = None) -> "_Built":
        """The program; with ``relaxed``, this tier may have more, at a price."""
        program = LinearProgram()
        columns = [
            self._column(program, choice, cost)
            for choice, cost in zip(self.choices, self.costs, strict=True)
        ]
        times = {phase: program.column(cost=1.0) for phase in PHASES}
        excess = program.column(upper=0.0 if relaxed is None else INFINITY)
        self._place_all(program, columns)
        bytes_rows = {}
        for row in self._rows:
            budget, scale = self.network.budgets[row.tier], self._scale(row.tier)
            terms = {
                columns[at]: float(nbytes) * self._share(self.choices[at]) / scale
                for at, nbytes in enumerate(row.terms)
                if nbytes
            }
            if row.tier == relaxed:
                terms[excess] = -1.0
            number = program.row(-INFINITY, terms, (budget - row.constant) / scale)
            bytes_rows[number] = row.tier
        for phase in PHASES:
            self._time(program, columns, times[phase], phase)
        return _Built(program, columns, times, excess, bytes_rows)

    def _column(self, program: LinearProgram, choice: Choice, cost: Cost) -> int:
        parts = self._parts(choice)
        exposed = cost.exposed_s * self._share(choice) / self._unit_s
        if parts is None:
            return program.column(upper=1.0, cost=exposed)
        return program.column(upper=float(parts), cost=exposed, whole=True)

    def _parts(self, choice: Choice) -> int | None:
        """Into how many equal parts the class may be cut; None: any."""
        blocks = self.work.order.count(choice.kind)
        if choice.whole:
            return blocks
        return self.rules.grain

    def _share(self, choice: Choice) -> float:
        """What one unit of the choice's column is of the class."""
        return 1.0 / (self._parts(choice) or 1)

    def _place_all(self, program: LinearProgram, columns: Sequence[int]) -> None:
        """Every byte once; the classes of one stepper agree, see [Note: who steps what]."""
        groups: dict[tuple[int, str, int, str | None], dict[int, float]] = defaultdict(dict)
        for choice, column in zip(self.choices, columns, strict=True):
            key = choice.kind, choice.role, choice.part, choice.stepper
            groups[key][column] = self._share(choice)
        self._check_placeable({key[:3] for key in groups})
        shared = self._steppers(program) if self.rules.even else None
        for at, kind in enumerate(self.work.kinds):
            if roles := stepped_roles(kind):
                stepped = shared or self._steppers(program)
                for role in roles:
                    for name, column in stepped.items():
                        program.row(0.0, {**groups[at, role, 0, name], column: -1.0}, 0.0)
        for (_, _, _, stepper), terms in groups.items():
            if stepper is None:
                program.row(1.0, terms, 1.0)

    def _steppers(self, program: LinearProgram) -> dict[str, int]:
        """Columns of the shares that are stepped by each."""
        stepped = {one.name: program.column(upper=1.0) for one in self.rules.stepping(self.network)}
        program.row(1.0, dict.fromkeys(stepped.values(), 1.0), 1.0)
        for name, share in self.rules.shares.items():
            program.row(share, {stepped[name]: 1.0}, share)
        return stepped

    def _check_placeable(self, placeable: set[tuple[int, str, int]]) -> None:
        for at, kind in enumerate(self.work.kinds):
            wanted: list[tuple[Role, int]] = [(role, 0) for role in stepped_roles(kind)]
            wanted += [("frozen", 0)] if kind.frozen_nbytes else []
            wanted += [("saved", number) for number in range(len(kind.saved))]
            for role, part in wanted:
                if (at, role, part) not in placeable:
                    raise ConfigError(
                        f"{kind.name}: the rules leave no place for its {role}: allow one of "
                        f"{', '.join(self.network.budgets)}"
                    )

    def _time(
        self, program: LinearProgram, columns: Sequence[int], time: int, phase: Phase
    ) -> None:
        """The phase is as long as each limit."""
        ahead = self.rules.ahead
        base = limit_seconds(self.network, self.constant.seconds, phase, ahead=ahead)
        each = [
            limit_seconds(self.network, cost.seconds, phase, ahead=ahead) for cost in self.costs
        ]
        for number, least_s in enumerate(base):
            terms = {time: 1.0}
            for choice, column, seconds in zip(self.choices, columns, each, strict=True):
                terms[column] = -seconds[number] * self._share(choice) / self._unit_s
            program.row(least_s / self._unit_s, terms, INFINITY)

    def _byte_rows(self) -> Iterator[_Row]:
        """For each tier the ticks that can bind.

        A tick whose bytes are, for every choice, halfway between those of its neighbours can't: it
        lies within a stretch of equal blocks.
        """
        zeros = np.zeros(self.work.ticks)
        for tier, budget in self.network.budgets.items():
            held = [self.constant, *self.costs]
            table = np.stack([cost.held.get(tier, zeros) for cost in held], axis=1)
            bend = np.any(np.diff(table, 2, axis=0) != 0, axis=1)
            binding = np.concatenate([[True], bend, [True]])
            before: Bytes | None = None
            for tick in np.flatnonzero(binding):
                row = table[tick]
                if before is not None and np.array_equal(row, before):
                    continue
                before = row
                if row.sum() > budget:  # no choice has more than all of it
                    yield _Row(tier, int(tick), float(row[0]), row[1:])

    def _scale(self, tier: str) -> float:
        """Bytes that are 1 in the rows of a tier."""
        return float(max(self.network.budgets[tier], _MIB))

    # Reading.

    def _calmest(self, built: "_Built", first: Solved) -> Solved:
        """Of the plans that are as fast, the one that moves and rebuilds least."""
        program = built.program
        busy = [0.0] * len(program.upper)
        for choice, column, cost in zip(self.choices, built.columns, self.costs, strict=True):
            busy[column] = sum(cost.seconds.values()) * self._share(choice) / self._unit_s
        for column in built.times.values():
            busy[column] = 1e-3  # a phase is no longer than it must be
        limit = first.objective * (1 + _SAME / 10) + 1e-9
        program.row(-INFINITY, dict(enumerate(program.costs)), limit)
        return program.solve(busy) or first

    def _shares(self, solved: Solved, columns: Sequence[int]) -> list[float]:
        """Of each choice; what the solver's tolerance left is taken off."""
        shares = []
        for choice, column in zip(self.choices, columns, strict=True):
            parts = self._parts(choice)
            value = solved.values[column]
            share = value if parts is None else round(value) / parts
            shares.append(0.0 if share < 1e-9 else 1.0 if share > 1 - 1e-9 else share)
        return shares

    def _prices(self, solved: Solved, bytes_rows: dict[int, str]) -> Iterator[Price]:
        """What one more GiB of each tier would save, by the duals."""
        saved: dict[str, float] = defaultdict(float)
        for number, tier in bytes_rows.items():
            saved[tier] += max(-solved.duals[number], 0.0) * self._unit_s / self._scale(tier)
        for tier in self.network.budgets:
            yield Price(tier=tier, s_per_gib=saved[tier] * (1 << 30))


def _priced(program: LinearProgram, solved: Solved) -> Solved:
    """The same solution with duals: whole numbers are held where they are."""
    if not any(program.whole):
        return solved
    held = LinearProgram(
        upper=program.upper,
        costs=program.costs,
        whole=[False] * len(program.whole),
        rows=list(program.rows),
    )
    for column, whole in enumerate(program.whole):
        if whole:
            value = round(solved.values[column])
            held.row(value, {column: 1.0}, value)
    return held.solve() or solved


def _refusal(works: Sequence[Work], network: Network, rules: Rules) -> BudgetError:
    """Nothing fits: the binding tier, the moment, and the smallest change that mends it."""
    changes = {
        tier: least
        for tier in network.budgets
        if (least := least_budget(works, network, tier, rules)) is not None
    }
    if not changes:
        given = ", ".join(f"{tier}={format_nbytes(b)}" for tier, b in network.budgets.items())
        return BudgetError(
            f"nothing fits {given}, and no tier alone would mend it: raise more than one budget, "
            "or take a smaller batch",
            needed_nbytes=sum(network.budgets.values()),
            budget_nbytes=sum(network.budgets.values()),
        )
    tier = min(changes, key=lambda name: (changes[name] - network.budgets[name], name))
    budget, needed = network.budgets[tier], -(-changes[tier] // _MIB) * _MIB
    tightest = _Program(works[-1], network, dataclasses.replace(rules, ahead=False))
    others = [
        f"or {_option(name)}={-(-changes[name] // _MIB)}MiB" for name in changes if name != tier
    ]
    return BudgetError(
        f"does not fit: {tier} has {format_nbytes(budget)} ({budget} bytes) and needs "
        f"{format_nbytes(needed)} ({needed} bytes), most during {tightest.moment(tier)}, with "
        "everything elsewhere that can be. The smallest change that fits: "
        f"{_option(tier)}={needed // _MIB}MiB" + (f" ({', '.join(others)})" if others else ""),
        needed_nbytes=needed,
        budget_nbytes=budget,
    )


def _option(tier: str) -> str:
    """The tier as a budget names it."""
    return "device" if tier.startswith("device:") else tier
