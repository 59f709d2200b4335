"""Batches of like size share a bucket, and what is known of one bounds what others need."""

from collections import UserDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload.swap.buckets import (
    Form,
    Taken,
    fitting_form,
    form_of,
    least_nbytes,
    most_nbytes,
    round_up,
)

SIZES = st.integers(1, 1 << 20)
MIB = 1 << 20


@given(size=st.integers(0, 1 << 40))
def test_a_bucket_is_at_most_an_eighth_wider_than_what_is_in_it(size):
    rounded = round_up(size)
    assert size <= rounded
    assert 8 * rounded <= 9 * size or size <= 16
    assert round_up(rounded) == rounded
    if size <= 16 or size & (size - 1) == 0:
        assert rounded == size


def test_an_octave_has_eight_buckets():
    assert len({round_up(size) for size in range(65, 4097)}) == 48


@given(size=SIZES, more=SIZES)
def test_rounding_keeps_the_order(size, more):
    assert round_up(size) <= round_up(size + more)


def batch(count, length, *, trains=True):
    return Form(shapes=((count, length),) * 2, itemsizes=(8, 8), trains=trains)


def test_a_form_is_that_of_the_tensors_wherever_they_are():
    tokens, mask = torch.zeros(2, 70, dtype=torch.int64), torch.zeros(2, 70, dtype=torch.bool)
    inputs = ((), {"batch": UserDict(tokens=tokens, rest=[(mask, "text")]), "limit": 3})
    form = form_of(inputs, trains=True)
    assert form == Form(shapes=((2, 70), (2, 70)), itemsizes=(8, 1))
    assert form.nbytes == 2 * 70 * 9
    assert str(form) == "2x70"
    assert form.rounded().shapes == ((2, 72), (2, 72))
    assert str(form_of(inputs, trains=False)) == "2x70 without backward"
    assert str(form_of("text", trains=True)) == "unknown"
    rows = [torch.zeros(3, 4), torch.zeros(5, 4)]
    ragged = torch.nested.nested_tensor(rows, layout=torch.jagged)
    assert form_of(ragged, trains=True).shapes == ((8, 4),)


def test_what_covers_another_has_no_smaller_size_and_saves_no_less():
    assert batch(2, 64).covers(batch(2, 64))
    assert batch(2, 64).covers(batch(1, 64))
    assert not batch(8, 512).covers(batch(1, 4096))
    assert batch(2, 64).covers(batch(2, 64, trains=False))
    assert not batch(2, 64, trains=False).covers(batch(2, 64))
    assert not batch(2, 64).covers(Form(shapes=((2, 64),), itemsizes=(8,)))
    assert not Form(shapes=((2, 64),), itemsizes=(8,)).covers(Form(shapes=((2,),), itemsizes=(8,)))


@st.composite
def models(draw):
    """A model of what batches need, and two of them; the second is larger in no size or in some."""
    fixed, linear, square = draw(st.integers(0, 100)), draw(SIZES), draw(st.integers(0, 1000))
    first, second = (batch(draw(st.integers(1, 16)), draw(st.integers(1, 4096))) for _ in range(2))

    def need(form):
        count, length = form.shapes[0]
        return fixed * MIB + count * length * (linear + square * length)

    return fixed * MIB, need, first, second


@given(model=models())
def test_the_bounds_hold(model):
    fixed, need, known, form = model
    taken = Taken(form=known, nbytes=need(known), least_nbytes=need(known))
    # Floats: their last bits.
    assert most_nbytes(taken, form, fixed) + 1 >= need(form) * (1 - 1e-9)


@given(model=models(), count=st.integers(1, 16), length=st.integers(1, 4096))
def test_from_two_batches_the_least_of_a_third_follows(model, count, length):
    _, need, smaller, taken = model
    taken = taken.joined(smaller)
    if 2 * smaller.nbytes > taken.nbytes:
        taken = taken.joined(batch(2 * smaller.shapes[0][0], 1))
    form = taken.joined(batch(count, length))
    known = [Taken(form=one, nbytes=need(one), least_nbytes=need(one)) for one in (smaller, taken)]
    assert need(taken) <= least_nbytes(*known, form) <= need(form)


@given(model=models(), share=st.floats(0, 1))
def test_the_shape_that_an_error_names_fits(model, share):
    fixed, need, known, form = model
    form = form.joined(known)
    taken = Taken(form=known, nbytes=need(known), least_nbytes=need(known))
    budget = need(known) + int(share * (most_nbytes(taken, form, fixed) - need(known)))
    fitting = fitting_form(taken, form, fixed, budget)
    assert form.covers(fitting)
    assert need(fitting) <= (budget + 1) * (1 + 1e-9)
    if share == 1:
        assert fitting == form


def test_what_is_known_of_a_bucket_is_that_of_all_its_passes():
    one = Taken(form=batch(2, 70), nbytes=5, least_nbytes=4)
    other = Taken(form=batch(2, 72), nbytes=3, least_nbytes=2, is_exact=True)
    both = Taken(form=batch(2, 72), nbytes=5, least_nbytes=2, passes=2, is_exact=True)
    assert one.joined(other) == both
    with pytest.raises(AttributeError):
        one.nbytes = 1
