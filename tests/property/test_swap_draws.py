"""What functions draw in turns is what they draw one after the other."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload.swap.draws import Draws, count_draws, moved_on, signature_of

COUNTS = st.integers(0, 3000)


def state_after(seed, *counts):
    torch.manual_seed(seed)
    for count in counts:
        torch.empty(count, dtype=torch.int32).random_()
    return torch.get_rng_state()


@given(seed=st.integers(0, 99), before=COUNTS, count=COUNTS)
def test_counting_and_moving_on_are_inverse(seed, before, count):
    first, last = state_after(seed, before), state_after(seed, before, count)
    assert torch.equal(moved_on(first, count), last)
    assert count_draws(first, last) == count


DRAWS = {
    "uniform": lambda: torch.rand(1000),
    "normal": lambda: torch.randn(1000),
    "permutation": lambda: torch.randperm(100),
    "dropout": lambda: torch.nn.functional.dropout(torch.ones(1000), 0.5),
    "multinomial": lambda: torch.multinomial(torch.ones(50), 9),
    "double": lambda: torch.rand(7, dtype=torch.float64),
}


@pytest.mark.parametrize("name", DRAWS)
def test_what_torch_draws_can_be_counted(name):
    torch.manual_seed(3)
    first = torch.get_rng_state()
    DRAWS[name]()
    last = torch.get_rng_state()
    count = count_draws(first, last)
    assert count
    assert torch.equal(moved_on(first, count), last)


def test_another_generator_is_not_counted(monkeypatch):
    monkeypatch.setattr("offload.swap.draws._MOST", 10_000)
    assert count_draws(state_after(1), state_after(2)) is None


def test_what_cannot_be_counted_is_tried_once(monkeypatch):
    tries = []
    monkeypatch.setattr("offload.swap.draws.count_draws", lambda *states: tries.append(states))
    draws = Draws()
    for _ in range(3):
        _, run, alone = run_in_turns(draws, [[5], [5]], ["a", "a"])
        assert alone
        assert run.is_exact
    assert len(tries) == 1


def run_in_turns(draws, programs, signatures):
    """Functions whose turns draw so many numbers: what each drew, and the run."""
    run = draws.begin(signatures)
    drawn = [[] for _ in programs]
    is_alone = False
    while left := [index for index, program in enumerate(programs) if program]:
        index = left[0] if is_alone else min(left, key=lambda one: (len(drawn[one]), one))
        run.enter(index)
        drawn[index].append(torch.randint(1 << 30, (programs[index].pop(0),)))
        is_alone = run.leave(index) or is_alone
    run.enter(None)
    draws.learn(run, signatures)
    return [torch.cat(parts) for parts in drawn], run, is_alone


PROGRAMS = st.lists(st.lists(st.integers(0, 700), min_size=1, max_size=4), min_size=2, max_size=4)


def one_after_the_other(programs):
    return [torch.cat([torch.randint(1 << 30, (n,)) for n in program]) for program in programs]


@given(programs=PROGRAMS, steps=st.integers(1, 3))
def test_turns_draw_what_a_loop_draws(programs, steps):
    draws = Draws()
    signatures = list(range(len(programs)))
    torch.manual_seed(5)
    expected = [one_after_the_other(programs) for _ in range(steps)]
    end = torch.get_rng_state()
    torch.manual_seed(5)
    for step in range(steps):
        found, run, alone = run_in_turns(draws, [list(p) for p in programs], signatures)
        assert run.is_exact
        assert all(torch.equal(*pair) for pair in zip(found, expected[step], strict=True))
        assert alone == (step == 0)
    assert torch.equal(torch.get_rng_state(), end)


def test_a_wrong_guess_is_noticed_and_learned():
    draws = Draws()
    torch.manual_seed(0)
    run_in_turns(draws, [[5], [5]], ["a", "b"])
    _, run, _ = run_in_turns(draws, [[7], [5]], ["a", "b"])
    assert not run.is_exact
    _, run, alone = run_in_turns(draws, [[7], [5]], ["a", "b"])
    assert run.is_exact
    assert not alone


def test_who_begins_to_draw_is_waited_for():
    """It never drew with these shapes: dropout was switched on."""
    draws = Draws()
    torch.manual_seed(0)
    run_in_turns(draws, [[0, 0], [0, 0]], ["a", "b"])
    state = torch.get_rng_state()
    expected = one_after_the_other([[3, 3], [3, 3]])
    torch.set_rng_state(state)
    found, run, alone = run_in_turns(draws, [[3, 3], [3, 3]], ["a", "b"])
    assert alone
    assert run.is_exact
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_who_has_begun_may_have_kept_the_state_that_it_met():
    """A checkpoint does: what is drawn later on is right, but nobody can know about that."""
    draws = Draws()
    run_in_turns(draws, [[0, 0], [0, 0]], ["a", "b"])
    _, run, alone = run_in_turns(draws, [[0, 3], [0, 3]], ["a", "b"])
    assert alone
    assert not run.is_exact


def test_new_shapes_are_expected_to_draw_nothing_where_none_did():
    draws = Draws()
    run_in_turns(draws, [[0], [0]], ["a", "b"])
    _, run, alone = run_in_turns(draws, [[0], [0]], ["c", "d"])
    assert run.is_exact
    assert not alone
    run_in_turns(draws, [[3], [3]], ["e", "f"])
    _, run, alone = run_in_turns(draws, [[0], [0]], ["g", "h"])
    assert run.is_exact
    assert alone


def test_signatures_are_shapes_and_types():
    batch = {"x": torch.ones(2, 3), "y": [1, torch.ones(2, dtype=torch.int64)]}
    same = {"x": torch.zeros(2, 3), "y": [5, torch.zeros(2, dtype=torch.int64)]}
    other = {"x": torch.zeros(2, 4), "y": [5, torch.zeros(2, dtype=torch.int64)]}
    assert signature_of(batch) == signature_of(same)
    assert signature_of(batch) != signature_of(other)
    hash(signature_of(batch))
