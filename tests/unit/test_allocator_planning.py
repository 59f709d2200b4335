"""Repeats in a trace, and the two levels of a plan, on traces whose answer is known."""

import pytest

from offload.allocator.bilevel import plan_memory
from offload.allocator.lifetimes import Lifetime, check, live_peak_nbytes
from offload.allocator.repeats import Run, find_runs

MIB = 1 << 20


@pytest.mark.parametrize("count", [2, 3, 10])
def test_a_run_is_found_between_what_does_not_repeat(count: int) -> None:
    block = list("abcdefghij")
    tokens = [*"uvw", *block * count, *"xyz"]
    assert find_runs(tokens) == [Run(start=3, end=3 + 10 * count, period=10)]


def test_the_shortest_period_is_taken_and_repeats_within_a_block_are_part_of_it() -> None:
    block = [*"nopq" * 2, *"abcdef"]
    assert find_runs(block * 8) == [Run(start=0, end=112, period=14)]


def test_two_runs_are_found_from_left_to_right() -> None:
    tokens = [*"abcdefgh" * 3, *"!", *"ABCDEFGHIJ" * 5]
    assert find_runs(tokens) == [
        Run(start=0, end=24, period=8),
        Run(start=25, end=75, period=10),
    ]


@pytest.mark.parametrize("tokens", ["", "a", "abc", "abcdefghijklmnop", "abcdefgh" + "abcdefg"])
def test_without_a_whole_second_block_there_is_no_run(tokens: str) -> None:
    assert find_runs(tokens) == []


def test_a_block_is_no_shorter_than_asked() -> None:
    assert find_runs("abcdef" * 3, shortest=7) == []
    assert find_runs("abcdef" * 3, shortest=6) == [Run(start=0, end=18, period=6)]


def step(blocks: int) -> list[Lifetime]:
    """Forward and backward of equal blocks: two kept buffers each, and nine that don't leave it."""
    rows: list[tuple[int, int, int]] = []
    end = blocks * 18 + 8
    for block in range(blocks):
        start = block * 9
        rows += [(8 * MIB, start, end - start), (2 * MIB, start + 4, end - start - 4)]
        rows += [((n % 3 + 1) * MIB, start + n, start + min(n + 2, 8)) for n in range(9)]
    rows += [(64 * MIB, blocks * 9 + n, blocks * 9 + n + 2) for n in range(6)]
    for block in range(blocks):
        start = blocks * 9 + 8 + block * 9
        rows += [((n % 2 + 2) * MIB, start + n, start + min(n + 3, 8)) for n in range(9)]
    rows.sort(key=lambda row: row[1])
    return [Lifetime(f"t{n}", *row) for n, row in enumerate(rows)]


def test_equal_blocks_are_one_problem() -> None:
    lives = step(20)
    plan = plan_memory(lives)
    check(plan.packing, lives)
    assert len(plan.kinds) == 2  # forward, backward
    assert {kind.buffers for kind in plan.kinds} == {9}
    assert min(kind.count for kind in plan.kinds) >= 19
    assert plan.outer < len(lives) // 3
    assert plan.gap == 0


def test_a_plan_of_blocks_is_as_large_as_the_bound_however_many_there_are() -> None:
    for blocks in (2, 5, 40):
        lives = step(blocks)
        assert plan_memory(lives).peak_nbytes == live_peak_nbytes(lives)


def test_a_block_that_would_exceed_the_bound_is_opened() -> None:
    # In each block a large buffer dies before a kept one of its size is made: together never alive.
    rows: list[tuple[int, int, int]] = []
    for block in range(6):
        start = block * 10
        rows += [(10 * MIB, start, start + 4), (10 * MIB, start + 5, 70)]
        rows += [((n + 1) * 512, start + n, start + min(n + 1, 9)) for n in range(10)]
    rows.sort(key=lambda row: row[1])
    lives = [Lifetime(f"t{n}", *row) for n, row in enumerate(rows)]
    plan = plan_memory(lives)
    check(plan.packing, lives)
    assert plan.opened >= 1
    assert plan.peak_nbytes < live_peak_nbytes(lives) + MIB
