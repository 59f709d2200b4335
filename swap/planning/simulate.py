"""A run on a virtual clock: a program's steps under the plan that ``attach`` makes.

Nothing is measured and nothing is random: the same program, plan and costs always give the same
run. It emits the events of a real one, so that a report of it is a report like any other.

[Note: steps that repeat] A step that begins as the one before it did is that step again. What a
beginning is made of each part tells (``standing``); of times only those count at which the pass
before used what it had saved, and of these only what they decide. Where nothing is recorded, such a
step is counted rather than simulated.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat

from offload.allocator.errors import CapacityError
from offload.swap.gradients import MIN_NBYTES
from offload.swap.plan import (
    MARGIN_NBYTES,
    Plan,
    grow,
    shrink,
    soft_limit_nbytes,
)
from offload.swap.planning.compiled import Compiled, Moment
from offload.swap.planning.sim_backward import SimBackwardStep
from offload.swap.planning.sim_fits import check_fits, fits, refused, too_small
from offload.swap.planning.sim_forward import SimForwardStep
from offload.swap.planning.sim_gradients import SimGradients
from offload.swap.planning.sim_memory import Memory, Role
from offload.swap.planning.sim_parts import PARTS, Parts
from offload.swap.planning.sim_pass import SimPass
from offload.swap.planning.sim_passes import Part, SimPasses
from offload.swap.planning.sim_saved import SimSaved
from offload.swap.planning.sim_step import SimStep
from offload.swap.planning.sim_weights import SimWeights
from offload.swap.planning.sim_writes import SimDrive
from offload.swap.planning.world import Reading, World, read_lane, write_lane
from offload.tiers.events import Recorder, StepFinished


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedStep:
    """One step: its times and bytes, its peak by role, and the plan that held in it.

    Attributes:
        busy_s: seconds in which each part worked: compute, optimizer, drive.
        spilled_nbytes: of saved activations that were on the drive at once, at most.
        mapped_nbytes: of gradients in scratch, each time that one of a further micro-batch was
            added: the kernel moves them, if it has to, so they are no reads and no writes.
    """

    finished: StepFinished
    busy_s: Mapping[str, float]
    peak_roles: Mapping[Role, int]
    plan: Plan
    spilled_nbytes: int
    mapped_nbytes: int = 0


@dataclass(frozen=True, slots=True)
class _Simulated:
    """A step, and how things stood before it."""

    standing: tuple[object, ...]
    before: Reading
    done: SimulatedStep


class Simulation:
    """Runs steps one after the other; the plan grows after the first, as in a run.

    Args:
        plan: of ``make_plan``.
        resident_nbytes: of the runtime itself, beside the plan's baseline.
        commits: each step is made durable.
        min_swap_nbytes: smaller saved storages move in batches.
        write_budget_nbytes: that a step may write to the drive.
        drive_nbytes: of the drive that saved activations may take at once.
        recorder: takes the events.
        write_slowdown: how many times as long as usual the drive takes for what is written to it.
        micro_batches: forwards, each with its backward, of a step.
        pages_stay: as of ``SimGradients``.

    Attributes:
        plan: as it is now.
    """

    def __init__(
        self,
        compiled: Compiled,
        plan: Plan,
        *,
        chunk_numel: int,
        resident_nbytes: int = 0,
        commits: bool = True,
        min_swap_nbytes: int = 64 << 10,
        write_budget_nbytes: int | None = None,
        drive_nbytes: int | None = None,
        recorder: Recorder | None = None,
        write_slowdown: float = 1.0,
        micro_batches: int = 1,
        pages_stay: bool = True,
    ) -> None:
        program, costs = compiled.program, compiled.costs
        self.plan = self._first_plan = plan
        self._program = program
        self._commits = commits
        self._costs = costs
        self._sizes = {weight.name: weight.nbytes for weight in program.census.weights}
        memory = Memory(soft_limit_nbytes(plan.budget_nbytes), plan.budget_nbytes)
        memory.add("fixed", plan.baseline_nbytes + resident_nbytes + program.buffers_nbytes)
        self.world = world = World(
            read_lane(costs.read_s, costs.read_latency_s),
            write_lane(
                lambda nbytes: write_slowdown * costs.write_s(nbytes), costs.write_latency_s
            ),
            together=costs.together,
            memory=memory,
            lost_s_per_byte=costs.lost_s_per_byte,
            recorder=recorder,
        )
        order = [name for info in program.census.modules for name in info.weights]
        self._weights = SimWeights(
            world,
            self._sizes,
            list(dict.fromkeys(order)),
            window_nbytes=plan.window_nbytes,
            checksum_bytes_per_s=costs.checksum_bytes_per_s,
            fetch_s=costs.fetch_s,
        )
        self._drive = SimDrive(world.journal, program, write_budget_nbytes, drive_nbytes)
        self._saved = SimSaved(
            world,
            program.storages,
            limit_nbytes=plan.activations_nbytes,
            min_nbytes=min_swap_nbytes,
            drive=self._drive,
        )
        self._gradients = SimGradients(
            world, costs, limit_nbytes=plan.gradients_nbytes, pages_stay=pages_stay
        )
        self._step: SimStep | None = None
        if program.stepping is not None:
            self._step = SimStep(
                world,
                self._weights,
                self._gradients,
                program.stepping,
                {name: nbytes // program.itemsizes[name] for name, nbytes in self._sizes.items()},
                costs,
                chunk_numel=chunk_numel,
                staging_nbytes=plan.staging_nbytes,
            )
        self._backward: SimBackwardStep | None = None
        if plan.step_in_backward and self._step is not None:
            self._backward = SimBackwardStep(
                world, self._weights, self._step, limit_nbytes=plan.gradients_nbytes
            )
        self._forward: SimForwardStep | None = None
        if plan.step_in_forward and self._step is not None:
            self._forward = SimForwardStep(
                world, self._weights, self._step, tables=program.census.lookups
            )
            self._forward.finished = self._make_late_step_durable
        parts = self._weights, self._saved, self._step, self._backward, self._forward
        self._acting: list[Part] = [part for part in parts if part is not None]
        self._pass = SimPass(
            world,
            program,
            costs,
            weights=self._weights,
            saved=self._saved,
            gradients=self._gradients,
            backward=self._backward,
            forward=self._forward,
            micro_batches=micro_batches,
        )
        self._passes = SimPasses(
            world,
            self._pass,
            self._saved,
            self._gradients,
            self._acting,
            count=micro_batches,
            repeats=recorder is None and not self._drive.counts_writes,
        )
        self._micro_batches = micro_batches
        self._kept_nbytes = self._states_nbytes()
        self._steps = 0
        self._parts = Parts(memory)  # of the first step
        self.follow(compiled.moments)

    def follow(self, moments: Sequence[Moment]) -> None:
        """Steps from now on are made of ``moments``, in the tables of the program."""
        self._moments = moments
        self._last: _Simulated | None = None

    def keep_streaming(self) -> "Simulation":
        """Let no weight and no state stay in memory, as ``Engine.keep_streaming``."""
        self._apply(dataclasses.replace(self.plan, resident=(), resident_states=()))
        return self

    def step(self) -> SimulatedStep:
        """One more step.

        Raises:
            BudgetError: the first one's forward and backward exceed the budget; names one that
                fits, as a run does. Or what may not be written does not fit memory.
        """
        standing = self._standing()
        if self._last is not None and self._repeats(self._last, standing):
            return self._repeat(self._last)
        before = self.world.reading()
        done = self._simulate(before)
        self._last = _Simulated(standing, before, done)
        return done

    def compute(self, parts: int | None = None) -> None:
        """Forward and backward of the next step, and no more.

        Args:
            parts: of the first step's passes, after which it ends.

        Raises:
            BudgetError: as ``step``.
        """
        self.world.memory.restart_peak()
        if self._forward is not None:
            self._forward.start()
        passes: Iterable[Iterable[Moment]] = repeat(self._moments, self._micro_batches)
        if not self._steps:
            passes = self._parts.passes(self._moments, self._micro_batches, parts)
        try:
            self._passes.go_through(passes)
        except CapacityError as refusal:
            raise refused(self.plan, self.world.memory.room(), refusal) from refusal
        if not self._steps:
            check_fits(self.plan, self.world.memory.peak_nbytes)

    def doubtful_parts(self) -> int:
        """How many parts of the first step, which fits, might not if the drive hesitates.

        See ``sim_parts`` [Note: a drive that hesitates].
        """
        if self._backward is not None or self._drive.is_bounded:
            # Tiles wait for writes, too; or what the drive refuses stays.
            return PARTS * self._micro_batches
        plan, more_nbytes = self._first_plan, self._first_plan.gradients_nbytes
        if self._saved.spilled_nbytes:
            limit_nbytes, largest_nbytes = plan.activations_nbytes, self._saved.largest_nbytes
            more_nbytes += max(2 * limit_nbytes, largest_nbytes) - limit_nbytes + largest_nbytes
        return self._parts.doubtful(more_nbytes, partial(fits, self.plan))

    def _simulate(self, before: Reading) -> SimulatedStep:
        world = self.world
        self.compute()
        passed_s, stalled_s = world.now_s, world.journal.totals.stall_s
        inside_s, inside_stall_s = self._spent_inside()
        late_s = 0.0 if self._forward is None else self._forward.late_s
        self._optimize()
        stepped_s, stepped_stall_s = world.now_s, world.journal.totals.stall_s
        self._end_step()
        self._drive.finish_step()
        self._steps += 1
        after, left = world.reading(), world.memory.now
        step_s = after.now_s - before.now_s
        stall_s = stalled_s - before.stall_s - inside_stall_s
        finished = StepFinished(
            t_s=world.now_s,
            step=self._steps,
            step_s=step_s,
            compute_s=passed_s - before.now_s - stall_s - inside_s - late_s,
            stall_s=stall_s,
            optimizer_s=stepped_s - passed_s + inside_s,
            commit_s=world.now_s - stepped_s + late_s,
            read_nbytes=after.read_nbytes - before.read_nbytes,
            written_nbytes=after.written_nbytes - before.written_nbytes,
            peak_nbytes=world.memory.peak_nbytes,
            resident_nbytes={
                "weight": left["weights"],
                "activation": self._saved.kept_nbytes,
                "state": left["states"],
            },
        )
        world.journal.record(finished)
        optimizer_s = finished.optimizer_s - (stepped_stall_s - stalled_s) - inside_stall_s
        done = SimulatedStep(
            finished=finished,
            busy_s={
                "compute": finished.compute_s,
                "optimizer": optimizer_s,
                "drive": after.drive_busy_s - before.drive_busy_s,
            },
            peak_roles=dict(world.memory.peak_roles),
            plan=self.plan,
            spilled_nbytes=self._saved.spilled_nbytes,
            mapped_nbytes=self._gradients.take_mapped_nbytes(),
        )
        if world.memory.peak_nbytes > self.plan.budget_nbytes:  # a later step may take more
            raise too_small(self.plan, world.memory.peak_nbytes)
        self._replan(world.memory.peak_nbytes)
        return done

    # See [Note: steps that repeat].

    def _standing(self) -> tuple[object, ...]:
        """What the next step depends on, but for times."""
        standing = [part.standing() for part in self._acting]
        return self.plan, list(self.world.memory.now.values()), *standing

    def _repeats(self, last: "_Simulated", standing: tuple[object, ...]) -> bool:
        return (
            not self.world.is_recorded
            and not self._drive.counts_writes
            and self._pass.forwards == 1
            and last.standing == standing
            and self._saved.would_choose_again()
        )

    def _repeat(self, last: "_Simulated") -> SimulatedStep:
        before = self.world.reading()
        self.world.repeat(last.before, 1, ())
        self._steps += 1
        again = dataclasses.replace(last.done.finished, t_s=self.world.now_s, step=self._steps)
        done = dataclasses.replace(last.done, finished=again)
        self._last = _Simulated(last.standing, before, done)
        return done

    def _spent_inside(self) -> tuple[float, float]:
        """Seconds that forward and backward spent on steps, and those of it that were waits."""
        if (inside := self._backward or self._forward) is None:
            return 0.0, 0.0
        return inside.spent.seconds, inside.spent.stalled_s

    def _optimize(self) -> None:
        if self._forward is not None:
            self._forward.end_forward()  # of a model that is called in parts
        self._weights.end_pass()
        self._gradients.poll()
        if self._backward is None and self._forward is None:
            self._weights.evict_streaming()
        else:
            self._weights.settle()
        if self._step is not None:
            self._step.step(self._backward.stepped if self._backward is not None else ())
        if (inside := self._backward or self._forward) is not None:
            inside.end_step()
        self._pass.end()

    def _end_step(self) -> None:
        """As ``Committing.after_step``."""
        is_late = self._forward is not None and self._forward.is_pending
        if self._step is not None and self._commits:
            self._step.take_down()
            if not is_late:
                self._step.make_durable()
        if not is_late:
            self.world.drain()

    def _make_late_step_durable(self) -> None:
        self.world.drain()
        if self._step is not None and self._commits:
            self._step.make_durable()

    def _replan(self, peak_nbytes: int) -> None:
        """As ``Replanner.finish_step``."""
        states, census = self._kept_nbytes, self._program.census
        if self._steps == 1:
            self._apply(grow(self.plan, census, peak_nbytes=peak_nbytes, states_nbytes=states))
        elif (excess := peak_nbytes - self.plan.budget_nbytes + MARGIN_NBYTES // 2) > 0:
            self._apply(shrink(self.plan, census, excess_nbytes=excess, states_nbytes=states))

    def _apply(self, plan: Plan) -> None:
        self.plan = plan
        if self._step is not None:
            self._step.pipeline.staging.limit_nbytes = self.plan.staging_nbytes
            self._step.keep(frozenset(self.plan.resident_states))
        self._weights.window_nbytes = self.plan.window_nbytes
        self._gradients.limit_nbytes = self.plan.gradients_nbytes
        if self._backward is not None:
            self._backward.limit_nbytes = self.plan.gradients_nbytes
        self._weights.keep(frozenset(self.plan.resident))

    def _states_nbytes(self) -> dict[str, int]:
        """As ``MemoryStep.nbytes``."""
        stepping = self._program.stepping
        if stepping is None or self._step is None:
            return {}
        # Else each gradient is used up at once.
        waits = self._backward is None or self._micro_batches > 1
        weights = self._weights.weights
        return {
            name: nbytes
            + (weights[name].padded_nbytes if waits and self._sizes[name] >= MIN_NBYTES else 0)
            for name, nbytes in self._step.states_nbytes.items()
            if name not in stepping.by_tile
        }
