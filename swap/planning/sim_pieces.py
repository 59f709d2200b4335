"""Bytes of one piece of a weight in the optimizer's step: ``pipeline.Target``, without tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from offload.swap.eightbit import packed_nbytes
from offload.swap.planning.program import StateForm, Stepping
from offload.swap.staged_states import packed_staging_nbytes, rounded_staging_nbytes
from offload.tiers.hostmem import page_ceil

_FLOAT_NBYTES = 4  # what the optimizer computes with where the store has something else


@dataclass(frozen=True, slots=True)
class SteppedWeight:
    """A weight as the optimizer steps it.

    Attributes:
        itemsize: of one element of the weight and of its gradient.
        states: form and bytes of an element of each state; these are of plain ones.
    """

    itemsize: int
    states: tuple[tuple[StateForm, int], ...]

    @property
    def has_master(self) -> bool:
        """Whether it is stepped in float32, though it is bfloat16."""
        return any(form == "low" for form, _ in self.states)

    def staging_nbytes(self, numel: int, *, in_memory: bool, on_file: bool) -> int:
        """What so many elements take of staging, to whole pages.

        Args:
            in_memory: the weight is.
            on_file: the gradient is.
        """
        if self.has_master:  # its gradient becomes float32 where the weight was
            nbytes = rounded_staging_nbytes(numel)
        else:
            nbytes = page_ceil(numel * self.itemsize) * ((not in_memory) + on_file)
        return nbytes + sum(_staging_nbytes(*state, numel) for state in self.states)

    def stored_nbytes(self, numel: int) -> int:
        """Bytes of so many elements of all states in the store; these are whole blocks."""
        return sum(_stored_nbytes(*state, numel) for state in self.states)

    @property
    def weight_nbytes(self) -> int:
        """Of an element of the weight, and of its gradient, as the optimizer computes with it."""
        return _FLOAT_NBYTES if self.has_master else self.itemsize

    @property
    def states_nbytes(self) -> int:
        """Of an element of all states, as the optimizer computes with them."""
        return sum(
            nbytes if form == "plain" else _FLOAT_NBYTES
            for form, nbytes in self.states
            if form != "low"
        )

    @property
    def by_blocks(self) -> int:
        """How many states are widened and rounded block by block (``tile_blocks``)."""
        return sum(form == "bf16" for form, _ in self.states)

    def computed_nbytes(self, numel: int) -> int:
        """Bytes of memory that the optimizer's own step of so many elements reads and writes."""
        return (3 * self.weight_nbytes + 2 * self.states_nbytes) * numel

    def recoded(self) -> Mapping[StateForm, int]:
        """How many numbers of each element change their form, and back."""
        forms = [form for form, _ in self.states if form != "plain"]
        return {form: forms.count(form) for form in forms}


def stepped_weights(
    stepping: Stepping, nbytes: Mapping[str, int], numels: Mapping[str, int]
) -> dict[str, SteppedWeight]:
    """Of each weight that is stepped.

    Args:
        nbytes: of each weight; ``numels``: its elements.
    """

    @cache  # layers are alike
    def stepped(
        nbytes: int, numel: int, forms: tuple[StateForm, ...], sizes: tuple[int, ...]
    ) -> SteppedWeight:
        elements = (size // numel for size in sizes)
        return SteppedWeight(nbytes // numel, tuple(zip(forms, elements, strict=True)))

    return {
        name: stepped(nbytes[name], numels[name], stepping.forms_of(name), sizes)
        for name, sizes in stepping.states_nbytes.items()
        if numels[name]
    }


def _staging_nbytes(form: StateForm, itemsize: int, numel: int) -> int:
    if form == "plain":
        return page_ceil(numel * itemsize)
    if form in ("bf16", "low"):
        return rounded_staging_nbytes(numel)
    return packed_staging_nbytes(numel)


def _stored_nbytes(form: StateForm, itemsize: int, numel: int) -> int:
    if form in ("signed", "unsigned"):
        return packed_nbytes(numel)
    return numel * itemsize
