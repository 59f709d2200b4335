"""How clipping streams: no byte too many, errors of the disk, and torch as it was."""

import math
import threading
from types import SimpleNamespace

import pytest
import torch
from gradients_in_scratch import (
    CHUNK,
    NBYTES,
    PATIENCE_S,
    PLENTY,
    SHAPES,
    Twins,
    moved,
    same_bits,
    values,
)
from torch import nn
from torch.nn.utils import clip_grad, clip_grad_norm_, clip_grad_value_  # before anything is led

from offload.allocator.errors import TierIOError
from offload.swap import torch_seams
from offload.swap.gradient_stream import GradientStream
from offload.swap.gradients import GradientSwapper
from offload.swap.torch_seams import cell_of, lead, leave
from offload.tiers.filetier import FileTier, Lanes


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


def test_unscaling_by_one_changes_a_nan_as_torch_does(twins, journal):
    for parameters in (twins.filed, twins.plain):
        parameters[1].grad.view(torch.int32)[-1] = 0x7F800001  # any product makes it quiet
    scalers = [torch.amp.GradScaler("cpu", init_scale=1.0) for _ in range(2)]
    for scaler, parameters in zip(scalers, (twins.filed, twins.plain), strict=True):
        scaler.scale(torch.ones(()))
        optimizer = torch.optim.SGD(parameters)
        read, written = moved(journal, lambda o=optimizer, s=scaler: s.unscale_(o))
        if parameters is twins.filed:
            assert 0 < written < read  # only where there may be one
    twins.assert_equal()


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
