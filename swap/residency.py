"""Where the bytes of a tensor are, and which copies of them exist."""

from enum import Enum


class Residency(Enum):
    """The states of a swapped tensor.

    ABSENT    the bytes are in their block on the file tier; memory holds no page of them
              (or clean cached pages that the kernel may take back at any moment).
    FETCHING  as ABSENT, and a read into memory is in flight, or has ended since; both are budgeted.
    READY     memory holds a copy equal to the block's bytes.
    DIRTY     memory holds the only newest copy; the block is older.
    WRITING   as DIRTY, and a write to a block is in flight; memory is freed when it ends.
    """

    ABSENT = "absent"
    FETCHING = "fetching"
    READY = "ready"
    DIRTY = "dirty"
    WRITING = "writing"
