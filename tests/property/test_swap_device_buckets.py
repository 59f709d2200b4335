"""A device's plans by buckets: whatever lengths come, the budget holds, short ones keep more."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.swap.buckets import Form
from offload.swap.census import Census, ModuleInfo, WeightInfo
from offload.swap.device_buckets import DeviceBuckets
from offload.swap.device_plan import DevicePlan, make_device_plan

MIB = 1 << 20
FIXED = 16 * MIB


def census(count=24, nbytes=4 * MIB):
    weights = tuple(WeightInfo(name=f"w{i}", nbytes=nbytes, trainable=True) for i in range(count))
    modules = tuple(ModuleInfo(name=f"m{i}", weights=(f"w{i}",)) for i in range(count))
    return Census(weights=weights, modules=modules)


def batch(count, length, *, trains=True):
    return Form(shapes=((count, length),), itemsizes=(8,), trains=trains)


class World:
    """A device whose kernels take what a model of batches says; the plan allows the rest.

    Args:
        linear, square: bytes for a token, and for a token and each that it looks at.
        saved: bytes that backward needs of a token, kept on the device as far as the plan reaches.
    """

    def __init__(self, budget_nbytes, linear, square, saved=0):
        self.linear, self.square, self.saved = linear, square, saved
        self.census = census()
        self.first = make_device_plan(
            self.census, budget_nbytes=budget_nbytes, fixed_nbytes=FIXED, device="device:0"
        )
        self.buckets = DeviceBuckets(self.first, self.census)
        self.peak_nbytes = 0
        self.steps = 0

    def takes(self, plan: DevicePlan, form: Form) -> int:
        count, length = form.shapes[0]
        tokens = count * length
        held = min(plan.window_nbytes, self.census.weight_nbytes) + plan.gradients_nbytes
        held += min(plan.activations_nbytes, self.saved * tokens) if form.trains else 0
        return FIXED + held + tokens * (self.linear + self.square * length)

    def step(self, *forms):
        """The plan of each pass, and what it takes."""
        found = []
        for form in forms:
            plan = self.buckets.plan_for(form)
            found.append((plan, self.takes(plan, form)))
            self.peak_nbytes = max(self.peak_nbytes, found[-1][1])
        self.buckets.tell(self.peak_nbytes)
        return found


FORMS = st.builds(
    batch, st.integers(1, 8), st.integers(16, 2048), trains=st.sampled_from([True, True, False])
)
STEPS = st.lists(st.lists(FORMS, min_size=1, max_size=3), min_size=1, max_size=14)


@given(
    steps=STEPS,
    spare=st.integers(0, 600),
    linear=st.integers(0, 20_000),
    square=st.integers(0, 20),
    saved=st.integers(0, 20_000),
)
def test_whatever_lengths_come_the_budget_holds(steps, spare, linear, square, saved):
    world = World((40 + spare) * MIB, linear, square, saved)
    budget = world.first.budget_nbytes
    for forms in steps:
        # What fits no plan is torch's own error; the run is over, or its batch is left out.
        fitting = [form for form in forms if world.takes(world.first, form) <= budget]
        for plan, taken in world.step(*fitting):
            assert taken <= budget
            assert plan.window_nbytes >= world.first.window_nbytes
            assert plan.activations_nbytes >= world.first.activations_nbytes


def grown(world, form, steps=6):
    for _ in range(steps):
        ((plan, _),) = world.step(form)
    return plan


def test_a_longer_batch_has_room_before_it_was_ever_seen_and_the_short_one_has_its_own_again():
    world = World(192 * MIB, linear=40_000, square=0)
    short, long = batch(1, 256), batch(1, 2048)
    kept = grown(world, short)
    assert world.takes(kept, long) > 192 * MIB  # with what the short one left it would not fit
    ((plan, taken),) = world.step(long)
    assert world.first.window_nbytes <= plan.window_nbytes < kept.window_nbytes
    assert taken <= 192 * MIB
    assert grown(world, short, 1) == kept
    between = world.buckets.plan_for(batch(1, 1024))  # covered: it fits what the long one has
    assert between.window_nbytes >= plan.window_nbytes
    assert world.takes(between, batch(1, 1024)) <= 192 * MIB


def test_a_slightly_longer_batch_keeps_most_of_what_there_is():
    world = World(512 * MIB, linear=20_000, square=0)
    grown(world, batch(1, 1024))
    plan = world.buckets.plan_for(batch(1, 1100))
    assert plan.window_nbytes > 2 * world.first.window_nbytes


def test_each_bucket_grows_for_a_few_steps_and_then_stays():
    world = World(100 * MIB, linear=40_000, square=0)
    windows = [world.step(batch(1, 256))[0][0].window_nbytes for _ in range(8)]
    assert windows[0] == world.first.window_nbytes
    assert windows[:5] == sorted(set(windows[:5]))
    assert len(set(windows[4:])) == 1


def test_a_pass_without_gradients_promises_nothing_of_one_with_them():
    world = World(192 * MIB, linear=10_000, square=0, saved=30_000)
    grown(world, batch(1, 1024, trains=False))
    ((plan, taken),) = world.step(batch(1, 1024))
    assert plan == world.first
    assert taken <= 192 * MIB


def test_a_step_without_a_pass_changes_nothing():
    world = World(192 * MIB, linear=1, square=0)
    assert world.buckets.tell(10 * MIB) is None
    assert world.buckets.plan_for(batch(1, 16)) == world.first


@pytest.mark.parametrize("length", [1030, 1150])
def test_the_largest_of_a_bucket_counts(length):
    """Of one bucket are up to an eighth: a larger one of it is measured anew."""
    world = World(192 * MIB, linear=90_000, square=0)
    smaller, larger = batch(1, 1026), batch(1, length)
    kept = grown(world, smaller)
    ((plan, taken),) = world.step(larger)
    assert smaller.rounded() == larger.rounded()
    assert plan.window_nbytes < kept.window_nbytes
    assert taken <= 192 * MIB
