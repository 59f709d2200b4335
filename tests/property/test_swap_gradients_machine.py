"""Whatever user code does with gradients, swapped ones equal those of a twin in memory."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

from offload.swap.governor import Governor
from offload.swap.gradient_stream import GradientStream
from offload.swap.gradients import GradientSwapper
from offload.swap.torch_seams import lead, leave
from offload.tiers.filetier import FileTier, Lanes
from offload.tiers.journal import Journal

NUMEL = 20_000  # 80 kB: five pages beyond a multiple of nothing
WHICH = st.integers(0, 1)


def gradient(seed):
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(seed))


class GradientMachine(RuleBasedStateMachine):
    @initialize(limit=st.sampled_from([0, NUMEL * 4, 1 << 30]))
    def open(self, limit):
        self.folder = TemporaryDirectory(prefix="offload-gradients-")
        self.lanes = Lanes(Journal())
        self.scratch = FileTier(Path(self.folder.name), None, self.lanes)
        self.governor = Governor(1 << 40, 1 << 40)
        self.swapper = GradientSwapper(self.scratch, Journal(), self.governor, limit)
        self.stream = GradientStream(self.swapper, chunk_numel=4096, staging_nbytes=limit)
        lead(self.stream)
        self.swapped = [nn.Parameter(torch.zeros(NUMEL)) for _ in range(2)]
        self.plain = [nn.Parameter(torch.zeros(NUMEL)) for _ in range(2)]
        for index, parameter in enumerate(self.swapped):
            self.swapper.watch(f"p{index}", parameter)
        self.kept = []  # (what the user holds of a swapped gradient, the same of its twin)

    @rule(seed=st.integers(0, 99), both=st.booleans(), which=WHICH)
    def backward(self, seed, both, which):
        for parameters in (self.swapped, self.plain):
            used = parameters if both else [parameters[which]]
            sum((parameter * gradient(seed)).sum() for parameter in used).backward()

    @rule(which=WHICH, to_none=st.booleans())
    def zero(self, which, to_none):
        for parameters in (self.swapped, self.plain):
            if to_none:
                parameters[which].grad = None
            elif parameters[which].grad is not None:
                parameters[which].grad.zero_()

    @rule(factor=st.sampled_from([0.5, -2.0]), counted=st.booleans())
    def scale(self, factor, counted):
        for parameters in (self.swapped, self.plain):
            found = [parameter.grad for parameter in parameters if parameter.grad is not None]
            if found and counted:
                torch._foreach_mul_(found, factor)
            for gradient in () if counted else found:
                gradient.data.mul_(factor)  # tells no version counter

    @rule(seed=st.integers(0, 99), factor=st.sampled_from([0.5, -2.0]), drain=st.booleans())
    def backward_with_hook(self, seed, factor, drain):
        """The user's code changes a gradient inside backward, on its way or when it has left."""
        for parameters in (self.swapped, self.plain):

            def change(_parameter, other=parameters[1]):
                if drain:
                    self.swapper.drain()
                if other.grad is not None:
                    other.grad.data[100:200].mul_(factor)

            handle = parameters[0].register_post_accumulate_grad_hook(change)
            sum((one * gradient(seed)).sum() for one in parameters).backward()
            handle.remove()

    def both(self, call):
        results = [call(parameters) for parameters in (self.swapped, self.plain)]
        assert torch.equal(*results)

    @rule(most=st.sampled_from([1.0, 1e9]), foreach=st.sampled_from([None, False]))
    def clip(self, most, foreach):
        self.both(lambda parameters: nn.utils.clip_grad_norm_(parameters, most, foreach=foreach))

    @precondition(lambda self: any(parameter.grad is not None for parameter in self.plain))
    @rule(most=st.sampled_from([0.5, 1e9]))
    def clip_values(self, most):
        for parameters in (self.swapped, self.plain):
            nn.utils.clip_grad_value_(parameters, most)

    @rule(spoil=st.booleans())
    def unscale(self, spoil):
        def unscaled(parameters):
            if spoil and parameters[0].grad is not None:
                parameters[0].grad.data[7] = torch.inf
            scaler = torch.amp.GradScaler("cpu", init_scale=3.0)
            scaler.scale(torch.ones(()))
            optimizer = torch.optim.SGD(parameters)
            scaler.unscale_(optimizer)
            found = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
            if spoil and parameters[0].grad is not None:
                parameters[0].grad.data[7] = 1.0
            return torch.stack([*found.values(), torch.zeros(())])

        self.both(unscaled)

    @rule(which=WHICH, part=st.sampled_from([slice(None), slice(7, 90, 3)]))
    def keep(self, which, part):
        if self.plain[which].grad is not None and self.swapper.home_of(self.swapped[which]):
            mine, twin = self.swapped[which].grad, self.plain[which].grad
            self.kept.append((mine, twin) if part == slice(None) else (mine[part], twin[part]))

    @rule()
    def let_go(self):
        self.kept.clear()

    @rule(which=WHICH)
    def replace(self, which):
        for parameters in (self.swapped, self.plain):
            parameters[which].grad = gradient(1234)

    @rule(drain=st.booleans())
    def wait(self, drain):
        if drain:
            self.swapper.drain()
        else:
            self.swapper.poll()

    @rule()
    def shed(self):
        self.governor.shed()

    @invariant()
    def gradients_equal_their_twins(self):
        for mine, twin in zip(self.swapped, self.plain, strict=True):
            assert (mine.grad is None) == (twin.grad is None)
            assert twin.grad is None or torch.equal(mine.grad, twin.grad)
        for mine, twin in self.kept:
            assert torch.equal(mine, twin)

    @invariant()
    def room_is_held_by_someone(self):
        held = len(self.swapper.places)
        assert self.scratch.arena.stats().current_count == held

    def teardown(self):
        if hasattr(self, "swapper"):
            leave(self.stream)
            self.swapper.stop()
            self.swapper.materialise()
            self.gradients_equal_their_twins()
            self.governor.close()
            self.lanes.close()
            self.scratch.close()
            self.folder.cleanup()


TestGradients = GradientMachine.TestCase
TestGradients.settings = settings(max_examples=60, stateful_step_count=25)
