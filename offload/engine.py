"""The engine: attaches to a model and an optimizer, and runs their steps within a budget."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from offload.adopting import (
    adopt_weights,
    check_resume,
    check_unchanged,
    refuse_unmovable,
    reserve_room,
    signature_of,
)
from offload.allocator.errors import ConfigError
from offload.attachment import Attachment
from offload.building import drop_unclaimed
from offload.checkpoint import save_pretrained
from offload.committing import Commits
from offload.computing import Computing
from offload.hooks import ModelHooks
from offload.hosting import host_passes
from offload.optimizing import Optimizing, no_masters
from offload.recording import record_finish, record_start
from offload.replanning import Replanner
from offload.returning import take_back
from offload.runtime import Runtime
from offload.saving import make_homes
from offload.sharing import open_device_step
from offload.steplog import Stats, StepLog
from offload.swap.buckets import Form
from offload.swap.census import tables_of, take_census
from offload.swap.device_plan import DevicePlan
from offload.swap.gradient_stream import GradientStream
from offload.swap.gradients import GradientSwapper
from offload.swap.plan import Plan
from offload.swap.row_gradients import RowGradients
from offload.swap.torch_seams import lead, leave
from offload.swap.uncompiled import forget_compiled
from offload.swap.weights import WeightSwapper
from offload.tiers import hostmem
from offload.tiers.accelerator import Accelerator
from offload.vertical import Vertical, refuse_turns


class Engine(Attachment):
    """Made by ``attach``; a context manager that detaches on exit.

    Attributes:
        step: optimizer steps taken, those before a resume included.
        resumed: whether the store held a commit that was continued.
        extra: what the last commit carried for the script.
        computing: the device, if the model computes on one; None on the CPU.
        tokenwise: what rebuilds token rows, if that was asked for; its ``report`` tells what.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        runtime: Runtime,
        plan: Plan,
        on_device: tuple[Accelerator, DevicePlan] | None = None,
    ) -> None:
        super().__init__(model)
        self.optimizer = optimizer
        self.step = 0
        self.resumed = False
        self.extra: dict[str, Any] = {}
        self._runtime = runtime
        self._journal = runtime.journal
        self._steps = StepLog(self._journal)
        self._census = census = take_census(model)
        governor = runtime.governor
        self.weights = WeightSwapper(
            runtime.store, self._journal, plan.window_nbytes, governor.room, governor.expect
        )
        self._replanner = Replanner(plan, census, self.weights, governor, apply=self._set_limits)
        refuse_unmovable(model, on_device=on_device is not None)
        reserve_room(model, optimizer, runtime)
        signature = signature_of(model, optimizer, runtime.precision)
        resuming = check_resume(runtime, signature)
        self._adopted = adopt_weights(model, runtime, self.weights, resuming=resuming)
        drop_unclaimed(runtime)
        self.weights.learn_order([name for info in census.modules for name in info.weights])
        self.gradients = GradientSwapper(
            runtime.gradient_scratch, self._journal, governor, plan.gradients_nbytes
        )
        self.gradient_stream = GradientStream(
            self.gradients,
            chunk_numel=runtime.chunk_numel,
            staging_nbytes=plan.staging_nbytes,
            make_room=self.weights.give_up,
        )
        homes, self._write_budget = make_homes(runtime, model, optimizer)
        self.computing = on_device and Computing(
            model,
            runtime,
            *on_device,
            plan,
            self.weights,
            self._adopted,
            self.gradients,
            homes,
        )
        passes = self.computing or host_passes(model, runtime, plan, census, self.weights, homes)
        self.activations, self.tokenwise = passes.activations, passes.tokenwise
        self._replanner.activations = self.activations if self.computing is None else None
        self._hooks = ModelHooks(model, passes, self._before_pass)
        self._vertical = Vertical(
            model, census, self.weights, self.gradients, self._hooks, self._replanner
        )
        for name, weight in self.weights.weights.items():
            for parameter in weight.parameters:
                self.gradients.watch(name, parameter)
            if self.computing is None and name not in census.lookups:
                self._hooks.watch_backward(weight)
        self._rows = (
            RowGradients(model, self.gradients, self._journal) if self.computing is None else None
        )
        self._optimizing = self._take_over(optimizer)
        self._commits = Commits(
            model, runtime, self.weights, signature, self._optimizing, self.computing
        )
        if resuming:
            self._resume()
        if self._optimizing is not None:
            self._optimizing.settle_share()
        self._begin()
        self._hold()

    def _take_over(self, optimizer: Optimizer | None) -> Optimizing | None:
        if optimizer is None:
            return None
        optimizing = Optimizing(
            optimizer,
            self._runtime,
            self.plan,
            self.weights,
            self.gradients,
            self._adopted,
            steps=lambda: self.step,
            check_step=self._check_step,
            before_step=self._before_step,
            after_step=self._after_step,
            tables=tables_of(self.model),
            device=open_device_step(optimizer, self.computing, self._runtime),
        )
        self._replanner.memory = optimizing.streamed.memory
        self._hooks.in_forward = optimizing.in_forward
        return optimizing

    def _set_limits(self, plan: Plan) -> None:
        self.weights.window_nbytes = plan.window_nbytes
        self.gradients.limit_nbytes = plan.gradients_nbytes
        if self.computing is None:
            self.activations.limit_nbytes = plan.activations_nbytes
        self.gradient_stream.staging.limit_nbytes = plan.staging_nbytes
        if self._optimizing is not None:
            self._optimizing.set_limits(plan)

    def _resume(self) -> None:
        record = self._runtime.store.committed
        assert record is not None
        self.step, self.extra = record.step, dict(record.state["extra"])
        self.resumed = True
        self._commits.restore(record)

    def _begin(self) -> None:
        record_start(self._runtime, self.plan, self.model)
        self._steps.begin()
        hostmem.trim_heap()
        self._runtime.governor.restart_peak()
        lead(self.gradient_stream)

    # What the hooks call.

    def _before_pass(self, form: Form) -> None:
        if self._optimizing is not None:
            self._optimizing.before_pass(trains=form.trains)
        self.gradients.poll()
        self._replanner.begin_pass(form)

    def _before_step(self) -> None:
        """Gradients are complete."""
        if self.computing is not None:
            self.computing.before_step()
        self._check_step()

    def _check_step(self) -> None:
        """Gradients are complete, or the first is: refuse the step while nothing is lost."""
        self._replanner.check_fits()
        check_unchanged(self.model, self._adopted)
        assert self._optimizing is not None
        self._optimizing.streamed.check_states()

    def _after_step(self, optimizer_s: float, stall_s: float) -> None:
        """The step's updates are in the store; ``stall_s`` is what the optimizer waited."""
        self.step += 1
        began_s = self._journal.now()
        self._commits.after_step(self.step, self.extra)
        if self._write_budget is not None:
            self._write_budget.finish_step(self._commits.owed_nbytes())
        self._steps.finish(
            self.step,
            optimizer_s=optimizer_s,
            optimizer_stall_s=stall_s,
            commit_s=self._journal.now() - began_s + self._commits.take_late_s(),
            resident_nbytes={
                "weight": self.weights.resident_nbytes(),
                "activation": self.activations.kept_nbytes,
                "state": self._optimizing.keeper.held_nbytes() if self._optimizing else 0,
            },
            bucket=self._replanner.bucket_name,
        )
        self._replanner.finish_step()
        if self.computing is not None:
            self.computing.finish_step()

    # The public surface.

    def accumulate(
        self,
        batches: Iterable[Any],
        forward: Callable[[Any], torch.Tensor],
        *,
        backward: Callable[[torch.Tensor], object] = torch.Tensor.backward,
        blocks: Sequence[str] = (),
    ) -> list[torch.Tensor]:
        """Forward and backward of several micro-batches, which go through the model together.

        Gives the gradients that this loop gives, bit for bit, but weights are read once for all
        micro-batches, and gradients written once (``offload.vertical``, [Note: vertical order])::

            for batch in batches:
                backward(forward(batch))

        Args:
            batches: of the micro-batches; all of them are listed first.
            forward: gives the loss of one of them, divided as it should be; called on another
                thread. It may do what it likes between the model's blocks, but must not wait for
                another micro-batch.
            backward: of a loss, such as ``accelerator.backward``.
            blocks: names of the model's blocks, or of lists of them; found by their repeating in
                a list if there are none.

        Returns:
            The losses, detached, in the order of ``batches``.

        Raises:
            ConfigError: no batch, unknown blocks, more micro-batches than ``accumulation_steps``
                of a step in backward, a call inside of forward or backward, or after ``detach``.
            UnsupportedError: the model is compiled, computes on a device or is rebuilt token-wise;
                a loss is no tensor; or a gradient's sum would not have the loop's order.
        """
        if not self._attached:
            raise ConfigError("the engine was detached: accumulate in a loop")
        listed = list(batches)
        refuse_turns(self._runtime.config, len(listed), on_device=self.computing is not None)
        self._finish_step()
        return self._vertical.run(listed, forward, backward, blocks)

    def commit(self, extra: Mapping[str, Any] | None = None) -> None:
        """Make the present state durable: weights, optimizer states, buffers, generators.

        Args:
            extra: JSON values that ``engine.extra`` gives back after a resume.

        Raises:
            ConfigError: the engine was attached with ``commit="never"``.
            TierIOError: the disk could not take it; the previous commit stays.
            StepInterruptedError: the last step, or backward in its steps, was interrupted.
        """
        if self._runtime.config.commit == "never":
            raise ConfigError("commit='never' keeps no slot to commit to: attach with 'manual'")
        kept = dict(self.extra if extra is None else extra)
        self._finish_step()
        self._commits.commit(self.step, kept)
        self.extra = kept

    @property
    def step_pending(self) -> bool:
        """Whether the last step is still to be made, in the next forward (``step_in_forward``).

        A process that is killed before that continues from the step before it.
        """
        return self._optimizing is not None and self._optimizing.is_pending

    def _finish_step(self) -> None:
        if self._optimizing is not None:
            self._optimizing.finish()

    @property
    def device(self) -> torch.device:
        """Where the model computes, and what it returns is."""
        return self.computing.device if self.computing is not None else torch.device("cpu")

    @property
    def plan(self) -> Plan:
        """The shares of the budget, as they are now."""
        return self._replanner.plan

    @property
    def stats(self) -> Stats:
        """Totals so far."""
        return self._steps.stats(self.plan.budget_nbytes)

    @property
    def notices(self) -> list[str]:
        """What the user should know: fallbacks taken, tensors left alone, and why."""
        return self._journal.notices

    def keep_streaming(self) -> None:
        """Keep nothing resident from now on, whatever the budget has to spare."""
        self._finish_step()
        self._replanner.keep_streaming()

    def state_dict(self) -> dict[str, Any]:
        """The model's ``state_dict``: plain names, tensors that read from the store as needed."""
        return self.model.state_dict()

    def save_pretrained(self, directory: str | Path, *, masters: bool = False) -> None:
        """Write the weights as safetensors, tensor by tensor, with the model's configuration.

        Args:
            masters: write the float32 masters of bfloat16 weights instead of these
                (``master_weights``).

        Raises:
            ConfigError: masters are asked for, but not kept.
            TierIOError: the directory can't be written.
        """
        self._finish_step()
        halves = self._masters().low_halves() if masters else {}
        self.weights.evict_streaming()
        save_pretrained(self.model, Path(directory), halves)

    def master_weight(self, name: str) -> torch.Tensor:
        """The float32 master of the bfloat16 weight ``name``, as a copy in memory.

        Raises:
            ConfigError: no masters are kept, or none of that name.
        """
        self._finish_step()
        weight = dict(self.model.named_parameters()).get(name)
        return self._masters().master(name, weight)

    def _masters(self) -> Optimizing:
        if self._optimizing is None:
            raise no_masters()
        return self._optimizing

    def _end(self, status: str) -> None:
        try:
            self._finish_step()
        finally:  # where it could not be, the last commit is the one before
            whole = self._optimizing is None or self._optimizing.is_whole()
            self._leave(status if whole else "interrupted")

    def _leave(self, status: str) -> None:
        leave(self.gradient_stream)
        if self._optimizing is not None:
            self._optimizing.remove()
        self._hooks.remove()
        forget_compiled()
        if self.tokenwise is not None:
            self.tokenwise.remove()
        self.gradients.stop()
        if self._rows is not None:
            self._rows.remove()
        if self._optimizing is not None:
            self._optimizing.abandon()
        try:
            self._give_back(status)
        except BaseException:  # the store must not stay locked by a run that is over
            self._runtime.close()
            raise

    def _give_back(self, status: str) -> None:
        whole = status == "done"
        if whole:
            self.activations.close()
        if self.computing is not None:
            self.computing.remove(whole=whole)
        if whole:
            self.gradients.materialise()
            self.weights.evict_streaming()
        record_finish(self._journal, self.plan, steps=len(self._steps), status=status)
        keeper = self._optimizing.keeper if self._optimizing is not None else None
        if not whole or take_back(self.weights, keeper, self.plan.budget_nbytes):
            self._runtime.close()
            self.weights.land()  # what lanes have read since would leak
