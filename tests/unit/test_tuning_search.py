"""The search over settings: pure, on runners that make their figures up."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.config import OffloadConfig
from offload.tuning.candidates import (
    AUTO_ALPHA_STEPS,
    BASELINE,
    Candidate,
    combine,
    list_candidates,
)
from offload.tuning.search import LEAST_NOISE, Found, Trial, search

BASE = OffloadConfig(budget={"host": 1 << 30}, nvme=(Path("/data/a"),))
Run = Callable[[Candidate, float | None], Trial]


def variant(name: str, factor: str = "", **changes: Any) -> Candidate:
    return Candidate(name=name, factor=factor or name, changes=changes or {"io_threads": 8})


def takes(
    seconds: Callable[[Candidate, int], float], calls: list[str] | None = None, wall_s: float = 1.0
) -> Run:
    """Runs nothing: the nth call of all takes what ``seconds`` says."""
    count = iter(range(10_000))

    def run(candidate: Candidate, _limit_s: float | None) -> Trial:
        if calls is not None:
            calls.append(candidate.name)
        return Trial(status="done", steps=8, step_s=seconds(candidate, next(count)), wall_s=wall_s)

    return run


def fixed(**seconds: float) -> Callable[[Candidate, int], float]:
    return lambda candidate, _number: seconds.get(candidate.name, 1.0)


def best_of(found: Found) -> str:
    assert found.best is not None
    return found.best.candidate.name


def rounds_of(calls: list[str]) -> Iterator[list[str]]:
    """Calls by round: each begins where a name would repeat."""
    part: list[str] = []
    for name in calls:
        if name in part:
            yield part
            part = []
        part.append(name)
    yield part


def test_the_shortest_step_wins_and_most_candidates_run_once() -> None:
    calls: list[str] = []
    variants = [variant(name) for name in "abcdefghi"]
    found = search(variants, takes(fixed(d=0.8), calls), combine=combine)
    assert best_of(found) == "d"
    assert found.ratio(found.best) == pytest.approx(0.8)
    first, second, *_ = rounds_of(calls)
    assert sorted(first) == sorted(["baseline", *"abcdefghi"])
    assert len(second) == 4  # the baseline and a third
    assert calls.count("d") >= 2
    assert len(calls) < 20


def test_orders_are_rotated_and_the_baseline_is_in_each_round() -> None:
    calls: list[str] = []
    search([variant(name) for name in "abcd"], takes(fixed(b=0.5), calls), combine=combine)
    found = list(rounds_of(calls))
    assert len(found) >= 2
    assert all("baseline" in names for names in found)
    assert found[0][0] == "baseline"
    assert found[1][0] != "baseline"


def test_a_machine_that_becomes_slower_has_no_say() -> None:
    """All steps take longer from call to call: ratios within a round tell."""
    drift = takes(lambda candidate, number: (0.9 if candidate.name == "c" else 1.0) * 1.003**number)
    found = search([variant(name) for name in "abc"], drift, combine=combine)
    assert best_of(found) == "c"


def test_within_the_noise_the_baseline_stays() -> None:
    found = search([variant("a")], takes(fixed(a=1 - LEAST_NOISE / 2)), combine=combine)
    assert best_of(found) == "baseline"
    assert found.rounds == 2

    def shaky(candidate: Candidate, number: int) -> float:
        return (1.0, 0.9, 1.0, 1.15)[number]  # baseline, a; a, baseline

    found = search([variant("a")], takes(shaky), combine=combine)
    assert found.ratio(found.others[0]) < 0.95
    assert best_of(found) == "baseline"  # it varied by 15 % itself


def test_winners_are_tried_together() -> None:
    def seconds(candidate: Candidate, _number: int) -> float:
        threads = {4: 1.0, 8: 0.9, 16: 0.95}[candidate.changes.get("io_threads", 4)]
        return threads * (0.8 if candidate.changes.get("step_in_backward") else 1.0)

    variants = [
        variant("8 threads", "io_threads", io_threads=8),
        variant("16 threads", "io_threads", io_threads=16),
        variant("in backward", step_in_backward=True),
        variant("useless", "other", min_swap_nbytes=1),
    ]
    found = search(variants, takes(seconds), combine=combine)
    assert best_of(found) == "in backward + 8 threads"
    assert found.best.candidate.changes == {"io_threads": 8, "step_in_backward": True}
    assert len(found.best.trials) >= 2


def test_of_equals_the_one_that_changes_least() -> None:
    def seconds(candidate: Candidate, _number: int) -> float:
        return 0.8 if candidate.changes.get("step_in_backward") else 0.97

    variants = [variant("x", io_threads=8), variant("y", step_in_backward=True)]
    found = search(
        [*variants, variant("z", "z", min_swap_nbytes=1)], takes(seconds), combine=combine
    )
    assert best_of(found) == "y"


def test_a_failure_is_told_and_ends_nothing() -> None:
    said: list[str] = []

    def run(candidate: Candidate, _limit_s: float | None) -> Trial:
        if candidate.name == "b":
            return Trial(status="does not fit", reason="300 bytes are missing")
        return Trial(status="done", step_s=0.7 if candidate.name == "c" else 1.0)

    found = search([variant(name) for name in "abc"], run, combine=combine, say=said.append)
    assert best_of(found) == "c"
    (failed,) = [one for one in found.others if one.failure is not None]
    assert failed.candidate.name == "b"
    assert len(failed.trials) == 1
    assert "b does not fit: 300 bytes are missing" in said


def test_a_candidate_that_fails_later_is_out() -> None:
    count = iter(range(100))

    def run(candidate: Candidate, _limit_s: float | None) -> Trial:
        if candidate.name == "a" and next(count) == 1:
            return Trial(status="failed", reason="by chance")
        return Trial(status="done", step_s=0.5 if candidate.name == "a" else 1.0)

    found = search([variant("a"), variant("b")], run, combine=combine)
    assert best_of(found) == "baseline"


def test_what_fits_wins_where_the_baseline_does_not() -> None:
    calls: list[str] = []

    def run(candidate: Candidate, _limit_s: float | None) -> Trial:
        calls.append(candidate.name)
        if candidate is BASELINE:
            return Trial(status="does not fit", reason="too small")
        return Trial(status="done", step_s={"a": 2.0, "b": 1.0}[candidate.name])

    found = search([variant("a"), variant("b")], run, combine=combine)
    assert best_of(found) == "b"
    assert found.ratio(found.best) is None
    assert calls.count("baseline") == 1


def test_a_script_that_ends_by_itself_ends_the_search() -> None:
    calls: list[str] = []

    def run(candidate: Candidate, _limit_s: float | None) -> Trial:
        calls.append(candidate.name)
        return Trial(status="ended early", steps=2)

    found = search([variant("a")], run, combine=combine)
    assert found.best is None
    assert calls == ["baseline"]


def test_what_fits_with_no_settings_ends_the_search() -> None:
    calls: list[str] = []

    def run(candidate: Candidate, _limit_s: float | None) -> Trial:
        calls.append(candidate.name)
        return Trial(status="never fits", reason=f"{len(calls)} bytes are missing")

    found = search([variant("a"), variant("b")], run, combine=combine)
    assert found.best is None
    assert calls == ["baseline"]


def test_failing_alike_gives_up_and_differently_does_not() -> None:
    def failing(reason: Callable[[Candidate], str]) -> list[str]:
        calls: list[str] = []

        def run(candidate: Candidate, _limit_s: float | None) -> Trial:
            calls.append(candidate.name)
            return Trial(status="failed", reason=reason(candidate))

        found = search([variant(name) for name in "abcde"], run, combine=combine)
        assert found.best is None
        return calls

    assert len(failing(lambda _candidate: "no such file")) == 3
    assert len(failing(lambda candidate: candidate.name)) == 6


def test_trials_have_a_limit_once_the_baseline_is_known() -> None:
    limits: dict[str, float | None] = {}

    def run(candidate: Candidate, limit_s: float | None) -> Trial:
        limits.setdefault(candidate.name, limit_s)
        return Trial(status="done", step_s=1.0, wall_s=30.0)

    search([variant("a")], run, combine=combine)
    assert limits == {"baseline": None, "a": 150.0}


@given(
    st.lists(st.floats(0.1, 10), max_size=14),
    st.lists(st.sampled_from(["done", "failed", "too slow"]), min_size=40, max_size=40),
)
def test_every_search_ends_and_tells_the_truth(seconds: list[float], statuses: list[Any]) -> None:
    count = iter(range(10_000))

    def run(candidate: Candidate, _limit_s: float | None) -> Trial:
        status = statuses[next(count) % len(statuses)]
        number = -1 if candidate is BASELINE else int(candidate.name)
        return Trial(status=status, step_s=1.0 if number < 0 else seconds[number])

    variants = [variant(str(index)) for index in range(len(seconds))]
    found = search(variants, run, combine=lambda _winners: None)
    assert next(count) <= 1 + 3 * (len(seconds) + 6)
    best = found.best
    if best is not None:
        assert best.alive
        if best is not found.baseline:
            assert len(best.trials) > 1
            ratio = found.ratio(best)
            alive = found.baseline.alive
            assert not alive or (ratio is not None and 1 - ratio > found.noise(best))


# Candidates.


def changes(candidates: tuple[Candidate, ...]) -> list[dict[str, Any]]:
    return [dict(candidate.changes) for candidate in candidates]


def test_by_default_nothing_is_given_up() -> None:
    for candidate in list_candidates(BASE, steps=100, engines=("threads", "aiofiles")):
        config = candidate.config(BASE)
        assert config.commit == "step"
        assert config.state_precision == "exact"
        assert config.master_weights == "none"
        assert not config.relaxed
        assert (config.budget, config.nvme) == (BASE.budget, BASE.nvme)


def test_what_gives_something_up_is_asked_for() -> None:
    plain = changes(list_candidates(BASE, steps=8))
    lossy = changes(list_candidates(BASE, steps=8, lossy=True))
    volatile = changes(list_candidates(BASE, steps=8, volatile=True))
    assert [one for one in lossy if one not in plain] == [
        {"state_precision": "bf16"},
        {"state_precision": "8bit"},
    ]
    assert [one for one in volatile if one not in plain] == [{"commit": "never"}]


def test_what_the_user_has_set_is_not_searched() -> None:
    free = {name for one in changes(list_candidates(BASE, steps=8)) for name in one}
    assert free == {"step_in_backward", "step_in_forward", "recompute", "alpha", "io_threads"}
    for name, value in (
        ("step_in_backward", False), ("step_in_forward", False), ("recompute", "off"),
        ("io_threads", 4),
    ):  # fmt: skip
        base = OffloadConfig(**{**BASE.model_dump(include={"budget", "nvme"}), name: value})
        left = changes(list_candidates(base, steps=8))
        assert left
        assert all(name not in one for one in left)


def test_engines_directories_and_long_trials_add_candidates() -> None:
    two = OffloadConfig(budget={"host": 1 << 30}, nvme=(Path("/data/a"), Path("/data/b")))
    found = changes(list_candidates(two, steps=8, engines=("threads", "aiofiles")))
    assert {"io_engine": "aiofiles"} in found
    assert {"io_engine": "threads"} not in found
    assert {"nvme": (Path("/data/b"),)} in found
    solved = {"recompute": "tokenwise", "alpha": "auto"}
    assert solved not in found
    assert solved in changes(list_candidates(two, steps=AUTO_ALPHA_STEPS))


def test_combining_takes_the_best_of_each_factor() -> None:
    a, b, c = (
        variant("a", "x", io_threads=8),
        variant("b", "x", io_threads=2),
        variant("c", commit="never"),
    )
    both = combine([a, b, c])
    assert both is not None
    assert (both.name, both.changes) == ("a + c", {"io_threads": 8, "commit": "never"})
    assert combine([a, b]) is None
    assert combine([]) is None


def test_what_a_run_refuses_together_is_not_combined() -> None:
    backward, forward, *_ = list_candidates(BASE, steps=8)
    *_, bf16, eight = list_candidates(BASE, steps=8, lossy=True)
    assert combine([backward, forward]) is None
    for winners, name in (
        ([forward, eight, bf16], "step in forward + bf16 states"),
        ([backward, eight], "step in backward + 8bit states"),
    ):
        both = combine(winners)
        assert both is not None
        assert both.name == name
        both.config(BASE)
    assert combine([eight, forward]) is None
