"""Which tiles a device steps: evenly spread, whatever else happens, and best by the rates."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.swap.tile_share import StepRates, TileShare, best_share, parse_share
from offload.swap.tiles import Piece, cut

CHUNK = 64
shares = st.fractions(0, 1, max_denominator=16)
numels = st.lists(st.integers(1, 20 * CHUNK), min_size=1, max_size=8)


def taken(share: Fraction, sizes: list[int]) -> list[tuple[int, int]]:
    """(parameter, start) of the tiles that the device takes."""
    tiles = TileShare(CHUNK, share)
    tiles.number(enumerate(sizes))
    pieces = [piece for tile in cut(sizes, CHUNK) for piece in tile]
    there, here = tiles.split(range(len(sizes)), pieces)
    assert sorted([*there, *here], key=str) == sorted(pieces, key=str)
    return sorted((piece.index, piece.start) for piece in there)


@given(share=shares, sizes=numels)
def test_a_share_is_evenly_spread(share: Fraction, sizes: list[int]) -> None:
    tiles = [(index, at) for index, numel in enumerate(sizes) for at in range(0, numel, CHUNK)]
    there = set(taken(share, sizes))
    count = 0
    for number, tile in enumerate(tiles, 1):
        count += tile in there
        assert count == number * share // 1  # of the first ones, as many as fit


@given(share=shares, sizes=numels, more=numels)
def test_new_parameters_change_nothing_for_the_old_ones(
    share: Fraction, sizes: list[int], more: list[int]
) -> None:
    old = [tile for tile in taken(share, [*sizes, *more]) if tile[0] < len(sizes)]
    assert old == taken(share, sizes)


def test_a_parameter_without_a_gradient_counts() -> None:
    tiles = TileShare(CHUNK, Fraction(1, 2))
    tiles.number([("a", CHUNK), ("b", CHUNK), ("c", CHUNK), ("d", CHUNK)])
    for name, there in {"a": False, "b": True, "c": False, "d": True}.items():
        piece = Piece(0, 0, CHUNK)
        assert bool(tiles.split([name], [piece])[0]) is there


seconds = st.floats(1e-12, 1e-6)


@given(host_s=seconds, device_s=seconds)
def test_the_best_share_is_as_good_as_any(host_s: float, device_s: float) -> None:
    rates = StepRates(host_s=host_s, device_s=device_s)
    found, alone = best_share(rates), min(host_s, device_s)
    every = [Fraction(part, whole) for whole in range(1, 17) for part in range(whole + 1)]
    least = min(map(rates.step_s, every))
    if found.denominator == 1:
        assert rates.step_s(found) == alone
        assert least >= 0.85 * alone  # sharing by the nearest fraction saves less than a tenth
    else:
        assert rates.step_s(found) < 0.9 * alone
        assert rates.step_s(found) <= 1.1 * least


@pytest.mark.parametrize(
    ("host_s", "device_s", "share"),
    [
        (1.0, 1.0, Fraction(1, 2)),
        (1.0, 3.0, Fraction(1, 4)),  # every fourth, as k = 1 + d/h says
        (3.0, 1.0, Fraction(3, 4)),
        (1.0, 20.0, Fraction(0)),  # it would save less than a tenth
        (20.0, 1.0, Fraction(1)),
    ],
)
def test_rates_that_one_can_follow(host_s: float, device_s: float, share: Fraction) -> None:
    assert best_share(StepRates(host_s=host_s, device_s=device_s)) == share


@pytest.mark.parametrize(
    ("value", "share"),
    [("host", 0), ("device", 1), (0.25, Fraction(1, 4)), (0.3333, Fraction(1, 3)), (1.0, 1)],
)
def test_what_a_setting_says(value: str | float, share: Fraction) -> None:
    assert parse_share(value) == share


def test_a_share_that_is_none() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        parse_share(1.5)


@given(share=shares)
def test_a_share_told_in_decimals_is_the_same(share: Fraction) -> None:
    assert parse_share(round(float(share), 4)) == share
