"""Tiles in flight: read ahead, step, write behind, within a bound on staging memory."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from offload.swap.gradients import GradientSwapper
from offload.swap.optim_kinds import step_on
from offload.swap.tiles import Piece, cut
from offload.swap.weights import Weight
from offload.tiers.base import Block
from offload.tiers.filetier import FileTier
from offload.tiers.hostmem import page_ceil
from offload.tiers.journal import Journal, Label
from offload.tiers.lanes import Job, Transfer
from offload.tiers.mapped import MappedTensor
from offload.tiers.memory import HostBuffer
from offload.tiers.pieces import move_jobs
from offload.tiers.store import StoredTensor, checksum


@dataclass(slots=True, eq=False)
class Version:
    """The next version of a stored tensor while its tiles are written."""

    stored: StoredTensor
    target: Block
    checksums: list[int]

    def publish(self) -> None:
        """Every chunk has been written: make it the current version."""
        self.stored.publish(self.target, self.checksums)


@dataclass(slots=True, eq=False)
class Target:
    """What the step of one parameter reads and writes.

    Attributes:
        gradient: 1-D, in ordinary memory or in the mapping ``home``.
        before: ``optimizer.state[parameter]``, empty before its first step.
        states: the next versions of its per-element states, by name.
        after: the new state's entries in the optimizer's own order; per-element ones stand for
            themselves only by name, their bytes go to ``states``.
    """

    parameter: nn.Parameter
    weight: Weight
    version: Version
    gradient: torch.Tensor
    home: MappedTensor | None
    before: Mapping[str, Any]
    states: dict[str, Version]
    after: dict[str, Any] = field(default_factory=dict)

    def staging(self, piece: Piece) -> list[int]:
        """Staging bytes of a piece: its parameter, its gradient, each per-element state."""
        weight = 0 if self.weight.in_memory else self.parameter.element_size()
        gradient = 0 if self.home is None else self.gradient.element_size()
        states = [version.stored.dtype.itemsize for version in self.states.values()]
        return [page_ceil(piece.numel * itemsize) for itemsize in (weight, gradient, *states)]


@dataclass(slots=True, eq=False)
class _Part:
    """One piece of a tile in memory: 1-D tensors of the piece's elements."""

    piece: Piece
    target: Target
    parameter: torch.Tensor
    states: dict[str, torch.Tensor]

    def state_before(self) -> dict[str, Any]:
        """The state that the optimizer sees: staged slices, and copies of counters."""
        return {
            name: self.states[name] if name in self.states else _copied(value)
            for name, value in self.target.before.items()
        }

    def take(self, after: Mapping[str, Any]) -> None:
        """Keep what the optimizer made of the state."""
        for name, value in after.items():
            staged = self.states.get(name)
            if staged is None:
                self.target.after[name] = value
                continue
            self.target.after.setdefault(name, None)
            if value.data_ptr() != staged.data_ptr():
                staged.copy_(value)  # made afresh: the first step, or an out-of-place one


@dataclass(slots=True, eq=False)
class _Tile:
    """Parts in flight and the staging buffer under them."""

    parts: list[_Part]
    buffer: HostBuffer
    transfer: Transfer


class _Staging:
    """Buffers of the tiles in flight, used again: fresh pages would cost their zeroing."""

    def __init__(self, limit_nbytes: int) -> None:
        self.limit_nbytes = limit_nbytes
        self._free: list[HostBuffer] = []
        self._taken_nbytes = 0

    def take(self, nbytes: int) -> HostBuffer | None:
        """A buffer of at least ``nbytes``, or None while others hold the room."""
        for buffer in self._free:
            if buffer.nbytes >= nbytes:
                self._free.remove(buffer)
                self._taken_nbytes += buffer.nbytes
                return buffer
        while self._free and self._held_nbytes() + nbytes > self.limit_nbytes:
            self._free.pop().release()
        if self._taken_nbytes and self._held_nbytes() + nbytes > self.limit_nbytes:
            return None
        buffer = HostBuffer(max(nbytes, 1))
        self._taken_nbytes += buffer.nbytes
        return buffer

    def _held_nbytes(self) -> int:
        return self._taken_nbytes + sum(buffer.nbytes for buffer in self._free)

    def give_back(self, buffer: HostBuffer) -> None:
        """The tile is written: its buffer may be taken again."""
        self._taken_nbytes -= buffer.nbytes
        self._free.append(buffer)

    def close(self) -> None:
        """Return the memory to the kernel."""
        for buffer in self._free:
            buffer.release()


class TilePipeline:
    """Streams the tiles of a group of parameters through the optimizer's own step.

    Args:
        tier: the store's, which parameters and states are read from and written to.
        staging_nbytes: bytes of tiles in flight; one tile may always be.
    """

    def __init__(
        self,
        tier: FileTier,
        gradients: GradientSwapper,
        journal: Journal,
        *,
        chunk_numel: int,
        staging_nbytes: int,
    ) -> None:
        self.tier = tier
        self.gradients = gradients
        self.journal = journal
        self.chunk_numel = chunk_numel
        self.staging_nbytes = staging_nbytes

    def run(
        self, optimizer: Optimizer, group: Mapping[str, Any], targets: Sequence[Target]
    ) -> None:
        """Step ``targets``; returns when every tile has been written, not yet published.

        Raises:
            TierIOError: a read or write failed.
        """
        waiting = deque(cut([target.gradient.numel() for target in targets], self.chunk_numel))
        reading: deque[_Tile] = deque()
        writing: deque[_Tile] = deque()
        staging = _Staging(self.staging_nbytes)
        threads = torch.get_num_threads()
        # The step is bound by the disk. More threads would only wait, busily, for one another,
        # on cores that the lanes want.
        torch.set_num_threads(1)
        try:
            while waiting or reading or writing:
                while writing and writing[0].transfer.done():
                    self._retire(writing, staging)
                while waiting and (buffer := staging.take(_staging(targets, waiting[0]))):
                    reading.append(self._read(targets, waiting.popleft(), buffer))
                if not reading:
                    if writing:  # room is needed, or the step is ending
                        self._retire(writing, staging)
                    continue
                tile = reading[0]
                self._await(tile.transfer, "late")
                self._compute(optimizer, group, tile)
                self._write(tile)
                writing.append(reading.popleft())
        finally:
            # After an error lanes may still use the buffers: let them finish first.
            for tile in (*reading, *writing):
                tile.transfer.settle()
                staging.give_back(tile.buffer)
            staging.close()
            torch.set_num_threads(threads)

    def _retire(self, writing: deque[_Tile], staging: "_Staging") -> None:
        self._await(writing[0].transfer, "full")
        staging.give_back(writing.popleft().buffer)

    def _await(self, transfer: Transfer, reason: str) -> None:
        if not transfer.done():
            label = transfer.label
            with self.journal.stall(label.key, label.role, f"{label.src}→{label.dst}", reason):
                transfer.settle()
        transfer.wait()

    def _read(
        self, targets: Sequence[Target], pieces: tuple[Piece, ...], buffer: HostBuffer
    ) -> _Tile:
        """Lay out the staging of a tile and issue its reads."""
        parts: list[_Part] = []
        jobs: list[Job] = []
        offset = 0
        for piece in pieces:
            target = targets[piece.index]
            parts.append(self._part(target, piece, buffer, offset, jobs))
            offset += sum(target.staging(piece))
        transfer = self.tier.lanes.reads.submit(
            jobs, self._label(parts, reading=True), sum(_read_nbytes(part) for part in parts)
        )
        return _Tile(parts, buffer, transfer)

    def _part(
        self, target: Target, piece: Piece, buffer: HostBuffer, offset: int, jobs: list[Job]
    ) -> _Part:
        weight_nbytes, gradient_nbytes, *state_nbytes = target.staging(piece)
        if target.weight.in_memory:  # stepped in place: memory is the newest copy
            parameter = target.weight.mapped.tensor.view(-1)[piece.start : piece.stop]
        else:
            parameter = buffer.tensor(target.parameter.dtype, (piece.numel,), offset=offset)
            jobs += self._read_jobs(target.version.stored, piece, parameter)
        offset += weight_nbytes
        gradient = target.gradient[piece.start : piece.stop]
        if target.home is not None:
            staged = buffer.tensor(gradient.dtype, (piece.numel,), offset=offset)
            jobs += self.gradients.read_jobs(target.home, piece.start, staged)
            gradient = staged
        offset += gradient_nbytes
        states: dict[str, torch.Tensor] = {}
        for (name, version), nbytes in zip(target.states.items(), state_nbytes, strict=True):
            states[name] = buffer.tensor(version.stored.dtype, (piece.numel,), offset=offset)
            if target.before:
                jobs += self._read_jobs(version.stored, piece, states[name])
            offset += nbytes
        parameter.grad = gradient
        return _Part(piece, target, parameter, states)

    def _read_jobs(self, stored: StoredTensor, piece: Piece, staged: torch.Tensor) -> list[Job]:
        assert stored.current is not None
        base = stored.current.extent.offset + piece.start * stored.dtype.itemsize
        file, nbytes = self.tier.file, page_ceil(staged.nbytes)
        return move_jobs(file, file.read, base, staged.data_ptr(), nbytes)

    def _compute(self, optimizer: Optimizer, group: Mapping[str, Any], tile: _Tile) -> None:
        afters = step_on(
            optimizer,
            group,
            [part.parameter for part in tile.parts],
            [part.state_before() for part in tile.parts],
        )
        for part, after in zip(tile.parts, afters, strict=True):
            part.take(after)

    def _write(self, tile: _Tile) -> None:
        jobs: list[Job] = []
        nbytes = 0
        for part in tile.parts:
            written = [(part.target.version, part.parameter)]
            written += [
                (part.target.states[name], staged)
                for name, staged in part.states.items()
                if name in part.target.after
            ]
            for version, data in written:
                jobs += self._write_jobs(version, part.piece, data)
                nbytes += data.nbytes
        label = self._label(tile.parts, reading=False)
        tile.transfer = self.tier.lanes.writes.submit(jobs, label, nbytes)

    def _write_jobs(self, version: Version, piece: Piece, data: torch.Tensor) -> list[Job]:
        file, offset = self.tier.file, piece.start * data.element_size()
        base, address = version.target.extent.offset + offset, data.data_ptr()

        def write(at: int, source: int, nbytes: int) -> None:
            file.write(at, source, nbytes)
            if source == address:  # once for all the pieces of the chunk
                chunk = offset // version.stored.chunk_nbytes
                version.checksums[chunk] = checksum(address, data.nbytes)

        return move_jobs(file, write, base, address, page_ceil(data.nbytes))

    def _label(self, parts: Sequence[_Part], *, reading: bool) -> Label:
        ends = (self.tier.spec.name, "host")
        source, destination = ends if reading else ends[::-1]
        return Label(parts[0].target.weight.name, "state", source, destination)


def _staging(targets: Sequence[Target], pieces: Sequence[Piece]) -> int:
    return sum(sum(targets[piece.index].staging(piece)) for piece in pieces)


def _read_nbytes(part: _Part) -> int:
    target, nbytes = part.target, 0
    if not target.weight.in_memory:
        nbytes += part.parameter.nbytes
    if target.home is not None:
        nbytes += part.piece.numel * target.gradient.element_size()
    if target.before:
        nbytes += sum(staged.nbytes for staged in part.states.values())
    return nbytes


def _copied(value: Any) -> Any:
    """Each tile steps its own copy of a counter, so that a step counts once."""
    return value.clone() if isinstance(value, torch.Tensor) else value
