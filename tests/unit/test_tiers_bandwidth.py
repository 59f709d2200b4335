"""The measurement of paths: that it measures, leaves nothing, and tells what failed."""

import errno
import os
from pathlib import Path

import pytest
from open_files import open_files

from offload.allocator.errors import CapacityError, TierIOError
from offload.tiers import bandwidth
from offload.tiers import file as file_module
from offload.tiers.bandwidth import measure_paths
from offload.tiers.engines.threads import ThreadsEngine


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(bandwidth, "DURATION_S", 0.01)


@pytest.fixture
def paths(tmp_path):
    made = [tmp_path / name for name in "ab"]
    for path in made:
        path.mkdir()
    return made


@pytest.mark.parametrize("direct", [True, False])
def test_each_path_has_rates_and_keeps_nothing(paths, direct, monkeypatch):
    if not direct:
        monkeypatch.setattr(file_module, "_open_direct", lambda fd: fd)
    rates = measure_paths(paths)
    assert len(rates) == 2
    assert all(path.read_bytes_per_s > 0 and path.write_bytes_per_s > 0 for path in rates)
    assert not any(list(path.iterdir()) for path in paths)
    assert not any(open_files(path) for path in paths)


def test_only_what_was_written_is_read_and_it_is_random(paths, monkeypatch):
    written, read, contents = set(), set(), set()
    whole_write, whole_read = ThreadsEngine.write, ThreadsEngine.read

    def write(self, offset, address, nbytes):
        written.add((id(self), offset))
        contents.add(bytes(file_module.memory_at(address, 64)))
        return whole_write(self, offset, address, nbytes)

    def note(self, offset, address, nbytes):
        read.add((id(self), offset))
        return whole_read(self, offset, address, nbytes)

    monkeypatch.setattr(ThreadsEngine, "write", write)
    monkeypatch.setattr(ThreadsEngine, "read", note)
    measure_paths(paths)
    assert read
    assert read <= written
    assert bytes(64) not in contents


@pytest.mark.parametrize("verb", ["read", "write"])
def test_a_path_that_fails_is_named(paths, verb, monkeypatch):
    whole = getattr(ThreadsEngine, verb)

    def second_fails(self, offset, address, nbytes):
        if Path(f"/proc/self/fd/{self._fd}").readlink().is_relative_to(paths[1]):
            raise OSError(errno.EIO, "Input/output error")
        return whole(self, offset, address, nbytes)

    monkeypatch.setattr(ThreadsEngine, verb, second_fails)
    with pytest.raises(TierIOError, match=rf"scratch in {paths[1]}"):
        measure_paths(paths)


def test_a_full_disk_is_named(paths, monkeypatch):
    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CapacityError, match=rf"scratch in {paths[0]} needs"):
        measure_paths(paths)
