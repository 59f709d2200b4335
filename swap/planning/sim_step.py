"""The optimizer's step of a simulated run: ``swap.optimizer`` and ``swap.memory_step``, virtually.

The tiles, and the order in which they are read, stepped and written, are those of the runtime; what
stays in memory is stepped between them, and written at the commit.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from offload.swap.planning.cost import Costs
from offload.swap.planning.program import Stepping
from offload.swap.planning.sim_gradients import SimGradients
from offload.swap.planning.sim_pieces import SteppedWeight, stepped_weights
from offload.swap.planning.sim_pipeline import SimPipeline, SimTile
from offload.swap.planning.sim_weights import SimWeight, SimWeights
from offload.swap.planning.world import Flight, World
from offload.swap.states import SMALL_NUMEL
from offload.swap.tile_blocks import block_numel
from offload.swap.tiles import cut, cut_runs
from offload.tiers.hostmem import page_ceil

_FUSED_TILES = 32  # of one call in memory, as ``memory_step`` has it
_TEMPORARIES = 2  # tensors of a tile's size that a step which is not fused makes
_Part: TypeAlias = tuple[SimWeight, SteppedWeight, int]  # of a tile: a weight, its elements


@dataclass(slots=True, eq=False)
class _Cut:
    """The tiles of some weights.

    Attributes:
        parts: of each tile that differs from the one before, and how many are like it.
        state: of what these tiles were made last: whether there are states, whether each weight is
            in memory, and its gradient on file.
    """

    weights: Sequence[SimWeight]
    parts: Sequence[tuple[tuple[_Part, ...], int]]
    state: tuple[bool, list[tuple[bool, bool]]] | None = None
    tiles: Sequence[tuple[SimTile, int]] = ()


class SimStep:
    """Steps all weights that have a gradient.

    Attributes:
        names: of the weights that are stepped.
        gradients: of all weights.
        states_nbytes: of each weight's states in memory, to whole pages.
        has_states: a step has been made, which made them.
        put_off: takes weights whose tiles are stepped later; returns those to be stepped now.

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
        self.gradients = gradients
        self._stepping = stepping
        self._numels = numels
        self._costs = costs
        self._chunk_numel = chunk_numel
        self.pipeline = SimPipeline(world, staging_nbytes=staging_nbytes)
        self._held: set[str] = set()  # whose states are in memory
        self.has_states = False
        self.put_off: Callable[[Sequence[str]], Sequence[str]] = lambda names: names
        self.names = list(stepping.states_nbytes)
        self._in_order = [weights.weights[name] for name in self.names]
        self._small = {name for name in self.names if numels[name] <= SMALL_NUMEL}
        nbytes = {name: weight.nbytes for name, weight in weights.weights.items()}
        self._stepped = stepped_weights(stepping, nbytes, numels)
        self._cuts: dict[tuple[str, ...], _Cut] = {}
        self._tiles: dict[tuple[object, ...], SimTile] = {}  # those that differ
        states = stepping.states_nbytes
        paged = {sizes: sum(map(page_ceil, sizes)) for sizes in set(states.values())}
        self.states_nbytes = {name: paged[sizes] for name, sizes in states.items()}

    def keep(self, names: Collection[str]) -> None:
        """Keep gradients and states of ``names`` in memory, and of these alone."""
        for name in self._held - set(names):
            self._world.memory.drop("states", self.states_nbytes[name])
        self._held &= set(names)
        self.gradients.kept = names

    def keeps(self, weight: SimWeight) -> bool:
        """Whether ``weight`` is stepped in memory."""
        return weight.resident and weight.name in self.gradients.kept

    def standing(self) -> tuple[object, ...]:
        """What the next step depends on, between two steps."""
        return frozenset(self._held), self.has_states, *self.gradients.standing()

    def step(self, stepped: Collection[str] = ()) -> None:
        """The whole step, but for the weights that backward has ``stepped``."""
        held: list[str] = []
        streamed: list[str] = []
        small: list[SimWeight] = []
        kept, few = self.gradients.kept, self._small
        for weight in self._in_order:
            name = weight.name
            if name in stepped:
                continue
            if weight.resident and name in kept:
                held.append(name)
            elif name in few:
                small.append(weight)
            else:
                streamed.append(name)
        for tile, count in self.tiles(self.put_off(streamed)):
            self.pipeline.add(tile, count)
        self.pipeline.move_on()
        self.step_in_memory(held)
        self.pipeline.finish()
        self._step_small(small)
        self.has_states = True
        self.gradients.clear()

    # Tiles.

    def tiles(self, names: Sequence[str]) -> Sequence[tuple[SimTile, int]]:
        """What a step of ``names`` moves, and how often."""
        key, on_file = tuple(names), self.gradients.on_file
        found = self._cuts.get(key)
        if found is None:
            found = self._cuts[key] = self._cut(names)
        there = [
            (weight.ready or weight.flight is not None, weight.name in on_file)
            for weight in found.weights
        ]
        state = self.has_states, there
        if state != found.state:
            found.state = state
            found.tiles = [(self._tile(parts), count) for parts, count in found.parts]
        return found.tiles

    def _cut(self, names: Sequence[str]) -> _Cut:
        weights = [self._weights.weights[name] for name in names]
        pieces_of = cut_runs([self._numels[name] for name in names], self._chunk_numel)
        parts = [
            (
                tuple(
                    (weights[piece.index], self._stepped[names[piece.index]], piece.numel)
                    for piece in pieces
                ),
                count,
            )
            for pieces, count in pieces_of
        ]
        return _Cut(weights, parts)

    def _tile(self, parts: Sequence[_Part]) -> SimTile:
        on_file = self.gradients.on_file
        key: list[object] = [self.has_states]
        for weight, stepped, numel in parts:
            key += (
                id(stepped),
                numel,
                weight.ready or weight.flight is not None,
                weight.name in on_file,
            )
        found = self._tiles.get(alike := tuple(key))
        if found is None:
            found = self._tiles[alike] = self._make_tile(parts)
        name, first = parts[0][0].name, found.name
        return found if name == first else SimTile(name, *found[1:])

    def _make_tile(self, parts: Sequence[_Part]) -> SimTile:
        read = staged = written = 0
        for weight, stepped, numel in parts:
            in_memory, on_file = weight.in_memory, weight.name in self.gradients.on_file
            parameter, states = stepped.itemsize * numel, stepped.stored_nbytes(numel)
            read += parameter * ((not in_memory) + on_file)
            read += states if self.has_states else 0
            written += parameter + states
            staged += stepped.staging_nbytes(numel, in_memory=in_memory, on_file=on_file)
        numel = sum(numel for _, _, numel in parts)
        return SimTile(
            name=parts[0][0].name,
            numel=numel,
            read_nbytes=read,
            staging_nbytes=staged,
            written_nbytes=written,
            seconds=self._seconds(((weight.name, numel) for weight, _, numel in parts), "one")
            + len(parts) * self._costs.tile_part_s,
            temporary_nbytes=self._temporaries(numel) + self._made_nbytes(parts),
        )

    def _made_nbytes(self, parts: Sequence[_Part]) -> int:
        """Of states beside staging: those of a block that are made or widened (``tile_blocks``)."""
        numel = sum(numel for _, _, numel in parts)
        made = (
            0
            if self.has_states
            else sum(stepped.states_nbytes * numel for _, stepped, numel in parts)
        )
        scratch = 4 * max(stepped.by_blocks for _, stepped, _ in parts)
        at_once = min(block_numel(self._chunk_numel), numel)
        return made * at_once // numel + scratch * at_once

    def _seconds(self, parts: Iterable[tuple[str, int]], threads: Literal["one", "all"]) -> float:
        """Of one call of the optimizer's step, and of what is read or written in another form."""
        moved, seconds = 0, 0.0
        for name, numel in parts:
            stepped = self._stepped[name]
            moved += stepped.computed_nbytes(numel)
            for form, count in stepped.recoded().items():
                seconds += self._costs.recoding_s(form, count * numel)
        return seconds + self._costs.optimizer_s(self._stepping, moved, threads=threads)

    def _temporaries(self, numel: int) -> int:
        return 0 if self._stepping.fused else _TEMPORARIES * 4 * min(numel, self._chunk_numel)

    # In memory.

    def step_in_memory(self, names: Sequence[str]) -> None:
        """In place; what is not there yet comes first."""
        if not names:
            return
        world = self._world
        missing: list[Flight] = []
        for name in names:
            self._weights.fetch_now(self._weights.weights[name])
            if name in self._held:
                continue
            nbytes = self.states_nbytes[name]
            world.memory.add("states", nbytes)
            if self.has_states:
                missing.append(world.submit(world.reads, name, "state", nbytes))
            self._held.add(name)
        for flight in missing:
            world.wait(world.reads, flight, "cold")
        numels = [self._numels[name] for name in names]
        tiles = _FUSED_TILES if self._stepping.fused else 1
        for call in cut(numels, self._chunk_numel * tiles):
            numel = sum(piece.numel for piece in call)
            if temporaries := self._temporaries(numel):
                world.memory.pass_through([temporaries])
            parts = ((names[piece.index], piece.numel) for piece in call)
            world.compute(self._seconds(parts, "all"))

    def _step_small(self, weights: Sequence[SimWeight]) -> None:
        """Few elements: stepped whole, and stored at once."""
        world, writes, seconds = self._world, self._world.writes, self._costs.small_step_s
        for weight in weights:
            world.compute(seconds)
            world.move(writes, weight.name, "weight", weight.padded_nbytes, "full")

    def take_down(self) -> None:
        """What only memory has newest is on its way to the drive."""
        world = self._world
        for weight in self._in_order:
            name = weight.name
            if name in self._held:
                world.submit(world.writes, name, "weight", weight.nbytes)
                world.submit(world.writes, name, "state", self.states_nbytes[name])
            elif weight.ready:  # is it still what was stored?
                world.compute(weight.nbytes / self._costs.checksum_bytes_per_s)

    def make_durable(self) -> None:
        """All that was written is."""
        self._world.drain()
        self._world.compute(self._costs.commit_s(len(self._numels)))
