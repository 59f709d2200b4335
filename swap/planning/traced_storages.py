"""Which storages live while a step runs on fake tensors: each has a number, and one end.

[Note: rows of lookups] Where a run makes the gradient of a lookup of its rows alone
(``row_gradients``), the fake run makes the whole table, of which no more than these rows is
counted: as many as were looked up, for no value tells which are the same. Autograd's sum of rows
and rows is rows, that of rows and another gradient of the weight is one more table (torch 2.13
adds them in place neither here nor in a run).
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
        """Autograd may add rows to others: ``total`` is rows, too."""
        given = tensors_of(arguments)
        rows = [self._rows.get(storage_key(one)) for one in given]
        if len(rows) == 2 and None not in rows and storage_key(total) not in self._known:
            self.meet_rows(total, sum(nbytes for nbytes in rows if nbytes is not None))
