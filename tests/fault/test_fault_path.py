"""One of several paths fails, fills up or becomes slow in the middle of training."""

import errno
import os
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import offload
from forked import Forked
from offload.allocator.errors import CapacityError, TierIOError
from offload.tiers import health
from offload.tiers import home as home_module
from offload.tiers.health import PathHealth, PathRates
from offload.tiers.store import Store


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-3)


def train(model: nn.Module, optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(4, 512, generator=torch.Generator().manual_seed(step))
        F.mse_loss(model(x), x * 2).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two directories of equal weight, with units so small that all is on both."""
    monkeypatch.setattr(home_module, "UNIT_NBYTES", 16 << 10)
    same = [PathRates(read_bytes_per_s=1e9, write_bytes_per_s=1e9)] * 2
    monkeypatch.setattr("offload.runtime.Store", partial(Store, measure=lambda _: same))
    return [tmp_path / "a", tmp_path / "b"]


RESUME = """
import sys, torch, offload
from torch import nn
m = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512))
o = torch.optim.AdamW(m.parameters(), 1e-3)
e = offload.attach(m, o, budget="8GiB", nvme=sys.argv[1:3], resume="must")
print(e.step)
for step in range(e.step, 5):
    x = torch.randn(4, 512, generator=torch.Generator().manual_seed(step))
    torch.nn.functional.mse_loss(m(x), x * 2).backward()
    o.step()
    o.zero_grad()
torch.save({key: value.clone() for key, value in m.state_dict().items()}, sys.argv[3])
"""


@pytest.mark.parametrize(("verb", "failing"), [("read", 1), ("write", 0)])
def test_a_failing_path_stops_the_run_before_anything_is_lost(
    verb: str, failing: int, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = make_model()
    train(plain, adamw(plain), 0, 5)
    model = make_model()
    optimizer = adamw(model)
    engine = offload.attach(model, optimizer, budget="8GiB", nvme=paths)
    engine.keep_streaming()
    train(model, optimizer, 0, 2)
    disk: Any = engine._runtime.store.tier.file

    def broken(*_arguments: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(disk.files[failing].engine, verb, broken)
    with pytest.raises(TierIOError) as raised, engine:
        train(model, optimizer, 2, 5)
    message = str(raised.value)
    assert f"{verb} of" in message
    assert str(paths[failing] / "offload-store" / "data") in message
    assert f"path {failing + 1} of 2" in message
    # The last commit is whole, and another process goes on from it with the same bits.
    found = tmp_path / "found.pt"
    script = tmp_path / "resume.py"
    script.write_text(RESUME)
    assert Forked(*map(str, (script, *paths, found))).finish() == "2\n"
    for name, value in torch.load(found).items():
        assert torch.equal(value, plain.state_dict()[name]), name


class VirtualHealth(PathHealth):
    """The first path moves 1 GB/s as at the start, the second a hundredth of it."""

    def _count_busy(self, path: int) -> None:
        pass

    def ended(self, path: int, *, read_nbytes: int = 0, written_nbytes: int = 0) -> None:
        with self._lock:
            self._windows[path].busy_s += (read_nbytes + written_nbytes) / (1e7 if path else 1e9)
        super().ended(path, read_nbytes=read_nbytes, written_nbytes=written_nbytes)


def test_a_path_that_becomes_slow_is_reported_and_training_goes_on(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(home_module, "PathHealth", VirtualHealth)
    monkeypatch.setattr(health, "WINDOW_S", 0.1)  # a megabyte of the second path
    model = make_model()
    optimizer = adamw(model)
    with offload.attach(model, optimizer, budget="8GiB", nvme=paths) as engine:
        engine.keep_streaming()
        train(model, optimizer, 0, 4)
        assert engine.step == 4
        (notice,) = [text for text in engine.notices if "has become slow" in text]
    assert notice.startswith(f"{paths[1]}: has become slow: 0.01 GB/s now, 1 GB/s when")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_too_little_room_on_one_path_is_met_before_the_first_step(
    paths: list[Path], small_disk: Path
) -> None:
    model = nn.Linear(2048, 1024)  # 8 MiB; 56 MiB in all, half of them on each path
    weights = model.weight.detach().clone()
    with pytest.raises(CapacityError) as raised:
        offload.attach(model, adamw(model), budget="8GiB", nvme=[paths[0], small_disk])
    assert str(small_disk / "offload-store") in str(raised.value)
    assert torch.equal(model.weight, weights)
    data = paths[0] / "offload-store" / "data"
    assert data.stat().st_size < 4 << 20  # no room is kept on the other path
    assert os.listdir(paths[0]) == ["offload-store"]  # noqa: PTH208
