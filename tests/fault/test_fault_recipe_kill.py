"""The recipe itself, killed again and again, ends with the weights of an undisturbed run."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"
MODEL = ["--vocabulary=512", "--positions=64", "--width=64", "--layers=2", "--heads=2"]
JOB = ["--batch=2", "--seq=32", "--steps=40", "--warmup=3", "--budget=host=4GiB", "--accumulate=2"]


def command(checkpoint: Path, place: Path) -> list[str]:
    paths = [f"--checkpoint={checkpoint}", f"--nvme={place}", f"--record={place / 'record'}"]
    result = f"--result={place / 'result.json'}"
    return [sys.executable, str(RECIPES / "finetune_lm.py"), *JOB, *paths, result]


@pytest.mark.slow
def test_a_killed_recipe_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    maker = [sys.executable, str(RECIPES / "make_checkpoint.py"), str(checkpoint), *MODEL]
    subprocess.run(maker, check=True)
    calm, disturbed = tmp_path / "calm", tmp_path / "disturbed"
    subprocess.run(command(checkpoint, calm), check=True)
    moments = random.Random(0)
    for _ in range(20):
        with subprocess.Popen(
            command(checkpoint, disturbed), stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr is not None
            while not process.stderr.readline().startswith("step "):
                assert process.poll() is None
            try:
                process.wait(timeout=moments.uniform(0, 0.05))
            except subprocess.TimeoutExpired:
                process.kill()
    subprocess.run(command(checkpoint, disturbed), check=True)
    one, other = (json.loads((place / "result.json").read_text()) for place in (calm, disturbed))
    assert one["weights_xxh3"] == other["weights_xxh3"]
    assert one["losses"] == other["losses"]
