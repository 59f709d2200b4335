"""``offload plan``: does it fit, how slow, bound by what, what to change."""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload.allocator.errors import BudgetError, ConfigError
from offload.allocator.units import LEAST_MEMORY_NBYTES, format_nbytes, parse_nbytes
from offload.config import OffloadConfig, make_config

if TYPE_CHECKING:
    from offload.planner.on_device import PlacementAnswer, Placing
    from offload.planner.refine import Recorded
    from offload.planner.sources import Batch
    from offload.swap.planning.predict import Baseline, Prediction
    from offload.swap.planning.program import Program
    from offload.tiers.machine import Machine

HELP = "before the first step: does it fit, how slow, bound by what, what to change"
DESCRIPTION = """\
Tell what fine-tuning a model would need and how long a step would take, without
loading its weights. MODEL is a Hugging Face config.json, or its directory, or a
training script, which runs until its first backward (its own arguments after --args).

  offload plan checkpoints/llama --seq 2048 --budget host=8GiB --machine machine.json
  offload plan config.json --solve host
Exit code 3 if it does not fit, with the smallest change that would."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.add_argument("model", metavar="MODEL|script.py", type=Path, nargs="?")
    parser.add_argument("--seq", metavar="N", type=int, help="tokens of a sequence (default: 1024)")
    parser.add_argument("--batch", metavar="N", type=int, help="sequences of a step (default: 1)")
    parser.add_argument("--optim", metavar="O", help="adamw (default), adam, sgd, …")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--method", choices=["full", "lora"])
    parser.add_argument(
        "--budget",
        metavar="B",
        help="for example host=24GiB, or just 24GiB; with device=20GiB, and numa:1=64GiB, on a GPU",
    )
    parser.add_argument(
        "--nvme",
        metavar="DIR",
        action="append",
        default=[],
        help="the directory of the store; several, each after its own --nvme, are striped",
    )
    parser.add_argument("--commit", choices=["step", "never"], default="step")
    parser.add_argument(
        "--step-in-backward",
        action="store_true",
        help="step each parameter as soon as its gradient is complete",
    )
    parser.add_argument(
        "--state-precision",
        choices=["exact", "bf16", "8bit"],
        default="exact",
        help="of optimizer states in the store; all but exact round",
    )
    parser.add_argument(
        "--master-weights",
        choices=["none", "fp32"],
        default="none",
        help="fp32: bfloat16 weights are stepped in float32",
    )
    parser.add_argument(
        "--recompute",
        choices=["off", "tokenwise"],
        default="off",
        help="tokenwise: some token rows of what blocks save are swapped, the others rebuilt",
    )
    parser.add_argument(
        "--alpha", metavar="A", help="the share of rows that is swapped, 0 to 1, or auto (default)"
    )
    parser.add_argument(
        "--nvme-write-budget",
        metavar="SIZE",
        help="bytes that a step may write to the drive, everything included",
    )
    parser.add_argument(
        "--machine",
        metavar="FILE|NAME",
        help="of offload doctor -o, or of the library (--machine list); default: this one, as it "
        "was measured last",
    )
    parser.add_argument(
        "--measure", action="store_true", help="measure this machine again, whatever is kept"
    )
    parser.add_argument(
        "--from",
        dest="recorded",
        metavar="RUN",
        type=Path,
        help="correct rates and memory by what a recorded run of this model has shown",
    )
    parser.add_argument(
        "--baseline", metavar="SIZE", help="resident set without a model; default: measured here"
    )
    parser.add_argument("--what-if", metavar="C", help="for example nvme=7GB/s,compute=2x")
    parser.add_argument(
        "--solve",
        choices=["seq", "batch", "host"],
        help="find the longest sequence, the largest batch, or the least memory",
    )
    parser.add_argument("--record", metavar="DIR", type=Path, help="events, for offload report")
    parser.add_argument("--explain", action="store_true", help="why each class went where")
    parser.add_argument("--json", action="store_true", help="the same figures as JSON")
    parser.add_argument(
        "--args", metavar="…", nargs=argparse.REMAINDER, default=[], help="the script's own"
    )


def run(arguments: argparse.Namespace) -> int:
    """Plan, and print on stdout; progress goes to stderr. 3 where it does not fit.

    Raises:
        ConfigError: wrong settings, no such model or machine, or one that lacks measurements.
        UnsupportedError: a model that can't be planned.
    """
    from offload.planner.text import refusal_to_json

    try:
        return _run(arguments)
    except BudgetError as error:
        if not arguments.json:
            raise
        print(refusal_to_json(str(error), error.needed_nbytes, error.budget_nbytes))
        return error.exit_code


def _run(arguments: argparse.Namespace) -> int:
    from offload.planner.machines import find_machine, list_machines
    from offload.planner.on_device import split_budget
    from offload.planner.placement_text import placement_to_json, print_placement
    from offload.planner.text import print_answer, to_json

    if arguments.machine == "list":
        print(list_machines())
        return 0
    host, others = split_budget(arguments.budget)
    budget = _budget_of(host)
    baseline_nbytes = _size("--baseline", arguments.baseline)
    _check_counts(arguments)
    recorded = _recorded_of(arguments)
    source = _source_of(arguments)
    name, machine, drive = find_machine(
        arguments.machine, arguments.nvme, _say, measure=arguments.measure
    )
    machine.check_measured()
    asking = _Asking(arguments, source, name, machine, drive, budget, baseline_nbytes, recorded)
    if others:
        placed = asking.place(others if budget is None else {"host": budget, **others})
        if arguments.json:
            print(placement_to_json(placed))
        else:
            print_placement(placed, explain=arguments.explain)
        return 0
    answer = asking.answer()
    if arguments.json:
        print(to_json(answer))
    else:
        print_answer(answer, explain=arguments.explain)
    return 0


class _Asking:
    """One question: the model is traced when it is needed, for each batch once."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        source: Any,
        name: str,
        machine: "Machine",
        drive: str,
        budget: int | None,
        baseline_nbytes: int | None,
        recorded: "Recorded | None",
    ) -> None:
        from offload.swap.planning.predict import Settings
        from offload.swap.planning.whatif import parse_changes
        from offload.tiers.hostmem import HUGE_PAGE, PAGE

        self.arguments = arguments
        self._changes = parse_changes(arguments.what_if) if arguments.what_if else {}
        self.source = source
        self.name = name
        self.machine = machine
        self._recorded = recorded
        self._refined = ""
        # A recorded run tells it, as far as nothing else is known.
        self.baseline = _baseline_of(
            baseline_nbytes or (recorded.attach_nbytes if recorded else None), source
        )
        host, config = machine.tier("host"), _config_of(arguments)
        self.settings = Settings(
            budget_nbytes=budget or int(min(host.free_nbytes, host.capacity_nbytes) * 0.8),
            drive=drive,
            commits=arguments.commit != "never",
            step_in_backward=arguments.step_in_backward,
            align_nbytes=HUGE_PAGE if len(arguments.nvme) > 1 else PAGE,
            write_budget_nbytes=config.nvme_write_budget,
            alpha=config.alpha if config.recompute == "tokenwise" else None,
        )

    def answer(self) -> Any:
        """The answer to the first screen.

        Raises:
            BudgetError: it does not fit.
        """
        from offload.planner.answer import advise, solve_batch, solve_length
        from offload.planner.sources import Batch
        from offload.planner.text import Answer, describe_machine
        from offload.swap.planning.predict import least_budget

        arguments, solve = self.arguments, self.arguments.solve
        batch = Batch(sequences=arguments.batch or 1, length=self._length())
        if self._recorded is not None:
            self._refine(self.source.trace(batch), given=arguments.baseline is not None)
        self._change_rates()  # of what is known by then
        solved = None
        if solve in {"seq", "batch"}:
            _say(f"looking for the largest {solve} that fits")
            if solve == "seq":
                found = solve_length(
                    self.source.trace, batch, self._fits, longest=self.source.longest()
                )
                batch = dataclasses.replace(batch, length=found or batch.length)
                solved = f"--seq {found} is the longest that fits, on a grid of 64"
            else:
                found = solve_batch(self.source.trace, batch, self._fits)
                batch = dataclasses.replace(batch, sequences=found or batch.sequences)
                solved = f"--batch {found} is the largest that fits"
        program = self.source.trace(batch)
        if solve == "host":
            _say("looking for the least memory that fits")
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

    def place(self, budgets: dict[str, int]) -> "PlacementAnswer":
        """The answer where the model computes on a GPU.

        Raises:
            BudgetError: it does not fit.
            ConfigError: a tier that the machine has not, or what was not measured.
        """
        from offload.planner.on_device import answer_placement
        from offload.planner.sources import Batch

        if self.arguments.record is not None:
            raise ConfigError("--record keeps what is simulated on the CPU: leave device= out")
        if self._recorded is not None:
            raise ConfigError("--from corrects what is simulated on the CPU: leave device= out")
        self._check_exact()
        self._change_rates()
        batch = Batch(sequences=self.arguments.batch or 1, length=self._length())
        return answer_placement(
            self._placing(budgets),
            batch,
            name=self.name,
            title=self._title,
            solve=self.arguments.solve,
            longest=self.source.longest(),
        )

    def _beside(self, program: "Program", batch: "Batch") -> "PlacementAnswer | str | None":
        """The placement on the GPU that this machine has besides, or why there is none."""
        from offload.planner.on_device import answer_placement

        if not any(tier.kind == "device" for tier in self.machine.tiers):
            return None
        try:
            self._check_exact()
            placing = self._placing({"host": self.settings.budget_nbytes}, {batch: program})
            return answer_placement(placing, batch, name=self.name, title=self._title)
        except (BudgetError, ConfigError) as error:
            return str(error)

    def _check_exact(self) -> None:
        given = [
            f"--{name.replace('_', '-')} {getattr(self.arguments, name)}"
            for name, default in (
                ("state_precision", "exact"),
                ("master_weights", "none"),
                ("nvme_write_budget", None),
                ("recompute", "off"),
            )
            if getattr(self.arguments, name) != default
        ]
        if given:
            raise ConfigError(
                f"{', '.join(given)}: predicted where the model computes on the CPU: leave "
                "device= out"
            )

    def _placing(
        self, budgets: dict[str, int], known: "dict[Batch, Program] | None" = None
    ) -> "Placing":
        from offload.planner.on_device import Placing

        return Placing(
            self.source.trace,
            self.machine,
            self.settings.drive,
            budgets,
            self.baseline,
            commits=self.settings.commits,
            known=known or {},
        )

    def _change_rates(self) -> None:
        """As ``--what-if`` asks."""
        if self._changes:
            from offload.swap.planning.whatif import changed

            self.machine = changed(self.machine, self.settings.drive, self._changes)
            self.name += f", what if {self.arguments.what_if}"

    def _refine(self, program: "Program", *, given: bool) -> None:
        """Take from the recorded run what it knows better; a given baseline stays."""
        from offload.planner.refine import refine

        assert self._recorded is not None
        refined = refine(program, self.machine, self.settings.drive, self._recorded)
        self.machine, self._refined = refined.machine, refined.note
        if not given:
            self.baseline = refined.baseline

    def _fits(self, program: "Program") -> bool:
        from offload.swap.planning.predict import predict

        try:
            predict(program, self.machine, self.settings, self.baseline)
        except BudgetError:
            return False
        return True

    def _predict(self, program: "Program") -> "Prediction":
        from offload.planner.answer import refused
        from offload.planner.recording import recorded
        from offload.swap.planning.predict import predict

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

    def _title(self, program: "Program", batch: "Batch") -> str:
        name = program.stepping.name if program.stepping else "no optimizer"
        return (
            f"{self.source.name} ({program.parameters / 1e6:,.1f}M parameters)  "
            f"{self.source.describe(batch)}  {name}"
        )

    def _notes(self, prediction: "Prediction") -> tuple[str, ...]:
        notes = [self._refined] if self._refined else []
        if any(tier.kind == "device" for tier in self.machine.tiers):
            notes.append("computing on the CPU is predicted; for the GPU see the placement")
        if prediction.building_nbytes == prediction.peak_nbytes:
            notes.append("the peak is that of building the model with offload.init")
        host = self.machine.tier("host").capacity_nbytes
        if self.settings.budget_nbytes > host:
            notes.append(f"the machine has {format_nbytes(host)}, less than the budget")
        return tuple(notes)


def _config_of(arguments: argparse.Namespace) -> OffloadConfig:
    """What of a run's settings is asked for, refused as a run refuses it."""
    names = ("nvme_write_budget", "recompute", "alpha")
    return make_config(OffloadConfig(), **{name: getattr(arguments, name) for name in names})


def _budget_of(text: str | None) -> int | None:
    if text is None:
        return None
    budget = make_config({}, budget=text).budget
    if "host" not in budget:
        raise ConfigError("--budget: host=SIZE bounds memory, for example host=24GiB")
    return budget["host"]


def _size(option: str, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        nbytes = parse_nbytes(text)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from error
    if nbytes < LEAST_MEMORY_NBYTES:
        raise ConfigError(f"{option} {text}: {nbytes} bytes; a size has a unit: {text}MiB?")
    return nbytes


def _check_counts(arguments: argparse.Namespace) -> None:
    for name, least in (("seq", 2), ("batch", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name} {value}: at least {least}")


def _source_of(arguments: argparse.Namespace) -> Any:
    from offload.planner.sources import HuggingFaceModel
    from offload.swap.state_precision import Precision

    path: Path | None = arguments.model
    if path is None:
        raise ConfigError("offload plan needs a model: a config.json, its directory, or a script")
    precision = Precision(states=arguments.state_precision, masters=arguments.master_weights)
    config = _config_of(arguments)
    rebuild_nbytes = config.min_swap_nbytes if config.recompute == "tokenwise" else None
    if path.suffix == ".py":
        from offload.planner.scripts import TrainingScript

        return TrainingScript(
            path,
            arguments.args,
            given=arguments,
            precision=precision,
            rebuild_nbytes=rebuild_nbytes,
        )
    if arguments.args:
        raise ConfigError(f"--args {' '.join(arguments.args)}: {path} is no script")
    return HuggingFaceModel(
        path,
        dtype=arguments.dtype,
        method=arguments.method or "full",
        optimizer=arguments.optim or "adamw",
        precision=precision,
        rebuild_nbytes=rebuild_nbytes,
    )


def _recorded_of(arguments: argparse.Namespace) -> "Recorded | None":
    from offload.planner.refine import read_recorded

    return None if arguments.recorded is None else read_recorded(arguments.recorded)


def _baseline_of(nbytes: int | None, source: Any) -> "Baseline":
    from offload.planner.baseline import RUNNING_NBYTES, measure_baseline
    from offload.swap.planning.predict import Baseline

    if nbytes is not None:
        return Baseline(attach_nbytes=nbytes, running_nbytes=RUNNING_NBYTES)
    _say("measuring what a process takes without a model")
    return measure_baseline(source.imports)


def _say(text: str) -> None:
    print(f"offload: {text}", file=sys.stderr)
