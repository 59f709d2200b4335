"""Placements against brute force, and what must never make them slower."""

import dataclasses

import pytest
from placing_cases import brute_force, random_case

from offload.allocator.errors import BudgetError
from offload.swap.planning.placing.check import check
from offload.swap.planning.placing.solve import place

CASES, AT_ONCE = 500, 50
ROUNDING = 1e-6


def placed(work, network, rules):
    """The placement, checked; None if nothing fits."""
    try:
        found = place([work], network, rules)
    except BudgetError:
        return None
    check(found, work, network)
    return found


@pytest.mark.parametrize("first", range(0, CASES, AT_ONCE))
def test_the_planner_equals_brute_force(first):
    fitting = 0
    for seed in range(first, first + AT_ONCE):
        work, network, rules = random_case(seed)
        best, found = brute_force(work, network, rules), placed(work, network, rules)
        assert (found is None) == (best is None), seed
        if found is not None:
            assert found.step_s == pytest.approx(best, rel=ROUNDING), seed
            fitting += 1
    assert fitting > AT_ONCE // 4


@pytest.mark.parametrize("grain", [None, "as drawn"])
def test_more_room_or_a_faster_lane_never_makes_a_step_longer(grain):
    compared = 0
    for seed in range(40):
        work, network, rules = random_case(seed)
        if grain is None:
            rules = dataclasses.replace(rules, grain=None)
        found = placed(work, network, rules)
        if found is None:
            continue
        larger = [network.with_budget(t, b + b // 3) for t, b in network.budgets.items()]
        lanes = {lane for route in network.routes.values() for lane in route} | {"cpu"}
        faster = [network.faster(lane, 1.5) for lane in sorted(lanes)]
        for other in (*larger, *faster):
            again = placed(work, other, rules)
            assert again is not None, seed
            assert again.step_s <= found.step_s * (1 + ROUNDING), seed
            compared += 1
    assert compared > 100


def test_shares_of_any_size_are_never_slower_than_shares_of_a_grid():
    for seed in range(40):
        work, network, rules = random_case(seed)
        on_grid = placed(work, network, rules)
        if on_grid is not None:
            free = placed(work, network, dataclasses.replace(rules, grain=None))
            assert free is not None
            assert free.step_s <= on_grid.step_s * (1 + ROUNDING), seed


def test_the_same_question_has_the_same_answer():
    for seed in range(10):
        work, network, rules = random_case(seed)
        answers = {str(placed(work, network, rules)) for _ in range(2)}
        assert len(answers) == 1, seed
