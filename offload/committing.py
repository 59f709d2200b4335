"""Commits of a run: what they hold beside the weights' bytes, and how a run continues from one."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from offload.computing import Computing
from offload.optimizing import Optimizing
from offload.progress import BufferKeeper, pack_rng, restore_rng
from offload.runtime import Runtime
from offload.swap.weights import WeightSwapper
from offload.tiers.commit import CommitRecord


class Commits:
    """Makes the state of a run durable, and reads it back.

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

    def commit(self, step: int, extra: Mapping[str, Any]) -> None:
        """Make the present state durable, as after ``step``.

        Raises:
            TierIOError: the disk could not take it; the previous commit stays.
            StepInterruptedError: the last step, or backward in its steps, was interrupted.
        """
        if self._optimizing is not None:
            self._optimizing.check_whole()
        self._runtime.lanes.drain()
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
            state |= self._optimizing.record()
        self._runtime.store.commit(step, self._signature, state)

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
