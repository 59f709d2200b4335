"""Rows rebuilt before they are needed: to compare them with saved ones, or to learn the time."""

import math
from collections.abc import Callable

import torch

from offload.swap.tokenwise.buffers import fresh
from offload.swap.tokenwise.replay import Replay, direct, rows_of
from offload.tiers.accelerator import Accelerator


class Rehearsal:
    """Takes rebuilt rows as backward will, into memory of its own, and lets them go."""

    def __init__(
        self, replay: Replay, device: torch.device, accelerator: Accelerator | None = None
    ) -> None:
        self._replay = replay
        self._accelerator = accelerator
        self._device = device
        self._targets = {target.root: target for target in replay.chain.targets}
        self._placed: set[int] = set()

    def place(self, value: int) -> torch.Tensor | None:
        """Memory with the strides of the tail that backward will write to."""
        told = self._replay.chain.program.values[value]
        shape_only = torch.empty_strided(told.shape, told.stride, dtype=told.dtype, device="meta")
        tail = self._tail_of(value, shape_only)
        if not direct(self._targets[value].axis, tail):
            return None
        nbytes = tail.numel() * told.dtype.itemsize
        flat = fresh(nbytes, self._device, self._accelerator)
        placed = flat.view(told.dtype).view(tail.shape)
        self._placed.add(value)
        return placed

    def take(self, value: int, rows: torch.Tensor) -> torch.Tensor:
        """Copy them to where they belong, unless a product has written there."""
        if value not in self._placed:
            torch.empty_like(rows).copy_(rows)
        return rows

    def _tail_of(self, value: int, whole: torch.Tensor) -> torch.Tensor:
        program = self._replay.chain.program
        return rows_of(whole, self._targets[value].axis, self._replay.cut, program.rows)


class Comparison(Rehearsal):
    """Takes rebuilt rows as they come; each saved tensor is fetched for its comparison alone.

    Args:
        saved: gives what fills a storage that was saved.
        relaxed: accept differences up to ``tolerance``.

    Attributes:
        failed: by storage: why its rows are not accepted.
        worst_error: the largest relative difference that was accepted.
    """

    def __init__(
        self,
        replay: Replay,
        saved: Callable[[int], torch.Tensor],
        device: torch.device,
        *,
        accelerator: Accelerator | None = None,
        relaxed: bool,
    ) -> None:
        super().__init__(replay, device, accelerator)
        self.failed: dict[int, str] = {}
        self.worst_error = 0.0
        self._saved = saved
        self._relaxed = relaxed

    def take(self, value: int, rows: torch.Tensor) -> torch.Tensor:
        """Compare them with what was saved; what comes after them has to do with its own only."""
        storage = self._targets[value].storage
        saved = self._tail_of(value, self._saved(storage))
        reason = self._difference(rows.reshape(saved.shape), saved)
        if reason is None:
            return rows
        self.failed[storage] = reason
        return torch.empty_like(rows).copy_(saved.reshape(rows.shape))

    def _difference(self, rebuilt: torch.Tensor, saved: torch.Tensor) -> str | None:
        if identical(rebuilt, saved):
            return None
        error = relative_error(rebuilt, saved)
        if self._relaxed and error <= tolerance(saved.dtype):
            self.worst_error = max(self.worst_error, error)
            return None
        cut, rows = self._replay.cut, self._replay.chain.program.rows
        return (
            f"its rebuilt rows are not bit-identical behind cut {cut} of {rows} (relative error "
            f"{error:.1e})"
        )


def tolerance(dtype: torch.dtype) -> float:
    """The largest relative error of rebuilt rows that ``relaxed`` accepts."""
    if dtype is torch.float64:
        return 1e-12
    return 4 * torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def identical(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same bits; equal NaNs are equal here, 0 and -0 are not."""
    if one.is_complex() or one.itemsize not in _BITS:
        return torch.equal(one, other)
    bits = _BITS[one.itemsize]
    return torch.equal(one.contiguous().view(bits), other.contiguous().view(bits))


def relative_error(rebuilt: torch.Tensor, saved: torch.Tensor) -> float:
    """Largest difference over the largest magnitude; infinite where either is not finite."""
    wide = torch.float64
    difference = (rebuilt.to(wide) - saved.to(wide)).abs().max().item()
    scale = saved.to(wide).abs().max().item()
    error = difference / scale if scale else difference
    return error if math.isfinite(error) else math.inf


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
