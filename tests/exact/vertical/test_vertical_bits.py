"""Micro-batches that go through the model together give the bits of a loop over them."""

from typing import Any

import pytest
import torch
from test_exact_optimizers import OPTIMIZERS
from torch import nn
from vertical_runs import (
    IN_BACKWARD,
    MANY_STEPS,
    STEPS,
    Net,
    accumulate,
    adamw,
    loop,
    loss_of,
    token_batches,
)

from offload.engine import Engine
from offload.tiers.events import Move, StepFinished


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer(name: str, compare: Any) -> None:
    same = compare(Net, lambda model: OPTIMIZERS[name](list(model.parameters())), loop(3, 4))
    assert "vertical" not in " ".join(same.engine.notices)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_any_number_of_micro_batches(count: int, compare: Any) -> None:
    compare(Net, adamw, loop(count))


@pytest.mark.slow
@pytest.mark.parametrize("config", [{}, {**IN_BACKWARD, "accumulation_steps": 4}])
def test_many_steps(config: dict[str, Any], compare: Any) -> None:
    same = compare(lambda: Net(dropout=0.1), adamw, loop(4, MANY_STEPS), config=config)
    assert same.engine.step == MANY_STEPS


def test_the_step_in_backward(compare: Any) -> None:
    same = compare(Net, adamw, loop(4), config={**IN_BACKWARD, "accumulation_steps": 4})
    events = same.engine._journal.recorder.events
    first = next(at for at, event in enumerate(events) if isinstance(event, StepFinished))
    later = [event for event in events[first:] if isinstance(event, Move)]  # one by one before
    moved = {event.key for event in later if event.role == "gradient"}
    assert moved <= same.engine._census.lookups  # of which only rows are in memory


def test_several_calls_make_one_step(compare: Any) -> None:
    def twice(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        values = []
        for step in range(STEPS):
            for half in range(2):
                batches = token_batches(2, 2 * step + half)
                values += accumulate(engine, batches, lambda tokens: loss_of(model, tokens) / 4)
            values.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
            optimizer.step()
            optimizer.zero_grad()
        return values

    compare(Net, adamw, twice)


def test_together_and_in_a_loop_by_turns(compare: Any) -> None:
    def mixed(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        values = []
        for step in range(STEPS):
            chosen = engine if step % 3 else None
            batches = token_batches(3, step)
            values += accumulate(chosen, batches, lambda tokens: loss_of(model, tokens) / 3)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                values.append(loss_of(model.eval(), batches[0]).item())
            model.train()
        return values

    compare(Net, adamw, mixed)


def test_settings_of_the_caller_hold_in_each_micro_batch(compare: Any) -> None:
    def autocast(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        values = []
        for step in range(STEPS):
            with torch.autocast("cpu", torch.bfloat16):
                values += accumulate(
                    engine, token_batches(3, step), lambda tokens: loss_of(model, tokens)
                )
            optimizer.step()
            optimizer.zero_grad()
        return values

    compare(Net, adamw, autocast)


def test_settings_inside_a_micro_batch_are_its_own(compare: Any) -> None:
    """One switches what belongs to the process around the model; the others must not see it."""

    def switching(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        def forward(batch: tuple[int, torch.Tensor]) -> torch.Tensor:
            index, tokens = batch
            if index != 1:
                return loss_of(model, tokens)
            torch.set_default_dtype(torch.float64)
            with (
                torch.autocast("cpu", torch.bfloat16),
                torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH]),
            ):
                loss = loss_of(model, tokens)
            torch.set_default_dtype(torch.float32)
            return loss + torch.zeros(1)[0]

        before = torch.nn.attention._cur_sdpa_kernel_backends()
        values = accumulate(engine, list(enumerate(token_batches(3, 0))), forward)
        optimizer.step()
        assert torch.nn.attention._cur_sdpa_kernel_backends() == before
        assert torch.get_default_dtype() == torch.float32
        return values

    compare(Net, adamw, switching)
