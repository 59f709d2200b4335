"""Bad input, full disks, missing permissions: a clear error, and nothing is lost."""

import contextlib
import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import offload
from forked import Forked, python
from offload.allocator.errors import (
    BudgetError,
    CapacityError,
    CheckpointError,
    ConfigError,
    StoreCorruptError,
    StoreInUseError,
    TierIOError,
    UnsupportedError,
)
from offload.tiers.file import TierFile


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-3)


def train(model: nn.Module, optimizer: Any, steps: int = 1) -> None:
    for _ in range(steps):
        x = torch.ones(4, 512)
        F.mse_loss(model(x), x * 2).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_budget_too_small_for_one_layer_names_one_that_fits(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, torch, offload\n"
        "from torch import nn\n"
        "model = nn.Linear(4096, 4096)\n"
        "optimizer = torch.optim.SGD(model.parameters(), 0.1)\n"
        "engine = offload.attach(model, optimizer, budget=sys.argv[1], nvme=sys.argv[2])\n"
        "model(torch.ones(1, 4096)).sum().backward(); optimizer.step()\n"
    )
    command = [sys.executable, str(script)]
    store = str(tmp_path / "nvme")
    too_small = subprocess.run(
        [*command, "host=50MiB", store], capture_output=True, text=True, check=False
    )
    assert "BudgetError" in too_small.stderr
    assert "needs 128.0" in too_small.stderr  # 64 MiB of weights, as much of gradients, biases
    suggested = too_small.stderr.split("The smallest budget that fits is ")[1].split()[0]
    assert subprocess.run([*command, suggested, store], check=False).returncode == 0


def test_the_command_line_says_3_when_it_does_not_fit(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import torch\nm = torch.nn.Linear(999, 999)\no = torch.optim.SGD(m.parameters(), 0.1)\n"
        "m(torch.ones(1, 999)).sum().backward(); o.step()\n"
    )
    done = python("-m", "offload", "run", "--budget=9MiB", f"--nvme={tmp_path}", script)
    assert done.returncode == 3
    assert "smallest budget that fits" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_store_in_use_is_refused_here_and_in_another_process(tmp_path: Path) -> None:
    model = make_model()
    with offload.attach(model, adamw(model), budget="8GiB", nvme=tmp_path):
        other = make_model()
        with pytest.raises(StoreInUseError, match=f"in use by process {os.getpid()}"):
            offload.attach(other, adamw(other), budget="8GiB", nvme=tmp_path)
        code = f"import offload; offload.init(budget='8GiB', nvme={str(tmp_path)!r})"
        assert "StoreInUseError" in python("-c", code).stderr
    offload.init(budget="8GiB", nvme=tmp_path).runtime.close()  # free again


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of 24 MiB, or as many as the parameter says."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    place = tmp_path / "disk"
    place.mkdir()
    size = f"size={getattr(request, 'param', 24)}m"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(path: Path) -> None:
    """Take all the room that is left, to the last page."""
    with path.open("wb", buffering=0) as file:
        for nbytes in (1 << 20, 4096):
            with contextlib.suppress(OSError):
                while file.write(b"x" * nbytes) == nbytes:
                    pass


def test_a_full_disk_is_met_before_the_first_step(small_disk: Path) -> None:
    model = nn.Linear(1024, 1024)  # 4 MiB; two slots of weight and states, a gradient: 28 MiB
    weights = model.weight.detach().clone()
    with pytest.raises(CapacityError, match=r"needs .* free: free that much, or pass another"):
        offload.attach(model, adamw(model), budget="8GiB", nvme=small_disk)
    assert torch.equal(model.weight, weights)


def test_a_disk_filled_by_others_does_not_touch_preallocated_training(small_disk: Path) -> None:
    model = make_model()  # 2 MiB: 14 MiB in all
    optimizer = adamw(model)
    with offload.attach(model, optimizer, budget="8GiB", nvme=small_disk) as engine:
        train(model, optimizer)
        fill(small_disk / "other")
        with pytest.raises(TierIOError, match="previous commit stays valid"):
            train(model, optimizer)  # the record itself has no room
        (small_disk / "other").unlink()
        train(model, optimizer)
        assert engine.step == 3
    resumed = make_model()
    with offload.attach(resumed, adamw(resumed), budget="8GiB", nvme=small_disk) as engine:
        assert engine.step == 3
        assert torch.equal(resumed[0].weight, model[0].weight)


@pytest.mark.parametrize("small_disk", [64 + 14 + 20], indirect=True)
def test_saved_activations_fill_a_disk_no_further_than_gradients_and_records_let_them(
    small_disk: Path,
) -> None:
    def steps(model: nn.Sequential, optimizer: Any) -> list[float]:
        losses = []
        for _ in range(3):
            loss = model(torch.ones(512, 512)).square().mean()  # each layer saves 1 MiB
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def deep() -> nn.Sequential:
        first, last = make_model()
        return nn.Sequential(first, *(nn.Tanh() for _ in range(100)), last)

    plain, model = deep(), deep()
    expected = steps(plain, adamw(plain))
    optimizer = adamw(model)
    with offload.attach(model, optimizer, budget="8GiB", nvme=small_disk) as engine:
        engine.activations.limit_nbytes = 1 << 20
        assert steps(model, optimizer) == expected
        taken = engine._runtime.activation_scratch.file.nbytes
        assert 16 << 20 < taken < 24 << 20  # of 100 MiB that would leave
        assert engine.step == 3
    assert all(map(torch.equal, plain.parameters(), model.parameters()))


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    model = make_model()
    with pytest.raises(TierIOError, match="pass a writable directory"):
        offload.attach(model, adamw(model), budget="8GiB", nvme=file / "inside")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "nvme").mkdir()
    (tmp_path / "nvme" / "offload-store").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TierIOError, match="symbolic link"):
        offload.attach(model, adamw(model), budget="8GiB", nvme=tmp_path / "nvme")


def test_files_are_private_and_scratch_leaves_nothing(tmp_path: Path) -> None:
    model = make_model()
    optimizer = adamw(model)
    with offload.attach(model, optimizer, budget="8GiB", nvme=tmp_path):
        train(model, optimizer)
        store = tmp_path / "offload-store"
        assert store.stat().st_mode & 0o777 == 0o700
        files = {file.name: file.stat().st_mode & 0o777 for file in store.iterdir()}
    assert files == {"data": 0o600, "commit.json": 0o600, "lock": 0o600}


@pytest.mark.parametrize("damage", ["record", "data", "truncated"])
def test_damage_to_the_store_is_noticed(damage: str, tmp_path: Path) -> None:
    model = make_model()
    optimizer = adamw(model)
    with offload.attach(model, optimizer, budget="8GiB", nvme=tmp_path):
        train(model, optimizer)
    store = tmp_path / "offload-store"
    if damage == "record":
        text = (store / "commit.json").read_bytes()
        (store / "commit.json").write_bytes(text.replace(b'"step": 1', b'"step": 2'))
    elif damage == "truncated":
        os.truncate(store / "data", 1 << 20)
    else:
        record = json.loads((store / "commit.json").read_bytes().partition(b"\n")[2])
        with (store / "data").open("r+b") as file:
            file.seek(record["tensors"]["0.weight"]["offset"] + 1000)
            file.write(b"\xff\xff")
    again = make_model()
    optimizer = adamw(again)
    with (
        pytest.raises(StoreCorruptError, match=r"start anew with resume='never'"),
        offload.attach(again, optimizer, budget="8GiB", nvme=tmp_path),
    ):
        train(again, optimizer)


def test_weights_that_cannot_be_moved_are_refused(tmp_path: Path) -> None:
    model = nn.Conv2d(64, 64, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with pytest.raises(UnsupportedError, match="contiguous_format"):
        offload.attach(model, adamw(model), budget="8GiB", nvme=tmp_path)
    meta = nn.Linear(512, 512, device="meta")
    with pytest.raises(UnsupportedError, match="meta device"):
        offload.attach(meta, adamw(meta), budget="8GiB", nvme=tmp_path)


def test_attaching_twice_is_refused(tmp_path: Path) -> None:
    model = make_model()
    with (
        offload.attach(model, adamw(model), budget="8GiB", nvme=tmp_path),
        pytest.raises(ConfigError, match="attached already"),
    ):
        offload.attach(model, adamw(model), budget="8GiB", nvme=tmp_path / "other")


def checkpoint_with(tmp_path: Path, content: bytes | None) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    if content is not None:
        (folder / "model.safetensors").write_bytes(content)
    return folder


def header(entry: dict[str, Any]) -> bytes:
    text = json.dumps({"w": entry}).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has neither model.safetensors"),
        (b"", "not a safetensors file"),
        (b"\x80\x02pickle, not safetensors", "not a safetensors file"),
        (b"\x05\x00\x00\x00\x00\x00\x00\x00oops!", "not a safetensors file"),
        (header({"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}), "truncated"),
        (header({"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}) + b"x" * 8, "8 bytes"),
        (header({"dtype": "F99", "shape": [4], "data_offsets": [0, 16]}), "malformed"),
    ],
)
def test_bad_checkpoints(content: bytes | None, message: str, tmp_path: Path) -> None:
    folder = checkpoint_with(tmp_path, content)
    with pytest.raises(CheckpointError, match=message):
        offload.load_pretrained(folder, budget="8GiB", nvme=tmp_path / "nvme")
    with pytest.raises(CheckpointError, match="not a directory"):
        offload.load_pretrained(tmp_path / "missing", budget="8GiB", nvme=tmp_path / "nvme")


def test_a_loss_that_is_not_a_number_trains_on_like_plain_pytorch(tmp_path: Path) -> None:
    plain, model = make_model(), make_model()
    plain_optimizer, optimizer = adamw(plain), adamw(model)
    with offload.attach(model, optimizer, budget="8GiB", nvme=tmp_path):
        for one, steps in ((plain, plain_optimizer), (model, optimizer)):
            (one(torch.ones(1, 512)).sum() * float("nan")).backward()
            steps.step()
        assert model[0].weight.isnan().all()
        assert torch.equal(plain[0].weight.isnan(), model[0].weight.isnan())


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("verb", ["read", "write"])
def test_an_io_error_in_a_worker_is_raised_in_training(
    verb: str, in_backward: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    optimizer = adamw(model)
    engine = offload.attach(
        model,
        optimizer,
        budget="8GiB",
        nvme=tmp_path,
        config={"step_in_backward": in_backward},
    )
    engine.keep_streaming()
    train(model, optimizer)
    committed = model[0].weight.detach().clone()

    def broken(*_args: Any) -> None:
        raise TierIOError(errno.EIO, f"{verb} failed: the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(TierFile, verb, broken)
        with pytest.raises(TierIOError, match="the disk is gone"):
            train(model, optimizer, 2)
    del engine
    code = (
        "import sys, torch, offload\nfrom torch import nn\n"
        "m = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512))\n"
        "o = torch.optim.AdamW(m.parameters(), 1e-3)\n"
        "e = offload.attach(m, o, budget='8GiB', nvme=sys.argv[1], resume='must')\n"
        "print(e.step); torch.save(m[0].weight.detach().clone(), sys.argv[2])\n"
    )
    # What another process finds: the step that was committed, whole.
    os.set_blocking(0, True)
    found = tmp_path / "found.pt"
    copy = tmp_path / "copy" / "offload-store"
    copy.parent.mkdir()
    subprocess.run(["cp", "-r", tmp_path / "offload-store", copy], check=True)
    script = tmp_path / "resume.py"
    script.write_text(code)
    assert Forked(str(script), str(copy.parent), str(found)).finish() == "1\n"
    assert torch.equal(torch.load(found), committed)


def test_a_store_is_free_again_after_a_detach_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    optimizer = adamw(model)
    engine = offload.attach(model, optimizer, budget="8GiB", nvme=tmp_path)
    engine.keep_streaming()
    train(model, optimizer)

    computed = threading.Event()

    def broken(*_args: Any) -> None:
        computed.wait()
        raise TierIOError(errno.EIO, "the disk is gone")

    monkeypatch.setattr(TierFile, "write", broken)
    model(torch.ones(8, 512)).sum().backward()  # its gradients are on their way
    computed.set()
    with pytest.raises(TierIOError, match="the disk is gone"):
        engine.detach()
    engine.detach()  # once more changes nothing
    monkeypatch.undo()
    again = make_model()
    with offload.attach(again, adamw(again), budget="8GiB", nvme=tmp_path) as engine:
        assert engine.resumed
        assert engine.step == 1


def test_budget_error_carries_its_numbers() -> None:
    error = BudgetError("no", needed_nbytes=2, budget_nbytes=1)
    assert (error.needed_nbytes, error.budget_nbytes, error.exit_code) == (2, 1, 3)
