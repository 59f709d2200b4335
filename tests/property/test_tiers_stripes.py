"""Where striped bytes lie: each in one place, in proportion, without gaps."""

import itertools
import math

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from offload.tiers.stripes import MOST_SLOTS, Stripes, reached_share, weights_for

WEIGHTS = st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any).map(tuple)
UNITS = st.integers(1, 7)
OFFSETS = st.integers(0, 500)


@given(UNITS, WEIGHTS)
def test_every_byte_has_one_place_and_paths_have_no_gaps(unit, weights):
    stripes = Stripes(unit, weights)
    total = 3 * unit * sum(weights)
    places = [stripes.place(offset) for offset in range(total)]
    assert len(set(places)) == total
    for path, weight in enumerate(weights):
        offsets = [offset for at, offset in places if at == path]
        assert offsets == list(range(3 * unit * weight))  # in order: neighbours stay neighbours


@given(UNITS, WEIGHTS)
def test_each_pattern_holds_every_path_as_its_weight_says_and_evenly(unit, weights):
    stripes, slots = Stripes(unit, weights), sum(weights)
    pattern = [stripes.place(slot * unit)[0] for slot in range(slots)]
    for path, weight in enumerate(weights):
        assert pattern.count(path) == weight
        for length in range(slots):  # at any point within a unit or two of its share
            assert abs(pattern[:length].count(path) - length * weight / slots) < 2


@given(UNITS, WEIGHTS, OFFSETS, st.integers(0, 300))
def test_runs_cover_a_range_once_in_order_and_merge(unit, weights, offset, nbytes):
    stripes = Stripes(unit, weights)
    runs = stripes.runs(offset, nbytes)
    seen = [
        (run.path, run.offset + byte, run.start + byte)
        for run in runs
        for byte in range(run.nbytes)
    ]
    expected = [(*stripes.place(offset + at), at) for at in range(nbytes)]
    assert seen == expected
    assert all(one.path != other.path for one, other in itertools.pairwise(runs))
    assert all(run.nbytes > 0 for run in runs)


@given(UNITS, WEIGHTS, OFFSETS)
def test_a_path_s_share_of_the_first_bytes_is_what_lies_there(unit, weights, nbytes):
    stripes = Stripes(unit, weights)
    places = [stripes.place(offset)[0] for offset in range(nbytes)]
    for path in range(len(weights)):
        assert stripes.path_nbytes(path, nbytes) == places.count(path)


@given(UNITS, WEIGHTS, OFFSETS, st.data())
def test_files_hold_the_beginning_up_to_the_first_byte_that_is_missing(unit, weights, nbytes, data):
    stripes = Stripes(unit, weights)
    sizes = [stripes.path_nbytes(path, nbytes) for path in range(len(weights))]
    assert stripes.held_nbytes(sizes) >= nbytes
    sizes = [size + data.draw(st.integers(0, 20)) for size in sizes]
    short = data.draw(st.sampled_from([path for path, weight in enumerate(weights) if weight]))
    sizes[short] = data.draw(st.integers(0, sizes[short]))
    held = stripes.held_nbytes(sizes)
    assert all(stripes.path_nbytes(path, held) <= size for path, size in enumerate(sizes))
    path, offset = stripes.place(held)
    assert offset >= sizes[path]  # the very next byte is not there


@given(st.lists(st.floats(1e6, 1e10), min_size=1, max_size=6))
@example([1000000.0, 75480206.0, 78090314.0, 4997780126.948055])  # one path, by rounding 55 times
def test_weights_reach_most_of_the_sum_with_a_short_pattern(rates):
    weights = weights_for(rates)
    assert 1 <= sum(weights) <= MOST_SLOTS
    assert math.gcd(*weights) == 1  # no shorter pattern does the same
    share = reached_share(rates, weights)
    assert 0 < share <= 1 + 1e-9
    if min(rates) * 16 >= max(rates):
        assert share >= 0.95
    assert share * sum(rates) >= 0.95 * max(rates)  # never worse than the fastest path alone


@given(st.lists(st.integers(1, 6), min_size=2, max_size=4), st.floats(1, 1e9))
def test_exact_proportions_are_found(weights, scale):
    assume(math.gcd(*weights) == 1)
    found = weights_for([weight * scale for weight in weights])
    assert reached_share([float(weight) for weight in weights], found) >= 0.97


def test_known_proportions():
    assert weights_for([1e9]) == (1,)
    assert weights_for([1e9, 1e9]) == (1, 1)
    assert weights_for([3e9, 1e9]) == (3, 1)
    assert weights_for([2e9, 1e9, 1e9]) == (2, 1, 1)
    assert weights_for([1e9, 1e6]) == (1, 0)  # would only hold the other up


@pytest.mark.parametrize(
    ("unit", "weights"), [(0, (1,)), (-1, (1,)), (4, ()), (4, (0, 0)), (4, (1, -1))]
)
def test_what_can_not_be_striped_is_refused(unit, weights):
    with pytest.raises(ValueError, match=f"units of {unit} bytes"):
        Stripes(unit, weights)
