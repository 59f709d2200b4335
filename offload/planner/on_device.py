"""The best placement for a model that computes on a GPU: from programs, machine and budgets."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from offload.allocator.errors import BudgetError, ConfigError
from offload.allocator.units import format_nbytes, format_rate, parse_memory_nbytes
from offload.planner.answer import solve_batch, solve_length
from offload.planner.as_attached import WORTH, StepSetting, choose_setting
from offload.planner.sources import Batch
from offload.planner.text import Advice
from offload.swap.plan import OVERHEAD_NBYTES, choose_chunk_numel
from offload.swap.planning.cost import Costs
from offload.swap.planning.placing.network import COMPUTE, CPU, Network, Stepper, make_network
from offload.swap.planning.placing.placement import Placement
from offload.swap.planning.placing.reduce import reduce_program
from offload.swap.planning.placing.solve import least_budget, place
from offload.swap.planning.placing.work import Work
from offload.swap.planning.predict import Baseline
from offload.swap.planning.program import Program
from offload.tiers.machine import Machine, MachineTier

_WORKSPACE_NBYTES = 64 << 20  # of the device's libraries, as attach counts on
_DEVICE_SHARE, _HOST_SHARE = 0.9, 0.8  # of what is free, without a budget
_MIB = 1 << 20
_UNFUSED_PASSES = 2.5
_KEY_BLOCK = 128  # of fused attention on a GPU (FlashAttention-2)
_HALVINGS = 3  # of the batch, in search of the best micro-batch


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementAnswer:
    """Everything that ``offload plan`` tells of a placement.

    Attributes:
        setting: who steps which tiles where ``attach`` runs it; None where that does not fit.
        advice: what to change, the best first.
    """

    title: str
    machine_name: str
    work: Work
    network: Network
    placement: Placement
    state_precision: str
    master_weights: str
    setting: StepSetting | None
    solved: str | None
    advice: tuple[Advice, ...]

    @property
    def tokens_per_s(self) -> float:
        """Of a step."""
        return self.placement.tokens / self.placement.step_s


def split_budget(text: str | None) -> tuple[str | None, dict[str, int]]:
    """The budget without, and of, memory nodes: ``device=20GiB,host=24GiB,numa:1=64GiB``.

    Raises:
        ConfigError: a size without its unit, or none at all; a tier that is given twice.
    """
    others: dict[str, int] = {}
    left = []
    for part in (text or "").split(","):
        name, equals, size = (word.strip() for word in part.partition("="))
        if not (equals and (name == "device" or name.startswith("numa:"))):
            left.append(part)
            continue
        if name in others:
            raise ConfigError(f"--budget: {name} is given twice")
        try:
            others[name] = parse_memory_nbytes(size)
        except ValueError as error:
            raise ConfigError(f"--budget {part.strip()}: {error}") from error
    return ",".join(left) or None, others


def device_of(machine: Machine) -> MachineTier:
    """The device that would compute.

    Raises:
        ConfigError: there is none.
    """
    for tier in machine.tiers:
        if tier.kind == "device":
            return tier
    raise ConfigError(
        "--budget device=…: this machine has no device: leave it out, name a machine that has one "
        "(--machine list), or measure yours with: offload doctor -o machine.json"
    )


class Placing:
    """Asks for placements of one job on one machine.

    Args:
        trace: the program of a batch.
        budgets: bytes of ``device``, ``host`` and ``numa:N``, as far as they were given.
        commits: whether each step is made durable.
        known: programs that were traced before.

    Raises:
        ConfigError: a tier that the machine has not, links or rates that were not measured.
    """

    def __init__(
        self,
        trace: Callable[[Batch], Program],
        machine: Machine,
        drive: str,
        budgets: Mapping[str, int],
        baseline: Baseline,
        *,
        commits: bool,
        known: Mapping[Batch, Program],
    ) -> None:
        self.machine, self.drive = machine, drive
        self._trace, self._known = trace, dict(known)
        self._baseline, self._commits = baseline, commits
        self.device = device_of(machine).name
        self._costs = Costs(
            computing_on(machine, _processor(self.device)), drive, key_block=_KEY_BLOCK
        )
        self._recoding_s = Costs(machine, drive).recoding_s  # forms change in host memory
        self.budgets = dict(self._budgets(budgets))

    def trace(self, batch: Batch) -> Program:
        """The program of one step; each batch is traced once."""
        if batch not in self._known:
            self._known[batch] = self._trace(batch)
        return self._known[batch]

    def _budgets(self, given: Mapping[str, int]) -> Iterator[tuple[str, int]]:
        device, host = self.machine.tier(self.device), self.machine.tier("host")
        for name, nbytes in given.items():
            tier = device if name == "device" else self.machine.tier(name)
            if name != "host" and nbytes > tier.capacity_nbytes:
                raise ConfigError(
                    f"--budget {name}={format_nbytes(nbytes)}: {tier.name} of this machine holds "
                    f"{format_nbytes(tier.capacity_nbytes)} ({tier.capacity_nbytes} bytes)"
                )
        yield self.device, given.get("device", int(device.free_nbytes * _DEVICE_SHARE))
        yield "host", given.get("host", int(host.free_nbytes * _HOST_SHARE))
        for name, nbytes in given.items():
            if name.startswith("numa:"):
                yield self.machine.tier(name).name, nbytes
        yield self.drive, self.machine.tier(self.drive).free_nbytes

    def network(self, program: Program) -> Network:
        """Tiers, ways and steppers; how fast these step depends on the optimizer."""
        stepping = program.stepping
        passes = 1.0 if stepping is None or stepping.fused else _UNFUSED_PASSES
        steppers = [
            Stepper(name=name, tier=tier, lane=lane, s_per_byte=passes / rate)
            for name, tier, lane, processor in (
                ("cpu", "host", CPU, "cpu"),
                ("device", self.device, COMPUTE, _processor(self.device)),
            )
            for rate in [_rate(self.machine, processor)]
        ]
        return make_network(self.machine, self.budgets, compute=self.device, steppers=steppers)

    def works(self, batch: Batch, *, halvings: int = _HALVINGS) -> tuple[Work, ...]:
        """The step with the batch whole, in halves, and so on."""
        found = []
        for halving in range(halvings + 1):
            passes = 1 << halving
            if batch.sequences % passes:
                break
            part = dataclasses.replace(batch, sequences=batch.sequences // passes)
            found.append(self._work(self.trace(part), passes))
        return tuple(found)

    def _work(self, program: Program, passes: int) -> Work:
        kinds, order = reduce_program(program, self._costs.seconds, self._recoding_s)
        staging = 16 * 4 * choose_chunk_numel(0)  # the least tiles that attach has in flight
        host = self._baseline.attach_nbytes + self._baseline.running_nbytes
        return Work(
            kinds=kinds,
            order=order,
            passes=passes,
            tokens=passes * program.tokens,
            fixed_nbytes={
                "host": host + OVERHEAD_NBYTES + staging,
                self.device: program.buffers_nbytes + _WORKSPACE_NBYTES,
            },
            store=self.drive,
            slots=2 if self._commits else 1,
            commits=self._commits,
        )

    def place(self, batch: Batch) -> tuple[Sequence[Work], Network, Placement]:
        """The best placement.

        Raises:
            BudgetError: nothing fits; names the binding tier and the smallest change.
        """
        works = self.works(batch)
        network = self.network(self.trace(batch))
        return works, network, place(works, network)

    def fits(self, program: Program) -> bool:
        """Whether a step of this program does, whole."""
        try:
            place([self._work(program, 1)], self.network(program))
        except BudgetError:
            return False
        return True

    def least_host(self, batch: Batch) -> int:
        """The least bytes of host memory.

        Raises:
            BudgetError: no amount of host memory would do.
        """
        works, network = self.works(batch), self.network(self.trace(batch))
        least = least_budget(works, network.with_budget("host", 0), "host")
        if least is None:
            place(works, network.with_budget("host", 1 << 50))
            raise AssertionError("a step without bounds on host memory fits")
        return least


def answer_placement(
    placing: Placing,
    batch: Batch,
    *,
    name: str,
    title: Callable[[Program, Batch], str],
    solve: str | None = None,
    longest: int | None = None,
) -> PlacementAnswer:
    """The best placement, what would be better, and what it is called.

    Args:
        name: of the machine.
        title: of a program and its batch.
        solve: seq | batch | host: the largest, or the least, that fits.
        longest: sequence that the model has positions for.

    Raises:
        BudgetError: nothing fits; names the binding tier and the smallest change.
    """
    solved = None
    if solve == "seq":
        found = solve_length(placing.trace, batch, placing.fits, longest=longest)
        batch = dataclasses.replace(batch, length=found or batch.length)
        solved = f"--seq {found} is the longest that fits, on a grid of 64"
    elif solve == "batch":
        found = solve_batch(placing.trace, batch, placing.fits)
        batch = dataclasses.replace(batch, sequences=found or batch.sequences)
        solved = f"--batch {found} is the largest that fits"
    elif solve == "host":
        placing.budgets["host"] = -(-placing.least_host(batch) // _MIB) * _MIB
        solved = f"host={placing.budgets['host'] // _MIB}MiB is the least that fits"
    works, network, placement = placing.place(batch)
    chosen = next(work for work in works if work.passes == placement.passes)
    stepping = placing.trace(batch).stepping
    return PlacementAnswer(
        title=f"{title(placing.trace(batch), batch)}  on {placing.device}",
        machine_name=_describe(name, placing),
        work=chosen,
        network=network,
        placement=placement,
        state_precision=stepping.state_precision if stepping else "exact",
        master_weights=stepping.master_weights if stepping else "none",
        setting=choose_setting(works, network),
        solved=solved,
        advice=advise_placement(works, network, placement),
    )


def settings_of(answer: PlacementAnswer) -> dict[str, Any]:
    """The settings of a run that comes nearest to the placement: budgets, and who steps."""
    budgets, device = answer.network.budgets, answer.network.compute
    return {
        "budget": {"device": budgets[device], "host": budgets["host"]},
        "device": _processor(device),
        "optimizer_device": "host" if answer.setting is None else answer.setting.value,
    }


def _describe(name: str, placing: Placing) -> str:
    """One line about where it would run."""
    machine, device = placing.machine, placing.device
    processor = next(one for one in machine.processors if one.name == _processor(device))
    into, out = machine.link("host", device), machine.link(device, "host")
    read = machine.link(placing.drive, "host")
    return (
        f"{name}: {processor.model}; bus {format_rate(into.bytes_per_s)} in, "
        f"{format_rate(out.bytes_per_s)} out; {placing.drive} {format_rate(read.bytes_per_s)} read"
    )


def advise_placement(
    works: Sequence[Work], network: Network, found: Placement
) -> tuple[Advice, ...]:
    """What would make a step shorter, each found by planning again."""
    options: list[tuple[str, Sequence[Work], Network]] = []
    for tier, budget in network.budgets.items():
        if not tier.startswith("file:"):
            for factor in (1.25, 2.0):
                larger = int(budget * factor)
                name = f"--budget {tier.partition(':')[0] if tier.startswith('device') else tier}"
                options.append(
                    (f"{name}={larger >> 20}MiB", works, network.with_budget(tier, larger))
                )
    lanes = sorted({lane for route in network.routes.values() for lane in route})
    options += [(f"{lane} twice as fast", works, network.faster(lane, 2.0)) for lane in lanes]
    options.append((f"{CPU} steps twice as fast", works, network.faster(CPU, 2.0)))
    options.append(("a device twice as fast", [_hastened(work) for work in works], network))
    advice = [
        Advice(change=name, step_s=seconds)
        for name, tried, changed in options
        if (seconds := place(tried, changed).step_s) < WORTH * found.step_s
    ]
    return tuple(sorted(advice, key=lambda one: one.step_s)[:4])


def _hastened(work: Work) -> Work:
    kinds = tuple(
        dataclasses.replace(
            kind,
            forward_s=kind.forward_s / 2,
            backward_s=kind.backward_s / 2,
            saved=tuple(
                dataclasses.replace(part, rebuild_s=part.rebuild_s and part.rebuild_s / 2)
                for part in kind.saved
            ),
        )
        for kind in work.kinds
    )
    return dataclasses.replace(work, kinds=kinds)


def computing_on(machine: Machine, processor: str) -> Machine:
    """``machine`` as ``Costs`` sees it when ``processor`` does the CPU's work.

    Raises:
        ConfigError: no rate of it is known.
    """
    own = [rate for rate in machine.compute if rate.processor == processor]
    if not own:
        raise ConfigError(
            f"no rate of {processor} is known: measure it with: offload doctor -o machine.json, "
            "or take a machine of the library, with published ones (--machine list)"
        )
    works = {(rate.work, rate.dtype) for rate in own}
    others = [
        rate
        for rate in machine.compute
        if rate.processor == "cpu" and (rate.work, rate.dtype) not in works
    ]
    as_cpu = [dataclasses.replace(rate, processor="cpu") for rate in own]
    return dataclasses.replace(machine, compute=tuple(as_cpu + others))


def _processor(device: str) -> str:
    return device.replace("device", "cuda")


def _rate(machine: Machine, processor: str) -> float:
    """Bytes per second of the optimizer's step, in large calls."""
    return computing_on(machine, processor).rates("optimizer", "float32")[-1][1]
