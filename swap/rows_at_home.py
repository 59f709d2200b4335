"""Gradients that are made where they stay: rows are written through the mapping of their home."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from offload.swap.gradient_homes import GradientHomes
from offload.tiers.filetier import FileTier
from offload.tiers.journal import Journal, Label
from offload.tiers.mapped import MappedTensor


class RowsAtHome:
    """Which gradients those are; used on the training thread only.

    Args:
        scratch: the volatile tier that homes are in.
        places: of the gradients.
        names: of the parameters, for events.

    Attributes:
        came: parameters whose last gradient was begun here.
        written: those of whose gradient rows have been written since it was last accumulated.
    """

    def __init__(
        self,
        scratch: FileTier,
        journal: Journal,
        places: GradientHomes,
        names: Mapping[nn.Parameter, str],
    ) -> None:
        self.came: set[nn.Parameter] = set()
        self.written: set[nn.Parameter] = set()
        self._begun: set[nn.Parameter] = set()
        self._scratch = scratch
        self._journal = journal
        self._places = places
        self._names = names

    def begin(self, parameter: nn.Parameter, dtype: torch.dtype) -> MappedTensor:
        """The home of a fresh gradient of ``parameter``, all zeros: what is written there is it.

        No gradient of ``parameter`` may be on its way (``GradientSwapper.settle``).

        Raises:
            TierIOError: the disk could not take it.
        """
        home = self._places.clear(parameter, dtype)
        self._begun.add(parameter)
        return home

    @contextmanager
    def writing(self, parameter: nn.Parameter, nbytes: int) -> Iterator[None]:
        """Records that ``nbytes`` of the gradient of ``parameter`` are written to its home."""
        began_s = self._journal.now()
        yield
        self.written.add(parameter)
        label = Label(self._names[parameter], "gradient", "host", self._scratch.spec.name)
        duration_s = self._journal.now() - began_s
        self._journal.moved(label, nbytes, duration_s, self._scratch.lanes.writes.name)

    def accumulated(self, parameter: nn.Parameter) -> bool:
        """A gradient of ``parameter`` has been accumulated: whether it was begun here."""
        begun = parameter in self._begun
        self._begun.discard(parameter)
        (self.came.add if begun else self.came.discard)(parameter)
        return begun
