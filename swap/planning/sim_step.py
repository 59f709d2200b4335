"""The optimizer's step of a simulated run: ``swap.optimizer`` and ``swap.memory_step``, virtually.

The tiles, and the order in which they are read, stepped and written, are those of the runtime; what
stays in memory is stepped between them, and written at the commit.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Literal

from offload.swap.planning.cost import Costs
from offload.swap.planning.program import Stepping
from offload.swap.planning.sim_gradients import SimGradients
from offload.swap.planning.sim_pieces import stepped_weights
from offload.swap.planning.sim_pipeline import SimPipeline, SimTile
from offload.swap.planning.sim_weights import SimWeight, SimWeights
from offload.swap.planning.world import Flight, World
from offload.swap.states import SMALL_NUMEL
from offload.swap.tiles import Piece, cut, cut_runs
from offload.tiers.hostmem import page_ceil

_FUSED_TILES = 32  # of one call in memory, as ``memory_step`` has it
_TEMPORARIES = 2  # tensors of a tile's size that a step which is not fused makes


class SimStep:
    """Steps all weights that have a gradient.

    Attributes:
        names: of the weights that are stepped.
        gradients: of all weights.

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
        self._has_states = False
        self.names = list(stepping.states_nbytes)
        nbytes = {name: weight.nbytes for name, weight in weights.weights.items()}
        self._stepped = stepped_weights(stepping, nbytes, numels)
        forms = {form: number for number, form in enumerate(set(self._stepped.values()))}
        self._forms = {name: forms[form] for name, form in self._stepped.items()}
        self._cuts: dict[tuple[str, ...], list[tuple[tuple[Piece, ...], int]]] = {}
        self._tiles: dict[tuple[object, ...], SimTile] = {}  # those that differ
        self._states_nbytes = {
            name: sum(map(page_ceil, sizes)) for name, sizes in stepping.states_nbytes.items()
        }

    def keep(self, names: Collection[str]) -> None:
        """Keep gradients and states of ``names`` in memory, and of these alone."""
        for name in self._held - set(names):
            self._world.memory.add("states", -self._states_nbytes[name])
        self._held &= set(names)
        self.gradients.kept = names

    def keeps(self, weight: SimWeight) -> bool:
        """Whether ``weight`` is stepped in memory."""
        return weight.resident and weight.name in self.gradients.kept

    def standing(self) -> tuple[object, ...]:
        """What the next step depends on, between two steps."""
        return frozenset(self._held), self._has_states, frozenset(self.gradients.by_rows)

    def step(self, stepped: Collection[str] = ()) -> None:
        """The whole step, but for the weights that backward has ``stepped``."""
        held: list[str] = []
        streamed: list[str] = []
        small: list[str] = []
        for name in self.names:
            if name in stepped:
                continue
            if self.keeps(self._weights.weights[name]):
                held.append(name)
            elif self._numels[name] > SMALL_NUMEL:
                streamed.append(name)
            else:
                small.append(name)
        for tile, count in self.tiles(streamed):
            self.pipeline.add(tile, count)
        self.pipeline.move_on()
        self.step_in_memory(held)
        self.pipeline.finish()
        self._step_small(small)
        self._has_states = True
        self.gradients.clear()

    # Tiles.

    def tiles(self, names: Sequence[str]) -> Iterator[tuple[SimTile, int]]:
        """What a step of ``names`` moves, and how often."""
        key = tuple(names)
        if key not in self._cuts:
            numels = [self._numels[name] for name in names]
            self._cuts[key] = list(cut_runs(numels, self._chunk_numel))
        for pieces, count in self._cuts[key]:
            yield self._tile(names, pieces), count

    def _tile(self, names: Sequence[str], pieces: Sequence[Piece]) -> SimTile:
        weights, on_file = self._weights.weights, self.gradients.on_file
        key: list[object] = [self._has_states]
        for piece in pieces:
            name = names[piece.index]
            key += self._forms[name], piece.numel, weights[name].in_memory, name in on_file
        found = self._tiles.get(alike := tuple(key))
        if found is None:
            found = self._tiles[alike] = self._make_tile(names, pieces)
        return SimTile(names[pieces[0].index], *found[1:])

    def _make_tile(self, names: Sequence[str], pieces: Sequence[Piece]) -> SimTile:
        read = staged = written = 0
        for piece in pieces:
            name, numel = names[piece.index], piece.numel
            in_memory = self._weights.weights[name].in_memory
            on_file = name in self.gradients.on_file
            stepped = self._stepped[name]
            parameter, states = stepped.itemsize * numel, stepped.stored_nbytes(numel)
            read += parameter * ((not in_memory) + on_file)
            read += states if self._has_states else 0
            written += parameter + states
            staged += stepped.staging_nbytes(numel, in_memory=in_memory, on_file=on_file)
        numel = sum(piece.numel for piece in pieces)
        return SimTile(
            name=names[pieces[0].index],
            numel=numel,
            read_nbytes=read,
            staging_nbytes=staged,
            written_nbytes=written,
            seconds=self._seconds(names, pieces, "one"),
            temporary_nbytes=self._temporaries(numel),
        )

    def _seconds(
        self, names: Sequence[str], pieces: Iterable[Piece], threads: Literal["one", "all"]
    ) -> float:
        """Of one call of the optimizer's step, and of what is read or written in another form."""
        moved, seconds = 0, 0.0
        for piece in pieces:
            stepped = self._stepped[names[piece.index]]
            moved += stepped.computed_nbytes(piece.numel)
            for form, count in stepped.recoded().items():
                seconds += self._costs.recoding_s(form, count * piece.numel)
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
            nbytes = self._states_nbytes[name]
            world.memory.add("states", nbytes)
            if self._has_states:
                missing.append(world.submit(world.reads, name, "state", nbytes))
            self._held.add(name)
        for flight in missing:
            world.wait(world.reads, flight, "cold")
        numels = [self._numels[name] for name in names]
        tiles = _FUSED_TILES if self._stepping.fused else 1
        for call in cut(numels, self._chunk_numel * tiles):
            numel = sum(piece.numel for piece in call)
            temporaries = self._temporaries(numel)
            world.memory.add("transients", temporaries)
            world.compute(self._seconds(names, call, "all"))
            world.memory.add("transients", -temporaries)

    def _step_small(self, names: Sequence[str]) -> None:
        """Few elements: stepped whole, and stored at once."""
        world = self._world
        for name in names:
            weight = self._weights.weights[name]
            world.compute(self._costs.hook_s)
            flight = world.submit(world.writes, name, "weight", weight.padded_nbytes)
            world.wait(world.writes, flight, "full")

    def commit(self) -> None:
        """What only memory has newest is written, and all is made durable."""
        world = self._world
        for name in self.names:
            weight = self._weights.weights[name]
            if name in self._held:
                world.submit(world.writes, name, "weight", weight.nbytes)
                world.submit(world.writes, name, "state", self._states_nbytes[name])
            elif weight.ready:  # is it still what was stored?
                world.compute(weight.nbytes / self._costs.checksum_bytes_per_s)
        world.drain()
        world.compute(self._costs.commit_s(len(self._numels)))
