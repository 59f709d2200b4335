"""Any program that keeps to the tiers' own methods comes out the same, however late its work is."""

from contextlib import ExitStack, nullcontext
from functools import partial

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.tiers.device import DeviceTier
from offload.tiers.pinned import PinnedTier, SizeClass
from offload.tiers.simulated.accelerator import SimulatedAccelerator
from offload.tiers.testing import find_race

NBYTES, SHAPE = 512, (128,)
COUNT = 3  # blocks, and buffers
indices = st.integers(0, COUNT - 1)
steps = st.one_of(
    st.tuples(st.just("kernel"), indices, st.integers(1, 9), st.sampled_from(["compute", "side"])),
    st.tuples(st.just("combine"), indices, indices),
    st.tuples(st.just("used"), indices),
    st.tuples(st.just("fetch"), indices, indices),
    st.tuples(st.just("evict"), indices, indices),
    st.tuples(st.just("renew"), indices, st.integers(1, 9)),
    st.tuples(st.just("refill"), indices, st.integers(1, 9)),
    st.tuples(st.just("host"), indices),
    st.tuples(st.just("next_step")),
)


class Program:
    """Runs steps on a device; each is what a swapper may do at any time."""

    def __init__(self, device, tier, pool):
        self.device, self.tier, self.pool = device, tier, pool
        self.blocks = [self.filled(index + 1) for index in range(COUNT)]
        self.buffers = [pool.allocate(NBYTES) for _ in range(COUNT)]
        for index in range(COUNT):
            self.host_view(index).fill_(10 * index)

    def filled(self, value):
        block = self.tier.allocate(NBYTES)
        self.device.launch(partial(self.view(block).fill_, value))
        return block

    def view(self, block, **options):
        return self.tier.tensor(block, torch.int32, SHAPE, **options)

    def host_view(self, index):
        return self.pool.tensor(self.buffers[index], torch.int32, SHAPE)

    def kernel(self, index, value, stream):
        simulated = isinstance(self.device, SimulatedAccelerator)
        with self.device.use_stream(stream) if simulated else nullcontext():
            values = self.view(self.blocks[index])
            self.device.launch(partial(values.mul_, 3))
            self.device.launch(partial(values.add_, value))

    def combine(self, target, source):
        into = self.view(self.blocks[target])
        self.device.launch(partial(into.add_, self.view(self.blocks[source], read_only=True)))

    def used(self, index):
        self.tier.used(self.blocks[index])

    def fetch(self, index, buffer):
        self.tier.fetch(self.blocks[index], self.buffers[buffer])

    def evict(self, index, buffer):
        self.tier.evict(self.blocks[index], self.buffers[buffer])

    def renew(self, index, value):
        self.blocks[index].release()
        self.blocks[index] = self.filled(value)

    def refill(self, index, value):
        self.buffers[index].release()
        self.buffers[index] = self.pool.allocate(NBYTES)
        self.host_view(index).fill_(value)

    def next_step(self):
        self.tier.next_step()

    def host(self, index):
        self.host_view(index).add_(1)

    def outcome(self):
        views = [self.view(block) for block in self.blocks]
        self.device.synchronize()
        return [*(view.clone() for view in views), *(self.host_view(i).clone() for i in range(3))]


def run(device, program):
    with ExitStack() as stack:
        classes = [SizeClass(nbytes=NBYTES, count=COUNT)]
        pool = stack.enter_context(PinnedTier(classes=classes, checked=True))
        tier = stack.enter_context(DeviceTier(device, COUNT * NBYTES))
        state = Program(device, tier, pool)
        for name, *arguments in program:
            getattr(state, name)(*arguments)
        return state.outcome()


@given(st.lists(steps, max_size=25), st.integers(0, 1 << 30))
@settings(max_examples=150)
def test_every_program_comes_out_as_on_a_device_that_blocks(program, seed):
    race = find_race(partial(run, program=program), seeds=range(seed, seed + 4))
    assert race is None, race
