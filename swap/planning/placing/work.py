"""What a training step asks for, block by block: the input of the placement planner."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, TypeAlias

from offload.allocator.errors import ConfigError

Role: TypeAlias = Literal["frozen", "weights", "gradients", "states", "saved"]
STEPPED: tuple[Role, ...] = ("weights", "gradients", "states")  # the optimizer touches them


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedPart:
    """Bytes that one block's forward saves for its backward, alike in what can be done with them.

    Attributes:
        name: such as ``inputs`` or ``rows``.
        rebuild_s: in which backward computes all of them again; None: it can't.
        rowwise: any share of its rows can be rebuilt alone (MEMO, SIGMOD'25, section 4); False:
            all of a block's or none, as attention's output, of which each row needs all rows.
    """

    name: str
    nbytes: int
    rebuild_s: float | None = None
    rowwise: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Recoded:
    """What the optimizer computes with where the store keeps another form of it; of one block.

    Rounded states and masters become what the optimizer computes with in host memory, whoever steps
    them, and are taken apart again there (``tile_parts``). So all of a block of which anything is
    recoded passes through host memory: from and to its place in the form of the store, from and to
    who steps it in this one.

    Attributes:
        weights_nbytes: as the optimizer computes with them, as are gradients and states.
        seconds: of one thread of the host, for changing the form and back.
    """

    weights_nbytes: int
    gradients_nbytes: int
    states_nbytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockWork:
    """One block of the model, or what stands before, between or behind blocks; times of one pass.

    Attributes:
        trained_nbytes: weights that the optimizer steps; ``frozen_nbytes`` are the others.
        states_nbytes: of the optimizer, in the form of the store, as weights and gradients are.
        recoded: the same as the optimizer computes with it; None where that is no other form.
        forward_workspace_nbytes: results of kernels that autograd does not save, at their peak.
    """

    name: str
    trained_nbytes: int = 0
    frozen_nbytes: int = 0
    gradients_nbytes: int = 0
    states_nbytes: int = 0
    recoded: Recoded | None = None
    saved: tuple[SavedPart, ...] = ()
    forward_s: float = 0.0
    backward_s: float = 0.0
    forward_workspace_nbytes: int = 0
    backward_workspace_nbytes: int = 0

    def stepped_nbytes(self, role: Role) -> int:
        """Bytes of weights, gradients or states as the optimizer computes with them."""
        kept = {
            "weights": self.trained_nbytes,
            "gradients": self.gradients_nbytes,
            "states": self.states_nbytes,
        }
        if self.recoded is None or not kept[role]:
            return kept[role]
        return {
            "weights": self.recoded.weights_nbytes,
            "gradients": self.recoded.gradients_nbytes,
            "states": self.recoded.states_nbytes,
        }[role]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One training step.

    Attributes:
        kinds: distinct blocks.
        order: the kind of each block, in the order of forward.
        passes: forward and backward of a micro-batch, so often in a step; gradients add up.
        tokens: of all passes.
        fixed_nbytes: by tier, what is there all the time: the process, buffers, staging.
        store: the tier with a durable slot of all weights and states, whatever else holds them.
        slots: of each trained weight and each state in the store: two where steps are committed.
        commits: whatever a step changed is written to the store at its end.
        step_in_backward: the step runs beside backward instead of behind it.

    Raises:
        ConfigError: no block, or figures below zero.
    """

    kinds: tuple[BlockWork, ...]
    order: tuple[int, ...]
    passes: int = 1
    tokens: int = 1
    fixed_nbytes: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    store: str | None = None
    slots: int = 1
    commits: bool = False
    step_in_backward: bool = False

    def __post_init__(self) -> None:
        if not self.order or set(self.order) != set(range(len(self.kinds))):
            raise ConfigError(
                f"a step needs blocks, each of a kind that is given: {len(self.kinds)} kinds, "
                f"order {self.order[:8]}"
            )
        for kind in self.kinds:
            sizes = (
                kind.trained_nbytes, kind.frozen_nbytes, kind.gradients_nbytes,
                kind.states_nbytes, kind.forward_workspace_nbytes, kind.backward_workspace_nbytes,
                *(part.nbytes for part in kind.saved),
                *(kind.stepped_nbytes(role) for role in STEPPED),
            )  # fmt: skip
            times = (
                kind.forward_s,
                kind.backward_s,
                kind.recoded.seconds if kind.recoded is not None else 0.0,
                *(part.rebuild_s or 0.0 for part in kind.saved),
            )
            if min(*sizes, *times) < 0:
                raise ConfigError(f"{kind.name}: bytes and seconds can't be below zero")
        if self.passes < 1:
            raise ConfigError(f"{self.passes} passes: a step has one at least")

    @property
    def blocks(self) -> int:
        """How many there are."""
        return len(self.order)

    def positions(self, kind: int) -> tuple[int, ...]:
        """Where in the order blocks of this kind stand."""
        return tuple(at for at, one in enumerate(self.order) if one == kind)

    # Ticks of a step: forward of each block, backward of each in reverse, the optimizer's step.

    @property
    def ticks(self) -> int:
        """How many there are."""
        return 2 * self.blocks + 1

    def forward_tick(self, block: int) -> int:
        """When ``block`` computes its forward."""
        return block

    def backward_tick(self, block: int) -> int:
        """When ``block`` computes its backward."""
        return 2 * self.blocks - 1 - block

    @property
    def step_tick(self) -> int:
        """When the optimizer steps."""
        return 2 * self.blocks

    def tick_name(self, tick: int) -> str:
        """Such as ``backward of block 3 (layers.*)``."""
        if tick == self.step_tick:
            return "the optimizer's step"
        passing, block = "forward", tick
        if tick >= self.blocks:
            passing, block = "backward", 2 * self.blocks - 1 - tick
        return f"{passing} of stage {block} ({self.kinds[self.order[block]].name})"
