"""What the adapted test files import of their peers: their names and signatures on our context.

It is a pytest plugin of the process that runs them, too: everything that our contexts let go of in
a test goes to a file at once, be it one number, and each test tells how many bytes did.
"""

import contextlib
import os
import sys
import tempfile
from dataclasses import dataclass

import pytest
import torch

from offload import ActivationSwap
from offload.swap import activations
from offload.swap.residency import Residency
from offload.swap.saved import View

assert activations.LEAST_NBYTES > 1
activations.LEAST_NBYTES = 1  # peers' tensors are tiny: with 512 none would ever leave

_swaps = []


def new_swap(**settings):
    """A context in which all that is saved leaves for a file; closed when the test ends."""
    given = {"limit": 0, "min_nbytes": 0, "in_flight": 0, "nvme": tempfile.gettempdir()}
    _swaps.append(ActivationSwap(**(given | settings)))
    return _swaps[-1]


def _do_nothing_hooks():
    return torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda tensor: tensor)


# What each test runs inside of: nothing, PyTorch's own hooks that change nothing, or our context.
AROUND = {"nothing": contextlib.nullcontext, "hooks": _do_nothing_hooks, "swap": new_swap}


@pytest.fixture(autouse=True)
def _count_moved_bytes(record_property):
    with AROUND[os.environ.get("OFFLOAD_PEER_AROUND", "nothing")]():
        yield
    swaps = [_swaps.pop() for _ in range(len(_swaps))]
    record_property("moved_nbytes", sum(swap.journal.totals.written_nbytes for swap in swaps))
    for swap in swaps:
        swap.close()


# torchtune.


def gpu_test(gpu_count):
    assert gpu_count == 1
    return lambda test: test


class OffloadActivations(contextlib.ExitStack):
    def __init__(self, use_streams):
        super().__init__()
        self.swap = new_swap(in_flight="1MiB" if use_streams else 0)

    def __enter__(self):
        self.enter_context(self.swap)
        return self


# PyTorch: our cache stands between autograd and the hooks of the test.


def save_on_cpu(pin_memory=False):
    assert pin_memory in {False, True}
    return new_swap()


class SavedTensorsHooks(torch.autograd.graph.saved_tensors_hooks):
    def __init__(self, pack_hook, unpack_hook):
        self.cache = cache = new_swap().cache

        def pack(tensor):
            return cache.pack(pack_hook(tensor))

        def unpack(saved):
            return unpack_hook(cache.unpack(saved))

        super().__init__(pack, unpack)

    def __enter__(self):
        self.cache.begin_pass("peer")
        super().__enter__()


# DeepSpeed.


class _Accelerator:
    """The CPU as the peer's tests ask for a device that has streams."""

    def is_available(self):
        return True

    def is_synchronized_device(self):
        return False

    def device_name(self):
        return "cpu"


def get_accelerator():
    return _Accelerator()


@dataclass
class Stats:
    saved_tensors_seen: int = 0
    marked_tensors: int = 0
    skipped_marked_tensors: int = 0
    offloaded_tensors: int = 0
    restored_tensors: int = 0
    kept_last_tensors: int = 0


class CheckpointHiddenStatesOffload:
    """Hands tensors that were marked to our cache; the last of them stay by its limit.

    A tensor counts once, as left and restored or as kept, when backward first asks for it.
    """

    def __init__(
        self,
        use_pin_memory=True,
        use_streams=True,
        min_offload_bytes=1024,
        max_fwd_stash_count=2,
        keep_last_count=1,
    ):
        if keep_last_count < 0:
            raise ValueError(f"keep_last_count is {keep_last_count}")
        self.stats = Stats()
        self.cache = new_swap(min_nbytes=min_offload_bytes).cache
        self.keep_last_count = keep_last_count
        self.handles = []
        self._seen = set()
        self._marks = []
        self._entered = contextlib.ExitStack()

    def mark(self, tensor):
        self.stats.marked_tensors += 1
        self._marks.append(tensor)

    def __enter__(self):
        self.cache.begin_pass("peer")
        self.handles = []
        self._seen = set()
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_marking(self))
            stack.enter_context(hooks)
            self._entered = stack.pop_all()
        return self

    def __exit__(self, *error):
        self._entered.close()

    def _pack(self, tensor):
        self.stats.saved_tensors_seen += 1
        if all(tensor is not marked for marked in self._marks):
            return tensor
        self._marks = [marked for marked in self._marks if marked is not tensor]
        self.cache.limit_nbytes = self.keep_last_count * tensor.untyped_storage().nbytes()
        handle = self.cache.pack(tensor)
        self.handles.append(handle)
        return handle

    def _unpack(self, saved):
        if not isinstance(saved, View):
            return saved
        if id(saved) not in self._seen:
            self._seen.add(id(saved))
            if saved.part.unit.block is not None:
                self.stats.offloaded_tensors += 1
                self.stats.restored_tensors += 1
            else:
                self.stats.kept_last_tensors += 1
        return self.cache.unpack(saved)

    # What its tests look at of the peer's own books, read off ours: numbered from 1, as there.

    @property
    def _next_id(self):
        return len(self.handles)

    def _by_residency(self, *wanted):
        return {
            number: handle
            for number, handle in enumerate(self.handles, 1)
            if handle.part.unit.residency in wanted
        }

    @property
    def _keep_last(self):
        return {key: each.tensor for key, each in self._by_residency(Residency.READY).items()}

    @property
    def _tracker(self):
        return {key: (each,) for key, each in self._by_residency(Residency.ABSENT).items()}

    @property
    def _fwd_stash(self):
        return self._by_residency(Residency.WRITING, Residency.FETCHING)


def get_checkpoint_hidden_states_offloading_ctx_manager(**settings):
    return CheckpointHiddenStatesOffload(**settings)


_managers = []


@contextlib.contextmanager
def _marking(manager):
    """The innermost manager marks the input of every checkpointed layer of transformers."""
    if "transformers" not in sys.modules:
        yield
        return
    from transformers import GradientCheckpointingLayer

    whole = GradientCheckpointingLayer.__call__
    owned = "__call__" in vars(GradientCheckpointingLayer)

    def marking(self, *args, **kwargs):
        if self.gradient_checkpointing and self.training:
            _managers[-1].mark(args[0])
        return whole(self, *args, **kwargs)

    if not _managers:
        GradientCheckpointingLayer.__call__ = marking
    _managers.append(manager)
    try:
        yield
    finally:
        _managers.remove(manager)
        if not _managers and owned:
            GradientCheckpointingLayer.__call__ = whole
        elif not _managers:
            del GradientCheckpointingLayer.__call__
