"""The model of PyTorch's caching allocator, rule by rule."""

import itertools
import random

import pytest

from offload.allocator.caching import CachingModel, replay
from offload.allocator.lifetimes import Lifetime

KIB, MIB = 1 << 10, 1 << 20


@pytest.mark.parametrize(
    ("nbytes", "reserved", "allocated"),
    [
        (1, 2 * MIB, 512),
        (513, 2 * MIB, KIB),
        (MIB, 2 * MIB, MIB),
        (MIB + 1, 20 * MIB, MIB + 512),
        (10 * MIB - 513, 20 * MIB, 10 * MIB - 512),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB, 10 * MIB + 512),
        (11 * MIB, 12 * MIB, 12 * MIB),  # the MiB that is left is no block of its own
    ],
)
def test_segments_and_rounding(nbytes: int, reserved: int, allocated: int) -> None:
    model = CachingModel()
    model.allocate(nbytes)
    assert (model.reserved_nbytes, model.allocated_nbytes) == (reserved, allocated)


def test_small_and_large_requests_share_no_segment() -> None:
    model = CachingModel()
    model.free(model.allocate(30 * MIB))
    model.allocate(KIB)
    assert model.reserved_nbytes == 32 * MIB


def test_the_smallest_free_block_is_taken() -> None:
    model = CachingModel()
    blocks = [model.allocate(nbytes * MIB) for nbytes in (40, 14, 20)]
    for block in blocks:
        model.free(block)
    assert model.allocate(13 * MIB).address == blocks[1].address
    assert model.reserved_nbytes == 74 * MIB


def test_neighbours_merge_and_serve_a_larger_request() -> None:
    model = CachingModel()
    parts = [model.allocate(4 * MIB) for _ in range(5)]
    assert model.reserved_nbytes == 20 * MIB
    for index in (1, 3, 2):
        model.free(parts[index])
    merged = model.allocate(12 * MIB)
    assert (merged.address, model.reserved_nbytes) == (parts[1].address, 20 * MIB)


def test_segments_never_merge() -> None:
    model = CachingModel()
    for block in [model.allocate(10 * MIB) for _ in range(2)]:
        model.free(block)
    model.allocate(20 * MIB)
    assert model.reserved_nbytes == 40 * MIB


def test_wrong_use_is_refused() -> None:
    model = CachingModel()
    with pytest.raises(ValueError, match="can't allocate 0 bytes"):
        model.allocate(0)
    block = model.allocate(5)
    model.free(block)
    with pytest.raises(ValueError, match="2097152 bytes at 0 are free"):
        model.free(block)


def test_blocks_cover_their_segments_whatever_happens() -> None:
    draw = random.Random(7)
    model = CachingModel()
    living = []
    for _ in range(3000):
        if living and draw.random() < 0.5:
            model.free(living.pop(draw.randrange(len(living))))
        else:
            living.append(model.allocate(int(2 ** draw.uniform(0, 25))))
        spans = sorted((block.address, block.address + block.nbytes) for block in living)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
        assert sum(block.nbytes for block in living) == model.allocated_nbytes
    for block in living:
        model.free(block)
    free = [nbytes for pool in model._free.values() for nbytes, _ in pool]
    assert sum(free) == model.reserved_nbytes
    assert all(nbytes % (2 * MIB) == 0 for nbytes in free)  # whole segments again


def test_a_replay_keeps_what_earlier_steps_cached() -> None:
    lives = [Lifetime("a", 15 * MIB, 0, 1), Lifetime("b", 20 * MIB, 2, 3)]
    once, more = replay(lives, steps=1), replay(lives)
    assert once.reserved_nbytes == 36 * MIB
    assert more.reserved_nbytes == 36 * MIB
    assert more.allocated_nbytes == 20 * MIB
    assert more.fragmentation == pytest.approx(1 - 20 / 36)
    assert replay([]).fragmentation == 0
