"""The adapter itself, on small files of our own in the place of a peer's."""

import pytest
from peer_adapter import (
    Change,
    adapted,
    cases_in,
    checkout_of,
    moved_in,
    names_of,
    run,
    run_whole,
)

GOOD = """
import pytest
import torch
from peer_stand_ins import CheckpointHiddenStatesOffload, SavedTensorsHooks, save_on_cpu


@pytest.mark.parametrize("hooks", [save_on_cpu, lambda: SavedTensorsHooks(abs, abs)])
def test_one_number(hooks):
    x = torch.ones(1, requires_grad=True)
    with hooks():
        y = x.exp()
    y.backward()
    assert x.grad == y


def test_marked():
    x = torch.ones(8, requires_grad=True)
    offload = CheckpointHiddenStatesOffload(min_offload_bytes=0, keep_last_count=1)
    with offload:
        one, two = x.clone(), x * 2
        offload.mark(one)
        offload.mark(two)
        (one * two).sum().backward()
    stats = offload.stats
    assert stats.offloaded_tensors == stats.restored_tensors == stats.kept_last_tensors == 1
    assert torch.equal(x.grad, torch.full((8,), 4.0))


def test_nothing():
    pass
"""
BAD = """
import pytest


def test_fails():
    assert False


def test_skips():
    pytest.skip("not here")


@pytest.fixture
def broken():
    1 / 0


def test_is_in_error(broken):
    pass
"""
WHOLE = """
import unittest

import torch


class TestSaved(unittest.TestCase):
    def test_right(self):
        x = torch.ones(8, requires_grad=True)
        x.exp().sum().backward()
        assert torch.equal(x.grad, x.exp())

    def test_the_object_itself(self):
        x = torch.ones(8, requires_grad=True)
        assert (x * x).grad_fn._saved_self is x

    def test_changed_in_place(self):
        x = torch.ones(8, requires_grad=True).clone()
        loss = (x * x).sum()
        x += 1
        with self.assertRaisesRegex(RuntimeError, "modified by an inplace operation"):
            loss.backward()
"""


def test_what_ran_and_what_moved_bytes_is_told(tmp_path):
    cases = run(tmp_path, "test_good.py", GOOD, [])
    assert len(cases) == 4
    assert names_of(cases) == set(cases_in(GOOD))
    assert moved_in(cases) == {"test_one_number", "test_marked"}


def test_what_does_not_pass_is_an_error(tmp_path):
    with pytest.raises(AssertionError) as raised:
        run(tmp_path, "test_bad.py", BAD, [])
    message = str(raised.value)
    for told in ("test_fails: failure", "test_skips: skipped", "test_is_in_error: error"):
        assert told in message


@pytest.mark.parametrize(
    ("around", "failing"),
    [
        ("nothing", set()),
        ("hooks", {"test_the_object_itself", "test_changed_in_place"}),
        ("swap", {"test_the_object_itself"}),
    ],
)
def test_a_whole_file_runs_as_it_is(tmp_path, around, failing):
    path = tmp_path / "test_whole.py"
    path.write_text(WHOLE)
    cases = run_whole(tmp_path, path, around)
    assert {(case.classname, case.name) for case in cases.values()} == cases.keys()
    assert cases.keys() == {("TestSaved", name) for name in cases_in(WHOLE, "TestSaved")}
    assert {case.name for case in cases.values() if case.outcome == "failure"} == failing
    assert moved_in(cases.values()) == (names_of(cases.values()) if around == "swap" else set())


def test_a_replacement_that_matches_too_rarely_is_an_error():
    assert adapted("a b a", [Change("a", "c", least=2)]) == "c b c"
    with pytest.raises(AssertionError, match="the peer has changed: 'a' matches 2 times, not 3"):
        adapted("a b a", [Change("a", "c", least=3)])


def test_tests_of_one_class_are_told_apart():
    text = "def test_a(): ...\nclass B:\n    def test_b(self): ...\n    def other(self): ..."
    assert cases_in(text) == {"test_a": "def test_a(): ..."}
    assert set(cases_in(text, "B")) == {"test_b"}


def test_without_a_checkout_it_is_skipped_by_name(monkeypatch, tmp_path):
    monkeypatch.delenv("OFFLOAD_PEER_TORCHTUNE", raising=False)
    reason = "^no checkout of torchtune: set OFFLOAD_PEER_TORCHTUNE$"
    with pytest.raises(pytest.skip.Exception, match=reason):
        checkout_of("torchtune")
    monkeypatch.setenv("OFFLOAD_PEER_TORCHTUNE", str(tmp_path / "gone"))
    with pytest.raises(AssertionError, match="gone is not a directory"):
        checkout_of("torchtune")
