"""Killed at any moment, a store holds one whole commit: the last one that was finished."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from store_files import read_commit

from forked import Forked
from offload.tiers import commit as commit_module
from offload.tiers.filetier import Lanes
from offload.tiers.hostmem import PAGE
from offload.tiers.journal import Journal
from offload.tiers.store import Store

CHUNK = 4 * PAGE
COUNT = 3 * CHUNK // 4 + 100  # elements: three chunks and a bit


def values(seed):
    return torch.randn(COUNT, generator=torch.Generator().manual_seed(seed))


def raw(*seeds):
    return [values(seed).numpy().tobytes() for seed in seeds]


def add(store, name, seed):
    store.write(store.add(name, torch.float32, (COUNT,), CHUNK), values(seed))


class Stages:
    """Copies the store's folder before and after each system call that changes it.

    ``power`` copies hold what a power cut would leave at the least: the data of the last flush.
    """

    def __init__(self, store, folder, monkeypatch):
        self.store, self.folder = store, folder
        self.copies, self.calls, self.flushed = [], [], b""
        for name in ("pwritev", "write", "fsync", "fdatasync", "replace", "unlink"):
            monkeypatch.setattr(os, name, self._watched(name, getattr(os, name)))

    def _watched(self, name, whole):
        def call(*args, **kwargs):
            self._copy()
            if name in {"pwritev", "write"}:  # torn: half of it is on the disk when we are killed
                fd, data, *rest = args
                view = memoryview(data[0] if name == "pwritev" else data)
                half = view[: max(PAGE, len(view) // 2 // PAGE * PAGE)]
                result = whole(fd, [half] if name == "pwritev" else half, *rest)
            else:
                result = whole(*args, **kwargs)
            self.calls.append((name, _path_of(args[0]) if args else ""))
            if name == "fdatasync":
                self.flushed = (self.store.directory / "data").read_bytes()
            self._copy()
            return result

        return call

    def _copy(self):
        number = len(self.copies)
        copy, power = self.folder / f"{number}-killed", self.folder / f"{number}-power"
        shutil.copytree(self.store.directory, copy / "offload-store")
        shutil.copytree(self.store.directory, power / "offload-store")
        with (power / "offload-store" / "data").open("r+b") as data:
            data.write(self.flushed)
        self.copies.append((copy, power))


def _path_of(target):
    if isinstance(target, int):
        target = Path(f"/proc/self/fd/{target}").readlink()
    return Path(target).name


HISTORY = {
    None: None,
    1: {"a": 1, "b": 2, "c": 3},
    2: {"a": 11, "b": 2, "c": 13},
    3: {"a": 21, "b": 12, "d": 4},
}


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Three commits, watched: tensors change, stay, go and come."""
    folder, lanes = tmp_path_factory.mktemp("stages"), Lanes(Journal())
    store = Store(folder / "live", lanes)
    with pytest.MonkeyPatch.context() as patch:
        stages = Stages(store, folder / "copies", patch)
        for name, seed in HISTORY[1].items():
            add(store, name, seed)
        store.commit(1, {}, {"note": 1})
        store.write(store.tensors["a"], values(10))
        store.write(store.tensors["a"], values(11))  # twice within a step
        store.write(store.tensors["c"], values(13))
        store.commit(2, {}, {"note": 2})
        store.write(store.tensors["b"], values(12))
        store.drop(store.tensors["c"])
        add(store, "d", 4)
        store.write(store.tensors["a"], values(21))
        store.commit(3, {}, {"note": 3})
    store.close()
    lanes.close()
    return stages


def expected(step):
    return None if step is None else {name: raw(seed)[0] for name, seed in HISTORY[step].items()}


def test_killed_at_any_stage_there_is_one_whole_commit(stages):
    steps = []
    for copies in stages.copies:
        for copy in copies:
            found = read_commit(copy)  # checks every checksum
            step, tensors = found or (None, None)
            assert tensors == expected(step)
            steps.append(step or 0)
    assert len(stages.copies) > 60
    assert steps == sorted(steps)  # never back to an older one
    assert set(steps) == {0, 1, 2, 3}


def test_the_store_opens_at_any_stage_and_goes_on(stages, tmp_path, lanes):
    for killed, _ in stages.copies[::5]:
        copy = tmp_path / killed.name
        shutil.copytree(killed, copy)
        store = Store(copy, lanes)
        seeds = HISTORY[store.committed.step if store.committed else None] or {}
        for name, seed in seeds.items():
            tensor = store.add(name, torch.float32, (COUNT,), CHUNK)
            store.restore(tensor)
            store.verify(tensor)
            data = torch.empty(COUNT)
            store.read_into(tensor, data)
            assert torch.equal(data, values(seed))
        assert store.committed is None or store.committed.state == {"note": store.committed.step}
        for name in store.tensors:
            store.write(store.tensors[name], values(99))
        assert (read_commit(copy) or [0])[0] == (store.committed.step if store.committed else 0)
        add(store, "e", 5)
        store.commit(50, {}, {})
        store.close()
        step, tensors = read_commit(copy)
        assert step == 50
        assert tensors == {**dict.fromkeys(seeds, raw(99)[0]), "e": raw(5)[0]}


def test_data_is_flushed_before_the_record_and_the_record_before_its_name(stages):
    order = [call for call in stages.calls if call[0] not in {"pwritev", "write"}]
    one = [
        ("fdatasync", "data"),
        ("fsync", "commit.tmp"),
        ("replace", "commit.tmp"),
        ("fsync", "offload-store"),
    ]
    assert order == one * 3
    writes = [index for index, call in enumerate(stages.calls) if call == ("pwritev", "data")]
    assert all(stages.calls[index] != ("write", "commit.tmp") for index in range(writes[0]))


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
def test_a_commit_that_fails_leaves_the_previous_one(tmp_path, lanes, monkeypatch, call):
    store = Store(tmp_path, lanes)
    add(store, "a", 1)
    store.commit(1, {}, {})
    store.write(store.tensors["a"], values(2))
    with monkeypatch.context() as patch:
        whole = getattr(os, call)

        def refuse(target, *args, **kwargs):
            if "commit.tmp" in {_path_of(target) if target else "", *map(str, args[:1])}:
                raise OSError(5, "bad disk")
            return whole(target, *args, **kwargs)

        patch.setattr(commit_module.os, call, refuse)
        with pytest.raises(commit_module.TierIOError, match="the previous commit stays valid"):
            store.commit(2, {}, {})
    assert read_commit(tmp_path) == (1, dict(zip("a", raw(1), strict=True)))
    assert not (store.directory / "commit.tmp").exists()
    for seed in (3, 4):  # later versions still keep off the committed block
        store.write(store.tensors["a"], values(seed))
        assert read_commit(tmp_path) == (1, dict(zip("a", raw(1), strict=True)))
    store.commit(3, {}, {})
    assert read_commit(tmp_path) == (3, dict(zip("a", raw(4), strict=True)))
    store.close()


def test_a_flush_that_fails_leaves_the_previous_commit(tmp_path, lanes, monkeypatch):
    store = Store(tmp_path, lanes)
    add(store, "a", 1)
    store.commit(1, {}, {})
    store.write(store.tensors["a"], values(2))

    def refuse(_fd):
        raise OSError(5, "bad disk")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", refuse)
        with pytest.raises(commit_module.TierIOError, match=r"sync of .*data failed"):
            store.commit(2, {}, {})
    assert read_commit(tmp_path) == (1, dict(zip("a", raw(1), strict=True)))
    store.close()


def test_a_leftover_of_a_killed_commit_does_no_harm(tmp_path, lanes):
    store = Store(tmp_path, lanes)
    add(store, "a", 1)
    store.commit(1, {}, {})
    (store.directory / "commit.tmp").write_bytes(b"half a rec" * 10_000)
    store.write(store.tensors["a"], values(2))
    store.commit(2, {}, {})
    assert read_commit(tmp_path) == (2, dict(zip("a", raw(2), strict=True)))
    store.close()


CHILD = """
import sys
from pathlib import Path
import torch
from offload.tiers.filetier import Lanes
from offload.tiers.journal import Journal
from offload.tiers.store import Store

store = Store(Path(sys.argv[1]), Lanes(Journal()))
tensors = [store.add(name, torch.int64, (100_000,), 1 << 16) for name in "abc"]
for step in range(1, 1_000_000):
    for tensor in tensors:
        store.write(tensor, torch.full((100_000,), step))
    store.commit(step, {}, {"step": step})
    print(step, flush=True)
"""


def test_kill_minus_nine_leaves_the_last_reported_commit_or_a_later_one(tmp_path, lanes):
    child = Forked("-c", CHILD, tmp_path)
    reported = [int(child.output.readline()) for _ in range(25)]
    child.process.kill()
    reported += [int(line) for line in child.output if line.endswith("\n")]
    assert child.wait().returncode == -signal.SIGKILL
    step, tensors = read_commit(tmp_path)
    assert step in {reported[-1], reported[-1] + 1}
    whole = torch.full((100_000,), step).numpy().tobytes()
    assert tensors == dict.fromkeys("abc", whole)
    store = Store(tmp_path, lanes)  # the kernel has given the lock back
    assert store.committed.step == step
    store.close()
