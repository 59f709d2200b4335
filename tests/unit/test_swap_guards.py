"""Guarded tensors stay the objects that they are, and tell before their bytes are used."""

import copy
import pickle
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from offload.swap.guards import GuardedState, Guards


class World:
    """A parameter with a gradient, both on guard until somebody wants their bytes."""

    def __init__(self) -> None:
        self.told = 0
        self.guards = Guards(self.renew)
        self.parameter = nn.Parameter(torch.zeros(4))
        self.parameter.grad = torch.zeros(4)
        self.gradient = self.parameter.grad
        self.watched = [self.parameter, self.gradient]
        for tensor in self.watched:
            self.guards.put_on(tensor)

    def renew(self) -> None:
        self.told += 1
        for tensor in self.watched:
            self.guards.take_off(tensor)
        self.parameter.data.fill_(1.0)


HARMLESS: dict[str, Callable[[torch.Tensor], Any]] = {
    "shape": lambda p: p.shape,
    "dtype": lambda p: p.dtype,
    "device": lambda p: p.device,
    "requires_grad": lambda p: p.requires_grad,
    "grad": lambda p: p.grad,
    "size": lambda p: p.size(0),
    "numel": torch.numel,
    "hash": hash,
    "class": lambda p: isinstance(p, nn.Parameter | torch.Tensor),
    "type": lambda p: type(p).__name__,
}


@pytest.mark.parametrize("use", HARMLESS)
def test_what_needs_no_bytes_passes(use: str) -> None:
    world = World()
    expected = HARMLESS[use](nn.Parameter(torch.zeros(4)))
    found = HARMLESS[use](world.parameter)
    assert world.told == 0
    if use not in ("hash", "grad"):
        assert found == expected


def test_a_gradient_is_dropped_without_a_word() -> None:
    world = World()
    torch.optim.SGD([world.parameter], 0.1).zero_grad()
    assert world.parameter.grad is None
    assert world.told == 0
    assert float(world.gradient.sum()) == 0.0  # whoever holds it is told of
    assert world.told == 1


USES: dict[str, Callable[[torch.Tensor], Any]] = {
    "method": lambda p: p.sum(),
    "function": lambda p: torch.add(p, 0).sum(),
    "operator": lambda p: (p + 0).sum(),
    "data": lambda p: p.data.sum(),
    "numpy": lambda p: torch.tensor(p.detach().numpy().sum()),
    "item": lambda p: torch.tensor(p[0].item() * 4),
    "list": lambda p: torch.tensor(sum(p.tolist())),
    "address": lambda p: (p.data_ptr(), p.sum())[1],
    "storage": lambda p: (p.untyped_storage(), p.sum())[1],
    "module": lambda p: nn.functional.linear(torch.ones(1, 4), p.view(1, 4)),
    "in a list": lambda p: torch.cat([torch.zeros(1), p]).sum(),
    "foreach": lambda p: torch._foreach_norm([p], 1.0)[0],
    "out": lambda p: (torch.sum(p.detach(), 0, out=torch.empty(())), p.sum())[1],
    "deepcopy": lambda p: copy.deepcopy(p).sum(),
    "pickle": lambda p: pickle.loads(pickle.dumps(p)).sum(),
    "repr": lambda p: (repr(p), p.sum())[1],
    "iteration": lambda p: sum(iter(p)),
}


@pytest.mark.parametrize("use", USES)
def test_who_needs_bytes_gets_new_ones(use: str) -> None:
    world = World()
    assert float(USES[use](world.parameter).detach()) == 4.0
    assert world.told == 1
    assert type(world.parameter) is nn.Parameter
    assert type(world.gradient) is torch.Tensor


def test_a_copy_is_an_ordinary_one() -> None:
    world = World()
    assert type(copy.deepcopy(world.parameter)) is nn.Parameter
    other = World()
    assert type(pickle.loads(pickle.dumps(other.parameter))) is nn.Parameter


def test_our_own_uses_are_not_told_of() -> None:
    world = World()
    with world.guards.aside():
        assert float(world.parameter.detach().sum()) == 0.0
        assert float((world.parameter + world.gradient).detach().sum()) == 0.0
    assert world.told == 0
    assert float(world.parameter.detach().sum()) == 4.0


def test_another_thread_is_told_of() -> None:
    from concurrent.futures import ThreadPoolExecutor

    world = World()
    with world.guards.aside(), ThreadPoolExecutor(1) as threads:
        assert threads.submit(lambda: float(world.parameter.detach().sum())).result() == 4.0
    assert world.told == 1


STATES: dict[str, Callable[[Any], Any]] = {
    "item": lambda state: state["a"],
    "missing": lambda state: state["b"],
    "get": lambda state: state.get("a"),
    "dict": dict,
    "list": list,
    "unpacked": lambda state: {**state},
    "length": len,
    "contains": lambda state: "a" in state,
    "items": lambda state: list(state.items()),
    "values": lambda state: list(state.values()),
    "equal": lambda state: state == {},
    "set": lambda state: state.__setitem__("c", 1),
    "delete": lambda state: state.pop("a"),
    "clear": lambda state: state.clear(),
    "update": lambda state: state.update(a=2),
    "union": lambda state: state | {},
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "repr": repr,
}


@pytest.mark.parametrize("use", STATES)
def test_a_state_tells_of_each_use_and_stays_what_it_was(use: str) -> None:
    told: list[int] = []
    state = GuardedState({"a": {"step": 1}}, Guards(lambda: told.append(1)))
    assert not told
    plain = defaultdict(dict, {"a": {"step": 1}})
    found = STATES[use](state)
    assert told
    if use not in ("repr", "pickle"):
        assert found == STATES[use](plain)
    assert plain == dict(state)
    assert type(copy.deepcopy(state)) is defaultdict
    assert type(pickle.loads(pickle.dumps(state))) is defaultdict
