"""Random use of a tier, compared with a dictionary from blocks to their bytes."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, ClassVar
from unittest import TestCase

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from offload.allocator.errors import OffloadError, StaleBlockError
from offload.tiers.base import Block
from offload.tiers.testing.memory import Memory, get, pattern, put
from offload.tiers.testing.tier import TierContract

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from offload.tiers.base import Tier
    from offload.tiers.lanes import Transfer

_STEPS_OF_A_RUN = 50
_SHIFTS = st.sampled_from([0, 0, 1, 513])


class TierMachine(RuleBasedStateMachine):
    """Allocates, writes, reads, releases, closes and opens anew, in any order."""

    contract: ClassVar[TierContract]
    steps: ClassVar[int]  # taken so far, by all runs

    @initialize()
    def open(self) -> None:
        self.folder = TemporaryDirectory(prefix="offload-contract-")
        self.context: AbstractContextManager[Tier] = self.contract.open_tier(Path(self.folder.name))
        self.tier = self.context.__enter__()
        self.model: dict[Block, bytearray] = {}
        self.moving: list[tuple[Transfer, Memory]] = []

    @rule(nbytes=st.sampled_from([1, 100, 4095, 4096, 4097, 70_000]))
    def allocate(self, nbytes: int) -> None:
        block = self.tier.allocate(nbytes)
        put(self.tier, block, bytes(nbytes))  # what fresh bytes are is not promised
        self.model[block] = bytearray(nbytes)

    @precondition(lambda self: self.model)
    @rule(draw=st.data(), shift=_SHIFTS)
    def write(self, draw: st.DataObject, shift: int) -> None:
        block, offset, nbytes = self.draw_range(draw)
        data = pattern(nbytes, seed=draw.draw(st.integers(0, 250), "seed"))
        self.settle()  # overlapping writes have no order of their own
        memory = Memory.of(data, shift=shift)
        transfer = self.tier.write(block, memory.address, offset=offset, nbytes=nbytes)
        self.moving.append((transfer, memory))
        self.model[block][offset : offset + nbytes] = data

    @precondition(lambda self: self.model)
    @rule(draw=st.data(), shift=_SHIFTS)
    def read(self, draw: st.DataObject, shift: int) -> None:
        block, offset, nbytes = self.draw_range(draw)
        self.settle()
        got = get(self.tier, block, offset=offset, nbytes=nbytes, shift=shift)
        assert got == bytes(self.model[block][offset : offset + nbytes])

    @precondition(lambda self: self.model)
    @rule(draw=st.data())
    def release(self, draw: st.DataObject) -> None:
        block = draw.draw(st.sampled_from(list(self.model)), "block")
        self.settle()
        block.release()
        del self.model[block]
        with pytest.raises(StaleBlockError):
            self.tier.read(block, 0, nbytes=1)

    @precondition(lambda self: len(self.model) > 2)  # a tier lives for a while
    @rule()
    def close(self) -> None:
        self.tier.close()
        assert all(transfer.done() for transfer, _ in self.moving)
        self.settle()
        with Memory(1) as memory:
            for block in self.model:
                with pytest.raises(OffloadError):
                    self.tier.read(block, memory.address, nbytes=1).wait()
        self.teardown()
        self.open()

    @rule()
    def settle(self) -> None:
        for transfer, memory in self.moving:
            transfer.wait()
            memory.__exit__()
        self.moving.clear()

    def draw_range(self, draw: st.DataObject) -> tuple[Block, int, int]:
        """A living block, and an offset and a size within it."""
        block = draw.draw(st.sampled_from(list(self.model)), "block")
        offset = draw.draw(st.integers(0, block.nbytes - 1), "offset")
        return block, offset, draw.draw(st.integers(0, block.nbytes - offset), "nbytes")

    @invariant()
    def holds_what_was_written(self) -> None:
        type(self).steps += 1
        if all(transfer.done() for transfer, _ in self.moving):
            for block, expected in self.model.items():
                assert self.contract.peek(self.tier, block, 0, block.nbytes) == bytes(expected)

    def teardown(self) -> None:
        if hasattr(self, "tier"):
            self.settle()
            self.context.__exit__(None, None, None)
            self.folder.cleanup()


def machine_of(contract: type[TierContract], *, steps: int = 1000) -> type[TestCase]:
    """The ``TestCase`` that takes at least ``steps`` random steps on tiers of ``contract``."""
    machine: type[TierMachine] = type(
        f"{contract.__name__}Machine", (TierMachine,), {"contract": contract(), "steps": 0}
    )

    class Case(machine.TestCase):  # type: ignore[misc, name-defined]
        settings = settings(
            max_examples=steps // _STEPS_OF_A_RUN * 6 // 5 + 2,  # some runs are shorter
            stateful_step_count=_STEPS_OF_A_RUN,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )

        def runTest(self) -> None:  # noqa: N802  (unittest's name)
            super().runTest()
            while machine.steps < steps:  # more of them than usual were
                super().runTest()

    Case.__name__ = Case.__qualname__ = machine.__name__
    return Case
