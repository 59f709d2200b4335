"""Tiles stepped on a device: the bits of the host's step, in any order of the device, in bounds."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, Self

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from offload.allocator.errors import CapacityError
from offload.swap import device_step, ferry
from offload.swap.device_step import DeviceStep
from offload.swap.ferry import Ferry
from offload.swap.optim_kinds import step_on
from offload.swap.state_precision import EXACT
from offload.swap.step_rates import measure_rates
from offload.swap.tile_share import TileShare
from offload.swap.visits import HostPart, State, VisitSize, visit_size
from offload.tiers import hostmem
from offload.tiers.accelerator import Accelerator, DeviceMemory
from offload.tiers.cpudevice import CpuAccelerator, DoneEvent
from offload.tiers.events import NullRecorder
from offload.tiers.journal import Journal
from offload.tiers.lanes import Lane
from offload.tiers.simulated.deferred import Deferred
from offload.tiers.testing import assert_no_race, find_race

SEEDS = 20
MANY_SEEDS = 1000
CHUNK_NBYTES = 64 << 10  # of the ferry: a tile takes several
NUMELS = (5000, 33_333, 1, 700, 40_000)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ferry, "CHUNK_NBYTES", CHUNK_NBYTES)


class Bench:
    """A device step and all that it stands on; a context manager."""

    def __init__(self, device: Accelerator, optimizer: Any, *, tile_nbytes: int = 1 << 20) -> None:
        self._closing = ExitStack()
        journal = Journal(NullRecorder())
        self.ferry = Ferry(device, journal, buffers=4)
        self._closing.callback(self.ferry.close)
        self.lanes = [Lane(name, 2, journal) for name in ("host→device", "device→host")]
        for lane in self.lanes:
            self._closing.callback(lane.close)
        self.given_up = 0
        self.step = DeviceStep(
            optimizer,
            self.ferry,
            *self.lanes,
            journal,
            share=TileShare(1 << 16),
            size=VisitSize(tile_nbytes=tile_nbytes, temporaries_nbytes=0),
            make_room=self._give_up,
        )

    def _give_up(self) -> None:
        self.given_up += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._closing.close()


MAKERS: dict[str, Callable[[Any], Any]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 1e-2),
    "fused": lambda parameters: torch.optim.AdamW(parameters, 1e-2, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9),
    "asgd": lambda parameters: torch.optim.ASGD(parameters, 0.1),
}
OTHERS: dict[str, Callable[[Any], Any]] = {
    "plain": lambda parameters: torch.optim.SGD(parameters, 0.1),
    "adam": lambda parameters: torch.optim.Adam(parameters, 1e-2, amsgrad=True),
    "maximize": lambda parameters: torch.optim.AdamW(parameters, 1e-2, maximize=True),
    "foreach": lambda parameters: torch.optim.AdamW(parameters, 1e-2, foreach=True),
    "nadam": lambda parameters: torch.optim.NAdam(parameters, 1e-2),
    "radam": lambda parameters: torch.optim.RAdam(parameters, 1e-2),
    "adamax": lambda parameters: torch.optim.Adamax(parameters, 1e-2),
    "adadelta": lambda parameters: torch.optim.Adadelta(parameters, 1.0),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, 1e-2),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, 1e-2, centered=True),
    "rprop": lambda parameters: torch.optim.Rprop(parameters, 1e-2),
}
EVERY = {**MAKERS, **OTHERS}


def parameters_of(numels: Any = NUMELS) -> list[nn.Parameter]:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(numel)) for numel in numels]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


def part_of(parameter: nn.Parameter, state: State, made: State) -> HostPart:
    assert parameter.grad is not None
    return HostPart(
        name="weight",
        parameter=parameter.detach(),
        gradient=parameter.grad,
        before={
            name: value.clone() if isinstance(value, torch.Tensor) and not value.dim() else value
            for name, value in state.items()
        },
        states={**made, **{name: value for name, value in state.items() if _is_large(value)}},
    )


def _is_large(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 1


def names_of(optimizer: Any) -> list[str]:
    state = optimizer.state.get(optimizer.param_groups[0]["params"][0])
    if state:  # has them from the beginning
        return [name for name, value in state.items() if _is_large(value)]
    parameter = torch.zeros(64)
    parameter.grad = torch.zeros(64)
    (state,) = step_on(optimizer, optimizer.param_groups[0], [parameter], [{}])
    return [name for name, value in state.items() if _is_large(value)]


def stepped(
    device: Accelerator, name: str, *, at_once: int = 2, steps: int = 2, tile_nbytes: int = 1 << 20
) -> list[torch.Tensor]:
    """Parameters and states after steps of tiles of ``at_once`` parameters."""
    parameters = parameters_of()
    optimizer = EVERY[name](parameters)
    group, names = optimizer.param_groups[0], names_of(optimizer)
    states: list[State] = [dict(optimizer.state.get(one, {})) for one in parameters]
    made = [{name: torch.full((p.numel(),), 7.0) for name in names} for p in parameters]

    def take(first: int, afters: list[State]) -> None:
        states[first : first + len(afters)] = afters

    bench = Bench(device, optimizer, tile_nbytes=tile_nbytes)
    with bench, Deferred(device, beside_host=True):
        for _ in range(steps):
            for first in range(0, len(parameters), at_once):
                some = range(first, min(first + at_once, len(parameters)))
                parts = [part_of(parameters[index], states[index], made[index]) for index in some]
                bench.step.send(group, parts, partial(take, first))
            bench.step.finish()
            assert not bench.step.busy
    found = [value for state in states for value in state.values()]
    return [*(one.detach() for one in parameters), *(torch.as_tensor(one) for one in found)]


def on_host(name: str, steps: int = 2) -> list[torch.Tensor]:
    parameters = parameters_of()
    optimizer = EVERY[name](parameters)
    for _ in range(steps):
        optimizer.step()
    found = [value for p in parameters for value in optimizer.state[p].values()]
    return [*(one.detach() for one in parameters), *(torch.as_tensor(one) for one in found)]


@pytest.mark.parametrize("at_once", [1, 2, 5])
@pytest.mark.parametrize("name", MAKERS)
def test_the_bits_are_those_of_a_step_on_the_host(name: str, at_once: int) -> None:
    for one, other in zip(
        stepped(CpuAccelerator(), name, at_once=at_once), on_host(name), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", OTHERS)
def test_every_optimizer_that_goes_by_tiles(name: str) -> None:
    for one, other in zip(stepped(CpuAccelerator(), name), on_host(name), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", MAKERS)
def test_no_order_of_the_device_changes_a_bit(name: str) -> None:
    assert_no_race(partial(stepped, name=name), seeds=range(SEEDS))


@pytest.mark.slow
def test_no_order_of_the_device_changes_a_bit_under_many_seeds() -> None:
    assert_no_race(partial(stepped, name="adamw"), seeds=range(MANY_SEEDS))


def kernels_do_not_wait_for_what_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    def carry_in(self: Any, target: Any, fill: Any, at: int, nbytes: int) -> None:
        address = hostmem.map_anonymous(nbytes)  # never given back: its bytes stay as they are
        fill(at, address, nbytes)
        self.copy_in(target.memory, at, address, nbytes)

    monkeypatch.setattr(Ferry, "_carry_in", carry_in)


def what_leaves_does_not_wait_for_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def memory(*, tensor: torch.Tensor, ready: Any) -> DeviceMemory:
        del ready
        return DeviceMemory(tensor=tensor, ready=DoneEvent())

    monkeypatch.setattr(device_step, "DeviceMemory", memory)


def nobody_waits_for_what_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    def carry_out(self: Any, source: Any, drain: Any, at: int, nbytes: int) -> None:
        address = hostmem.map_anonymous(nbytes)
        self.copy_out(source.memory, at, address, nbytes)
        drain(at, address, nbytes)

    monkeypatch.setattr(Ferry, "_carry_out", carry_out)


LEFT_OUT = {
    "kernels wait for what arrives": kernels_do_not_wait_for_what_arrives,
    "what leaves waits for kernels": what_leaves_does_not_wait_for_kernels,
    "what leaves has left": nobody_waits_for_what_leaves,
}


@pytest.mark.parametrize("edge", LEFT_OUT)
def test_right_code_without_one_edge_is_found_out(
    edge: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    LEFT_OUT[edge](monkeypatch)
    assert find_race(partial(stepped, name="adamw"), seeds=range(100)) is not None


@settings(max_examples=20, deadline=None)
@given(
    tile_nbytes=st.integers(1, 1 << 20),
    at_once=st.integers(1, 5),
    name=st.sampled_from(sorted(MAKERS)),
)
def test_any_bound_gives_the_same_bits(tile_nbytes: int, at_once: int, name: str) -> None:
    device = CpuAccelerator()
    got = stepped(device, name, at_once=at_once, steps=1, tile_nbytes=tile_nbytes)
    for one, other in zip(got, on_host(name, 1), strict=True):
        assert torch.equal(one, other)


def test_a_device_without_room_is_asked_once_more_and_says_so() -> None:
    parameters = parameters_of()
    optimizer = MAKERS["fused"](parameters)
    made = {name: torch.empty(NUMELS[4]) for name in names_of(optimizer)}
    with Bench(CpuAccelerator(64 << 10), optimizer) as bench:
        with pytest.raises(CapacityError, match=r"may hold 64\.00 KiB"):
            bench.step.send(
                optimizer.param_groups[0], [part_of(parameters[4], {}, made)], lambda _: None
            )
        assert bench.given_up == 1
        assert not bench.step.busy


def test_tiles_wait_for_one_another_where_there_is_little_room() -> None:
    numel = 4096
    parameters = parameters_of([numel] * 6)
    optimizer = MAKERS["fused"](parameters)
    done: list[int] = []
    made = [{name: torch.empty(numel) for name in names_of(optimizer)} for _ in parameters]
    device = CpuAccelerator(7 * 4 * numel)  # one tile of four, two that its step makes, no more
    with Bench(device, optimizer) as bench, Deferred(device, beside_host=True):
        for index, parameter in enumerate(parameters):
            part = part_of(parameter, {}, made[index])
            bench.step.send(optimizer.param_groups[0], [part], lambda _, i=index: done.append(i))
        bench.step.finish()
        assert bench.given_up == 0
    assert done == list(range(6))
    optimizer = MAKERS["fused"](right := parameters_of([numel] * 6))
    optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(parameters, right, strict=True))


def test_the_size_of_a_tile_is_what_it_takes() -> None:
    parameters = parameters_of([70_000, 3000])
    fused = visit_size(MAKERS["fused"](parameters), EXACT, 1 << 16)
    assert 4 * 4 * (1 << 16) <= fused.tile_nbytes <= 5 * 4 * (1 << 16)
    assert fused.temporaries_nbytes == 2 * 4 * (1 << 16)  # states, as a first step makes them
    plain = visit_size(MAKERS["adamw"](parameters), EXACT, 1 << 16)
    assert plain.temporaries_nbytes == (2 + 4) * 4 * (1 << 16)
    few = visit_size(MAKERS["sgd"](parameters[1:]), EXACT, 1 << 16)  # as large as there are
    assert 3 * 4 * 3000 <= few.tile_nbytes <= 2 * 3 * 4 * 3000 + (1 << 16)


def test_rates_are_of_all_tiles_and_of_each_element() -> None:
    times = iter(range(1000))
    parameters = parameters_of()
    before = [one.detach().clone() for one in parameters]
    optimizer = MAKERS["adamw"](parameters)
    with Bench(CpuAccelerator(), optimizer) as bench:
        rates = measure_rates(optimizer, EXACT, bench.step, 4096, clock=lambda: next(times))
    assert rates is not None
    assert rates.host_s == rates.device_s == 1 / (3 * 4096)
    assert not optimizer.state
    assert all(torch.equal(one, other) for one, other in zip(parameters, before, strict=True))
    with Bench(CpuAccelerator(), small := MAKERS["sgd"](parameters[3:4])) as bench:
        assert measure_rates(small, EXACT, bench.step, 4096) is None
