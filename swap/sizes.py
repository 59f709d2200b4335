"""Which buffers the pinned pool must have: the sizes of the weights that are in flight at once."""

from collections import Counter
from collections.abc import Iterator

from offload.swap.census import Census
from offload.tiers.hostmem import page_ceil
from offload.tiers.pinned import SizeClass


def size_classes(census: Census, *, window_nbytes: int) -> tuple[SizeClass, ...]:
    """Size classes that hold every run of modules whose weights fit ``window_nbytes``.

    A window slides over the modules in the model's order (backward's order has the same windows):
    as many in a row as fit, at least one. A class counts the weights of its size, in whole pages,
    in the window that has most of them; a weight that several modules use counts once. Pure.

    Unlike one buffer size for all (the largest weight's), no byte is held that no window needs:
    MemAscend, arXiv 2505.23254, "adaptive buffer pool".

    Returns:
        Classes, the largest first; nbytes are whole pages.
    """
    most: Counter[int] = Counter()
    for window in windows(census, window_nbytes=window_nbytes):
        most |= Counter(window.values())  # the larger count of each size
    return tuple(
        SizeClass(nbytes=nbytes, count=count)
        for nbytes, count in sorted(most.items(), reverse=True)
        if nbytes
    )


def windows(census: Census, *, window_nbytes: int) -> Iterator[dict[str, int]]:
    """For each module, bytes by weight of it and the modules after it that fit with it."""
    sizes = {weight.name: page_ceil(weight.nbytes) for weight in census.weights}
    for first in range(len(census.modules)):
        window: dict[str, int] = {}
        for module in census.modules[first:]:
            more = {name: sizes[name] for name in module.weights if name not in window}
            if window and sum(window.values()) + sum(more.values()) > window_nbytes:
                break
            window |= more
        yield window
