"""Sizes, rates and times as people write them."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.allocator.adaptors import LimitAdaptor, StatisticsAdaptor
from offload.allocator.errors import CapacityError
from offload.allocator.extent import Extent
from offload.allocator.tlsf import TLSF
from offload.allocator.units import (
    format_nbytes,
    format_rate,
    format_seconds,
    parse_memory_nbytes,
    parse_nbytes,
    parse_rate,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("24GiB", 24 << 30),
        ("1.5 GB", 1_500_000_000),
        ("512MiB", 512 << 20),
        ("7k", 7000),
        ("12", 12),
        ("0", 0),
        ("24B", 24),
        ("9" * 400 + "PiB", int("9" * 400) << 50),
        (4096, 4096),
    ],
)
def test_sizes_are_read(text: str | int, nbytes: int) -> None:
    assert parse_nbytes(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1GiB", "1 XB", "nan", "1GiBs", "24i", "24iB", 1.5, -1, True, None]
)
def test_what_is_no_size_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match=r"size"):
        parse_nbytes(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("parse", [parse_size, parse_memory_nbytes])
@pytest.mark.parametrize(
    ("value", "unit", "meant"),
    [
        ("24", None, "24GiB"),
        (" 24 ", None, "24GiB"),
        (8, None, "8GiB"),
        ("0.5", None, "0.5GiB"),
        ("400", None, "400MiB"),
        ("1048575", None, "1048575MiB"),
        (600, "TB", "600TB"),
    ],
)
def test_a_size_without_its_unit_is_refused(parse, value, unit, meant) -> None:
    with pytest.raises(ValueError, match=f"; a size has a unit: {meant}") as refusal:
        parse(value, unit=unit)
    assert str(refusal.value).endswith("?")


@pytest.mark.parametrize("value", ["0", "24B", "64KiB", "1048576", 1 << 21, "24GiB"])
def test_a_size_with_its_unit_is_taken(value) -> None:
    assert parse_size(value) == parse_nbytes(value)


@pytest.mark.parametrize("value", ["0", "24B", "64KiB"])
def test_memory_that_holds_nothing_is_refused(value) -> None:
    with pytest.raises(ValueError, match="bytes of memory hold nothing; write 1MiB or more"):
        parse_memory_nbytes(value)


@given(st.integers(0, 1 << 60))
def test_formatting_keeps_three_digits(nbytes: int) -> None:
    assert parse_nbytes(format_nbytes(nbytes)) == pytest.approx(nbytes, rel=0.006)


def test_rates_and_times() -> None:
    assert parse_rate("7GB/s") == 7e9
    assert format_rate(2.814e9) == "2.81 GB/s"
    assert [format_seconds(value) for value in (12.34, 0.0456, 7.8e-6)] == [
        "12.3 s",
        "45.6 ms",
        "7.8 us",
    ]


@pytest.mark.parametrize(
    ("text", "mend"),
    [
        ("7", "write 7GB/s"),
        ("7/s", "write 7GB/s"),
        ("7GB", "write 7GB/s"),
        ("7GB/min", "write 7GB/s or 900MiB/s"),
        ("GB/s", "is not a size"),
        ("fast", "write 7GB/s or 900MiB/s"),
        ("", "write 7GB/s or 900MiB/s"),
    ],
)
def test_what_is_no_rate_is_refused_with_what_to_write(text: str, mend: str) -> None:
    with pytest.raises(ValueError, match=re.escape(mend)):
        parse_rate(text)


def test_the_arena_reports_exact_numbers() -> None:
    arena = StatisticsAdaptor(TLSF(100 << 10))
    first = arena.allocate(10 << 10)
    arena.allocate(20 << 10)
    arena.free(first)
    stats = arena.stats()
    assert (stats.current_nbytes, stats.peak_nbytes) == (20 << 10, 30 << 10)
    assert (stats.current_count, stats.total_count) == (1, 2)
    free, largest = (100 - 20) << 10, stats.largest_free_nbytes
    assert stats.fragmentation == 1 - largest / free


def test_a_limit_refuses_what_the_arena_would_give() -> None:
    arena = LimitAdaptor(TLSF(100 << 10), 30 << 10)
    first = arena.allocate(20 << 10)
    message = r"20.00 KiB \(20480 bytes\) were asked, .* 10.00 KiB left: raise it by 10.00 KiB"
    with pytest.raises(CapacityError, match=message):
        arena.allocate(20 << 10)
    arena.free(first)
    arena.grow(100 << 10)  # the limit stays
    assert (arena.capacity, arena.largest_free_nbytes) == (200 << 10, 200 << 10)
    with pytest.raises(CapacityError):
        arena.reserve(Extent(0, 31 << 10))
    arena.reserve(Extent(0, 30 << 10))
    assert (arena.current_nbytes, arena.current_count) == (30 << 10, 1)
