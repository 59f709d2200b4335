"""Size classes hold every window of the model, and no byte that no window needs."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from offload.allocator.errors import CapacityError
from offload.swap.census import Census, ModuleInfo, WeightInfo, take_census
from offload.swap.sizes import size_classes, windows
from offload.tiers.hostmem import page_ceil
from offload.tiers.pinned import PinnedTier, SizeClass

SIZES = [0, 1, 4096, 4097, 10_000, 70_000]


@st.composite
def censuses(draw):
    sizes = draw(st.lists(st.sampled_from(SIZES), min_size=1, max_size=8))
    names = [f"w{index}" for index in range(len(sizes))]
    modules = draw(st.lists(st.lists(st.sampled_from(names), unique=True, min_size=1), max_size=7))
    return Census(
        weights=tuple(
            WeightInfo(name=name, nbytes=nbytes, trainable=True)
            for name, nbytes in zip(names, sizes, strict=True)
        ),
        modules=tuple(
            ModuleInfo(name=f"m{index}", weights=tuple(used)) for index, used in enumerate(modules)
        ),
    )


@given(censuses(), st.integers(0, 200_000))
def test_the_weights_of_every_window_have_rooms_at_once(census, window_nbytes):
    classes = size_classes(census, window_nbytes=window_nbytes)
    if not classes:
        assert not any(sum(window.values()) for window in windows(census, window_nbytes=10**9))
        return
    sizes = {weight.name: weight.nbytes for weight in census.weights}
    with PinnedTier(classes=classes) as pool:
        for window in windows(census, window_nbytes=window_nbytes):
            held = [pool.allocate(sizes[name]) for name in window if sizes[name]]
            for block in held:
                block.release()


@given(censuses(), st.integers(0, 200_000))
def test_no_room_is_kept_that_no_window_needs(census, window_nbytes):
    sizes = {weight.name: page_ceil(weight.nbytes) for weight in census.weights}
    counts = [
        Counter(sizes[name] for name in window)
        for window in windows(census, window_nbytes=window_nbytes)
    ]
    for size in size_classes(census, window_nbytes=window_nbytes):
        assert size.count == max(count[size.nbytes] for count in counts)


@given(censuses(), st.integers(0, 200_000))
def test_a_window_is_a_run_of_modules_that_fits_or_one_module(census, window_nbytes):
    sizes = {weight.name: page_ceil(weight.nbytes) for weight in census.weights}
    for first, window in enumerate(windows(census, window_nbytes=window_nbytes)):
        assert window == {name: sizes[name] for name in window}
        alone = set(census.modules[first].weights)
        assert set(window) >= alone
        if set(window) != alone and sum(sizes[name] for name in alone):
            assert sum(window.values()) <= window_nbytes


def test_a_transformer_needs_a_fraction_of_one_size_for_all():
    """Two blocks of four square and three wide matrices, as the pool of Llama-like models."""
    hidden, wide = 64, 176

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.square = nn.ModuleList(nn.Linear(hidden, hidden, bias=False) for _ in range(4))
            self.up = nn.ModuleList(nn.Linear(hidden, wide, bias=False) for _ in range(2))
            self.down = nn.Linear(wide, hidden, bias=False)

    model = nn.Sequential(*(Block() for _ in range(6)), nn.Linear(hidden, 2048, bias=False))
    census = take_census(model)
    square, wide_nbytes, head = hidden * hidden * 4, page_ceil(hidden * wide * 4), 2048 * hidden * 4
    two_blocks = 2 * (4 * square + 3 * wide_nbytes)
    classes = size_classes(census, window_nbytes=two_blocks)
    assert classes == (
        SizeClass(nbytes=head, count=1),
        SizeClass(nbytes=wide_nbytes, count=6),
        SizeClass(nbytes=square, count=8),
    )
    held = sum(size.held_nbytes for size in classes)
    assert held == two_blocks + head
    assert held < 0.25 * sum(size.count for size in classes) * head


def test_a_model_without_weights_needs_no_pool():
    assert size_classes(take_census(nn.ReLU()), window_nbytes=10) == ()


def test_the_pool_of_a_window_is_full_when_the_window_is_in_flight():
    census = take_census(nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(5))))
    with PinnedTier(classes=size_classes(census, window_nbytes=3 * 16384)) as pool:
        held = [pool.allocate(16384) for _ in range(3)]
        with pytest.raises(CapacityError, match="all 3 blocks of that size class are in use"):
            pool.allocate(16384)
        assert len(held) == 3
