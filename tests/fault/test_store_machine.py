"""Whatever is done to a store, its files always hold one whole commit: the last one."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from store_files import read_commit

from offload.tiers import home as home_module
from offload.tiers.filetier import Lanes
from offload.tiers.health import PathRates
from offload.tiers.hostmem import PAGE
from offload.tiers.journal import Journal
from offload.tiers.store import Store

COUNTS = {"a": 10, "b": PAGE // 4, "c": PAGE // 4 + 1, "d": 3000, "e": 0}
NAMES = st.sampled_from(sorted(COUNTS))
SEEDS = st.integers(0, 1000)
RATES = [PathRates(read_bytes_per_s=rate, write_bytes_per_s=rate) for rate in (2e9, 1e9)]


def values(name, seed):
    return (torch.arange(COUNTS[name]) * 31 + seed).to(torch.float32)


class StoreMachine(RuleBasedStateMachine):
    count = 1  # of directories

    @initialize()
    def open(self):
        self.folder = TemporaryDirectory(prefix="offload-store-machine-")
        self.paths = [Path(self.folder.name) / str(index) for index in range(self.count)]
        self.lanes = Lanes(Journal(), paths=self.count)
        self.store = self.opened()
        self.step = 0
        self.committed = None  # (step, {name: values})
        self.current = {}

    def opened(self):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(home_module, "UNIT_NBYTES", PAGE)
            return Store(self.paths, self.lanes, measure=lambda _: RATES[: self.count])

    @rule(name=NAMES, seed=SEEDS)
    def write(self, name, seed):
        tensor = self.store.tensors.get(name)
        if tensor is None:
            tensor = self.store.add(name, torch.float32, (COUNTS[name],), PAGE)
        self.current[name] = values(name, seed)
        self.store.write(tensor, self.current[name])

    @rule(name=NAMES)
    def break_off_a_write(self, name):
        """An error in the middle of a version: it is never published."""
        tensor = self.store.tensors.get(name)
        if tensor is not None and tensor.committed and tensor.nbytes:
            torn = torch.full((COUNTS[name],), -1.0)
            target = tensor.target(self.store.tier)
            nbytes = min(torn.nbytes, PAGE // 2)
            self.store.tier.write(target, torn.data_ptr(), nbytes=nbytes).wait()

    @rule(name=NAMES)
    def drop(self, name):
        if name in self.store.tensors:
            self.store.drop(self.store.tensors[name])
            del self.current[name]

    @rule()
    def commit(self):
        self.step += 1
        self.store.commit(self.step, {}, {})
        self.committed = (self.step, dict(self.current))

    @precondition(lambda self: self.committed)
    @rule()
    def be_killed_and_continue(self):
        self.store.close()  # a killed process does nothing else
        self.store = self.opened()
        assert self.store.committed.step == self.committed[0]
        self.current = dict(self.committed[1])
        for name in self.current:
            tensor = self.store.add(name, torch.float32, (COUNTS[name],), PAGE)
            self.store.restore(tensor)
            self.store.verify(tensor)
        self.store.release_unclaimed()

    @rule()
    def be_killed_and_start_anew(self):
        self.store.close()
        self.store = self.opened()
        self.store.forget()
        self.committed, self.current = None, {}

    @invariant()
    def the_files_hold_the_last_commit(self):
        found = read_commit(*self.paths)
        if self.committed is None:
            assert found is None
            return
        step, tensors = self.committed
        assert found == (step, {name: data.numpy().tobytes() for name, data in tensors.items()})

    @invariant()
    def the_newest_versions_are_read(self):
        assert set(self.store.tensors) == set(self.current)
        for name, expected in self.current.items():
            data = torch.empty(COUNTS[name])
            self.store.read_into(self.store.tensors[name], data)
            assert torch.equal(data, expected)

    @invariant()
    def no_room_is_lost(self):
        """At most two blocks for each tensor, and those that wait for the next commit."""
        tensors = self.store.tensors.values()
        held = sum((tensor.current is not None) + (tensor.spare is not None) for tensor in tensors)
        waiting = len(self.store._condemned)
        assert self.store.tier.arena.stats().current_count == held + waiting

    def teardown(self):
        if hasattr(self, "store"):
            self.store.close()
            self.lanes.close()
            self.folder.cleanup()


class StripedStoreMachine(StoreMachine):
    count = 2


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=30, stateful_step_count=25)
TestStripedStoreMachine = StripedStoreMachine.TestCase
TestStripedStoreMachine.settings = settings(max_examples=20, stateful_step_count=25)
