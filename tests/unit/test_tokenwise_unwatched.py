"""What is done to saved tensors is seen by no mode of the user's, and by the device alone."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from offload.swap.tokenwise.unwatched import unwatched
from offload.tiers.cpudevice import CpuAccelerator
from offload.tiers.simulated.deferred import Deferred


class Watching(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_nothing_of_what_happens_inside():
    with Watching() as mode:
        with unwatched():
            torch.ones(2).exp()
        torch.ones(2).sin()
    assert mode.seen == ["ones", "sin"]


def test_the_device_still_computes():
    device = CpuAccelerator()
    with Deferred(device), Watching() as mode:
        with unwatched():
            made = torch.ones(2).exp()
        seen = list(mode.seen)
        torch.ones(2).sin()
    assert seen == []
    assert mode.seen == ["ones", "sin"]
    assert device.owns(made)


def test_modes_are_back_after_an_error():
    device = CpuAccelerator()
    with Deferred(device), Watching() as mode:
        try:
            with unwatched():
                raise ValueError
        except ValueError:
            pass
        torch.ones(2)
    assert mode.seen == ["ones"]
