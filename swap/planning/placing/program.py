"""A linear or mixed-integer program, and HiGHS to solve it.

HiGHS (Huangfu and Hall, Math. Prog. Comp. 10, 2018) is loaded when the first program is solved. It
runs with one thread and a fixed seed, so that the same program always has the same answer.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

INFINITY = float("inf")
_TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """A solution.

    Attributes:
        values: of the columns.
        objective: as it was minimised.
        duals: of the rows: the objective's change for each unit of a row's bound; all zero where
            columns are whole numbers.
    """

    values: tuple[float, ...]
    objective: float
    duals: tuple[float, ...]


@dataclass(slots=True)
class LinearProgram:
    """Columns with bounds and costs, rows of sums with bounds; costs are minimised."""

    upper: list[float] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)
    whole: list[bool] = field(default_factory=list)
    rows: list[tuple[float, Mapping[int, float], float]] = field(default_factory=list)

    def column(self, *, upper: float = INFINITY, cost: float = 0.0, whole: bool = False) -> int:
        """A new column, from 0 to ``upper``; its number."""
        self.upper.append(upper)
        self.costs.append(cost)
        self.whole.append(whole)
        return len(self.upper) - 1

    def row(
        self, low: float, terms: Mapping[int, float] | Iterable[tuple[int, float]], high: float
    ) -> int:
        """A new row: ``low <= sum of terms <= high``; its number."""
        kept = {at: value for at, value in dict(terms).items() if value}
        self.rows.append((low, kept, high))
        return len(self.rows) - 1

    def solve(self, costs: Sequence[float] | None = None) -> Solved | None:
        """The cheapest values, or None where no values satisfy all rows.

        Args:
            costs: of the columns, instead of their own.

        Raises:
            RuntimeError: the solver gave up; a defect.
        """
        import highspy as typed_in_part

        highspy: Any = typed_in_part
        solver = highspy.Highs()
        for name, value in _options(_TOLERANCE):
            solver.setOptionValue(name, value)
        solver.passModel(self._model(highspy, self.costs if costs is None else costs))
        solver.run()
        status = solver.getModelStatus()
        if status in {
            highspy.HighsModelStatus.kInfeasible,
            highspy.HighsModelStatus.kUnboundedOrInfeasible,
        }:
            return None
        if status != highspy.HighsModelStatus.kOptimal:
            raise RuntimeError(f"HiGHS ended with {solver.modelStatusToString(status)}")
        solution = solver.getSolution()
        duals = tuple(solution.row_dual)
        if any(self.whole) or len(duals) != len(self.rows):
            duals = (0.0,) * len(self.rows)
        return Solved(
            values=tuple(solution.col_value),
            objective=float(solver.getInfo().objective_function_value),
            duals=duals,
        )

    def _model(self, highspy: Any, costs: Sequence[float]) -> Any:
        """As HiGHS takes it: rows one after the other."""
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = len(self.upper), len(self.rows)
        lp.col_cost_ = np.array(costs, dtype=np.double)
        lp.col_lower_ = np.zeros(len(self.upper))
        lp.col_upper_ = np.array(self.upper, dtype=np.double)
        lp.row_lower_ = np.array([low for low, _, _ in self.rows], dtype=np.double)
        lp.row_upper_ = np.array([high for _, _, high in self.rows], dtype=np.double)
        lengths = [len(terms) for _, terms, _ in self.rows]
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.start_ = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        lp.a_matrix_.index_ = np.array(
            [at for _, terms, _ in self.rows for at in terms], dtype=np.int32
        )
        lp.a_matrix_.value_ = np.array(
            [value for _, terms, _ in self.rows for value in terms.values()], dtype=np.double
        )
        if any(self.whole):
            kinds = highspy.HighsVarType
            lp.integrality_ = [
                kinds.kInteger if whole else kinds.kContinuous for whole in self.whole
            ]
        return lp


def _options(tolerance: float) -> tuple[tuple[str, Any], ...]:
    return (
        ("output_flag", False),
        ("threads", 1),
        ("random_seed", 0),
        ("primal_feasibility_tolerance", tolerance),
        ("dual_feasibility_tolerance", tolerance),
        ("mip_feasibility_tolerance", tolerance),
        ("mip_rel_gap", 0.0),
        ("mip_abs_gap", tolerance),
    )
