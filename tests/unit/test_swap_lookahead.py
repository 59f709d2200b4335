"""What backward needs next is learned from the last pass of the same kind."""

from offload.swap.lookahead import Lookahead
from offload.swap.saved import Graveyard, Unit

LIMIT_NBYTES = 25


def unit(nbytes=10):
    return Unit([], nbytes, 0, Graveyard())


def run(lookahead, sizes, uses, kind="model"):
    """One pass: packs units of ``sizes``, then uses them at (position, time)."""
    lookahead.begin(kind, LIMIT_NBYTES)
    units = [unit(nbytes) for nbytes in sizes]
    for each in units:
        lookahead.add(each)
    for position, now_s in uses:
        lookahead.used(units[position], now_s)
    return units


def upcoming(lookahead, units, position):
    return [(units.index(other), due_s) for other, due_s in lookahead.upcoming(units[position])]


def test_before_anything_is_learned_the_last_packed_comes_next():
    lookahead = Lookahead()
    units = run(lookahead, [10] * 4, [])
    assert upcoming(lookahead, units, 3) == [(2, 0), (1, 0), (0, 0)]
    assert upcoming(lookahead, units, 0) == []
    assert not any(each.stays for each in units)


def test_the_last_pass_tells_order_and_times():
    lookahead = Lookahead()
    run(lookahead, [10] * 4, [(3, 1.0), (0, 1.5), (2, 4.0), (1, 5.0), (3, 9.0)])
    units = run(lookahead, [10] * 4, [])
    assert upcoming(lookahead, units, 3) == [(0, 0.5), (2, 3.0), (1, 4.0)]
    assert upcoming(lookahead, units, 2) == [(1, 1.0)]


def test_what_is_used_first_stays_as_far_as_it_fits():
    lookahead = Lookahead()
    run(lookahead, [10, 10, 10, 10], [(3, 1), (0, 2), (2, 3), (1, 4)])
    units = run(lookahead, [10, 10, 10, 10], [])
    assert [each.stays for each in units] == [True, False, False, True]


def test_what_was_never_used_does_not_stay():
    lookahead = Lookahead()
    run(lookahead, [10, 10, 10], [(0, 1)])  # the others were of a dead branch
    units = run(lookahead, [10, 10, 10], [])
    assert [each.stays for each in units] == [True, False, False]
    assert upcoming(lookahead, units, 2) == [(1, 0), (0, 0)]


def test_another_shape_is_not_expected_to_repeat():
    lookahead = Lookahead()
    run(lookahead, [10, 10, 10], [(0, 1), (2, 2), (1, 3)])
    units = run(lookahead, [10, 14, 10], [])
    assert [each.stays for each in units] == [True, False, False]
    assert upcoming(lookahead, units, 2) == [(1, 0), (0, 0)]


def test_a_shape_of_the_same_bucket_is_expected_to_repeat():
    lookahead = Lookahead()
    run(lookahead, [100, 100, 100], [(0, 1), (2, 2), (1, 3)])
    units = run(lookahead, [112, 126, 100], [])
    assert upcoming(lookahead, units, 0) == [(2, 1), (1, 2)]


def test_kinds_are_learned_apart():
    lookahead = Lookahead()
    run(lookahead, [10, 10], [(0, 1), (1, 2)], kind="generator")
    units = run(lookahead, [10, 10], [], kind="discriminator")
    assert upcoming(lookahead, units, 1) == [(0, 0)]


def test_a_forward_without_a_backward_teaches_nothing():
    lookahead = Lookahead()
    run(lookahead, [10, 10, 10], [(0, 1), (2, 2), (1, 3)])
    run(lookahead, [10, 10, 10], [])
    units = run(lookahead, [10, 10, 10], [])
    assert upcoming(lookahead, units, 0) == [(2, 1), (1, 2)]


def test_several_forwards_before_a_backward():
    lookahead = Lookahead()
    first = run(lookahead, [10, 10], [])
    second = run(lookahead, [10, 10], [])
    both = first + second
    assert upcoming(lookahead, both, 3)[:3] == [(2, 0), (1, 0), (0, 0)]
    for position, now_s in ((3, 1), (2, 2), (1, 3), (0, 4)):
        lookahead.used(both[position], now_s)
    third = run(lookahead, [10, 10], [])
    assert upcoming(lookahead, third, 1) == [(0, 1)]  # and nothing of passes that were used


def test_dead_units_are_passed_over():
    lookahead = Lookahead()
    run(lookahead, [10] * 3, [(2, 1), (1, 2), (0, 3)])
    units = run(lookahead, [10] * 3, [])
    del units[1]
    assert upcoming(lookahead, units, 1) == [(0, 2)]


def test_what_is_not_packed_yet_is_passed_over():
    """As when a checkpointed block runs its backward inside the forward of the pass."""
    lookahead = Lookahead()
    run(lookahead, [10] * 3, [(2, 1), (1, 2), (0, 3)])
    lookahead.begin("model", LIMIT_NBYTES)
    units = [unit(), unit()]
    for each in units:
        lookahead.add(each)
    assert upcoming(lookahead, units, 1) == [(0, 1)]
