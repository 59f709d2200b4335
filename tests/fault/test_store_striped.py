"""A store over several directories: whole on all of them, or an error that says what is wrong."""

import errno
import json
import os
import shutil
import stat

import pytest
import torch
from store_files import read_commit

from offload.allocator.errors import (
    CapacityError,
    StoreCorruptError,
    StoreInUseError,
    StoreMismatchError,
    TierIOError,
)
from offload.tiers import home as home_module
from offload.tiers.filetier import Lanes
from offload.tiers.health import PathRates, SlowPath
from offload.tiers.hostmem import PAGE
from offload.tiers.journal import Journal
from offload.tiers.store import Store

CHUNK = 8 * PAGE
COUNT = 20 * PAGE // 4 + 7


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    """So small that every tensor is on every path."""
    monkeypatch.setattr(home_module, "UNIT_NBYTES", 2 * PAGE)


@pytest.fixture
def lanes():
    lanes = Lanes(Journal(), 2, 3)
    yield lanes
    lanes.close()


def rates(*bytes_per_s):
    def measure(directories):
        assert len(directories) == len(bytes_per_s)
        return [PathRates(read_bytes_per_s=rate, write_bytes_per_s=rate) for rate in bytes_per_s]

    return measure


@pytest.fixture
def paths(tmp_path):
    return [tmp_path / name for name in "abc"]


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def never(directories):
    raise AssertionError("measured again")


def values(seed):
    return torch.randn(COUNT, generator=torch.Generator().manual_seed(seed))


def bytes_of(seed):
    return values(seed).numpy().tobytes()


def write(store, name, seed):
    tensor = store.tensors.get(name) or store.add(name, torch.float32, (COUNT,), CHUNK)
    store.write(tensor, values(seed))
    return tensor


def make(paths, lanes, *bytes_per_s, commit=True):
    """A committed store that has been closed."""
    store = Store(paths, lanes, measure=rates(*bytes_per_s))
    write(store, "w", 1)
    if commit:
        store.commit(1, {}, {})
    store.close()


def content(store, name="w"):
    tensor = store.add(name, torch.float32, (COUNT,), CHUNK)
    store.restore(tensor)
    store.verify(tensor)
    data = torch.empty(COUNT)
    store.read_into(tensor, data)
    return data


def test_a_commit_is_whole_over_all_paths(paths, lanes):
    store = Store(paths, lanes, measure=rates(3e9, 1e9, 2e9))
    for seed in range(1, 4):
        write(store, "w", seed)
        store.commit(seed, {}, {})
        assert read_commit(*paths) == (seed, {"w": bytes_of(seed)})
    write(store, "w", 9)  # not committed
    assert read_commit(*paths) == (3, {"w": bytes_of(3)})
    record = json.loads((store.directory / "commit.json").read_bytes().partition(b"\n")[2])
    assert record["format"] == 2
    assert record["layout"]["weights"] == [3, 1, 2]
    store.close()
    again = Store(paths, lanes, measure=never)
    assert torch.equal(content(again), values(3))
    again.close()


def test_every_folder_is_private_and_knows_its_part(paths, lanes):
    make(paths, lanes, 1e9, 1e9, 1e9)
    for index, path in enumerate(paths):
        folder = path / "offload-store"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}
        expected = dict.fromkeys(["data", "lock", "part.json"], 0o600)
        assert modes == expected | ({"commit.json": 0o600} if index == 0 else {})
        note = json.loads((folder / "part.json").read_text())
        assert note["index"] == index
        assert note["directories"] == [str(path) for path in paths]


def test_the_layout_of_the_record_counts_whatever_is_measured_now(paths, lanes):
    make(paths[:2], lanes, 3e9, 1e9)
    store = Store(paths[:2], lanes, measure=rates(1e9, 9e9))
    assert torch.equal(content(store), values(1))
    write(store, "w", 2)
    store.commit(2, {}, {})
    assert read_commit(*paths[:2]) == (2, {"w": bytes_of(2)})
    store.close()


def test_scratch_is_striped_too_and_leaves_no_name(paths, lanes):
    store = Store(paths[:2], lanes, measure=rates(1e9, 1e9))
    before = [names(path / "offload-store") for path in paths[:2]]
    with store.open_scratch() as scratch:
        scratch.reserve_room(10 * PAGE)
        assert [os.fstat(file.fd).st_size > 0 for file in scratch.file.files] == [True, True]
        assert [names(path / "offload-store") for path in paths[:2]] == before
    store.close()


def test_one_directory_keeps_the_format_that_older_versions_read(paths, lanes):
    store = Store(paths[:1], lanes, measure=never)
    write(store, "w", 1)
    store.commit(1, {}, {})
    record = json.loads((store.directory / "commit.json").read_bytes().partition(b"\n")[2])
    assert record["format"] == 1
    assert "layout" not in record
    assert names(store.directory) == ["commit.json", "data", "lock"]
    store.close()
    again = Store(paths[0], lanes)
    assert torch.equal(content(again), values(1))
    again.close()


# Directories that are not those of the commit.


def refused(given, lanes, match, kind=StoreMismatchError):
    with pytest.raises(kind, match=match) as raised:
        Store(given, lanes, measure=never)
    if kind is StoreMismatchError:
        assert "resume='never'" in str(raised.value)


def test_fewer_or_more_directories_than_the_commit_s_are_refused(paths, lanes):
    a, b, c = paths
    make([a, b], lanes, 1e9, 1e9)
    refused([a], lanes, rf"spread over 2 directories \({a}, {b}\), but 1 directory .*{a},{b}")
    refused([a, b, c], lanes, r"but 3 directories")
    make([c], lanes)
    refused([c, a], lanes, rf"spread over 1 directory \({c}\), but 2 directories")
    assert read_commit(a, b) == (1, {"w": bytes_of(1)})
    assert read_commit(c) == (1, {"w": bytes_of(1)})


def test_a_directory_whose_disk_is_not_mounted_is_told(paths, lanes):
    a, b, _ = paths
    make([a, b], lanes, 1e9, 1e9)
    b.rename(b.with_name("elsewhere"))
    refused([a, b], lanes, rf"{b} holds no part .* part 2 of 2 was in {b}: mount its disk")
    shutil.rmtree(b)
    b.with_name("elsewhere").rename(b)
    store = Store([a, b], lanes, measure=never)
    assert torch.equal(content(store), values(1))
    store.close()


def test_the_first_directory_s_disk_is_not_mounted(paths, lanes):
    """Nothing of the other parts is touched: their store may come back."""
    a, b, _ = paths
    make([a, b], lanes, 1e9, 1e9)
    a.rename(a.with_name("elsewhere"))
    refused([a, b], lanes, rf"{b} holds part 2 of 2 of the store in {a}")
    shutil.rmtree(a)
    a.with_name("elsewhere").rename(a)
    assert read_commit(a, b) == (1, {"w": bytes_of(1)})


def test_swapped_directories_are_told_their_order(paths, lanes):
    a, b, c = paths
    make(paths, lanes, 1e9, 1e9, 1e9)
    refused([b, a, c], lanes, rf"{b} holds part 2 of 3 .*nvme={a},{b},{c} in that order")
    refused([a, c, b], lanes, rf"{c} holds part 3 of 3 .*nvme={a},{b},{c} in that order")
    refused([b], lanes, rf"{b} holds part 2 of 3")
    assert read_commit(*paths) == (1, {"w": bytes_of(1)})


def test_a_part_of_another_store_is_refused(paths, lanes, tmp_path):
    a, b, _ = paths
    x, y = tmp_path / "x", tmp_path / "y"
    make([a, b], lanes, 1e9, 1e9)
    make([x, y], lanes, 1e9, 1e9)
    refused([a, y], lanes, rf"{y} holds a part of another store, that in {x}; .* was in {b}")
    refused([tmp_path / "new", y], lanes, rf"{y} holds part 2 of 2 of the store in {x}")
    refused([tmp_path / "new", x], lanes, rf"{x} holds a store of its own")
    for pair in ([a, b], [x, y]):
        assert read_commit(*pair) == (1, {"w": bytes_of(1)})


@pytest.mark.parametrize("count", [1, 2])
def test_a_folder_that_is_not_a_store_is_refused(paths, lanes, count):
    foreign = paths[count - 1] / "offload-store"
    foreign.mkdir(parents=True)
    (foreign / "thesis.tex").write_text("precious")
    refused(paths[:count], lanes, "not a store of Offload's; move it away", TierIOError)
    with pytest.raises(TierIOError, match="not a store"):
        Store(paths[:count], lanes, discard_damaged=True)
    assert (foreign / "thesis.tex").read_text() == "precious"
    (paths[0] / "other").mkdir(parents=True, exist_ok=True)  # beside it there may be anything
    shutil.rmtree(foreign)
    Store(paths[:count], lanes, measure=rates(1e9, 1e9)).close()


def test_a_damaged_note_is_told(paths, lanes):
    make(paths[:2], lanes, 1e9, 1e9)
    (paths[1] / "offload-store" / "part.json").write_text("{")
    refused(paths[:2], lanes, "can't read .*part.json", StoreCorruptError)


def test_data_that_is_cut_short_on_one_path_is_told(paths, lanes):
    make(paths[:2], lanes, 1e9, 1e9)
    os.truncate(paths[1] / "offload-store" / "data", PAGE)
    with pytest.raises(StoreCorruptError, match=r"record names byte \d+ for w"):
        Store(paths[:2], lanes, measure=never)


def test_resume_never_discards_what_does_not_fit_together(paths, lanes):
    a, b, c = paths
    make([a, b], lanes, 1e9, 1e9)
    make([c], lanes)
    store = Store([b, c, a], lanes, discard_damaged=True, measure=rates(1e9, 1e9, 2e9))
    assert store.committed is None
    write(store, "w", 5)
    store.commit(1, {}, {})
    store.close()
    assert read_commit(b, c, a) == (1, {"w": bytes_of(5)})
    refused([a, b], lanes, "part 3 of 3")


# Stores that were never committed.


def test_an_uncommitted_store_is_begun_anew(paths, lanes):
    a, b, c = paths
    make([a, b], lanes, 1e9, 1e9, commit=False)
    make([a, b], lanes, 5e9, 1e9)  # measured again
    assert read_commit(a, b) == (1, {"w": bytes_of(1)})
    shutil.rmtree(a)
    shutil.rmtree(b)
    make([a, b], lanes, 1e9, 1e9, commit=False)
    make([a], lanes)
    assert names(a / "offload-store") == ["commit.json", "data", "lock"]
    refused([b, c], lanes, rf"{b} holds part 2 of 2 of the store in {a}")


def test_a_stale_note_never_joins_a_later_store(paths, lanes):
    """[a, b] is given up for [a, c]: b must not be taken for the second part of that."""
    a, b, c = paths
    make([a, b], lanes, 1e9, 1e9, commit=False)
    make([a, c], lanes, 1e9, 1e9)
    refused([a, b], lanes, rf"{b} holds a part of another store")


# Locks, room, failures.


def test_each_directory_is_locked(paths, lanes):
    a, b, c = paths
    store = Store([a, b], lanes, measure=rates(1e9, 1e9))
    for given in ([a], [b], [c, b]):
        with pytest.raises(StoreInUseError, match=f"in use by process {os.getpid()}"):
            Store(given, lanes)
    store.close()
    Store([c], lanes).close()  # what was locked before the refusal is free again


def test_too_little_room_on_one_path_names_it(paths, lanes, small_disk):
    store = Store([paths[0], small_disk.folder], lanes, measure=rates(1e9, 1e9))
    before = [file.nbytes for file in store.tier.file.files]
    with pytest.raises(CapacityError) as raised:
        store.tier.reserve_room(40 << 20)
    message = str(raised.value)
    assert str(small_disk.folder / "offload-store" / "data") in message
    assert str(paths[0]) not in message
    assert "free that much, or pass another directory" in message
    assert [file.nbytes for file in store.tier.file.files] == before
    store.tier.reserve_room(4 << 20)
    store.close()


@pytest.mark.parametrize("failing", [0, 1])
def test_a_path_that_can_not_be_flushed_leaves_the_last_commit(paths, lanes, failing, monkeypatch):
    store = Store(paths[:2], lanes, measure=rates(2e9, 1e9))
    write(store, "w", 1)
    store.commit(1, {}, {})
    write(store, "w", 2)

    def broken():
        raise TierIOError(errno.EIO, "sync failed: Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(store.tier.file.files[failing], "sync", broken)
        with pytest.raises(TierIOError, match=f"path {failing + 1} of 2"):
            store.commit(2, {}, {})
    assert read_commit(*paths[:2]) == (1, {"w": bytes_of(1)})
    store.commit(2, {}, {})
    assert read_commit(*paths[:2]) == (2, {"w": bytes_of(2)})
    store.close()


def test_every_path_is_flushed_before_the_record_is_written(paths, lanes, monkeypatch):
    store = Store(paths, lanes, measure=rates(1e9, 1e9, 1e9))
    write(store, "w", 1)
    order = []
    numbers = {file.fd: index for index, file in enumerate(store.tier.file.files)}
    whole_sync, whole_replace = os.fdatasync, os.rename

    def sync(fd):
        order.append(numbers[fd])
        whole_sync(fd)

    monkeypatch.setattr(os, "fdatasync", sync)
    monkeypatch.setattr(
        "pathlib.Path.replace", lambda self, to: (order.append("record"), whole_replace(self, to))
    )
    store.commit(1, {}, {})
    assert order == [0, 1, 2, "record"]
    store.close()


def test_what_each_path_holds_and_when_it_is_slow_is_told(paths, lanes):
    store = Store(paths, lanes, measure=rates(3e9, 1e9, 1e6))
    notices = lanes.journal.notices
    measured = "measured reading 3 GB/s, writing 3 GB/s"
    assert notices[0] == f"{paths[0]}: holds 3 of every 4 stripes; {measured}"
    assert notices[1].startswith(f"{paths[1]}: holds 1 of every 4 stripes; ")
    assert notices[2].startswith(f"{paths[2]}: is too slow beside the others and holds nothing")
    store.tier.file.health._report(SlowPath(path=1, bytes_per_s=2.5e8, start_bytes_per_s=1e9))
    assert (
        f"{paths[1]}: has become slow: 0.25 GB/s now, 1 GB/s when the store was made" in notices[3]
    )
    write(store, "w", 1)
    store.commit(1, {}, {})
    store.close()
    assert (paths[2] / "offload-store" / "data").stat().st_size == 0
    again = Store(paths, lanes, measure=never)
    assert torch.equal(content(again), values(1))
    again.close()
