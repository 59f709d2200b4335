"""Gradients leave memory behind the user's back, and are right whenever anyone looks."""

import os
import threading

import pytest
import torch
from gradients_in_scratch import PATIENCE_S, SHAPE, backward, stalls, values
from torch import nn

from offload.allocator.errors import TierIOError
from offload.swap.gradients import MIN_NBYTES
from offload.tiers.journal import Label
from offload.tiers.memory import HostBuffer


def test_a_gradient_that_has_left_is_a_mapping_of_its_bytes_in_scratch(swapper, parameter):
    backward(parameter, values(1))
    swapper.drain()
    home = swapper.home_of(parameter)
    assert parameter.grad.data_ptr() == home.address
    assert not home.held
    assert torch.equal(parameter.grad, values(1))
    on_disk = os.pread(swapper.scratch.file.fd, home.nbytes, home.block.extent.offset)
    assert on_disk == values(1).numpy().tobytes()


def test_a_gradient_on_its_way_is_the_one_that_autograd_made(swapper, parameter, gate):
    backward(parameter, values(1))
    assert gate.begun.wait(PATIENCE_S)
    made = parameter.grad
    swapper.poll()
    assert parameter.grad is made
    assert swapper.home_of(parameter) is None
    assert torch.equal(parameter.grad, values(1))
    gate.open()
    swapper.drain()
    assert swapper.home_of(parameter) is not None
    assert torch.equal(parameter.grad, values(1))


def test_accumulation_goes_on_while_a_gradient_leaves(swapper, parameter, gate):
    backward(parameter, values(1))
    assert gate.begun.wait(PATIENCE_S)
    backward(parameter, values(2))
    gate.open()
    swapper.drain()
    assert swapper.home_of(parameter) is not None
    assert torch.equal(parameter.grad, values(1) + values(2))


def test_accumulation_goes_on_after_a_gradient_has_left(swapper, parameter):
    backward(parameter, values(1))
    swapper.drain()
    address = parameter.grad.data_ptr()
    backward(parameter, values(2))
    swapper.drain()
    assert parameter.grad.data_ptr() == address
    assert torch.equal(parameter.grad, values(1) + values(2))


def test_each_step_s_gradient_uses_the_same_room(swapper, parameter):
    homes = set()
    for seed in range(4):
        parameter.grad = None
        backward(parameter, values(seed))
        swapper.drain()
        assert torch.equal(parameter.grad, values(seed))
        homes.add(swapper.home_of(parameter))
    assert len(homes) == 1
    assert swapper.scratch.arena.stats().current_count == 1


@pytest.mark.parametrize(
    "keep",
    [lambda gradient: gradient, lambda gradient: gradient[3:], lambda gradient: gradient.numpy()],
    ids=["itself", "view", "array"],
)
def test_a_gradient_that_the_user_keeps_is_not_written_over(swapper, parameter, keep):
    backward(parameter, values(1))
    swapper.drain()
    kept = keep(parameter.grad)
    parameter.grad = None
    backward(parameter, values(2))
    swapper.drain()
    assert torch.equal(torch.as_tensor(kept), torch.as_tensor(keep(values(1))))
    assert torch.equal(parameter.grad, values(2))


def test_room_of_gradients_that_the_user_kept_comes_back(swapper, parameter):
    kept = []
    for seed in range(5):
        parameter.grad = None
        backward(parameter, values(seed))
        swapper.drain()
        kept.append(parameter.grad)
    assert all(torch.equal(gradient, values(seed)) for seed, gradient in enumerate(kept))
    assert swapper.scratch.arena.stats().current_count == 5
    kept.clear()
    parameter.grad = None
    backward(parameter, values(9))
    swapper.drain()
    assert torch.equal(parameter.grad, values(9))
    assert swapper.scratch.arena.stats().current_count == 1


def test_a_gradient_is_not_written_beside_an_older_one_on_its_way(
    swapper, parameter, journal, scratch, monkeypatch
):
    """The older write is held up; it must not land last."""
    first_may_end = threading.Event()
    whole = scratch.file.write
    begun = threading.Event()

    def write(*args):
        if not begun.is_set():
            begun.set()
            assert first_may_end.wait(PATIENCE_S)
        whole(*args)

    monkeypatch.setattr(scratch.file, "write", write)
    journal.on_stall = first_may_end.set  # as soon as the training thread waits for it
    backward(parameter, values(1))
    assert begun.wait(PATIENCE_S)
    parameter.grad = None
    backward(parameter, values(2))
    while not first_may_end.is_set() and swapper._leaving:
        if swapper._leaving[-1].transfer.done():
            break  # the newer write has passed the older one, if it may
    first_may_end.set()
    swapper.drain()
    scratch.lanes.drain()
    assert torch.equal(parameter.grad, values(2))


@pytest.mark.parametrize("short_of", ["limit", "budget"])
def test_gradients_that_may_not_wait_leave_at_once(swapper, journal, governor, short_of):
    if short_of == "limit":
        swapper.limit_nbytes = MIN_NBYTES
    else:
        governor.limit_nbytes = 0
    parameters = [nn.Parameter(torch.zeros(SHAPE)) for _ in range(4)]
    for index, parameter in enumerate(parameters):
        swapper.watch(f"layer.{index}", parameter)
    sum((parameter * values(index)).sum() for index, parameter in enumerate(parameters)).backward()
    left = [swapper.home_of(parameter) is not None for parameter in parameters]
    assert sum(left) >= (3 if short_of == "limit" else 4)
    assert {(stall.role, stall.reason) for stall in stalls(journal)} <= {("gradient", "full")}
    swapper.drain()
    for index, parameter in enumerate(parameters):
        assert torch.equal(parameter.grad, values(index))


def test_waiting_for_a_gradient_is_a_stall_that_names_it(swapper, parameter, journal, gate):
    journal.on_stall = gate.open
    backward(parameter, values(1))
    assert gate.begun.wait(PATIENCE_S)
    swapper.drain()
    (stall,) = stalls(journal)
    assert (stall.key, stall.role, stall.lane, stall.reason) == (
        "layer.weight",
        "gradient",
        "host→file",
        "drain",
    )


def test_a_failed_write_is_raised_and_the_gradient_stays(swapper, parameter, scratch, monkeypatch):
    def refuse(*_args):
        raise TierIOError(28, "no room")

    monkeypatch.setattr(scratch.file, "write", refuse)
    with pytest.raises(TierIOError, match="no room"):  # noqa: PT012 (backward may notice first)
        backward(parameter, values(1))
        swapper.drain()
    assert torch.equal(parameter.grad, values(1))
    swapper.drain()  # told once


@pytest.mark.parametrize("cached", [True, False])
def test_a_tile_of_a_gradient_is_read_for_the_optimizer(swapper, cached):
    parameter = nn.Parameter(torch.zeros(40_000))
    swapper.watch("layer.weight", parameter)
    backward(parameter, values(1, (40_000,)))
    swapper.drain()
    home = swapper.home_of(parameter)
    parameter.grad.mul_(3)
    if cached:
        assert torch.equal(parameter.grad, values(1, (40_000,)) * 3)
    else:
        swapper.scratch.file.sync()
        home.shed()
        swapper.scratch.file.uncache(home.block.extent.offset, home.block.extent.nbytes)
    buffer = HostBuffer(8192 * 4)
    staged = buffer.tensor(torch.float32, (8192,))
    start = 4 * 8192
    staged = staged[: 40_000 - start]
    jobs = swapper.places.read_jobs(home, start, staged)
    swapper.scratch.lanes.reads.submit(jobs, Label("", "gradient", "", ""), staged.nbytes).wait()
    assert torch.equal(staged, values(1, (40_000,))[start:] * 3)
    assert torch.equal(parameter.grad, values(1, (40_000,)) * 3)
    buffer.release()
