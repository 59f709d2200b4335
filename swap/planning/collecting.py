"""Python's collector of cycles rests while much is made that has none."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_paused() -> Iterator[None]:
    """No garbage is looked for meanwhile; if it was before, it is again, whatever happens.

    A simulated run makes hundreds of thousands of records, and keeps many of them to its end: the
    collector would look through them, and through all that the process holds, again and again.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
