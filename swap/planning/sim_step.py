"""Gradients and the optimizer's step of a simulated run.

``swap.gradients``, ``swap.pipeline`` and ``swap.memory_step`` on a virtual clock: the tiles, their
staging and the order in which they are read, stepped and written are those of ``TilePipeline``;
what stays in memory is stepped between them, and written at the commit.
"""

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from offload.swap.gradients import MIN_NBYTES
from offload.swap.planning.cost import Costs
from offload.swap.planning.program import Stepping
from offload.swap.planning.sim_weights import SimWeight, SimWeights
from offload.swap.planning.world import Flight, World
from offload.swap.states import SMALL_NUMEL
from offload.swap.tiles import Piece, cut
from offload.tiers.hostmem import page_ceil
from offload.tiers.journal import Label

_FUSED_TILES = 32  # of one call in memory, as ``memory_step`` has it
_TEMPORARIES = 2  # tensors of a tile's size that a step which is not fused makes


@dataclass(slots=True)
class _Leaving:
    name: str
    nbytes: int
    flight: Flight


class SimGradients:
    """Gradients leave as backward produces them.

    Args:
        limit_nbytes: that may wait for their write.
    """

    def __init__(self, world: World, *, limit_nbytes: int) -> None:
        self._world = world
        self.limit_nbytes = limit_nbytes
        self._leaving: deque[_Leaving] = deque()
        self._leaving_nbytes = 0
        self.kept: Collection[str] = ()
        self.on_file: set[str] = set()
        self.in_memory_nbytes = 0

    def take(self, name: str, nbytes: int) -> None:
        """The gradient of the weight ``name`` is complete."""
        world = self._world
        self.poll()
        world.memory.add("gradients", nbytes)
        self.in_memory_nbytes += nbytes
        if nbytes < MIN_NBYTES or name in self.kept:
            return
        label = Label(name, "gradient", "host", "file")
        self._leaving.append(_Leaving(name, nbytes, world.submit(world.writes, label, nbytes)))
        self._leaving_nbytes += nbytes
        while self._leaving and (
            self._leaving_nbytes > self.limit_nbytes or world.memory.room() < 0
        ):
            world.wait(world.writes, self._leaving[0].flight, "full")
            self.poll()

    def poll(self) -> None:
        """Let go of the gradients whose write has ended."""
        while self._leaving and self._world.done(self._leaving[0].flight):
            left = self._leaving.popleft()
            self.on_file.add(left.name)
            self._let_go(left.nbytes)

    def _let_go(self, nbytes: int) -> None:
        self._leaving_nbytes -= nbytes
        self.in_memory_nbytes -= nbytes
        self._world.memory.add("gradients", -nbytes)

    def clear(self) -> None:
        """The step has used them all, and the user's code lets go of them."""
        while self._leaving:
            self._let_go(self._leaving.popleft().nbytes)
        self._world.memory.add("gradients", -self.in_memory_nbytes)
        self.in_memory_nbytes = 0
        self.on_file.clear()


@dataclass(slots=True)
class _Tile:
    pieces: tuple[tuple[SimWeight, Piece], ...]
    read_nbytes: int
    staging_nbytes: int
    written_nbytes: int
    buffer_nbytes: int = 0
    flight: Flight | None = None

    @property
    def numel(self) -> int:
        return sum(piece.numel for _, piece in self.pieces)


class SimStep:
    """Steps all weights that have a gradient.

    Args:
        numels: elements of each weight.
        staging_nbytes: bytes of tiles in flight; one tile may always be.
    """

    def __init__(
        self,
        world: World,
        weights: SimWeights,
        gradients: SimGradients,
        stepping: Stepping,
        numels: Mapping[str, int],
        costs: Costs,
        *,
        chunk_numel: int,
        staging_nbytes: int,
    ) -> None:
        self._world = world
        self._weights = weights
        self._gradients = gradients
        self._stepping = stepping
        self._numels = numels
        self._costs = costs
        self._chunk_numel = chunk_numel
        self.staging_nbytes = staging_nbytes
        self._taken_nbytes = 0
        self._buffers: list[int] = []  # free ones, by their size
        self._held: set[str] = set()  # whose states are in memory
        self._has_states = False

    def keep(self, names: Collection[str]) -> None:
        """Keep gradients and states of ``names`` in memory, and of these alone."""
        for name in self._held - set(names):
            self._world.memory.add("states", -self._states_nbytes(name))
        self._held &= set(names)
        self._gradients.kept = names

    def _states_nbytes(self, name: str) -> int:
        return sum(map(page_ceil, self._stepping.states_nbytes[name]))

    def step(self) -> None:
        """The whole step."""
        names = list(self._stepping.states_nbytes)
        held = [
            name
            for name in names
            if name in self._gradients.kept and self._weights.weights[name].resident
        ]
        chosen = set(held)
        streamed = [
            name for name in names if name not in chosen and self._numels[name] > SMALL_NUMEL
        ]
        waiting = deque(self._tiles(streamed))
        reading: deque[_Tile] = deque()
        writing: deque[_Tile] = deque()
        self._move_on(waiting, reading, writing)
        self._step_in_memory(held)
        while waiting or reading or writing:
            self._move_on(waiting, reading, writing)
            if reading:
                self._step_first(reading, writing)
            elif writing:
                self._retire(writing)
        for nbytes in self._buffers:
            self._world.memory.add("staging", -nbytes)
        self._buffers.clear()
        small = [name for name in names if name not in chosen and name not in set(streamed)]
        self._step_small(small)
        self._has_states = True
        self._gradients.clear()

    # Tiles.

    def _tiles(self, names: Sequence[str]) -> list[_Tile]:
        cuts = cut([self._numels[name] for name in names], self._chunk_numel)
        return [self._tile(names, pieces) for pieces in cuts]

    def _tile(self, names: Sequence[str], pieces: Sequence[Piece]) -> _Tile:
        read = staged = written = 0
        members: list[tuple[SimWeight, Piece]] = []
        for piece in pieces:
            name = names[piece.index]
            weight, numel = self._weights.weights[name], self._numels[name]
            parts = [weight.nbytes, *self._stepping.states_nbytes[name]]
            sizes = [nbytes * piece.numel // numel for nbytes in parts]
            parameter, *states = sizes
            written += sum(sizes)
            if not weight.in_memory:
                read += parameter
                staged += page_ceil(parameter)
            if name in self._gradients.on_file:
                read += parameter
                staged += page_ceil(parameter)
            staged += sum(map(page_ceil, states))
            read += sum(states) if self._has_states else 0
            members.append((weight, piece))
        return _Tile(tuple(members), read, staged, written)

    def _move_on(
        self, waiting: "deque[_Tile]", reading: "deque[_Tile]", writing: "deque[_Tile]"
    ) -> None:
        world = self._world
        while writing and writing[0].flight and world.done(writing[0].flight):
            self._retire(writing)
        while waiting and (buffer := self._take(waiting[0].staging_nbytes)):
            tile = waiting.popleft()
            tile.buffer_nbytes = buffer
            label = Label(tile.pieces[0][0].name, "state", "file", "host")
            tile.flight = world.submit(world.reads, label, tile.read_nbytes)
            reading.append(tile)

    def _take(self, nbytes: int) -> int:
        """The size of the buffer that ``Staging.take`` would give; 0 for none."""
        nbytes = max(nbytes, 1)
        for buffer in self._buffers:
            if buffer >= nbytes:
                self._buffers.remove(buffer)
                self._taken_nbytes += buffer
                return buffer
        while self._buffers and self._staged() + nbytes > self.staging_nbytes:
            self._world.memory.add("staging", -self._buffers.pop())
        if self._taken_nbytes and self._staged() + nbytes > self.staging_nbytes:
            return 0
        self._taken_nbytes += nbytes
        self._world.memory.add("staging", nbytes)
        return nbytes

    def _staged(self) -> int:
        return self._taken_nbytes + sum(self._buffers)

    def _step_first(self, reading: "deque[_Tile]", writing: "deque[_Tile]") -> None:
        world, tile = self._world, reading.popleft()
        assert tile.flight is not None
        world.wait(world.reads, tile.flight, "late")
        temporaries = self._temporaries(tile.numel)
        world.memory.add("transients", temporaries)
        moved = self._moved_nbytes((weight.name, piece) for weight, piece in tile.pieces)
        world.compute(self._costs.optimizer_s(self._stepping, moved, threads="one"))
        world.memory.add("transients", -temporaries)
        label = Label(tile.pieces[0][0].name, "state", "host", "file")
        tile.flight = world.submit(world.writes, label, tile.written_nbytes)
        writing.append(tile)

    def _moved_nbytes(self, pieces: Iterable[tuple[str, Piece]]) -> int:
        """Bytes that a step of ``pieces`` reads and writes in memory."""
        moved = 0
        for name, piece in pieces:
            weight = self._weights.weights[name].nbytes
            states = sum(self._stepping.states_nbytes[name])
            moved += (3 * weight + 2 * states) * piece.numel // self._numels[name]
        return moved

    def _temporaries(self, numel: int) -> int:
        return 0 if self._stepping.fused else _TEMPORARIES * 4 * min(numel, self._chunk_numel)

    def _retire(self, writing: "deque[_Tile]") -> None:
        tile = writing.popleft()
        assert tile.flight is not None
        self._world.wait(self._world.writes, tile.flight, "full")
        self._taken_nbytes -= tile.buffer_nbytes
        self._buffers.append(tile.buffer_nbytes)

    # In memory.

    def _step_in_memory(self, names: Sequence[str]) -> None:
        if not names:
            return
        world = self._world
        missing: list[Flight] = []
        for name in names:
            self._weights.fetch_now(self._weights.weights[name])
            if name in self._held:
                continue
            nbytes = self._states_nbytes(name)
            world.memory.add("states", nbytes)
            if self._has_states:
                label = Label(name, "state", "file", "host")
                missing.append(world.submit(world.reads, label, nbytes))
            self._held.add(name)
        for flight in missing:
            world.wait(world.reads, flight, "cold")
        numels = [self._numels[name] for name in names]
        tiles = _FUSED_TILES if self._stepping.fused else 1
        for call in cut(numels, self._chunk_numel * tiles):
            numel = sum(piece.numel for piece in call)
            temporaries = self._temporaries(numel)
            world.memory.add("transients", temporaries)
            moved = self._moved_nbytes((names[piece.index], piece) for piece in call)
            world.compute(self._costs.optimizer_s(self._stepping, moved, threads="all"))
            world.memory.add("transients", -temporaries)

    def _step_small(self, names: Sequence[str]) -> None:
        """Few elements: stepped whole, and stored at once."""
        world = self._world
        for name in names:
            nbytes = page_ceil(self._weights.weights[name].nbytes)
            label = Label(name, "weight", "host", "file")
            world.compute(self._costs.hook_s)
            world.wait(world.writes, world.submit(world.writes, label, nbytes), "full")

    def commit(self) -> None:
        """What only memory has newest is written, and all is made durable."""
        world, flights = self._world, []
        for name in self._stepping.states_nbytes:
            weight = self._weights.weights[name]
            if name in self._held:
                sizes = [("weight", weight.nbytes), ("state", self._states_nbytes(name))]
                flights += [
                    world.submit(world.writes, Label(name, role, "host", "file"), nbytes)
                    for role, nbytes in sizes
                ]
            elif weight.ready:  # is it still what was stored?
                world.compute(weight.nbytes / self._costs.checksum_bytes_per_s)
        world.drain()
        world.compute(self._costs.commit_s(len(self._numels)))
