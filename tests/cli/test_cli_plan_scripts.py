"""``offload plan train.py`` on scripts that can't be planned: what is wrong, in which line."""

from pathlib import Path

import pytest
from plan_verb import LAPTOP, refusal

MODEL = """
import sys, torch
from torch import nn
model = nn.Sequential(nn.Linear(8, 8))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
x = torch.ones(2, 8)
"""
ARGUMENTS = """
import argparse
parser = argparse.ArgumentParser()
parser.add_argument("--data", required=True)
parser.parse_args()
"""
HANDLES = """
import traceback
try:
    1 / 0
except ZeroDivisionError:
    traceback.print_exc()
"""
MISSES = "ended without a backward of a model whose parameters an optimizer steps: "


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "raise ValueError('no data\\nat all')",
            "train.py, line 1: ValueError: no data; does it run",
        ),
        (f"{MODEL}sys.exit('no data')", "it exited before its first backward, with no data: pass"),
        (
            ARGUMENTS,
            "with 2: pass the arguments of the script after --args (train.py: error: the following",
        ),
        ("print('nothing')", f"{MISSES}it made no optimizer"),
        (f"{MODEL}model(x)", f"{MISSES}it called its model, and no backward"),
        (
            f"{MODEL}with torch.no_grad():\n    model(x)",
            f"{MISSES}it called no module, with gradients, that has all",
        ),
        (f"{MODEL}model(x[:, :7])", "train.py, line 7: Sequential can't be planned: torch refuses"),
        (f"{MODEL}y = model(x)\ny[y > 0].sum()", "train.py, line 8: what Sequential computes"),
        (HANDLES, f"was not planned: train.py {MISSES}"),
    ],
    ids=[
        *("raises", "exits", "lacks an argument", "no optimizer", "no backward", "no gradients"),
        *("wrong shapes", "values", "handles an error"),
    ],
)
def test_why_a_script_is_not_planned(
    text: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(text)
    said = refusal(capsys, 1, "train.py", *LAPTOP)
    assert message in said
    assert "--dtype" not in said  # which a script decides


def test_what_is_no_script_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "train.py"
    file.write_text("x = (")
    assert "is not a Python script: '(' was never closed" in refusal(capsys, 2, file, *LAPTOP)
    file.write_bytes(b"\x00")
    assert "is not a Python script" in refusal(capsys, 2, file, *LAPTOP)
    file.unlink()
    file.mkdir()
    assert f"can't read the script {file}: Is a directory" in refusal(capsys, 2, file, *LAPTOP)
