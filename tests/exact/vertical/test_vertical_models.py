"""Micro-batches through models of several kinds give the bits of a loop over them."""

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from vertical_runs import (
    IN_BACKWARD,
    STEPS,
    VOCABULARY,
    Net,
    TwoTowers,
    accumulate,
    adamw,
    loop,
    loss_of,
    token_batches,
)

from offload.engine import Engine


@pytest.mark.parametrize("config", [{}, IN_BACKWARD])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_blocks(reentrant: bool, config: dict[str, Any], compare: Any) -> None:
    config = {**config, "accumulation_steps": 3} if config else {}
    compare(lambda: Net(reentrant=reentrant, dropout=0.1), adamw, loop(3), config=config)


def test_dropout_draws_the_same_numbers(compare: Any) -> None:
    same = compare(lambda: Net(dropout=0.2), adamw, loop(3))
    assert not any("drew other numbers" in notice for notice in same.engine.notices)


def test_shapes_that_differ(compare: Any) -> None:
    """Dropout's numbers too: what is not known yet runs one after the other once."""

    def uneven(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        values = []
        for step in range(STEPS):
            rows = [1 + (step + part) % 4 for part in range(3)]
            batches = [token_batches(1, step, rows=count)[0] for count in rows]
            values += accumulate(engine, batches, lambda tokens: loss_of(model, tokens) / 3)
            optimizer.step()
            optimizer.zero_grad()
        return values

    same = compare(lambda: Net(dropout=0.1), adamw, uneven)
    assert not any("drew other numbers" in notice for notice in same.engine.notices)


WAYS = [(0, 1, 2, 3), (3, 1), (0, 0, 2, 3), (2,), (3, 2, 1, 0), (0, 1, 2, 3)]


@pytest.mark.parametrize("config", [{}, {**IN_BACKWARD, "accumulation_steps": 6}])
def test_micro_batches_that_go_different_ways(config: dict[str, Any], compare: Any) -> None:
    """Blocks that are skipped, used twice, in another order: each sum has the loop's order."""

    def different(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        values = []
        for step in range(STEPS):
            batches = list(zip(token_batches(6, step), WAYS[step % 6 :] + WAYS, strict=False))
            values += accumulate(engine, batches, lambda batch: loss_of(model, *batch) / 6)
            optimizer.step()
            optimizer.zero_grad()
        return values

    # Running statistics are not sums of parts: they come in the order of the turns.
    compare(lambda: Net(statistics=False), adamw, different, config=config)


def llama(checkpointing: bool) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        tie_word_embeddings=True,
        attention_dropout=0.1,
    )
    model = transformers.LlamaForCausalLM(config)
    if checkpointing:
        old = type(model).gradient_checkpointing_enable
        enable = getattr(type(model), "activation_checkpointing_enable", old)
        enable(model, {"use_reentrant": False})
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_language_model(checkpointing: bool, compare: Any) -> None:
    def train(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        model.train()
        values = []
        for step in range(STEPS):
            values += accumulate(
                engine,
                token_batches(3, step),
                lambda tokens: model(input_ids=tokens, labels=tokens).loss / 3,
            )
            optimizer.step()
            optimizer.zero_grad()
        return values

    same = compare(lambda: llama(checkpointing), adamw, train)
    assert "weight" in same.moved_roles()


def test_two_lists_of_blocks_and_inputs_with_gradients(compare: Any) -> None:
    def train(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        values = []
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(step)
            batches = [torch.randn(5, 200, generator=generator) for _ in range(3)]
            for batch in batches:
                batch.requires_grad_()
            values += accumulate(engine, batches, lambda x: model(x).square().mean())
            values += [float(batch.grad.norm()) for batch in batches if batch.grad is not None]
            optimizer.step()
            optimizer.zero_grad()
        return values

    compare(TwoTowers, adamw, train)


def test_a_model_without_blocks_is_a_loop(compare: Any) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(200, 300), nn.GELU(), nn.Linear(300, 200))

    def train(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        values = []
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            batches = [torch.randn(5, 200, generator=generator) for _ in range(3)]
            values += accumulate(engine, batches, lambda x: model(x).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        return values

    same = compare(make, adamw, train)
    assert [notice for notice in same.engine.notices if "one after the other" in notice]


def test_blocks_can_be_named(compare: Any) -> None:
    def train(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        values = []
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            batches = [torch.randn(5, 200, generator=generator) for _ in range(3)]
            if engine is None:
                values += accumulate(None, batches, lambda x: model(x).square().mean())
            else:
                losses = engine.accumulate(
                    batches, lambda x: model(x).square().mean(), blocks=["0", "2"]
                )
                values += [loss.item() for loss in losses]
            optimizer.step()
            optimizer.zero_grad()
        return values

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(200, 300), nn.GELU(), nn.Linear(300, 200))

    compare(make, adamw, train)
