"""Moving a whole range by requests that may come short, with errors that say what and where."""

import errno
from collections.abc import Callable
from typing import Literal, TypeAlias

from offload.allocator.errors import TierIOError

RequestCall: TypeAlias = Callable[[int, int, int], int]  # offset, address, nbytes → bytes moved


def move_whole(
    verb: Literal["read", "write"],
    request: RequestCall,
    place: str,
    offset: int,
    address: int,
    nbytes: int,
) -> None:
    """Repeat ``request`` until ``nbytes`` from ``offset`` of ``place`` have moved.

    Raises:
        TierIOError: a request failed, or the place ended early.
    """
    done = 0
    while done < nbytes:
        at, left = offset + done, nbytes - done
        try:
            count = request(at, address + done, left)
        except OSError as error:
            raise TierIOError(
                error.errno,
                f"{verb} of {left} bytes at byte {at} of {place} failed: {error.strerror or error}",
            ) from error
        if count == 0:
            raise TierIOError(
                errno.EIO,
                f"{place} ends at byte {at}, {left} bytes early"
                if verb == "read"
                else f"{place} took none of the {left} bytes written at byte {at}",
            )
        done += count
