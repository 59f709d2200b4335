"""The store: versions, commits, and what they tell when they can't be had."""

import json
import stat

import pytest
import torch
import xxhash

from offload.allocator.errors import StoreMismatchError, TierIOError
from offload.tiers.filetier import Lanes
from offload.tiers.hostmem import PAGE
from offload.tiers.journal import Journal
from offload.tiers.store import Store

CHUNK = 2 * PAGE


@pytest.fixture
def lanes():
    lanes = Lanes(Journal())
    yield lanes
    lanes.close()


@pytest.fixture
def store(tmp_path, lanes):
    store = Store(tmp_path, lanes)
    yield store
    store.close()


def values(count=5000, seed=0):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def add(store, name, data):
    tensor = store.add(name, data.dtype, tuple(data.shape), CHUNK)
    store.write(tensor, data)
    return tensor


def content(store, tensor):
    data = torch.empty(tensor.shape, dtype=tensor.dtype)
    store.read_into(tensor, data)
    return data


def restored(store, name, like):
    tensor = store.add(name, like.dtype, tuple(like.shape), CHUNK)
    store.restore(tensor)
    return tensor


class Writes:
    """Notes every range of the data file that the store writes, and by whom it may be."""

    def __init__(self, store, monkeypatch):
        self.ranges = []
        whole = store.tier.file.write

        def write(offset, address, nbytes):
            self.ranges.append((offset, offset + nbytes))
            whole(offset, address, nbytes)

        monkeypatch.setattr(store.tier.file, "write", write)

    def touch(self, block):
        return any(
            start < block.extent.end and block.extent.offset < end for start, end in self.ranges
        )


@pytest.mark.parametrize(
    "shape", [(), (0,), (1,), (3, 5), (CHUNK // 4,), (CHUNK // 4 + 1,), (70, 90)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_what_is_written_is_read(store, shape, dtype):
    data = (values(torch.Size(shape).numel()) * 9).to(dtype).reshape(shape)
    tensor = add(store, "w", data)
    assert torch.equal(content(store, tensor), data)
    store.verify(tensor)


def test_a_view_is_written_by_its_values(store):
    data = values(6000).reshape(60, 100)
    tensor = add(store, "w", data.t())
    assert torch.equal(content(store, tensor), data.t())


def test_each_chunk_has_the_checksum_of_its_bytes(store):
    data = values(CHUNK // 4 + 10)
    tensor = add(store, "w", data)
    raw = data.numpy().tobytes()
    assert tensor.chunks() == [(0, CHUNK), (CHUNK, 40)]
    assert tensor.checksums == [
        xxhash.xxh3_64_intdigest(raw[:CHUNK]),
        xxhash.xxh3_64_intdigest(raw[CHUNK:]),
    ]


@pytest.mark.parametrize("chunk_nbytes", [0, -PAGE, PAGE - 1, PAGE + 4])
def test_chunks_are_whole_pages(store, chunk_nbytes):
    with pytest.raises(ValueError, match=f"whole pages of {PAGE} bytes, not {chunk_nbytes} bytes"):
        store.add("w", torch.float32, (10,), chunk_nbytes)


def test_the_committed_block_is_never_written_before_the_next_commit(store, monkeypatch):
    tensor = add(store, "w", values())
    store.commit(1, {}, {})
    for step in range(2, 6):
        committed = tensor.current
        writes = Writes(store, monkeypatch)
        for version in range(3):  # the optimizer's, then the user's own changes
            store.write(tensor, values(seed=10 * step + version))
            assert tensor.current is not committed
        assert writes.touch(tensor.current)
        assert not writes.touch(committed)
        assert torch.equal(content(store, tensor), values(seed=10 * step + 2))
        store.commit(step, {}, {})


def test_versions_alternate_between_two_blocks(store):
    tensor = add(store, "w", values())
    blocks = []
    for step in range(6):
        store.commit(step, {}, {})
        store.write(tensor, values(seed=step))
        blocks.append(tensor.current.extent)
    assert blocks[0] != blocks[1]
    assert blocks == blocks[:2] * 3
    assert store.tier.arena.stats().current_count == 2


def test_an_unpublished_version_changes_nothing(store):
    tensor = add(store, "w", values())
    store.commit(1, {}, {})
    target = tensor.target(store.tier)
    assert target is tensor.target(store.tier)  # asked again after an error: the same room
    assert target is not tensor.current
    assert torch.equal(content(store, tensor), values())


def test_a_commit_is_found_again(tmp_path, lanes, store):
    first, second = values(), values(70, seed=1).to(torch.bfloat16)
    add(store, "a", first)
    add(store, "b", second)
    store.commit(7, {"model": "m"}, {"extra": {"lr": 0.1}, "text": "naïve\n"})
    store.close()
    again = Store(tmp_path, lanes)
    assert again.committed.step == 7
    assert again.committed.signature == {"model": "m"}
    assert again.committed.state == {"extra": {"lr": 0.1}, "text": "naïve\n"}
    assert set(again.committed.tensors) == {"a", "b"}
    for name, data in (("a", first), ("b", second)):
        tensor = restored(again, name, data)
        again.verify(tensor)
        assert torch.equal(content(again, tensor), data)
    again.close()


def test_what_was_not_committed_is_not_found(tmp_path, lanes, store):
    tensor = add(store, "a", values())
    store.commit(1, {}, {})
    store.write(tensor, values(seed=1))
    add(store, "b", values(seed=2))
    store.close()
    again = Store(tmp_path, lanes)
    assert set(again.committed.tensors) == {"a"}
    assert torch.equal(content(again, restored(again, "a", values())), values())
    again.close()


def test_a_restored_tensor_s_committed_block_is_kept_until_the_next_commit(
    tmp_path, lanes, store, monkeypatch
):
    add(store, "w", values())
    store.commit(1, {}, {})
    store.close()
    again = Store(tmp_path, lanes)
    tensor = restored(again, "w", values())
    committed = tensor.current
    writes = Writes(again, monkeypatch)
    again.write(tensor, values(seed=1))
    assert not writes.touch(committed)
    again.commit(2, {}, {})
    again.write(tensor, values(seed=2))
    assert writes.touch(committed)
    again.close()


def test_blocks_of_the_commit_are_not_reused_before_they_are_claimed(tmp_path, lanes, store):
    add(store, "w", values())
    extent = store.tensors["w"].current.extent
    store.commit(1, {}, {})
    store.close()
    again = Store(tmp_path, lanes)
    other = add(again, "other", values(seed=3))
    assert not other.current.extent.overlaps(extent)
    again.release_unclaimed()
    reused = add(again, "new", values(seed=4))
    assert reused.current.extent == extent
    again.close()


def test_restoring_takes_the_place_of_versions_written_before(tmp_path, lanes, store):
    """``offload.init`` writes fresh weights before it is known that the run continues."""
    add(store, "w", values())
    store.commit(1, {}, {})
    store.close()
    again = Store(tmp_path, lanes)
    tensor = add(again, "w", values(seed=5))
    again.restore(tensor)
    again.release_unclaimed()
    assert torch.equal(content(again, tensor), values())
    assert again.tier.arena.stats().current_count == 1
    again.close()


def test_the_chunks_of_the_commit_count_not_those_asked_for(tmp_path, lanes, store):
    data = values()
    add(store, "w", data)
    store.commit(1, {}, {})
    store.close()
    again = Store(tmp_path, lanes)
    tensor = again.add("w", data.dtype, tuple(data.shape), 8 * PAGE)
    again.restore(tensor)
    assert tensor.chunk_nbytes == CHUNK
    again.verify(tensor)
    again.close()


@pytest.mark.parametrize(
    ("name", "like", "found"),
    [
        ("absent", torch.empty(100), "nothing of that name"),
        ("w", torch.empty(101), r"float32\[100\]"),
        ("w", torch.empty(100, 1), r"float32\[100\]"),
        ("w", torch.empty(100, dtype=torch.float64), r"float32\[100\]"),
    ],
)
def test_a_commit_of_another_model_is_refused(tmp_path, lanes, store, name, like, found):
    add(store, "w", values(100))
    store.commit(1, {}, {})
    store.close()
    again = Store(tmp_path, lanes)
    with pytest.raises(StoreMismatchError, match=f"belongs to another model: {name} .*{found}"):
        restored(again, name, like)
    again.close()


def test_a_forgotten_commit_is_gone_and_its_room_free(tmp_path, lanes, store):
    add(store, "w", values())
    store.commit(1, {}, {})
    store.close()
    again = Store(tmp_path, lanes)
    again.forget()
    assert again.committed is None
    assert again.tier.arena.stats().current_count == 0
    again.close()
    third = Store(tmp_path, lanes)
    assert third.committed is None
    third.close()


def test_a_store_without_a_commit_starts_with_an_empty_file(tmp_path, lanes, store):
    add(store, "w", values())
    store.close()
    again = Store(tmp_path, lanes)
    assert (again.directory / "data").stat().st_size == 0
    again.close()


def test_dropped_blocks_are_reused_only_after_the_next_commit(store, monkeypatch):
    tensor = add(store, "w", values())
    store.commit(1, {}, {})
    store.write(tensor, values(seed=1))
    extents = [tensor.current.extent, tensor.spare.extent]
    store.drop(tensor)
    assert "w" not in store.tensors
    writes = Writes(store, monkeypatch)
    fresh = [add(store, f"n{index}", values(seed=index)) for index in range(3)]
    assert not any(new.current.extent.overlaps(old) for new in fresh for old in extents)
    assert not any(start < old.end and old.offset < end
                   for start, end in writes.ranges for old in extents)  # fmt: skip
    store.commit(2, {}, {})
    later = [add(store, f"m{index}", values(seed=index)).current.extent for index in range(2)]
    assert sorted(later) == sorted(extents)


def test_a_renamed_tensor_is_committed_under_its_new_name(tmp_path, lanes, store):
    tensor = add(store, "built-0", values())
    store.rename(tensor, "layer.weight")
    store.commit(1, {}, {})
    store.close()
    again = Store(tmp_path, lanes)
    assert set(again.committed.tensors) == {"layer.weight"}
    again.close()


def test_a_state_that_is_not_json_leaves_the_previous_commit(tmp_path, lanes, store):
    tensor = add(store, "w", values())
    store.commit(1, {}, {})
    store.write(tensor, values(seed=1))
    with pytest.raises(TypeError, match="not JSON serializable"):
        store.commit(2, {}, {"extra": object()})
    assert not tensor.committed
    store.close()
    again = Store(tmp_path, lanes)
    assert again.committed.step == 1
    assert torch.equal(content(again, restored(again, "w", values())), values())
    again.close()


def test_the_store_is_its_owner_s_alone(store):
    store.commit(1, {}, {})
    assert stat.S_IMODE(store.directory.stat().st_mode) == 0o700
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in store.directory.iterdir()}
    assert modes == {"data": 0o600, "commit.json": 0o600, "lock": 0o600}


def test_a_store_left_open_to_others_is_closed_to_them(tmp_path, lanes):
    (tmp_path / "offload-store").mkdir(mode=0o755)
    store = Store(tmp_path, lanes)
    assert stat.S_IMODE(store.directory.stat().st_mode) == 0o700
    store.close()


def test_a_store_is_made_with_the_folders_above_it(tmp_path, lanes):
    store = Store(tmp_path / "a" / "b", lanes)
    assert store.directory == tmp_path / "a" / "b" / "offload-store"
    store.close()


@pytest.mark.parametrize("name", ["", "lock", "data", "commit.json"])
def test_symbolic_links_are_refused(tmp_path, lanes, store, name):
    add(store, "w", values())
    store.commit(1, {}, {})
    store.close()
    target = store.directory / name
    elsewhere = tmp_path / "elsewhere"
    target.rename(elsewhere)
    target.symlink_to(elsewhere)

    def files():  # but for the lock, which holds our number
        found = (path for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock")
        return {path: path.read_bytes() for path in found}

    before = files()
    with pytest.raises(TierIOError, match="symbolic link"):
        Store(tmp_path, lanes)
    assert files() == before


def test_close_may_come_twice_and_gives_the_lock_back(tmp_path, lanes, store):
    store.close()
    store.close()
    Store(tmp_path, lanes).close()


def test_the_record_is_plain_json_below_its_checksum(store):
    add(store, "w", values(3))
    store.commit(4, {"a": 1}, {"b": [None, 2.5]})
    digest, _, body = (store.directory / "commit.json").read_bytes().partition(b"\n")
    assert digest.decode() == xxhash.xxh3_64_hexdigest(body)
    record = json.loads(body)
    assert record["format"] == 1
    assert record["step"] == 4
    assert record["tensors"]["w"]["dtype"] == "float32"
    assert record["tensors"]["w"]["shape"] == [3]
