"""The table of published results: every claim has a source, a figure and a verdict that holds."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import bench_plan
import bench_published
from benchlib import Result


@pytest.fixture(scope="module")
def result() -> Result:
    result = Result("published")
    bench_published.measure(result, quick=True)
    return result


def test_every_claim_that_is_said_to_reproduce_does(result) -> None:
    assert [check.name for check in result.checks if not check.holds] == []


def test_what_differs_is_said_and_really_differs(result) -> None:
    claims = [
        claim
        for paper in bench_published.read_papers().values()
        for claim in paper["claims"].values()
    ]
    assert len(claims) == len(result.rows)
    differing = 0
    for claim, row in zip(claims, result.rows, strict=True):
        assert row["claim"] == claim["name"]
        if "differs" in claim:
            differing += 1
            assert not bench_published.holds(row["ours"], claim)
    assert differing == len(result.notes) == len(claims) - len(result.checks)


def test_the_command_writes_theirs_ours_and_the_error(monkeypatch, tmp_path, capsys) -> None:
    file = tmp_path / "published.json"
    command = ["bench_plan.py", "--part", "published", "--quick", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", command)
    assert bench_plan.main() == 0
    rows = json.loads(file.read_text())["rows"]
    assert all({"paper", "where", "theirs", "ours", "error"} <= set(row) for row in rows)
    assert "does not reproduce" in capsys.readouterr().out


def test_every_input_has_a_source() -> None:
    for paper in bench_published.read_papers().values():
        for name, one in paper["inputs"].items():
            # Tables are told by the comment above them, for each of their figures.
            assert "source" in one or isinstance(one["value"], dict), name
            if one.get("source") == "none":
                assert one["assumed"]
        for claim in paper["claims"].values():
            assert claim["where"]


@pytest.mark.parametrize(
    ("compare", "ours", "expected"),
    [
        ("equal", 1.05, True),
        ("equal", 0.85, False),
        ("at_most", 0.1, True),
        ("at_most", 1.2, False),
        ("at_least", 5.0, True),
        ("at_least", 0.8, False),
    ],
)
def test_tolerances(compare: str, ours: float, expected: bool) -> None:
    claim = {"value": 1.0, "tolerance": 0.1, "compare": compare}
    assert bench_published.holds(ours, claim) is expected
