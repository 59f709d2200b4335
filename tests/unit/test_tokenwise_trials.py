"""Trials of alpha: pure choices first, then a whole pass in virtual time."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from offload.swap.tokenwise.keeper import MemoryKeeper
from offload.swap.tokenwise.plans import Settings
from offload.swap.tokenwise.solve import Link
from offload.swap.tokenwise.timing import Timer
from offload.swap.tokenwise.tokenwise import TokenWise
from offload.swap.tokenwise.trials import Choice, Trials

ROWS = 256


def try_all(trials: Trials, seconds: dict[Choice, Sequence[float]]) -> list[Choice]:
    order = []
    taken = {choice: iter(times) for choice, times in seconds.items()}
    while trials.settled is None:
        choice = trials.present()
        order.append(choice)
        trials.took(choice, next(taken[choice]))
    return order


def test_each_is_tried_in_turn_and_the_shortest_pass_decides():
    trials = Trials(list(Choice))
    order = try_all(
        trials,
        {
            Choice.REBUILT: (1.2, 1.1, 1.2, 9.0, 1.2),
            Choice.SOLVED: (1.3, 1.3, 1.3, 1.3, 1.3),
            Choice.SWAPPED: (1.5, 1.4, 1.6, 1.5, 1.5),
        },
    )
    assert order == list(Choice) * 5
    assert trials.settled is trials.present() is Choice.REBUILT


def test_the_solved_one_gives_way_only_to_one_that_is_clearly_shorter():
    for solved_s, settled in ((1.02, Choice.SOLVED), (1.04, Choice.SWAPPED)):
        trials = Trials(list(Choice))
        seconds = {Choice.REBUILT: 2.0, Choice.SOLVED: solved_s, Choice.SWAPPED: 1.0}
        try_all(trials, {choice: (taken,) * 5 for choice, taken in seconds.items()})
        assert trials.settled is settled


def test_a_single_choice_needs_no_trial():
    assert Trials([Choice.SWAPPED]).settled is Choice.SWAPPED


def test_what_comes_later_changes_nothing():
    trials = Trials([Choice.SOLVED, Choice.SWAPPED])
    try_all(trials, {Choice.SOLVED: (1.0,) * 5, Choice.SWAPPED: (2.0,) * 5})
    trials.took(Choice.SOLVED, 100.0)
    assert trials.settled is Choice.SOLVED


class _Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 1e-6
        return self.now_s


class _LyingKeeper(MemoryKeeper):
    """Says that its link is fast; it takes its time for each byte all the same."""

    def __init__(self, clock: _Clock, bytes_per_s: float) -> None:
        super().__init__()
        self._clock = clock
        self._bytes_per_s = bytes_per_s

    def unpack(self, packed: Any) -> torch.Tensor:
        tensor = super().unpack(packed)
        self._clock.now_s += tensor.nbytes / self._bytes_per_s
        return tensor

    def links(self) -> Sequence[Link]:
        return (Link(name="fast", bytes_per_s=1e15, free_nbytes=1e15),)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.up = nn.Linear(64, 256)
        self.down = nn.Linear(256, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return out


def test_a_link_that_is_slower_than_it_says_is_found_out():
    torch.manual_seed(0)
    clock = _Clock()
    model = nn.Sequential(*(_Block() for _ in range(3)))
    keeper = _LyingKeeper(clock, 1e4)
    rows = TokenWise(model, keeper, Settings(), timer=Timer(clock))
    gradients = []
    for _ in range(20):
        with torch.autograd.graph.saved_tensors_hooks(rows.pack, rows.unpack):
            loss = model(torch.ones(2, ROWS, 64)).square().mean()
        loss.backward()
        gradients.append(model[0].up.weight.grad.clone())
        model.zero_grad()
    assert {report.solution.alpha for report in rows.report() if report.solution} == {1.0}
    assert {report.cut for report in rows.report()} == {0}
    assert all(torch.equal(one, gradients[0]) for one in gradients)


def test_a_short_sequence_has_its_alpha_solved_too():
    """Of 128 rows, 64 are the only ones that may be left to rebuild beside none and all."""
    model = nn.Sequential(*(_Block() for _ in range(2)))
    clock = _Clock()
    keeper = _LyingKeeper(clock, 1e4)
    rows = TokenWise(model, keeper, Settings(min_nbytes=1024), timer=Timer(clock))
    for _ in range(3):
        with torch.autograd.graph.saved_tensors_hooks(rows.pack, rows.unpack):
            loss = model(torch.ones(1, 128, 64)).square().mean()
        loss.backward()
    for report in rows.report():
        assert report.solution is not None
        assert report.cost is not None
    (first, *_) = rows.report()
    assert {choice for choice, _ in first.trial_s} <= set(Choice)
    assert first.trial_s


def test_passes_are_measured_while_that_may_change_something():
    """All of them until the trials have settled, then each sixteenth: marks are not for nothing."""
    model = nn.Sequential(*(_Block() for _ in range(2)))
    clock = _Clock()
    timer = Timer(clock)
    rows = TokenWise(model, MemoryKeeper(), Settings(alpha=0.5, min_nbytes=1024), timer=timer)
    measured = []
    for _ in range(34):
        with torch.autograd.graph.saved_tensors_hooks(rows.pack, rows.unpack):
            loss = model(torch.ones(1, 128, 64)).square().mean()
        measured.append(timer.measures)
        loss.backward()
    assert measured == [True] * 16 + ([False] * 15 + [True]) + [False] * 2
