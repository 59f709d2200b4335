"""Gradients leave memory behind the user's back, and are right whenever anyone looks."""

import os
import threading

import numpy as np
import pytest
import torch
from torch import nn

from offload.allocator.errors import TierIOError
from offload.swap.governor import Governor
from offload.swap.gradients import MIN_NBYTES, GradientSwapper
from offload.tiers.events import ListRecorder, Stall
from offload.tiers.filetier import FileTier, Lanes
from offload.tiers.journal import Journal, Label
from offload.tiers.memory import HostBuffer

SHAPE = (128, 128)  # float32: MIN_NBYTES exactly
PATIENCE_S = 60
PLENTY = 1 << 40


class Waits(Journal):
    """Tells ``on_stall`` when the training thread is about to wait."""

    on_stall = staticmethod(lambda: None)

    def stall(self, *args):
        self.on_stall()
        return super().stall(*args)


@pytest.fixture
def journal():
    return Waits(ListRecorder())


@pytest.fixture
def scratch(tmp_path, journal):
    lanes = Lanes(journal)
    with FileTier(tmp_path, None, lanes) as scratch:
        yield scratch
    lanes.close()


@pytest.fixture
def governor():
    governor = Governor(PLENTY)
    yield governor
    governor.close()


@pytest.fixture
def swapper(scratch, journal, governor):
    swapper = GradientSwapper(scratch, journal, governor, PLENTY)
    yield swapper
    swapper.stop()


@pytest.fixture
def parameter(swapper):
    parameter = nn.Parameter(torch.zeros(SHAPE))
    swapper.watch("layer.weight", parameter)
    return parameter


class Gate:
    """Holds the scratch file's writes, before or after they touch the disk, until it is opened."""

    def __init__(self, scratch, monkeypatch, when):
        self.begun, self._open = threading.Event(), threading.Event()
        whole = scratch.file.write

        def write(*args):
            if when == "before":
                self._hold()
            whole(*args)
            if when == "after":
                self._hold()

        monkeypatch.setattr(scratch.file, "write", write)

    def _hold(self):
        self.begun.set()
        assert self._open.wait(PATIENCE_S)

    def open(self):
        self._open.set()


@pytest.fixture(params=["before", "after"])
def gate(scratch, monkeypatch, request):
    gate = Gate(scratch, monkeypatch, request.param)
    yield gate
    gate.open()


def values(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def backward(parameter, gradient, **options):
    """A backward pass whose gradient is ``gradient``."""
    (parameter * gradient).sum().backward(**options)


def stalls(journal):
    return [event for event in journal.recorder.events if isinstance(event, Stall)]


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


@pytest.mark.parametrize(
    "change",
    [
        lambda gradient: gradient.mul_(0.5),
        lambda gradient: gradient.data.mul_(0.5),  # tells no version counter
        lambda gradient: np.multiply(gradient.numpy(), 0.5, out=gradient.numpy()),
    ],
    ids=["in place", "data", "numpy"],
)
def test_a_change_by_the_user_while_a_gradient_leaves_is_kept(swapper, parameter, gate, change):
    backward(parameter, values(1))
    assert gate.begun.wait(PATIENCE_S)
    change(parameter.grad)
    gate.open()
    swapper.drain()
    assert swapper.home_of(parameter) is not None
    assert torch.equal(parameter.grad, values(1) * 0.5)


def test_changes_between_later_steps_are_kept_too(swapper, parameter, gate):
    """A gradient that leaves again, outside of backward, is watched as the first time."""
    backward(parameter, values(1))
    assert gate.begun.wait(PATIENCE_S)
    parameter.grad.mul_(0.5)
    gate.open()
    swapper._leaving[0].transfer.settle()
    swapper.poll()  # leaves again
    parameter.grad.data.mul_(0.5)
    swapper.drain()
    assert torch.equal(parameter.grad, values(1) * 0.25)


def test_a_change_by_the_user_is_kept_when_the_gradient_left_again_in_backward(
    swapper, parameter, scratch, monkeypatch
):
    """Its first write has ended, unnoticed, when the second backward adds to it."""
    backward(parameter, values(1))
    swapper._leaving[0].transfer.settle()
    gate = Gate(scratch, monkeypatch, "after")
    backward(parameter, values(2))
    assert gate.begun.wait(PATIENCE_S)
    parameter.grad.data.mul_(3)  # tells no version counter
    gate.open()
    swapper.drain()
    assert torch.equal(parameter.grad, (values(1) + values(2)) * 3)


@pytest.mark.parametrize("kind", ["post accumulate", "tensor"])
def test_a_change_inside_backward_by_a_hook_of_a_parameter_is_kept(swapper, parameter, gate, kind):
    """It tells no version counter, and the write has begun."""
    later = nn.Parameter(torch.zeros(SHAPE))
    swapper.watch("later", later)
    on_their_way = []

    def change(_gradient):
        assert gate.begun.wait(PATIENCE_S)
        on_their_way.extend(swapper._leaving.of(parameter))
        parameter.grad.data.mul_(0.5)

    if kind == "tensor":
        later.register_hook(change)
    else:
        later.register_post_accumulate_grad_hook(change)
    # What was computed last is first in backward.
    ((later * values(2)).sum() + (parameter * values(1)).sum()).backward()
    gate.open()
    swapper.drain()
    assert len(on_their_way) == 1
    assert swapper.home_of(parameter) is not None
    assert torch.equal(parameter.grad, values(1) * 0.5)
    assert torch.equal(later.grad, values(2))


def test_a_checksum_is_taken_where_the_user_s_code_could_change_bytes(swapper, parameter, gate):
    """Not inside of backward where none of it runs."""
    noted = []
    swapper.before_end = lambda: noted.append(swapper._leaving[-1].checksum is not None)
    backward(parameter, values(1))
    parameter.grad = None
    handle = parameter.register_post_accumulate_grad_hook(lambda _parameter: None)
    gate.open()
    backward(parameter, values(2))
    parameter.grad = None
    handle.remove()
    backward(parameter, values(3))
    assert noted == [False, True, False]


def test_a_failed_backward_does_not_end_the_watch(swapper, parameter, gate):
    class Refuse(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise ValueError("no")

    other = nn.Parameter(torch.zeros(SHAPE))
    swapper.watch("other", other)
    with pytest.raises(ValueError, match="no"):
        (Refuse.apply(torch.ones((), requires_grad=True)) + other.sum()).backward()
    backward(parameter, values(1))
    assert gate.begun.wait(PATIENCE_S)
    parameter.grad.data.mul_(0.5)
    gate.open()
    swapper.drain()
    assert torch.equal(parameter.grad, values(1) * 0.5)


def test_a_change_by_the_user_after_a_gradient_has_left_is_kept(swapper, parameter):
    backward(parameter, values(1))
    swapper.drain()
    norm = nn.utils.clip_grad_norm_([parameter], 1.0)
    expected = values(1)
    expected.mul_(torch.clamp(1.0 / (values(1).norm() + 1e-6), max=1.0))
    assert torch.equal(norm, values(1).norm())
    assert torch.equal(parameter.grad, expected)
    swapper.home_of(parameter).shed()
    assert torch.equal(parameter.grad, expected)


@pytest.mark.parametrize("replacement", [None, torch.ones(SHAPE)], ids=["dropped", "replaced"])
def test_what_the_user_puts_in_place_of_a_leaving_gradient_stays(
    swapper, parameter, gate, replacement
):
    backward(parameter, values(1))
    assert gate.begun.wait(PATIENCE_S)
    parameter.grad = replacement
    gate.open()
    swapper.drain()
    assert parameter.grad is replacement


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


def left_alone(swapper, parameter):
    swapper.drain()
    return not swapper.homes and swapper.home_of(parameter) is None


def test_small_gradients_stay(swapper):
    parameter = nn.Parameter(torch.zeros(MIN_NBYTES // 4 - 1))
    swapper.watch("bias", parameter)
    backward(parameter, torch.ones(MIN_NBYTES // 4 - 1))
    assert left_alone(swapper, parameter)


def test_frozen_parameters_have_no_gradient(swapper):
    parameter = nn.Parameter(torch.zeros(SHAPE), requires_grad=False)
    swapper.watch("frozen", parameter)
    assert left_alone(swapper, parameter)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_gradients_that_are_part_of_a_graph_stay(swapper, parameter):
    (parameter**3).sum().backward(create_graph=True)
    assert parameter.grad.requires_grad
    assert left_alone(swapper, parameter)
    parameter.grad = None


def test_sparse_gradients_stay(swapper):
    table = nn.Embedding(128, 128, sparse=True)
    swapper.watch("table", table.weight)
    table(torch.tensor([1, 5])).sum().backward()
    assert table.weight.grad.is_sparse
    assert left_alone(swapper, table.weight)


@pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout contract")
def test_gradients_with_strides_of_their_own_stay(swapper, parameter):
    parameter.grad = torch.zeros(SHAPE).t()
    backward(parameter, values(1))
    assert not parameter.grad.is_contiguous()
    assert left_alone(swapper, parameter)
    assert torch.equal(parameter.grad, values(1))


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


def test_when_stopped_gradients_are_ordinary_again(swapper, parameter):
    backward(parameter, values(1))
    swapper.stop()
    swapper.materialise()
    assert swapper.home_of(parameter) is None
    assert torch.equal(parameter.grad, values(1))
    parameter.grad = None
    backward(parameter, values(2))
    assert not swapper._leaving
    assert torch.equal(parameter.grad, values(2))


def test_a_gradient_that_is_kept_does_not_leave(swapper, parameter, journal):
    swapper.keep([parameter])
    for seed in (1, 2):
        backward(parameter, values(seed))
        swapper.drain()
    assert swapper.home_of(parameter) is None
    assert torch.equal(parameter.grad, values(1) + values(2))
    assert not [event for event in journal.recorder.events if type(event).__name__ == "Move"]


def test_a_gradient_that_has_left_comes_back_to_be_kept(swapper, parameter):
    backward(parameter, values(1))
    swapper.drain()
    swapper.keep([parameter])
    assert torch.equal(parameter.grad, values(1))
    backward(parameter, values(2))
    assert swapper.home_of(parameter) is None
    assert torch.equal(parameter.grad, values(1) + values(2))
    swapper.keep([])
    parameter.grad = None
    backward(parameter, values(3))
    swapper.drain()
    assert swapper.home_of(parameter) is not None
    assert torch.equal(parameter.grad, values(3))


def test_a_gradient_on_its_way_when_it_is_to_be_kept(swapper, parameter, gate):
    backward(parameter, values(1))
    assert gate.begun.wait(PATIENCE_S)
    swapper.keep([parameter])
    backward(parameter, values(2))
    gate.open()
    swapper.drain()
    assert torch.equal(parameter.grad, values(1) + values(2))
    backward(parameter, values(3))
    assert swapper.home_of(parameter) is None
    assert torch.equal(parameter.grad, values(1) + values(2) + values(3))
