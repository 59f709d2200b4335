"""A damaged store says what is damaged, and never gives wrong bytes out as right ones."""

import errno
import json

import pytest
import torch
import xxhash
from store_files import read_commit

from offload.allocator.errors import (
    CapacityError,
    StoreCorruptError,
    StoreError,
    StoreInUseError,
    StoreMismatchError,
    TierIOError,
)
from offload.tiers.file import TierFile
from offload.tiers.filetier import FileTier
from offload.tiers.hostmem import PAGE
from offload.tiers.store import Store
from offload.tiers.testing import Memory, pattern

CHUNK = 2 * PAGE
COUNT = 5000  # three chunks, the last of them 3616 bytes


def values(seed=0):
    return torch.randn(COUNT, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def closed_store(tmp_path, lanes):
    """A folder with a store that holds step 3 of tensors ``a`` and ``b``."""
    store = Store(tmp_path, lanes)
    for seed, name in enumerate("ab"):
        store.write(store.add(name, torch.float32, (COUNT,), CHUNK), values(seed))
    store.commit(3, {}, {})
    store.close()
    return tmp_path


def change(path, edit):
    content = bytearray(path.read_bytes())
    edit(content)
    path.write_bytes(content)


def restored(store, name="a"):
    tensor = store.add(name, torch.float32, (COUNT,), CHUNK)
    store.restore(tensor)
    return tensor


@pytest.mark.parametrize("at", [0, 5, 16, 17, 60, -1])
def test_a_flipped_bit_in_the_record_is_corruption(closed_store, lanes, at):
    record = closed_store / "offload-store" / "commit.json"

    def flip(content):
        content[at] ^= 1

    change(record, flip)
    with pytest.raises(
        StoreCorruptError, match=rf"{record} \(\d+ bytes\) does not match"
    ) as raised:
        Store(closed_store, lanes)
    assert "resume='never'" in str(raised.value)


@pytest.mark.parametrize("keep", [0, 10, 17, 100])
def test_a_truncated_record_is_corruption(closed_store, lanes, keep):
    record = closed_store / "offload-store" / "commit.json"
    record.write_bytes(record.read_bytes()[:keep])
    with pytest.raises(StoreCorruptError, match="does not match its checksum"):
        Store(closed_store, lanes)


def test_a_record_of_another_version_is_a_mismatch(closed_store, lanes):
    record = closed_store / "offload-store" / "commit.json"
    body = json.dumps({"format": 99, "future": True}).encode()
    record.write_bytes(xxhash.xxh3_64_hexdigest(body).encode() + b"\n" + body)
    with pytest.raises(StoreMismatchError, match=r"has format 99, this version .* writes format 1"):
        Store(closed_store, lanes)


def test_a_record_that_can_not_be_read_says_so(closed_store, lanes):
    record = closed_store / "offload-store" / "commit.json"
    record.unlink()
    record.mkdir()
    with pytest.raises(TierIOError, match=r"can't read the commit record .*: Is a directory"):
        Store(closed_store, lanes)


@pytest.mark.parametrize("keep", [0, PAGE, 5 * PAGE])
def test_truncated_data_is_corruption(closed_store, lanes, keep):
    data = closed_store / "offload-store" / "data"
    data.write_bytes(data.read_bytes()[:keep])
    with pytest.raises(
        StoreCorruptError, match=rf"data holds {keep} bytes, but its record names byte \d+ for [ab]"
    ):
        Store(closed_store, lanes)


def test_missing_data_is_corruption(closed_store, lanes):
    (closed_store / "offload-store" / "data").unlink()
    with pytest.raises(StoreCorruptError, match="data holds 0 bytes"):
        Store(closed_store, lanes)


@pytest.mark.parametrize("what", ["record", "format", "data"])
def test_a_store_that_can_not_be_opened_is_not_kept_locked(closed_store, lanes, what):
    folder = closed_store / "offload-store"
    record = (folder / "commit.json").read_bytes()
    if what == "record":
        (folder / "commit.json").write_bytes(b"nonsense")
    elif what == "format":
        body = json.dumps({"format": 99}).encode()
        (folder / "commit.json").write_bytes(xxhash.xxh3_64_hexdigest(body).encode() + b"\n" + body)
    else:
        data = (folder / "data").read_bytes()
        (folder / "data").write_bytes(data[:PAGE])
    for _ in range(2):
        with pytest.raises(StoreError) as raised:
            Store(closed_store, lanes)
        assert not isinstance(raised.value, StoreInUseError)
    (folder / "commit.json").write_bytes(record)  # restored from a copy, as the error says
    if what == "data":
        (folder / "data").write_bytes(data)
    store = Store(closed_store, lanes)
    assert store.committed.step == 3
    store.verify(restored(store))
    store.close()


@pytest.mark.parametrize("what", ["record", "format", "data"])
def test_starting_anew_discards_what_is_damaged(closed_store, lanes, what):
    folder = closed_store / "offload-store"
    if what == "record":
        (folder / "commit.json").write_bytes(b"nonsense")
    elif what == "format":
        body = json.dumps({"format": 99}).encode()
        (folder / "commit.json").write_bytes(xxhash.xxh3_64_hexdigest(body).encode() + b"\n" + body)
    else:
        (folder / "data").write_bytes(b"")
    store = Store(closed_store, lanes, discard_damaged=True)
    assert store.committed is None
    store.write(store.add("a", torch.float32, (COUNT,), CHUNK), values(7))
    store.commit(1, {}, {})
    store.close()
    store = Store(closed_store, lanes)
    store.verify(restored(store))
    store.close()


def test_starting_anew_keeps_a_whole_commit_until_it_is_forgotten(closed_store, lanes):
    store = Store(closed_store, lanes, discard_damaged=True)
    assert store.committed.step == 3
    store.close()


@pytest.mark.parametrize(
    ("at", "chunk"),
    [(0, f"0..{CHUNK}"), (CHUNK, f"{CHUNK}..{2 * CHUNK}"), (-1, f"{2 * CHUNK}..20000")],
)
def test_a_flipped_bit_in_the_data_names_the_tensor_and_the_bytes(closed_store, lanes, at, chunk):
    store = Store(closed_store, lanes)
    tensor, other = restored(store, "a"), restored(store, "b")
    at += tensor.current.extent.offset + (4 * COUNT if at < 0 else 0)

    def flip(content):
        content[at] ^= 0x10

    change(store.directory / "data", flip)
    with pytest.raises(StoreCorruptError, match=rf"a is damaged in .*data: bytes {chunk} of it"):
        store.verify(tensor)
    store.verify(other)
    store.close()


def test_the_unused_rest_of_a_block_may_hold_anything(closed_store, lanes):
    store = Store(closed_store, lanes)
    tensor = restored(store, "a")

    def scribble(content):
        start = tensor.current.extent.offset + 4 * COUNT
        content[start : tensor.current.extent.end] = b"\xff" * (
            tensor.current.extent.nbytes - 4 * COUNT
        )

    change(store.directory / "data", scribble)
    store.verify(tensor)
    store.close()


def test_data_that_vanishes_while_it_is_read_is_an_error(closed_store, lanes):
    store = Store(closed_store, lanes)
    tensor = restored(store, "a")
    (store.directory / "data").write_bytes(b"")
    with pytest.raises(TierIOError, match="bytes early"):
        store.verify(tensor)
    store.close()


# Disks that are full, and folders that can't be written to.


def test_a_full_disk_is_met_when_room_is_taken(small_disk, lanes):
    store = Store(small_disk.folder, lanes)
    tensor = store.add("large", torch.uint8, (12 << 20,), 1 << 20)
    with pytest.raises(CapacityError) as raised:
        tensor.target(store.tier)
    message = str(raised.value)
    assert f"({12 << 20} bytes)" in message
    assert str(store.directory / "data") in message
    assert "nvme=" in message
    store.drop(tensor)
    small = store.add("small", torch.uint8, (1 << 20,), 1 << 20)
    store.write(small, torch.ones(1 << 20, dtype=torch.uint8))  # what fits still does
    store.commit(1, {}, {})
    store.verify(small)
    store.close()


def test_a_disk_that_is_nearly_full_is_used_to_the_end(small_disk, lanes):
    """Growth ahead of need must not fail where the need itself fits."""
    with FileTier(small_disk.folder, "data", lanes) as tier:
        blocks = [tier.allocate(1 << 20) for _ in range(7)]
        data = pattern(1 << 20)
        with Memory.of(data) as memory:
            for block in blocks:
                tier.write(block, memory.address).wait()
        with pytest.raises(CapacityError):
            tier.allocate(2 << 20)


def test_reserving_room_meets_a_full_disk_before_anything_is_written(small_disk, lanes):
    with FileTier(small_disk.folder, None, lanes) as tier:
        with pytest.raises(CapacityError, match=r"scratch in .* needs 16.00 MiB more"):
            tier.reserve_room(16 << 20)
        tier.reserve_room(4 << 20)


def test_writing_past_the_room_of_the_disk_is_an_error(small_disk):
    with TierFile(small_disk.folder, "data") as file, Memory(16 << 20) as memory:
        with pytest.raises(
            TierIOError, match=r"write of \d+ bytes at byte \d+ of .*data"
        ) as raised:
            file.write(0, memory.address, 16 << 20)
        assert raised.value.errno in {errno.ENOSPC, errno.EFBIG}


def test_a_disk_that_fills_up_mid_run_keeps_the_last_commit(small_disk, lanes):
    store = Store(small_disk.folder, lanes)
    tensor = store.add("a", torch.float32, (COUNT,), CHUNK)
    store.write(tensor, values(1))
    store.commit(1, {}, {})
    store.write(tensor, values(2))
    small_disk.fill()
    with pytest.raises(
        TierIOError, match=r"can't write the commit record .* stays valid"
    ) as raised:
        store.commit(2, {}, {})
    assert raised.value.errno in {errno.ENOSPC, errno.EFBIG}
    assert read_commit(small_disk.folder) == (1, {"a": values(1).numpy().tobytes()})
    small_disk.free()
    store.commit(2, {}, {})
    assert read_commit(small_disk.folder) == (2, {"a": values(2).numpy().tobytes()})
    store.close()


def test_a_folder_that_can_not_be_written_to_says_so(read_only_folder, lanes):
    with pytest.raises(TierIOError, match="can't make the store directory") as raised:
        Store(read_only_folder, lanes)
    assert raised.value.errno == errno.EACCES
    assert "nvme=" in str(raised.value)
    with pytest.raises(TierIOError, match="for writing: Permission denied"):
        TierFile(read_only_folder, "data")
    with pytest.raises(TierIOError, match="for writing: Permission denied"):
        TierFile(read_only_folder, None)


def test_a_file_where_the_store_should_be_says_so(tmp_path, lanes):
    (tmp_path / "offload-store").write_bytes(b"")
    with pytest.raises(TierIOError, match="can't make the store directory"):
        Store(tmp_path, lanes)
