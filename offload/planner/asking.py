"""One question to the planner, as the verb's arguments put it: what is traced, solved and told."""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from offload.allocator.errors import BudgetError, ConfigError
from offload.allocator.units import format_nbytes
from offload.config import OffloadConfig, make_config
from offload.planner.answer import advise, refused, solve_batch, solve_length
from offload.planner.baseline import RUNNING_NBYTES, measure_baseline
from offload.planner.on_device import PlacementAnswer, Placing, answer_placement
from offload.planner.recording import recorded
from offload.planner.refine import Recorded, refine
from offload.planner.sources import Batch
from offload.planner.text import Answer, describe_machine
from offload.swap.planning.predict import Baseline, Prediction, Settings, least_budget, predict
from offload.swap.planning.program import Product, Program
from offload.swap.planning.whatif import changed, parse_changes
from offload.tiers.hostmem import HUGE_PAGE, PAGE
from offload.tiers.machine import Machine

_NEVER_PLACED = ("step_in_backward", "step_in_forward", "nvme_write_budget", "recompute")


class Asking:
    """One question: the model is traced when it is needed, for each batch once.

    Args:
        arguments: of the verb.
        source: of the model; ``name`` and ``machine``: where it would run.
        drive: the tier of the store.
        budget: bytes of host memory; None: most of what is free.
        baseline_nbytes: of a process without a model, if that was given.
        recorded: a run of the same model.
        say: is told of what takes long.
    """

    def __init__(
        self,
        arguments: argparse.Namespace,
        source: Any,
        name: str,
        machine: Machine,
        drive: str,
        budget: int | None,
        baseline_nbytes: int | None,
        recorded: Recorded | None,
        say: Callable[[str], None],
    ) -> None:
        self.arguments = arguments
        self._changes = parse_changes(arguments.what_if) if arguments.what_if else {}
        self.source = source
        self.name = name
        self.machine = machine
        self._recorded = recorded
        self._refined = ""
        self._say = say
        self._trace = cache(source.trace)
        # A recorded run tells it, as far as nothing else is known.
        given = baseline_nbytes or (recorded.attach_nbytes if recorded else None)
        self._baseline: Baseline | None = None
        if given:
            self._baseline = Baseline(attach_nbytes=given, running_nbytes=RUNNING_NBYTES)
        host, config = machine.tier("host"), config_of(arguments)
        self.settings = Settings(
            budget_nbytes=budget or int(min(host.free_nbytes, host.capacity_nbytes) * 0.8),
            drive=drive,
            commits=arguments.commit != "never",
            step_in_backward=arguments.step_in_backward,
            step_in_forward=arguments.step_in_forward,
            align_nbytes=HUGE_PAGE if len(arguments.nvme) > 1 else PAGE,
            write_budget_nbytes=config.nvme_write_budget,
            alpha=config.alpha if config.recompute == "tokenwise" else None,
            micro_batches=arguments.micro_batches or _passes_of(recorded),
        )

    def answer(self) -> Answer:
        """The answer to the first screen.

        Raises:
            BudgetError: it does not fit.
        """
        arguments, solve = self.arguments, self.arguments.solve
        batch = Batch(sequences=arguments.batch or 1, length=self._length())
        if self._recorded is not None:
            self._refine(self._trace(batch), given=arguments.baseline is not None)
        self._find_baseline(self._trace(batch).products)
        self._change_rates()  # of what is known by then
        solved = None
        if solve in {"seq", "batch"}:
            self._say(f"looking for the largest {solve} that fits")
            if solve == "seq":
                found = solve_length(self._trace, batch, self._fits, longest=self.source.longest())
                batch = dataclasses.replace(batch, length=found or batch.length)
                solved = f"--seq {found} is the longest that fits, on a grid of 64"
            else:
                found = solve_batch(self._trace, batch, self._fits)
                batch = dataclasses.replace(batch, sequences=found or batch.sequences)
                solved = f"--batch {found} is the largest that fits"
        program = self._trace(batch)
        if solve == "host":
            self._say("looking for the least memory that fits")
            least = least_budget(program, self.machine, self.settings, self.baseline)
            self.settings = least.settings
            budget = f"host={least.settings.budget_nbytes >> 20}MiB"
            solved = f"--budget {budget} is the least that fits"
        prediction = self._predict(program)
        return Answer(
            title=self._title(program, batch),
            machine_name=describe_machine(self.name, self.machine, self.settings.drive),
            program=program,
            machine=self.machine,
            prediction=prediction,
            solved=solved,
            advice=advise(program, self.machine, self.settings, self.baseline, prediction),
            notes=self._notes(prediction),
            placement=self._beside(program, batch),
        )

    def place(self, budgets: dict[str, int]) -> PlacementAnswer:
        """The answer where the model computes on a GPU.

        Raises:
            BudgetError: it does not fit.
            ConfigError: a tier that the machine has not, or what was not measured.
        """
        if self.arguments.record is not None:
            raise ConfigError("--record keeps what is simulated on the CPU: leave device= out")
        if self._recorded is not None:
            raise ConfigError("--from corrects what is simulated on the CPU: leave device= out")
        self._check_placeable()
        self._change_rates()
        self._find_baseline()  # the host makes no products
        batch = Batch(sequences=self.arguments.batch or 1, length=self._length())
        return answer_placement(
            self._placing(budgets),
            batch,
            name=self.name,
            title=self._title,
            solve=self.arguments.solve,
            longest=self.source.longest(),
        )

    def _beside(self, program: Program, batch: Batch) -> PlacementAnswer | str | None:
        """The placement on the GPU that this machine has besides, or why there is none."""
        if not any(tier.kind == "device" for tier in self.machine.tiers):
            return None
        try:
            self._check_placeable()
            placing = self._placing({"host": self.settings.budget_nbytes}, {batch: program})
            return answer_placement(placing, batch, name=self.name, title=self._title)
        except (BudgetError, ConfigError) as error:
            return str(error)

    def _check_placeable(self) -> None:
        unknown = [
            f"--{name.replace('_', '-')}"
            for name in _NEVER_PLACED
            if getattr(self.arguments, name) not in {None, False, "off"}
        ]
        if self.settings.micro_batches > 1:
            unknown.append("--micro-batches")
        if unknown:
            raise ConfigError(
                f"{', '.join(unknown)}: no placement knows it, a prediction on the CPU does: leave "
                "it, or device=, out"
            )

    def _placing(
        self, budgets: dict[str, int], known: dict[Batch, Program] | None = None
    ) -> Placing:
        return Placing(
            self._trace,
            self.machine,
            self.settings.drive,
            budgets,
            self.baseline,
            commits=self.settings.commits,
            known=known or {},
        )

    @property
    def baseline(self) -> Baseline:
        """Of a process without a model."""
        assert self._baseline is not None
        return self._baseline

    def _find_baseline(self, products: Sequence[Product] = ()) -> None:
        if self._baseline is None:
            self._say("measuring what a process takes without a model")
            self._baseline = measure_baseline(self.source.held, products)

    def _change_rates(self) -> None:
        """As ``--what-if`` asks."""
        if self._changes:
            self.machine = changed(self.machine, self.settings.drive, self._changes)
            self.name += f", what if {self.arguments.what_if}"

    def _refine(self, program: Program, *, given: bool) -> None:
        """Take from the recorded run what it knows better; a given baseline stays."""
        assert self._recorded is not None
        refined = refine(
            program,
            self.machine,
            self.settings.drive,
            self._recorded,
            micro_batches=self.settings.micro_batches,
        )
        self.machine, self._refined = refined.machine, refined.note
        if not given:
            self._baseline = refined.baseline

    def _fits(self, program: Program) -> bool:
        try:
            predict(program, self.machine, self.settings, self.baseline)
        except BudgetError:
            return False
        return True

    def _predict(self, program: Program) -> Prediction:
        with recorded(self.arguments.record, self.settings, self.machine) as recorder:
            try:
                return predict(
                    program, self.machine, self.settings, self.baseline, recorder=recorder
                )
            except BudgetError as error:
                raise refused(error, program, self.machine, self.settings, self.baseline) from error

    def _length(self) -> int:
        longest, length = self.source.longest(), self.arguments.seq
        if length is None:
            return min(longest or 1024, 1024)
        if longest is not None and length > longest:
            raise ConfigError(
                f"--seq {length}: {self.source.name} has positions for {longest} tokens"
            )
        return int(length)

    def _title(self, program: Program, batch: Batch) -> str:
        name = program.stepping.name if program.stepping else "no optimizer"
        count = self.settings.micro_batches
        times = f" x {count} micro-batches" if count > 1 else ""
        return (
            f"{self.source.name} ({program.parameters / 1e6:,.1f}M parameters)  "
            f"{self.source.describe(batch)}{times}  {name}"
        )

    def _notes(self, prediction: Prediction) -> tuple[str, ...]:
        notes = [self._refined] if self._refined else []
        if any(tier.kind == "device" for tier in self.machine.tiers):
            notes.append("computing on the CPU is predicted; for the GPU see the placement")
        if prediction.building_nbytes == prediction.peak_nbytes:
            notes.append("the peak is that of building the model with offload.init")
        host = self.machine.tier("host").capacity_nbytes
        if self.settings.budget_nbytes > host:
            notes.append(f"the machine has {format_nbytes(host)}, less than the budget")
        return tuple(notes)


def _passes_of(recorded: Recorded | None) -> int:
    """Micro-batches of a step as far as a record tells them, or one."""
    return recorded.micro_batches or 1 if recorded is not None else 1


def config_of(arguments: argparse.Namespace) -> OffloadConfig:
    """What of a run's settings is asked for, refused as a run refuses it.

    Raises:
        ConfigError: a setting that a run refuses.
    """
    names = (
        "nvme_write_budget", "recompute", "alpha", "step_in_backward", "step_in_forward",
        "state_precision",
    )  # fmt: skip
    return make_config(OffloadConfig(), **{name: getattr(arguments, name) for name in names})
