"""Programs: what a fake run finds is what a real run does."""

from collections import Counter
from typing import Any

import pytest
import torch
from planning_models import Model, loss_of, tokens_of, trace
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from offload.allocator.errors import UnsupportedError
from offload.swap.planning.program import Event, Program, What
from offload.swap.planning.stepping import stepping_of
from offload.swap.planning.tracing import fake_mode

LEAST_NBYTES = 512


def numbers(program: Program, what: What) -> list[int]:
    return [event.which for event in program.events if event.what is what]


class Lossy(Model):
    """A model that computes its loss itself, as those of Hugging Face do."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(super().forward(tokens).flatten(0, 1), tokens.flatten())


@pytest.mark.parametrize(("make", "loss"), [(Model, loss_of), (Lossy, lambda model, x: model(x))])
def test_what_autograd_saves_is_what_a_real_run_saves(make: Any, loss: Any) -> None:
    """Of what runs inside of the model's call, for nothing else is watched."""
    model, saved, batch = make(), {}, tokens_of()
    known = *model.parameters(), *model.buffers(), batch
    fixed = {tensor.untyped_storage()._cdata for tensor in known}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in fixed and storage.nbytes() >= LEAST_NBYTES:
            saved[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    def watched(tokens: torch.Tensor) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return model(tokens)

    of = loss(watched, batch)
    program = trace(make, loss=loss)
    traced = Counter(program.storages[number] for number in numbers(program, What.SAVE))
    traced.pop(batch.nbytes, None)
    assert traced == Counter(nbytes for nbytes, _ in saved.values())
    assert (256_000 in traced) is (make is Lossy)  # log-probabilities
    of.backward()


def test_gradients_come_in_the_order_and_number_of_a_real_run() -> None:
    model, order = Model(), []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    loss_of(model, tokens_of()).backward()
    program = trace()
    assert [program.census.weights[n].name for n in numbers(program, What.GRADIENT)] == order


def test_the_operations_count_what_torch_counts() -> None:
    model = Model()
    with FlopCounterMode(display=False) as counter:
        loss_of(model, tokens_of()).backward()
    products = sum(
        flops
        for operation, flops in counter.get_flop_counts()["Global"].items()
        if "attention" not in str(operation)
    )
    program = trace()
    matmuls = sum(
        program.operations[number].flops
        for number in numbers(program, What.COMPUTE)
        if program.operations[number].kind == "matmul"
    )
    assert matmuls == products
    kinds = {operation.kind for operation in program.operations}
    assert kinds == {"matmul", "attention", "pointwise", "heavy", "view"}


def test_causal_attention_counts_half_and_its_backward_two_and_a_half_times() -> None:
    forward, backward = (
        next(o for o in trace().operations if o.kind == "attention" and ("back" in o.name) is back)
        for back in (False, True)
    )
    length, width = 64, 256
    assert forward.flops == 4 * length * length * width // 2
    assert backward.flops == 5 * forward.flops // 2


def test_every_storage_that_comes_goes_in_order() -> None:
    program = trace()
    states: dict[int, str] = {}
    saved: set[int] = set()
    for what, which in program.events:
        if what is What.ALLOCATE:
            assert which not in states
            states[which] = "held"
        elif what is What.FREE:
            assert states[which] == "held"
            states[which] = "gone"
        elif what is What.SAVE:
            assert states[which] == "held"
            saved.add(which)
        elif what is What.UNSAVE:
            assert which in saved
        elif what is What.FORGET:
            saved.remove(which)
    assert not saved
    assert set(states.values()) == {"gone"}
    assert program.events[0].what is not What.STEP
    assert program.events.count(Event(What.STEP, 0)) == 1


def test_weights_are_used_where_modules_and_backward_use_them() -> None:
    program = trace()
    used = Counter(name for number in numbers(program, What.USE) for name in program.uses[number])
    assert used["blocks.0.up.weight"] == 2  # forward, and backward's gradient of its input
    assert "embedding.weight" not in used
    (lookup,) = program.lookups
    assert (lookup.weight, lookup.rows) == ("embedding.weight", 64)


def test_states_are_those_of_a_real_step() -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    loss_of(model, tokens_of()).backward()
    optimizer.step()
    real = {
        name: tuple(
            value.nbytes
            for value in optimizer.state[parameter].values()
            if value.shape == parameter.shape
        )
        for name, parameter in model.named_parameters()
    }
    stepping = trace().stepping
    assert stepping is not None
    assert stepping.states_nbytes == real
    assert stepping.fused
    unfused = trace(fused=False).stepping
    assert unfused is not None
    assert not unfused.fused


class Tied(Model):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embedding.weight


def test_a_tied_weight_is_one_weight() -> None:
    plain, tied = trace(), trace(Tied)
    assert plain.parameters - tied.parameters == 1000 * 256
    assert tied.lookups[0].weight == "embedding.weight"
    assert ("embedding.weight",) in tied.uses  # the head reads all of it


class Checkpointed(Model):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x)


def test_checkpointing_saves_less_and_computes_more() -> None:
    plain, checkpointed = trace(length=256), trace(Checkpointed, length=256)
    assert checkpointed.saved_nbytes < plain.saved_nbytes
    assert checkpointed.flops > plain.flops
    used = Counter(name for n in numbers(checkpointed, What.USE) for name in checkpointed.uses[n])
    # In forward and again in backward; what checkpoint saves then, no outer hook sees.
    assert used["blocks.0.up.weight"] == 2


def test_frozen_weights_have_no_gradients_and_no_states() -> None:
    def make() -> nn.Module:
        model = Model()
        model.embedding.requires_grad_(requires_grad=False)
        return model

    program = trace(make)
    names = {program.census.weights[number].name for number in numbers(program, What.GRADIENT)}
    assert "embedding.weight" not in names
    assert program.stepping is not None
    assert "embedding.weight" not in program.stepping.states_nbytes
    assert program.trainable_nbytes == program.census.weight_nbytes - 1000 * 256 * 4


def test_what_depends_on_values_is_refused() -> None:
    def loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        value = loss_of(model, tokens)
        return value * 2 if value > 1 else value

    with pytest.raises(UnsupportedError, match="depends on the values of its tensors"):
        trace(loss=loss)


def test_what_torch_refuses_is_told() -> None:
    with pytest.raises(UnsupportedError, match="Model can't be planned: torch refuses"):
        trace(loss=lambda model, tokens: model(tokens) @ torch.ones(7))


def test_an_optimizer_of_unknown_states_is_refused() -> None:
    class Own(torch.optim.AdamW):
        pass

    with fake_mode():
        model = Model()
        with pytest.raises(UnsupportedError, match="Own is not known to be elementwise"):
            stepping_of(model, Own(model.parameters()))


def test_a_program_survives_json() -> None:
    program = trace()
    assert Program.from_json(program.to_json()) == program


def test_nothing_is_allocated_for_a_model_larger_than_memory() -> None:
    program = trace(lambda: Model(width=8192, blocks=2), length=256)
    assert program.census.weight_nbytes > 4 << 30
    assert program.saved_nbytes > 0
    assert program.transient_nbytes > 0
