"""What can't be stepped on the device is said, and what fails there loses nothing."""

import errno
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from device_runs import assert_same
from device_steps import (
    CHUNK,
    STEPS,
    attach,
    train,
)
from exact_models import adamw
from torch import nn

from forked import python
from offload.allocator.errors import (
    ConfigError,
    TierIOError,
    UnsupportedError,
)
from offload.engine import Engine
from offload.swap import device_step
from offload.swap.ferry import Ferry


def test_a_model_that_computes_on_the_cpu(tmp_path: Path) -> None:
    model = nn.Linear(64, 64)
    with pytest.raises(ConfigError, match=r"optimizer_device='device' .* set device='cuda'"):
        attach(model, adamw(model), tmp_path, accelerator=None)
    attach(
        model, adamw(model), tmp_path, accelerator=None, config={"optimizer_device": "auto"}
    ).detach()  # has nothing to choose


def test_an_optimizer_that_does_not_go_by_tiles(tmp_path: Path) -> None:
    model = nn.Linear(64, 64)
    optimizer = torch.optim.Adafactor(model.parameters())
    with pytest.raises(UnsupportedError, match="Adafactor is not known to be elementwise"):
        attach(model, optimizer, tmp_path)
    engine = attach(model, optimizer, tmp_path, config={"optimizer_device": "auto"})
    assert any("host: Adafactor" in text for text in engine.notices)
    engine.detach()


def test_a_sparse_gradient(tmp_path: Path) -> None:
    model = nn.Embedding(100, 64, sparse=True)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with attach(model, optimizer, tmp_path):
        model.weight.grad = torch.sparse_coo_tensor(
            [[3]], torch.ones(1, 64), (100, 64), check_invariants=True
        )
        with pytest.raises(UnsupportedError, match=r"weight \(100, 64\) is sparse"):
            optimizer.step()
        assert torch.equal(model.weight, before)
        model.weight.grad = torch.ones(100, 64)
        optimizer.step()
        assert torch.equal(model.weight, before - 0.1)


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("link", ["jobs_in", "jobs_out"])
def test_a_copy_that_fails_leaves_the_last_commit(
    link: str, keeps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, weights, _ = train(tmp_path / "right", "device", steps=3)
    original = getattr(Ferry, link)

    def broken(self: Ferry, cargo: Any, nbytes: int, mover: Any) -> Any:
        inside = sys._getframe(1).f_code.co_filename == device_step.__file__
        if not inside or engine_step() == 0:
            return original(self, cargo, nbytes, mover)

        def job() -> None:
            raise TierIOError(errno.EIO, "the device failed")

        return [job]

    finished: list[int] = []

    def engine_step() -> int:
        return len(finished)

    after_step = Engine._after_step

    def count(self: Engine, *times: float) -> None:
        after_step(self, *times)
        finished.append(self.step)

    monkeypatch.setattr(Engine, "_after_step", count)
    monkeypatch.setattr(Ferry, link, broken)
    with pytest.raises(TierIOError, match="the device failed"):
        train(tmp_path / "broken", "device", steps=3, keeps=1 if keeps else STEPS)
    monkeypatch.undo()
    monkeypatch.setattr("offload.runtime.choose_chunk_numel", lambda _budget: CHUNK)
    losses, end, engine = train(tmp_path / "broken", "device", steps=3)
    assert engine.resumed
    assert losses == right[1:]
    assert_same(end, weights)


SCRIPT = """
import os
import signal
import sys
from pathlib import Path
from device_steps import CHUNK, train
import offload.runtime
from offload.swap.device_step import DeviceStep
offload.runtime.choose_chunk_numel = lambda _budget: CHUNK
original, sent = DeviceStep.send, []
def send(self, *arguments):
    original(self, *arguments)
    sent.append(1)
    if len(sent) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
DeviceStep.send = send
train(Path(sys.argv[1]), 0.5, steps=3)
"""


def test_a_run_that_is_killed_in_a_step_goes_on(tmp_path: Path, stepped_there: list[int]) -> None:
    right, weights, _ = train(tmp_path / "right", 0.5, steps=3)
    each = len(stepped_there) // 3
    done = python("-c", SCRIPT, tmp_path / "killed", each + 3)
    assert done.returncode == -signal.SIGKILL, done.stderr
    losses, end, engine = train(tmp_path / "killed", 0.5, steps=3)
    assert engine.resumed
    assert losses == right[1:]
    assert_same(end, weights)
