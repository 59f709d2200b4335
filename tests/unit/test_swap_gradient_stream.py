"""torch's clipping and unscaling of gradients in scratch: the same bits, and no byte too many."""

import math
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad, clip_grad_norm_, clip_grad_value_  # before anything is led

from offload.allocator.errors import TierIOError
from offload.swap import torch_seams
from offload.swap.governor import Governor
from offload.swap.gradient_stream import GradientStream
from offload.swap.gradients import GradientSwapper
from offload.swap.torch_seams import cell_of, lead, leave
from offload.tiers.events import ListRecorder, Move
from offload.tiers.filetier import FileTier, Lanes
from offload.tiers.journal import Journal

PLENTY = 1 << 40
PATIENCE_S = 60
CHUNK = 1 << 14
SHAPES = [(128, 160), (20_480,), (3, 7000), (5, 5), (70, 300)]  # the fourth stays in memory
NBYTES = 4 * sum(math.prod(shape) for shape in SHAPES if math.prod(shape) > 25)


@pytest.fixture
def journal():
    return Journal(ListRecorder())


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
def stream(swapper):
    stream = GradientStream(swapper, chunk_numel=CHUNK, staging_nbytes=4 * 4 * CHUNK)
    lead(stream)
    yield stream
    leave(stream)


def values(seed, shape, scale=1.0, dtype=torch.float32):
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return made.to(dtype)


class Twins:
    """Parameters whose gradients are in scratch, and the same ones in memory."""

    def __init__(self, swapper, dtypes=(torch.float32,) * 5, scale=1.0):
        self.swapper = swapper
        self.scale = scale
        self.filed, self.plain = (
            [nn.Parameter(torch.zeros(s, dtype=d)) for s, d in zip(SHAPES, dtypes, strict=True)]
            for _ in range(2)
        )
        for index, parameter in enumerate(self.filed):
            swapper.watch(f"p{index}", parameter)
        self.backward(0)

    def backward(self, seed, change=lambda gradient: gradient):
        for parameters in (self.filed, self.plain):
            losses = [
                (one * change(values(seed + at, one.shape, self.scale, one.dtype))).sum()
                for at, one in enumerate(parameters)
            ]
            torch.autograd.backward(losses, [torch.ones_like(loss) for loss in losses])
        self.swapper.drain()

    def both(self, call):
        """What ``call`` says of either list, gradients being the same before and after."""
        self.assert_equal()
        outcomes = []
        for parameters in (self.filed, self.plain):
            try:
                outcomes.append(call(parameters))
            except RuntimeError as error:
                outcomes.append(str(error))
        self.assert_equal()
        mine, twin = outcomes
        if isinstance(twin, torch.Tensor):
            assert same_bits(mine, twin)
        else:
            assert mine == twin
        return twin

    def assert_equal(self):
        for mine, twin in zip(self.filed, self.plain, strict=True):
            assert (mine.grad is None) == (twin.grad is None)
            assert twin.grad is None or same_bits(mine.grad, twin.grad)
            if (home := self.swapper.home_of(mine)) is not None:
                home.shed()
                assert same_bits(mine.grad, twin.grad)


@pytest.fixture
def twins(swapper, stream):
    return Twins(swapper)


def same_bits(mine, twin):
    if mine.dtype != twin.dtype or mine.shape != twin.shape:
        return False
    as_bytes = [one.detach().clone().reshape(-1).view(torch.uint8) for one in (mine, twin)]
    return torch.equal(*as_bytes)


def moved(journal, call):
    """Bytes of gradients that ``call`` read and wrote."""
    events = journal.recorder.events
    before = len(events)
    call()
    moves = [event for event in events[before:] if isinstance(event, Move)]
    assert {move.role for move in moves} <= {"gradient"}
    read = sum(move.nbytes for move in moves if move.dst == "host")
    return read, sum(move.nbytes for move in moves if move.src == "host")


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("norm_type", [2.0, math.inf, 1, 3.5, 0.5, 0, -math.inf])
@pytest.mark.parametrize("max_norm", [0.01, 1e9, math.inf])
def test_clipping_by_norm(twins, foreach, norm_type, max_norm):
    norm = twins.both(lambda ps: clip_grad_norm_(ps, max_norm, norm_type, foreach=foreach))
    assert norm.isfinite()


@pytest.mark.parametrize("foreach", [None, False])
def test_clipping_by_value(twins, foreach):
    twins.both(lambda ps: clip_grad_value_(ps, 0.3, foreach=foreach))
    assert twins.filed[0].grad.max() == torch.tensor(0.3)


def test_norms_and_scaling_in_calls_of_their_own(twins):
    def call(parameters):
        norm = nn.utils.get_total_norm([one.grad for one in parameters])
        nn.utils.clip_grads_with_norm_(parameters, 0.5, norm)
        return norm

    twins.both(call)


@pytest.mark.parametrize("spoilt", [math.nan, math.inf])
@pytest.mark.parametrize("norm_type", [2.0, math.inf, 0])
@pytest.mark.parametrize("error", [True, False])
def test_gradients_that_are_not_finite(swapper, stream, spoilt, norm_type, error):
    twins = Twins(swapper)

    def spoil(gradient):
        gradient.view(-1)[-1] = spoilt
        return gradient

    twins.backward(7, spoil)
    twins.both(lambda ps: clip_grad_norm_(ps, 1.0, norm_type, error_if_nonfinite=error))
    twins.both(lambda ps: clip_grad_norm_(ps, 1e9, norm_type))  # a factor of one
    twins.both(lambda ps: clip_grad_value_(ps, 0.5))


def test_gradients_of_several_types_and_smallest_numbers(swapper, stream):
    bf16, f64 = torch.bfloat16, torch.float64
    dtypes = (bf16, torch.float32, f64, bf16, torch.complex64)
    for scale in (1.0, 1e-41):
        twins = Twins(swapper, dtypes, scale)
        for max_norm in (1e9, 0.3):
            twins.both(lambda ps, most=max_norm: clip_grad_norm_(ps, most))


def test_a_part_of_the_gradients_in_any_order_and_twice(twins):
    twins.filed[2].grad = twins.plain[2].grad = None
    twins.filed[1].grad = values(3, SHAPES[1])
    twins.plain[1].grad = values(3, SHAPES[1])
    picked = [4, 0, 3, 1, 0, 2]
    twins.both(lambda ps: clip_grad_norm_([ps[at] for at in picked], 0.7))
    twins.both(lambda ps: clip_grad_norm_((ps[at] for at in picked), 0.6))
    twins.both(lambda ps: clip_grad_value_(ps[0], 0.01))
    twins.both(lambda ps: clip_grad_norm_(ps[4], 0.001))
    twins.both(lambda ps: clip_grad_norm_(ps[2], 0.001))  # there is none


def test_accumulated_gradients(twins):
    twins.both(lambda ps: clip_grad_norm_(ps, 0.5))
    twins.backward(20)
    twins.both(lambda ps: clip_grad_norm_(ps, 0.5))
    for parameters in (twins.filed, twins.plain):
        for one in parameters:
            one.grad.zero_()
    twins.backward(30)
    twins.both(lambda ps: clip_grad_norm_(ps, 0.5))


@pytest.mark.parametrize(
    "change",
    [
        lambda gradient: gradient.mul_(3),
        lambda gradient: gradient.data.mul_(3),
        lambda gradient: np.multiply(gradient.numpy(), 3, out=gradient.numpy()),
    ],
    ids=["in place", "data", "numpy"],
)
def test_what_the_user_wrote_is_measured_and_clipped(twins, change):
    twins.both(lambda ps: clip_grad_norm_(ps, 1e9))
    for parameters in (twins.filed, twins.plain):
        change(parameters[0].grad)
    twins.both(lambda ps: clip_grad_norm_(ps, 0.5))


def test_views_that_the_user_holds_see_the_change(twins):
    held = [[one.grad[1:], one.grad.numpy(), one.grad.detach()] for one in twins.filed[:2]]
    version = twins.filed[0].grad._version
    clip_grad_norm_(twins.filed, 0.5)
    assert twins.filed[0].grad._version > version
    for one, (part, array, whole) in zip(twins.filed, held, strict=False):
        assert torch.equal(one.grad[1:], part)
        assert torch.equal(one.grad, torch.from_numpy(array))
        assert torch.equal(one.grad, whole)


@pytest.mark.parametrize("fused", [False, True])
def test_unscaling_skipped_steps_and_growth(swapper, stream, fused):
    twins = Twins(swapper)
    rows = []
    for parameters in (twins.filed, twins.plain):
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
        optimizer = torch.optim.SGD(parameters, 0.1, fused=fused)
        row = []
        for step in range(7):
            optimizer.zero_grad()
            scaler.scale(
                sum(
                    (one * values(step + at, one.shape)).sum() * (math.inf if step == 3 else 1)
                    for at, one in enumerate(parameters)
                )
            ).backward()
            swapper.drain()
            if step % 2:
                scaler.unscale_(optimizer)
                row.append(clip_grad_norm_(parameters, 1.0).item())
            scaler.step(optimizer)
            scaler.update()
            row += [scaler.get_scale(), *(one.grad.abs().sum().item() for one in parameters)]
        rows.append(row)
    assert np.array_equal(*rows, equal_nan=True)
    assert 128.0 in rows[0]
    twins.assert_equal()
    for mine, twin in zip(twins.filed, twins.plain, strict=True):
        assert torch.equal(mine, twin)


def test_what_moves(twins, journal):
    norm = moved(journal, lambda: clip_grad_norm_(twins.filed, 1e9))
    assert norm == (NBYTES, 0)  # a factor of one changes no bit
    assert moved(journal, lambda: clip_grad_norm_(twins.filed, 0.5)) == (2 * NBYTES, NBYTES)
    assert moved(journal, lambda: clip_grad_value_(twins.filed, 0.1)) == (NBYTES, NBYTES)
    assert moved(journal, lambda: nn.utils.get_total_norm(twins.filed[1].grad)) == (81_920, 0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    optimizer = torch.optim.SGD(twins.filed)
    assert moved(journal, lambda: scaler.unscale_(optimizer)) == (NBYTES, NBYTES)


def test_a_gradient_on_its_way_is_clipped_in_memory(twins, swapper, scratch, monkeypatch):
    may_end = threading.Event()
    whole = scratch.file.write

    def write(*args):
        assert may_end.wait(PATIENCE_S)
        whole(*args)

    monkeypatch.setattr(scratch.file, "write", write)
    for parameters in (twins.filed, twins.plain):
        parameters[0].grad = None
        (parameters[0] * values(5, SHAPES[0])).sum().backward()
    assert swapper._leaving
    norms = [clip_grad_norm_(ps[:1], 0.5) for ps in (twins.filed, twins.plain)]
    may_end.set()
    swapper.drain()
    assert same_bits(*norms)
    assert swapper.home_of(twins.filed[0]) is not None
    twins.assert_equal()


def test_room_is_asked_for_and_the_limit_kept(swapper, governor):
    twins = Twins(swapper)
    asked = []
    stream = GradientStream(swapper, chunk_numel=CHUNK, staging_nbytes=1, make_room=asked.append)
    lead(stream)
    governor.limit_nbytes = 0
    taken = []
    whole = stream.staging.take

    def take(nbytes):
        taken.append(len(stream._reading) + len(stream._writing))
        return whole(nbytes)

    stream.staging.take = take
    try:
        twins.both(lambda ps: clip_grad_norm_(ps, 0.5))
    finally:
        leave(stream)
    assert asked
    assert set(taken) == {0}  # one at a time
    assert stream.staging.free_nbytes == stream.staging.landing_nbytes == 0


@pytest.mark.parametrize("fast", ["reads", "writes"])
def test_a_disk_that_is_done_at_once(twins, scratch, monkeypatch, fast):
    lane = getattr(scratch.lanes, fast)
    whole = lane.submit

    def submit(*args, **options):
        transfer = whole(*args, **options)
        transfer.settle()
        return transfer

    monkeypatch.setattr(lane, "submit", submit)
    twins.both(lambda ps: clip_grad_norm_(ps, 0.5))


@pytest.mark.parametrize("direction", ["read", "write"])
def test_a_failing_disk_is_told_and_what_was_not_reached_stays(
    twins, scratch, monkeypatch, direction, stream
):
    def refuse(*_args):
        raise TierIOError(5, "the disk is broken")

    with monkeypatch.context() as patch:
        patch.setattr(scratch.file, direction, refuse)
        with pytest.raises(TierIOError, match="broken"):
            clip_grad_norm_(twins.filed, 0.5)
    assert stream.staging.free_nbytes == stream.staging.landing_nbytes == 0
    twins.assert_equal() if direction == "read" else None
    nn.utils.clip_grad_norm_(twins.filed, 0.4)  # goes on


def test_a_call_that_fails_half_way_has_done_what_came_before(twins, monkeypatch):
    def refuse(*_args):
        raise ArithmeticError("no")

    monkeypatch.setattr(torch, "_foreach_clamp_max_", refuse)
    for parameters in (twins.filed, twins.plain):
        with pytest.raises(ArithmeticError):
            clip_grad_value_(parameters, 0.25)
    twins.assert_equal()
    assert twins.filed[0].grad.min() == -0.25
    monkeypatch.undo()
    twins.both(lambda ps: clip_grad_norm_(ps, 0.5))


def test_calls_inside_backward(swapper, stream):
    """Each gradient is clipped by itself as it comes."""
    twins = Twins(swapper)

    def hook(one):
        clip_grad_norm_(one, 0.1)

    for _ in range(3):
        for parameters in (twins.filed, twins.plain):
            handles = [one.register_post_accumulate_grad_hook(hook) for one in parameters]
            sum((one * values(1, one.shape)).sum() for one in parameters).backward()
            for handle in handles:
                handle.remove()
        twins.both(lambda ps: clip_grad_norm_(ps, 0.2))


def test_torch_is_as_it_was(swapper):
    cells = [cell_of(getattr(clip_grad, name)) for name in torch_seams._FUNCTIONS]
    assert all(cells)
    before = [cell.cell_contents for cell in cells]
    unscale = torch.amp.GradScaler._unscale_grads_
    streams = [GradientStream(swapper, chunk_numel=64, staging_nbytes=0) for _ in range(2)]
    for one in streams:
        lead(one)
    assert not {cell.cell_contents for cell in cells} & set(before)
    leave(streams[0])
    assert torch.amp.GradScaler._unscale_grads_ is not unscale
    leave(streams[1])
    leave(streams[1])
    assert [cell.cell_contents for cell in cells] == before
    assert torch.amp.GradScaler._unscale_grads_ is unscale


def test_a_function_that_torch_makes_otherwise_stays_as_it_is():
    assert cell_of(None) is None
    assert cell_of(math.sqrt) is None
    assert cell_of(SimpleNamespace(__wrapped__=math.sqrt, __closure__=())) is None


def test_two_engines_and_gradients_of_nobody(tmp_path, journal, governor, stream, twins):
    lanes = Lanes(journal)
    with FileTier(tmp_path, None, lanes) as scratch:
        other = GradientSwapper(scratch, journal, governor, PLENTY)
        second = GradientStream(other, chunk_numel=CHUNK, staging_nbytes=1 << 20)
        lead(second)
        more = Twins(other)
        lone = [nn.Parameter(torch.zeros(9)) for _ in range(2)]
        for one in lone:
            one.grad = values(9, (9,))
        norms = [
            clip_grad_norm_([*mine, alone, *others], 0.5)
            for mine, alone, others in (
                (twins.filed, lone[0], more.filed),
                (twins.plain, lone[1], more.plain),
            )
        ]
        assert same_bits(*norms)
        assert torch.equal(lone[0].grad, lone[1].grad)
        twins.assert_equal()
        more.assert_equal()
        leave(second)
        other.stop()
        other.materialise()
        lanes.close()


def test_another_engine_that_has_failed_does_not_stop_this_one(
    tmp_path, journal, governor, stream, twins, monkeypatch
):
    """It raises where it goes on by itself."""
    lanes = Lanes(journal)
    with FileTier(tmp_path, None, lanes) as scratch:
        other = GradientSwapper(scratch, journal, governor, PLENTY)
        second = GradientStream(other, chunk_numel=CHUNK, staging_nbytes=1 << 20)
        lead(second)
        broken = nn.Parameter(torch.zeros(128, 160))
        other.watch("broken", broken)
        is_behind = threading.Event()

        def refuse(*_args):
            assert is_behind.wait(PATIENCE_S)
            raise TierIOError(5, "the disk is broken")

        monkeypatch.setattr(scratch.file, "write", refuse)
        (broken * values(1, (128, 160))).sum().backward()
        is_behind.set()
        lanes.writes.settle()
        twins.both(lambda ps: clip_grad_norm_(ps, 0.5))
        twins.assert_equal()
        with pytest.raises(TierIOError, match="broken"):
            other.drain()
        leave(second)
        other.stop()
        lanes.close()
