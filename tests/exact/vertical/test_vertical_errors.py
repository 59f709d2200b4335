"""Errors in one of several micro-batches, and what is refused."""

import warnings
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from vertical_runs import IN_BACKWARD, Net, accumulate, adamw, loss_of, token_batches

from offload.allocator.errors import ConfigError, StepInterruptedError, UnsupportedError


def test_numbers_that_were_not_foretold_are_told(starve: Any) -> None:
    model = Net()
    engine = starve(model, adamw(model))

    def forward(count: int) -> torch.Tensor:
        torch.randn(int(count))
        return loss_of(model, token_batches(1, 0)[0])

    for counts in ([20, 20], [20, 20], [40, 20]):
        assert not any("drew other numbers" in notice for notice in engine.notices)
        engine.accumulate(counts, forward)
    assert any("drew other numbers" in notice for notice in engine.notices)


def test_a_reentrant_checkpoint_that_is_used_twice_is_refused(starve: Any) -> None:
    model = Net(reentrant=True)
    engine = starve(model, adamw(model))

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        return loss_of(model, tokens, (0, 1, 0, 1))

    engine.accumulate(token_batches(2, 0), forward)  # one after the other, to see what is drawn
    model.zero_grad()
    with pytest.raises(UnsupportedError, match="use_reentrant=False"):
        engine.accumulate(token_batches(2, 0), forward)


@pytest.mark.parametrize("where", ["forward", "backward", "loss"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_an_error_in_one_micro_batch(where: str, which: int, starve: Any) -> None:
    torch.manual_seed(0)
    model, twin = Net(), Net()
    twin.load_state_dict(model.state_dict())
    optimizer, twin_optimizer = adamw(model), adamw(twin)
    engine = starve(model, optimizer)
    batches = token_batches(3, 0)

    def fail(_: Any) -> None:
        raise ArithmeticError("out of luck")

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        chosen = tokens is batches[which]
        x = model.embedding(tokens)
        for index, block in enumerate(model.blocks):
            x = block(x)
            if chosen and index == 2 and where == "forward":
                fail(x)
            if chosen and index == 2 and where == "backward":
                x.register_hook(fail)
        loss = F.cross_entropy(model.head(model.norm(x.flatten(0, 1))), tokens.flatten())
        return loss if not chosen or where != "loss" else "no tensor"  # type: ignore[return-value]

    expected = UnsupportedError if where == "loss" else ArithmeticError
    with pytest.raises(expected) as caught:
        engine.accumulate(batches, forward)
    assert caught.value.__notes__ == [f"in micro-batch {which} of 3"]
    optimizer.zero_grad()
    model.norm.load_state_dict(twin.norm.state_dict())
    for step in range(3):
        mine = accumulate(engine, token_batches(3, step), lambda tokens: loss_of(model, tokens))
        theirs = accumulate(None, token_batches(3, step), lambda tokens: loss_of(twin, tokens))
        assert mine == theirs
        optimizer.step()
        twin_optimizer.step()
        optimizer.zero_grad()
        twin_optimizer.zero_grad()


def test_an_error_in_a_step_in_backward_stops_the_engine(starve: Any) -> None:
    model = Net()
    optimizer = adamw(model)
    engine = starve(model, optimizer, config={**IN_BACKWARD, "accumulation_steps": 2})

    def fail(_: Any) -> None:
        raise ArithmeticError("out of luck")

    engine.accumulate(token_batches(2, 0), lambda tokens: loss_of(model, tokens))
    optimizer.step()
    optimizer.zero_grad()
    model.blocks[0].up.weight.register_hook(fail)
    with pytest.raises(ArithmeticError):
        engine.accumulate(token_batches(2, 0), lambda tokens: loss_of(model, tokens))
    with pytest.raises(StepInterruptedError):
        optimizer.step()
    with pytest.raises(StepInterruptedError):
        engine.accumulate(token_batches(2, 0), lambda tokens: loss_of(model, tokens))


def test_what_is_refused(starve: Any, tmp_path: Any) -> None:
    model = Net()
    engine = starve(model, adamw(model), config={**IN_BACKWARD, "accumulation_steps": 2})

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        return loss_of(model, tokens)

    with pytest.raises(ConfigError, match="no micro-batch"):
        engine.accumulate([], forward)
    with pytest.raises(ConfigError, match="accumulation_steps=2: set it to 3"):
        engine.accumulate(token_batches(3, 0), forward)
    with pytest.raises(ConfigError, match="no module 'layers'"):
        engine.accumulate(token_batches(2, 0), forward, blocks=["layers"])
    with pytest.raises(ConfigError, match="inside of a forward"):
        engine.accumulate(
            token_batches(2, 0), lambda _: engine.accumulate(token_batches(2, 0), forward)[0]
        )
    with torch.inference_mode(), pytest.raises(ConfigError, match="inference_mode"):
        engine.accumulate(token_batches(2, 0), forward)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch itself, as it imports its compiler
        compiled = torch.compile(forward, backend="eager")
    with pytest.raises(UnsupportedError, match="compile"):
        engine.accumulate(token_batches(2, 0), compiled)
    engine.detach()
    with pytest.raises(ConfigError, match="detached"):
        engine.accumulate(token_batches(2, 0), forward)
    other = Net()
    tokenwise = starve(
        other, adamw(other), nvme=tmp_path / "other", config={"recompute": "tokenwise"}
    )
    with pytest.raises(UnsupportedError, match="token-wise"):
        tokenwise.accumulate(token_batches(2, 0), lambda tokens: loss_of(other, tokens))
