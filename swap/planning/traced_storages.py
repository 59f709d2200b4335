"""Which storages live while a step runs on fake tensors: each has a number, and one end.

[Note: rows of lookups] Where a run makes the gradient of a lookup of its rows alone
(``row_gradients``), the fake run makes the whole table, of which no more than these rows is
counted: as many as were looked up, for no value tells which are the same. Autograd adds rows to
another gradient of the weight in place, but never a fake tensor: their sum counts as that one.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from offload.swap.census import storage_key
from offload.swap.planning.kernels import tensors_of
from offload.swap.planning.program import What


class TracedStorages:
    """Counts storages from the first time that they are met until they die.

    Args:
        fixed: tensors that are there before and behind the step: they are not counted.
        note: is told of each beginning and end, as of an event.
    """

    def __init__(self, fixed: Iterable[torch.Tensor], note: Callable[[What, int], None]) -> None:
        self._note = note
        self._nbytes: list[int] = []
        self._known: dict[int, int | None] = {storage_key(one): None for one in fixed}  # by key
        self._rows: dict[int, int] = {}  # by key of a table that stands for rows: their bytes
        self._deaths: dict[int, Any] = {}  # what notes the end of a storage, by its key

    @property
    def nbytes(self) -> tuple[int, ...]:
        """Of each storage, by its number."""
        return tuple(self._nbytes)

    @property
    def living(self) -> tuple[int, ...]:
        """The numbers of those that have not died."""
        return tuple(number for number in self._known.values() if number is not None)

    def number_of(self, key: int) -> int | None:
        """Of the storage with this key; None: it is not counted."""
        return self._known.get(key)

    def meet(self, tensor: torch.Tensor, nbytes: int | None = None) -> None:
        """Count the storage of ``tensor``, or ``nbytes`` for it, for as long as it lives."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        number = len(self._nbytes)
        self._nbytes.append(storage.nbytes() if nbytes is None else nbytes)
        self._note(What.ALLOCATE, number)
        self._follow(storage, number)

    def ignore(self, storage: torch.UntypedStorage) -> None:
        """``storage`` is not counted while it lives."""
        self._known[storage._cdata] = None
        weakref.finalize(storage, self._known.pop, storage._cdata, None).atexit = False

    def _follow(self, storage: torch.UntypedStorage, number: int) -> None:
        """The storage ``number`` lives as long as ``storage``."""
        key = storage._cdata
        self._known[key] = number
        death = self._deaths[key] = weakref.finalize(storage, self._on_death, key, number)
        death.atexit = False

    def _on_death(self, key: int, number: int) -> None:
        self._known.pop(key, None)
        self._deaths.pop(key, None)
        self._rows.pop(key, None)
        self._note(What.FREE, number)

    # See [Note: rows of lookups].

    def meet_rows(self, table: torch.Tensor, nbytes: int) -> None:
        """As ``meet``, for a table of which a run makes rows of ``nbytes`` alone."""
        self.meet(table, nbytes)
        self._rows[storage_key(table)] = nbytes

    def meet_sum(self, total: torch.Tensor, arguments: Sequence[Any]) -> None:
        """Autograd may add rows to others, or to a whole gradient, which ``total`` then is."""
        if not self._rows:
            return
        given = tensors_of(arguments)
        wholes = [one for one in given if storage_key(one) not in self._rows]
        if len(given) != 2 or len(wholes) == 2 or storage_key(total) in self._known:
            return
        if not wholes:
            self.meet_rows(total, sum(self._rows[storage_key(one)] for one in given))
            return
        storage = wholes[0].untyped_storage()
        number, death = self._known.get(storage._cdata), self._deaths.pop(storage._cdata, None)
        if number is not None and death is not None:
            death.detach()
            self.ignore(storage)
            self._follow(total.untyped_storage(), number)
