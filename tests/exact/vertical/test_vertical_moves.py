"""What moves when micro-batches go through a model together, however many they are."""

from collections import Counter
from typing import Any

import torch
from vertical_runs import IN_BACKWARD, TwoTowers, adamw, moves_of


def moved_nbytes(starve: Any, tmp_path: Any, count: int, **options: Any) -> dict[str, int]:
    """Bytes of one step, the third, by role and direction; and how often each gradient left."""
    torch.manual_seed(0)
    model = TwoTowers()
    engine = starve(model, adamw(model), nvme=tmp_path / f"{count}", **options)
    engine.weights.window_nbytes = 400_000  # two layers of nine
    for step in range(3):
        engine._journal.recorder.events.clear()
        generator = torch.Generator().manual_seed(step)
        batches = [torch.randn(5, 200, generator=generator) for _ in range(count)]
        engine.accumulate(batches, lambda x: model(x).square().mean() / count)
        engine._runtime.lanes.drain()
        read = {role: moves_of(engine, role, "src") for role in ("weight", "gradient")}
        written = {role: moves_of(engine, role, "dst") for role in ("weight", "gradient")}
        engine.optimizer.step()
        engine.optimizer.zero_grad()
    times = Counter(move.key for move in written["gradient"])
    assert set(times.values()) <= {1}
    return {
        **{f"{role} read": sum(move.nbytes for move in moves) for role, moves in read.items()},
        **{f"{role} out": sum(move.nbytes for move in moves) for role, moves in written.items()},
    }


def test_what_moves_does_not_depend_on_the_number(starve: Any, tmp_path: Any) -> None:
    one = moved_nbytes(starve, tmp_path, 1)
    streamed = 7 * 200 * 201 * 4
    assert one["weight read"] >= streamed
    assert one["gradient out"] == 7 * 200 * 200 * 4
    for count in (2, 4, 8):
        many = moved_nbytes(starve, tmp_path, count)
        assert many["weight read"] <= one["weight read"] + 2 * 200 * 200 * 4
        assert many["gradient out"] == one["gradient out"]
        assert many["weight out"] == one["weight out"] == many["gradient read"] == 0


def test_no_gradient_moves_with_the_step_in_backward(starve: Any, tmp_path: Any) -> None:
    config = {**IN_BACKWARD, "accumulation_steps": 4}
    moved = moved_nbytes(starve, tmp_path, 4, config=config)
    assert moved["gradient out"] == moved["gradient read"] == 0
