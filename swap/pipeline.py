"""Tiles in flight: read ahead, step, write behind, within a bound on staging memory.

Tiles that a device takes (``device_step``) go there when they have been read, and are written when
they are back.

[Note: a buffer goes on] While kernels run, the training thread comes by seldom. So the buffer of a
tile that is being written is promised to the next one at once: its read follows the write on the
lanes (``lanes`` [Note: one after the other]), and the drive need not wait for the training thread.

[Note: two that step] Tiles may also be stepped ``beside`` the training thread's kernels (``beside``
[Note: beside kernels]). Whoever steps holds the lock. The thread beside moves a tile from those
that have been read to those that are being written; that it was stepped is told to its target
when the training thread comes by, and so is all that follows.
"""

import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from offload.swap.beside import Beside
from offload.swap.device_step import DeviceStep
from offload.swap.gradients import GradientSwapper
from offload.swap.optim_kinds import step_on
from offload.swap.staging import Staging
from offload.swap.step_targets import Target
from offload.swap.tile_blocks import BlockStep
from offload.swap.tile_moves import Tile, TileMoves, WaitingTile
from offload.swap.tiles import Piece, cut
from offload.tiers.filetier import FileTier
from offload.tiers.journal import Journal
from offload.tiers.lanes import Transfer
from offload.tiers.memory import HostBuffer


class TilePipeline:
    """Streams tiles through the optimizer's own step: ``add`` them, then ``advance`` or ``finish``.

    Called on the training thread only; see [Note: two that step].

    Args:
        tier: the store's, which parameters and states are read from and written to.
        staging_nbytes: bytes of tiles in flight; one tile may always be.
        device: steps its share of the tiles.
    """

    def __init__(
        self,
        tier: FileTier,
        gradients: GradientSwapper,
        journal: Journal,
        optimizer: Optimizer,
        *,
        chunk_numel: int,
        staging_nbytes: int,
        device: DeviceStep | None = None,
    ) -> None:
        self.tier = tier
        self.gradients = gradients
        self.journal = journal
        self.optimizer = optimizer
        self.chunk_numel = chunk_numel
        self.staging = Staging(staging_nbytes)
        self.device = device
        self._moves = TileMoves(tier, gradients)
        self._blocks = BlockStep(optimizer, chunk_numel)
        self._waiting: deque[WaitingTile] = deque()
        self._reading: deque[Tile] = deque()
        self._visiting: deque[Tile] = deque()  # the device
        self._writing: deque[Tile] = deque()
        self._beside = Beside(self._step_beside)
        self._lock = threading.RLock()
        self._stepped_beside: deque[Tile] = deque()  # whose targets have not been told
        self._failed: BaseException | None = None  # what a step beside ended with

    @property
    def landing_nbytes(self) -> int:
        """Bytes of tiles in flight that the resident set may not show yet."""
        with self._lock:
            return self.staging.landing_nbytes

    @property
    def is_busy(self) -> bool:
        """Whether any tile is not written yet."""
        return bool(self._waiting or self._reading or self._visiting or self._writing)

    @property
    def is_waiting(self) -> bool:
        """Whether a tile waits for staging memory to be read to."""
        return bool(self._waiting)

    def add(
        self, group: Mapping[str, Any], targets: Sequence[Target], *, beside: bool = False
    ) -> None:
        """Line up the tiles of ``targets``, all of the optimizer's ``group``.

        Args:
            beside: they may be stepped while the training thread does something else, until
                ``finish``. Only those whose gradients are in memory are.
        """
        parameters = [target.parameter for target in targets]
        beside = beside and all(target.home is None for target in targets)
        taken: Sequence[Piece] = ()
        with self._lock:
            for pieces in cut([target.gradient.numel() for target in targets], self.chunk_numel):
                here: Sequence[Piece] = pieces
                if self.device is not None:
                    taken, here = self.device.share.split(parameters, pieces)
                if taken:
                    self._waiting.append(WaitingTile(group, targets, taken, True, False))
                if here:
                    self._waiting.append(WaitingTile(group, targets, here, False, beside))
        if beside:
            self._beside.start()

    def advance(self) -> None:
        """Read, step and write what can be without waiting for a lane.

        Raises:
            TierIOError: a read or write failed.
        """
        with self._lock:
            self._move_on()
            while self._has_read() and not (self._reading[0].on_device and self._is_full()):
                self._step_first()
                self._move_on()

    def advance_one(self) -> None:
        """Wait for the tile that is nearest to its end, and step it or let it go.

        Does not wait if a tile has been stepped beside: that may be all that was needed.

        Raises:
            TierIOError: a read or write failed.
        """
        with self._lock:
            was_stepped = bool(self._stepped_beside)
            self._move_on()
            if was_stepped:
                return
            if self.device is not None and self._visiting and not self._has_read():
                self.device.advance_one()
            elif self._reading:
                self._step_first()
            elif self._writing:  # room is needed, or the step is ending
                self._retire()

    def finish_target(self, target: Target) -> None:
        """Return when all tiles of ``target`` are written; others go on as far as they are read.

        Raises:
            TierIOError: a read or write failed.
        """
        with self._lock:
            while True:
                self._move_on()
                if not target.unwritten_numel:
                    return
                if target.unstepped_numel or self._has_read():
                    self.advance_one()
                else:
                    self._retire()

    def finish(self) -> None:
        """Return when every tile has been written; no staging is kept.

        Raises:
            TierIOError: a read or write failed.
        """
        while self.is_busy:
            self.advance_one()
        self._beside.stop()
        self.trim()

    def trim(self) -> None:
        """Give back the staging that no tile is in."""
        with self._lock:
            self.staging.close()
            self._blocks.close()

    def abandon(self) -> None:
        """After an error: wait until no lane uses a buffer, and forget all tiles."""
        self._beside.stop()
        self._failed = None
        self._stepped_beside.clear()
        self._waiting.clear()
        if self.device is not None:
            self.device.abandon()
        for tile in (*self._reading, *self._visiting, *self._writing):
            tile.transfer.settle()
            self._give_back(tile)
        self._reading.clear()
        self._visiting.clear()
        self._writing.clear()
        self.trim()

    def _move_on(self) -> None:
        """Let written tiles go and begin to read others, as far as staging reaches."""
        if self._failed is not None:
            raise self._failed
        while self._stepped_beside:
            self._stepped_beside.popleft().tell_stepped()
        if self.device is not None:
            self.device.advance()
        while self._writing and self._writing[0].transfer.done():
            self._retire()
        while self._waiting and (buffer := self.staging.take(self._waiting[0].staging_nbytes())):
            self._read(self._waiting.popleft(), buffer)

    def _has_read(self) -> bool:
        return bool(self._reading) and self._reading[0].transfer.done()

    def _is_full(self) -> bool:
        return self.device is not None and self.device.is_full

    def _step_first(self) -> None:
        tile = self._reading[0]
        self._await(tile.transfer, "late")
        for part in tile.parts:
            part.target.arrive()
        if tile.on_device:
            self._send(tile)
            return
        with _one_thread():
            self._compute(tile)
        self._reading.popleft()
        self._send_home(tile)
        tile.tell_stepped()

    def _step_beside(self) -> None:
        """Step what has been read, on the thread beside; the training thread hears of errors."""
        while self._step_first_beside():
            pass

    def _step_first_beside(self) -> bool:
        with self._lock:  # given up after each tile, for the training thread
            if self._failed is not None or not self._has_read():
                return False
            tile = self._reading[0]
            if not tile.beside or tile.transfer.error is not None:
                return False
            try:
                self._compute(tile)
                self._reading.popleft()
                self._send_home(tile, beside=True)
                self._stepped_beside.append(tile)
            except BaseException as error:  # noqa: BLE001 (raised on the training thread)
                self._failed = error
            return True

    def _send(self, tile: Tile) -> None:
        """Have the first tile that has been read stepped by the device."""
        assert self.device is not None
        with _one_thread():
            for part in tile.parts:
                part.widen()
        self._visiting.append(self._reading.popleft())
        parts = [part.for_device() for part in tile.parts]
        self.device.send(tile.group, parts, partial(self._came_back, tile))

    def _came_back(self, tile: Tile, afters: Sequence[Mapping[str, Any]]) -> None:
        with _one_thread():
            self._take(tile, afters)
            for part in tile.parts:
                part.narrow()
        self._visiting.remove(tile)
        self._send_home(tile)
        tile.tell_stepped()

    def _send_home(self, tile: Tile, *, beside: bool = False) -> None:
        """It has been stepped: write it, and have the next tile read where it is written from."""
        self._moves.write(tile, self.optimizer)
        self._writing.append(tile)
        buffer = tile.buffer
        assert buffer is not None
        following = self._waiting[0] if self._waiting else None
        if (
            following is not None
            and (following.beside or not beside)  # others are the training thread's
            and following.staging_nbytes() <= buffer.nbytes
        ):
            self.staging.pass_on(buffer)
            tile.buffer = None  # [Note: a buffer goes on]
            self._read(self._waiting.popleft(), buffer, after=tile.transfer)

    def _retire(self) -> None:
        tile = self._writing[0]
        self._await(tile.transfer, "full")
        self._writing.popleft()
        self._give_back(tile)
        for part in tile.parts:
            part.target.unwritten_numel -= part.piece.numel
            if not part.target.unwritten_numel:
                part.target.written(part.target)

    def _give_back(self, tile: Tile) -> None:
        if tile.buffer is not None:
            self.staging.give_back(tile.buffer)

    def _await(self, transfer: Transfer, reason: str) -> None:
        if not transfer.done():
            label = transfer.label
            with self.journal.stall(label.key, label.role, f"{label.src}→{label.dst}", reason):
                transfer.settle()
        transfer.wait()

    def _read(
        self, waiting: WaitingTile, buffer: HostBuffer, after: Transfer | None = None
    ) -> None:
        tile = self._moves.read(waiting, buffer, after)
        self._reading.append(tile)
        if tile.beside:
            tile.transfer.then(self._beside.ring)

    def _compute(self, tile: Tile) -> None:
        by_blocks = any(part.by_blocks or part.makes_states for part in tile.parts)
        for part in tile.parts:
            part.widen(by_blocks=by_blocks)
        if by_blocks:
            self._blocks.step(tile.group, tile.parts)
        else:
            self._take(tile, self._step_whole(tile))
        for part in tile.parts:
            part.narrow(by_blocks=by_blocks)

    def _step_whole(self, tile: Tile) -> Sequence[Mapping[str, Any]]:
        return step_on(
            self.optimizer,
            tile.group,
            [part.parameter for part in tile.parts],
            [part.state_before() for part in tile.parts],
        )

    def _take(self, tile: Tile, afters: Sequence[Mapping[str, Any]]) -> None:
        for part, after in zip(tile.parts, afters, strict=True):
            part.take(after)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The step is bound by the disk.

    More threads would only wait, busily, for one another, on cores that the lanes want.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
