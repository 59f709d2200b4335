"""The recipe itself, killed again and again, ends with the weights of an undisturbed run."""

import json
import random
from pathlib import Path

import pytest

from forked import Forked

RECIPES = Path(__file__).parents[2] / "recipes"
MODEL = ["--vocabulary=512", "--positions=64", "--width=64", "--layers=2", "--heads=2"]
JOB = ["--batch=2", "--seq=32", "--steps=40", "--warmup=3", "--budget=host=4GiB", "--accumulate=2"]


def command(checkpoint: Path, place: Path) -> list[str]:
    paths = [f"--checkpoint={checkpoint}", f"--nvme={place}", f"--record={place / 'record'}"]
    result = f"--result={place / 'result.json'}"
    return [str(RECIPES / "finetune_lm.py"), *JOB, *paths, result]


@pytest.mark.slow
def test_a_killed_recipe_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    Forked(RECIPES / "make_checkpoint.py", checkpoint, *MODEL).finish()
    calm, disturbed = tmp_path / "calm", tmp_path / "disturbed"
    Forked(*command(checkpoint, calm)).finish()
    moments = random.Random(0)
    for _ in range(20):
        child = Forked(*command(checkpoint, disturbed), merge=True)
        while not (line := child.output.readline()).startswith("step "):
            assert line, "it ended without a step"
        child.process.join(moments.uniform(0, 0.05))
        child.kill()
    Forked(*command(checkpoint, disturbed)).finish()
    one, other = (json.loads((place / "result.json").read_text()) for place in (calm, disturbed))
    assert one["weights_xxh3"] == other["weights_xxh3"]
    assert one["losses"] == other["losses"]
