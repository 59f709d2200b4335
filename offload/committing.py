"""Commits of a run: what they hold beside the weights' bytes, and how a run continues from one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from offload.computing import Computing
from offload.optimizing import Optimizing
from offload.progress import BufferKeeper, pack_rng, restore_rng
from offload.runtime import Runtime
from offload.swap.weights import Weight, WeightSwapper
from offload.tiers.commit import CommitRecord


@dataclass(frozen=True, slots=True)
class TakenDown:
    """A commit that is not written yet."""

    step: int
    state: dict[str, Any]


class Commits:
    """Makes the state of a run durable, and reads it back.

    [Note: late commits] A step that is put off until the next forward is committed when it has
    been finished there, but as of the moment when it was taken: its generators, buffers and
    settings are taken down then, and all that was not put off is stored. If a weight is stored
    once more before that, because the user's code wrote to it in forward, there is no commit
    of that step: a kill before the next one continues from the one before.

    Args:
        signature: of the model and the optimizer; a resume asks for the same.
        optimizing: the optimizer; None where nothing is stepped.
        computing: the device; None on the CPU.
    """

    def __init__(
        self,
        model: nn.Module,
        runtime: Runtime,
        weights: WeightSwapper,
        signature: Mapping[str, Any],
        optimizing: Optimizing | None,
        computing: Computing | None,
    ) -> None:
        self._runtime = runtime
        self._weights = weights
        self._signature = signature
        self._optimizing = optimizing
        self._device = computing.device if computing is not None else None
        self._buffers = (
            BufferKeeper(runtime.store, model, runtime.chunk_numel)
            if computing is None
            else BufferKeeper(runtime.store, model, runtime.chunk_numel, computing.to_host)
        )
        self._late: TakenDown | None = None  # [Note: late commits]
        self._late_s = 0.0
        if optimizing is not None and optimizing.in_forward is not None:
            optimizing.in_forward.finished = self.finish
        self._before_overwritten, weights.overwritten = weights.overwritten, self._overwritten

    def commit(self, step: int, extra: Mapping[str, Any]) -> None:
        """Make the present state durable, as after ``step``.

        Raises:
            TierIOError: the disk could not take it; the previous commit stays.
            StepInterruptedError: the last step, or backward in its steps, was interrupted.
        """
        if self._optimizing is not None:
            self._optimizing.check_whole()
        self._runtime.lanes.drain()
        self._write(self._take_down(step, extra))

    def _take_down(self, step: int, extra: Mapping[str, Any]) -> "TakenDown":
        """What is to be durable as after ``step``, but for what is still stepped.

        The store has the rest of it when this returns.

        Raises:
            TierIOError: the disk could not take it.
        """
        self._weights.absorb_all()
        state: dict[str, Any] = {
            "chunk_numel": self._runtime.chunk_numel,
            "extra": dict(extra),
            "optimizer": {},
            "groups": [],
            "buffers": self._buffers.record(),
            "rng": pack_rng(self._device),
        }
        if self._optimizing is not None:
            state |= self._optimizing.settings()
        return TakenDown(step, state)

    def after_step(self, step: int, extra: Mapping[str, Any]) -> None:
        """``step`` was taken: commit it, at once or when it is finished, if the settings ask so.

        Raises:
            TierIOError, StepInterruptedError: as ``commit``; or a move failed that nobody waited
                for.
        """
        is_late = self._optimizing is not None and self._optimizing.is_pending
        if self._runtime.config.commit != "step":
            if not is_late:
                self._runtime.lanes.drain()
        elif is_late:
            self._late = self._take_down(step, extra)
        else:
            self.commit(step, extra)

    def owed_nbytes(self) -> int:
        """What the next commit writes beside what the steps until then do."""
        if self._runtime.config.commit == "never" or self._optimizing is None:
            return 0
        return self._weights.dirty_nbytes() + self._optimizing.keeper.held_nbytes(dirty=True)

    def finish(self) -> None:
        """What was put off of a step has been finished.

        Raises:
            TierIOError: a write failed; the previous commit stays.
        """
        began_s = self._runtime.journal.now()
        self._runtime.lanes.drain()
        late, self._late = self._late, None
        if late is not None:
            self._write(late)
        self._late_s += self._runtime.journal.now() - began_s

    def take_late_s(self) -> float:
        """Seconds in ``finish`` since the last call."""
        late_s, self._late_s = self._late_s, 0.0
        return late_s

    def _overwritten(self, weight: Weight) -> None:
        self._before_overwritten(weight)
        self._late = None

    def _write(self, taken: "TakenDown") -> None:
        """Commit what was taken down; all of it has been stepped.

        Raises:
            TierIOError: the disk could not take it; the previous commit stays.
        """
        states = self._optimizing.states() if self._optimizing is not None else {}
        self._runtime.store.commit(taken.step, self._signature, taken.state | states)

    def restore(self, record: CommitRecord) -> None:
        """Continue from ``record``, the store's last commit."""
        if self._optimizing is not None:
            self._optimizing.restore(record.state)
        self._buffers.restore(record.state["buffers"])
        self._runtime.store.release_unclaimed()
        restore_rng(record.state["rng"], self._device)
        self._runtime.journal.notice(
            "resume", f"continued at step {record.step} from {self._runtime.store.directory}"
        )
