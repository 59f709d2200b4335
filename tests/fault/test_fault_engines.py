"""A failing disk under a store and under training: nothing is lost, errors say what and where."""

import copy
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import offload
from forked import python
from offload.allocator.errors import StoreCorruptError, TierIOError
from offload.tiers.engines.registry import choose_engine, wrapping
from offload.tiers.filetier import Lanes
from offload.tiers.hostmem import PAGE
from offload.tiers.journal import Journal
from offload.tiers.store import Store
from offload.tiers.wrappers import (
    DISK_FULL,
    Fault,
    FaultKind,
    FaultPlan,
    FaultyEngine,
    Request,
    SeededFaults,
)

FAILURES = [Fault(kind=FaultKind.ERROR), Fault(kind=FaultKind.TORN), DISK_FULL]
CHUNK_NBYTES = 16 * PAGE
NUMEL = 100_000  # seven chunks of four-byte values, the last one no whole page


def values(seed: int) -> torch.Tensor:
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(seed))


class FaultyStore:
    """A store on a disk that does what ``plan`` says, once it is told to."""

    def __init__(self, directory: Path) -> None:
        self.plan: FaultPlan = lambda _request: None
        with wrapping(lambda engine: FaultyEngine(engine, self.obey)):
            factory = choose_engine("threads", directory).factory
        self.lanes = Lanes(Journal(), engine=factory)
        self.store = Store(directory, self.lanes)
        self.tensor = self.store.add("weight", torch.float32, (NUMEL,), CHUNK_NBYTES)

    def obey(self, request: Request) -> Fault | None:
        return self.plan(request)

    def break_next(self, verb: Any, number: int, fault: Fault) -> None:
        """Request ``number`` from now on suffers ``fault``."""
        seen = 0

        def plan(request: Request) -> Fault | None:
            nonlocal seen
            if request.verb != verb:
                return None
            seen += 1
            return fault if seen == number + 1 else None

        self.plan = plan

    def close(self) -> None:
        self.lanes.close()
        self.store.close()


@pytest.fixture
def faulty(tmp_path: Path) -> Any:
    store = FaultyStore(tmp_path)
    yield store
    store.close()


def reopened(directory: Path) -> torch.Tensor:
    """What the next process finds committed."""
    lanes = Lanes(Journal())
    store = Store(directory, lanes)
    tensor = store.add("weight", torch.float32, (NUMEL,), CHUNK_NBYTES)
    store.restore(tensor)
    store.verify(tensor)
    found = torch.empty(NUMEL)
    store.read_into(tensor, found)
    lanes.close()
    store.close()
    return found


@pytest.mark.parametrize("number", [0, 3, 6])
@pytest.mark.parametrize(
    "fault", [Fault(kind=FaultKind.ERROR), DISK_FULL, Fault(kind=FaultKind.TORN)]
)
def test_a_failed_write_leaves_the_last_commit_whole(
    faulty: FaultyStore, tmp_path: Path, fault: Fault, number: int
) -> None:
    faulty.store.write(faulty.tensor, values(1))
    faulty.store.commit(1, {}, {})
    faulty.break_next("write", number, fault)
    with pytest.raises(TierIOError) as raised:
        faulty.store.write(faulty.tensor, values(2))
    assert raised.value.errno == fault.errno
    spare = faulty.tensor.spare
    assert spare is not None
    place = spare.extent.offset + number * CHUNK_NBYTES
    label = faulty.store.tier.file.label
    assert f"bytes at byte {place} of {label} failed" in str(raised.value)
    faulty.store.write(faulty.tensor, values(3))  # the disk is well again
    faulty.store.commit(2, {}, {})
    faulty.break_next("write", number, fault)
    with pytest.raises(TierIOError):
        faulty.store.write(faulty.tensor, values(4))
    faulty.close()
    assert torch.equal(reopened(tmp_path), values(3))


def test_a_failed_read_says_so_and_the_next_one_is_right(faulty: FaultyStore) -> None:
    faulty.store.write(faulty.tensor, values(1))
    found = torch.zeros(NUMEL)
    faulty.break_next("read", 2, Fault(kind=FaultKind.TORN))
    with pytest.raises(TierIOError, match=r"read of 65536 bytes at byte 131072 of .*data failed"):
        faulty.store.read_into(faulty.tensor, found)
    faulty.store.read_into(faulty.tensor, found)
    assert torch.equal(found, values(1))


@pytest.mark.parametrize("verb", ["read", "write"])
def test_a_flipped_bit_is_found_by_its_checksum(faulty: FaultyStore, verb: str) -> None:
    faulty.break_next(verb, 4, Fault(kind=FaultKind.FLIP, bit=12_345))
    faulty.store.write(faulty.tensor, values(1))
    with pytest.raises(StoreCorruptError, match=r"bytes 262144\.\.327680 of it do not match"):
        faulty.store.verify(faulty.tensor)
    if verb == "read":  # it was the reading that went wrong
        faulty.store.verify(faulty.tensor)


def test_short_requests_lose_nothing(faulty: FaultyStore, tmp_path: Path) -> None:
    plan = SeededFaults(1, 0.7, Fault(kind=FaultKind.SHORT))
    faulty.plan = plan
    for seed in range(5):
        faulty.store.write(faulty.tensor, values(seed))
        faulty.store.verify(faulty.tensor)
        faulty.store.commit(seed, {}, {})
    assert plan.met > 50
    faulty.close()
    assert torch.equal(reopened(tmp_path), values(4))


# Training.

SCRIPT = """
import sys, torch, offload
sys.path.insert(0, sys.argv[3])
from test_fault_engines import adamw, make_model, train
from offload.tiers.engines.registry import wrapping
from offload.tiers.wrappers import Fault, FaultKind, FaultyEngine
lost = lambda request: request.verb == "write" and request.number == int(sys.argv[2])
plan = lambda request: Fault(kind=FaultKind.LOST) if lost(request) else None
model = make_model()
optimizer = adamw(model)
with wrapping(lambda engine: FaultyEngine(engine, plan)):
    engine = offload.attach(model, optimizer, budget="8GiB", nvme=sys.argv[1])
engine.keep_streaming()
train(model, optimizer, 0, 10)
"""


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-3, fused=True)


def train(model: nn.Module, optimizer: Any, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        x = torch.randn(64, 256, generator=torch.Generator().manual_seed(step))
        loss = F.mse_loss(model(x), x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def expected() -> Callable[[int], dict[str, torch.Tensor]]:
    """The weights after so many steps of the same training in memory."""
    model = make_model()
    optimizer = adamw(model)
    states = [copy.deepcopy(model.state_dict())]
    for step in range(10):
        train(model, optimizer, step, step + 1)
        states.append(copy.deepcopy(model.state_dict()))
    return lambda step: states[step]


def resume_and_finish(directory: Path, expected: Callable[[int], Any]) -> int:
    """Continue without faults to step 10, bit for bit; the step that was found."""
    model = make_model()
    optimizer = adamw(model)
    with offload.attach(model, optimizer, budget="8GiB", nvme=directory, resume="auto") as engine:
        found = engine.step
        for name, value in model.state_dict().items():
            assert torch.equal(value, expected(found)[name]), name
        train(model, optimizer, found, 10)
        for name, value in model.state_dict().items():
            assert torch.equal(value, expected(10)[name]), name
    return found


@pytest.mark.parametrize("verb", ["read", "write"])
@pytest.mark.parametrize(
    "fault", [Fault(kind=FaultKind.ERROR), Fault(kind=FaultKind.TORN), DISK_FULL]
)
def test_a_failing_disk_ends_the_training_and_the_last_step_is_kept(
    verb: str, fault: Fault, tmp_path: Path, expected: Any
) -> None:
    failing = False

    def plan(request: Request) -> Fault | None:
        return fault if failing and request.verb == verb and request.number % 3 == 0 else None

    model = make_model()
    optimizer = adamw(model)
    with wrapping(lambda engine: FaultyEngine(engine, plan)):
        engine = offload.attach(model, optimizer, budget="8GiB", nvme=tmp_path)
    engine.keep_streaming()
    train(model, optimizer, 0, 4)
    failing = True
    with pytest.raises(TierIOError) as raised:
        train(model, optimizer, 4, 10)
    failing = False
    assert raised.value.errno == fault.errno
    assert f"{verb} of " in str(raised.value)
    assert f"{tmp_path}" in str(raised.value)
    # What another process finds, for this one keeps the lock.
    copied = tmp_path / "copied"
    shutil.copytree(tmp_path / "offload-store", copied / "offload-store")
    assert resume_and_finish(copied, expected) >= 4


@pytest.mark.parametrize(
    "number", [40, *(pytest.param(number, marks=pytest.mark.slow) for number in (0, 5, 77))]
)
def test_a_process_lost_in_a_write_continues_from_its_last_step(
    number: int, tmp_path: Path, expected: Any
) -> None:
    done = python("-c", SCRIPT, tmp_path, number, Path(__file__).parent)
    assert done.returncode == -signal.SIGKILL, done.stderr
    resume_and_finish(tmp_path, expected)


def test_a_run_by_aiofiles_that_just_ends_is_closed_in_good_order(tmp_path: Path) -> None:
    """When it ends, the executors of the standard library take no more work."""
    words = [sys.executable, "-c", SCRIPT, tmp_path, "-1", Path(__file__).parent]
    tests = str(Path(__file__).parents[1])
    environment = {**os.environ, "OFFLOAD_IO_ENGINE": "aiofiles", "PYTHONPATH": tests}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
