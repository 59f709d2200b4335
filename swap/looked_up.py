"""The rows of a table on the drive are asked for together, before a lookup reads them.

A lookup reads its rows through the mapping of the table. Each that is not in memory is a fault, for
which the training thread waits, and the kernel reads around it, by ``read_ahead_kb`` of the
drive up to all of the table. So the pages of all rows are asked for first: the drive has them to
read at once, and nothing else.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from offload.tiers import hostmem
from offload.tiers.hostmem import PAGE
from offload.tiers.mapped import MappedTensor

_NEAR_PAGES = 16  # between two that are asked for: one larger request is cheaper than another one


def ask_for_rows(table: MappedTensor, indices: Any) -> None:
    """Have the kernel read the rows ``indices`` of a *filed* table; does not wait for it."""
    if table.held or not _is_plain(indices):
        return
    rows = np.unique(indices.numpy())
    rows = rows[(rows >= 0) & (rows < len(table.tensor))]  # the lookup itself refuses others
    row_nbytes = table.tensor.stride(0) * table.tensor.itemsize
    for start, nbytes in page_spans(rows.astype(np.int64) * row_nbytes, row_nbytes):
        hostmem.will_need(table.address + start, nbytes)


def page_spans(starts: NDArray[np.int64], nbytes: int) -> list[tuple[int, int]]:
    """Spans of whole pages, (start, nbytes), that hold ``nbytes`` from each of ``starts`` on.

    ``starts`` ascend; spans that are near to each other are one.
    """
    if not len(starts):
        return []
    first, last = starts // PAGE, (starts + nbytes - 1) // PAGE
    breaks = np.flatnonzero(first[1:] > last[:-1] + _NEAR_PAGES) + 1
    begins = first[np.concatenate(([0], breaks))] * PAGE
    ends = (last[np.concatenate((breaks - 1, [-1]))] + 1) * PAGE
    return list(zip(begins.tolist(), (ends - begins).tolist(), strict=True))


def _is_plain(indices: Any) -> bool:
    """Whether these are numbers in memory, and no transform of functions stands between."""
    return (
        type(indices) is torch.Tensor
        and indices.is_cpu
        and indices.dtype in (torch.int32, torch.int64)
        and torch._C._functorch.peek_interpreter_stack() is None
    )
