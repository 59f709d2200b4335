"""The durable home of weights and optimizer states: the swap file that is the checkpoint.

[Note: alternating slots] A tensor has up to two blocks. ``current`` holds its newest bytes; when
those are committed, the next version is written to the other block, so the committed one stays
whole until a newer commit record stands. A commit is: flush the data, then replace the record
(``commit``). A crash at any moment leaves one record whose bytes are all there.
"""

import base64
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash

from offload.allocator.errors import StoreCorruptError, StoreError, StoreMismatchError
from offload.allocator.extent import Extent
from offload.tiers.bandwidth import Measure, measure_paths
from offload.tiers.base import Block
from offload.tiers.commit import CommitRecord, remove_file, write_record
from offload.tiers.filetier import FileTier, Lanes
from offload.tiers.home import StoreHome
from offload.tiers.hostmem import PAGE, page_ceil
from offload.tiers.journal import Label
from offload.tiers.memory import HostBuffer, memory_at


def checksum(address: int, nbytes: int) -> int:
    """xxh3-64 of the bytes at ``address``; releases the GIL."""
    return xxhash.xxh3_64_intdigest(memory_at(address, nbytes))


class StoredTensor:
    """A tensor in the store: its blocks and one checksum per ``chunk_nbytes`` of its bytes."""

    __slots__ = (
        "checksums",
        "chunk_nbytes",
        "committed",
        "current",
        "dtype",
        "name",
        "nbytes",
        "shape",
        "spare",
    )

    def __init__(
        self, name: str, dtype: torch.dtype, shape: tuple[int, ...], chunk_nbytes: int
    ) -> None:
        self.name = name
        self.dtype = dtype
        self.shape = shape
        self.nbytes = torch.Size(shape).numel() * dtype.itemsize
        self.chunk_nbytes = chunk_nbytes
        self.current: Block | None = None
        self.spare: Block | None = None
        self.committed = False
        self.checksums: list[int] = []

    def chunks(self) -> list[tuple[int, int]]:
        """(offset, nbytes) of each chunk that has a checksum of its own."""
        return [
            (at, min(self.chunk_nbytes, self.nbytes - at))
            for at in range(0, self.nbytes, self.chunk_nbytes)
        ]

    def target(self, tier: FileTier) -> Block:
        """The block to write the next version to ([Note: alternating slots])."""
        if self.current is not None and not self.committed:
            return self.current
        if self.spare is None:
            self.spare = tier.allocate(self.nbytes)
        return self.spare

    def publish(self, block: Block, checksums: list[int]) -> None:
        """Make ``block``, fully written, the current version."""
        if block is self.spare:
            self.current, self.spare = block, self.current
        self.current = block
        self.committed = False
        self.checksums = checksums

    def record(self) -> dict[str, Any]:
        """The tensor's entry in the commit record."""
        assert self.current is not None
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
            "offset": self.current.extent.offset,
            "extent_nbytes": self.current.extent.nbytes,
            "chunk_nbytes": self.chunk_nbytes,
            "checksums": [f"{value:016x}" for value in self.checksums],
        }


class Store:
    """Tensors by name in ``directory/offload-store``, under an exclusive lock.

    Over several directories the data is striped; the first one holds the commit record, which
    says how. A store is continued with the layout that it was made with.

    Args:
        directories: one, or several in a fixed order; created where missing. The store's own
            folder in each gets mode 0700, files 0600.
        lanes: the links that its tier uses, made for as many paths.
        discard_damaged: start anew where the last commit can't be read, or is spread over other
            directories (``resume="never"``).
        measure: how the rates of several directories are found when a striped store is made.

    Raises:
        StoreInUseError: another process holds it.
        StoreCorruptError: the commit record is damaged, or data that it names is missing.
        StoreMismatchError: another version of Offload wrote the commit record, or directories
            are missing, swapped or of another store.
        TierIOError: a directory can't be written, or is not Offload's.
        CapacityError: a disk has no room for the measurement.
    """

    def __init__(
        self,
        directories: Path | Sequence[Path],
        lanes: Lanes,
        *,
        discard_damaged: bool = False,
        measure: Measure = measure_paths,
    ) -> None:
        given = [directories] if isinstance(directories, Path) else directories
        self._home = StoreHome(given, lanes, measure)
        self.directory = self._home.directory
        self.tensors: dict[str, StoredTensor] = {}
        self._closed = False
        self._condemned: list[Block] = []
        # Blocks of the last commit that no tensor has adopted yet: nobody may reuse them.
        self._held: dict[str, Block] = {}
        try:
            try:
                self._open()
            except StoreError:
                if not discard_damaged:
                    raise
                self._home.discard()
                self._open()
        except BaseException:
            self._home.close()
            raise

    def _open(self) -> None:
        self.committed = self._home.open()
        self.tier = self._home.open_data()
        try:
            self._held = self._hold_committed()
        except BaseException:
            self.tier.close()
            raise

    def open_scratch(self, *, spare_nbytes: int = 0) -> FileTier:
        """A tier of unlinked files on the same paths, laid out as the store is.

        Args:
            spare_nbytes: of each path's disk that it leaves free.

        Raises:
            TierIOError: a file can't be made.
        """
        return self._home.open_tier(None, spare_nbytes=spare_nbytes)

    def _hold_committed(self) -> dict[str, Block]:
        if self.committed is None:
            return {}
        held: dict[str, Block] = {}
        for name, entry in self.committed.tensors.items():
            extent = Extent(entry["offset"], entry["extent_nbytes"])
            if extent.end > self.tier.arena.capacity:
                raise StoreCorruptError(
                    f"{self.tier.file.label} holds {self.tier.arena.capacity} bytes, but its "
                    f"record names byte {extent.end} for {name}: start anew with resume='never'"
                )
            held[name] = self.tier.adopt(extent, _record_nbytes(entry))
        return held

    def forget(self) -> None:
        """Give up the last commit: the store starts anew (``resume="never"``)."""
        remove_file(self._home.record)
        for block in self._held.values():
            block.release()
        self._held = {}
        self.committed = None

    def add(
        self, name: str, dtype: torch.dtype, shape: tuple[int, ...], chunk_nbytes: int
    ) -> StoredTensor:
        """A new tensor without any bytes yet.

        Raises:
            ValueError: ``chunk_nbytes`` is not a positive multiple of the page size.
        """
        if chunk_nbytes <= 0 or chunk_nbytes % PAGE:
            raise ValueError(
                f"chunks of {name} must be whole pages of {PAGE} bytes, not {chunk_nbytes} bytes"
            )
        tensor = StoredTensor(name, dtype, shape, chunk_nbytes)
        self.tensors[name] = tensor
        return tensor

    def rename(self, tensor: StoredTensor, name: str) -> None:
        """Give a tensor another name (one built before its model had names)."""
        del self.tensors[tensor.name]
        tensor.name = name
        self.tensors[name] = tensor

    def drop(self, tensor: StoredTensor) -> None:
        """Forget a tensor; its blocks are reused only after the next commit."""
        del self.tensors[tensor.name]
        self._condemned += [block for block in (tensor.current, tensor.spare) if block is not None]

    def restore(self, tensor: StoredTensor) -> None:
        """Make the committed bytes of ``tensor.name`` its current version.

        Raises:
            StoreMismatchError: the commit holds no such tensor, or one of another shape.
        """
        assert self.committed is not None
        entry = self.committed.tensors.get(tensor.name)
        expected = {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
        }
        if entry is None or {key: entry[key] for key in expected} != expected:
            found = "nothing of that name" if entry is None else f"{entry['dtype']}{entry['shape']}"
            raise StoreMismatchError(
                f"the store {self.directory} belongs to another model: {tensor.name} is "
                f"{expected['dtype']}{expected['shape']} here, the store has {found}; "
                "pass another directory with nvme=, or resume='never' to discard the store"
            )
        # Versions written before the resume was decided go; committed bytes take their place.
        for block in {tensor.current, tensor.spare} - {None}:
            assert block is not None
            block.release()
        tensor.spare = None
        tensor.current = self._held.pop(tensor.name)
        tensor.chunk_nbytes = entry["chunk_nbytes"]
        tensor.checksums = [int(value, 16) for value in entry["checksums"]]
        tensor.committed = True

    def release_unclaimed(self) -> None:
        """Free blocks of the last commit that nothing restored (after a full restore)."""
        for block in self._held.values():
            block.release()
        self._held = {}

    def write(self, tensor: StoredTensor, source: torch.Tensor) -> None:
        """Write ``source`` (same bytes as ``tensor``, contiguous) as the next version; blocks.

        Staged chunk by chunk, so that no second copy of a large tensor ever exists.
        """
        flat = _bytes_of(source)
        self.fill(tensor, lambda at, staged: staged.copy_(flat[at : at + staged.numel()]))

    def fill(self, tensor: StoredTensor, make: Callable[[int, torch.Tensor], object]) -> None:
        """Write the next version of ``tensor``, made in memory chunk by chunk; blocks.

        Args:
            make: fills the 1-D uint8 tensor that it is given with the bytes from ``at`` on.
        """
        target = tensor.target(self.tier)
        label = Label(tensor.name, role_of(tensor), "host", self.tier.spec.name)
        sums: list[int] = []
        staging = HostBuffer(max(1, min(tensor.chunk_nbytes, tensor.nbytes)))
        try:
            for at, nbytes in tensor.chunks():
                make(at, staging.tensor(torch.uint8, (nbytes,)))
                sums.append(checksum(staging.address, nbytes))
                padded = page_ceil(nbytes)
                self.tier.write(
                    target, staging.address, offset=at, nbytes=padded, label=label
                ).wait()
        finally:
            staging.release()
        tensor.publish(target, sums)

    def read_into(self, tensor: StoredTensor, target: torch.Tensor) -> None:
        """Fill ``target`` (contiguous) with the current version; blocks, checks nothing."""
        assert tensor.current is not None
        assert target.is_contiguous()
        label = Label(tensor.name, role_of(tensor), self.tier.spec.name, "host")
        flat = target.detach().reshape(-1).view(torch.uint8)
        staging = HostBuffer(max(1, min(tensor.chunk_nbytes, tensor.nbytes)))
        try:
            for at, nbytes in tensor.chunks():
                padded = page_ceil(nbytes)
                self.tier.read(
                    tensor.current, staging.address, offset=at, nbytes=padded, label=label
                ).wait()
                flat[at : at + nbytes].copy_(staging.tensor(torch.uint8, (nbytes,)))
        finally:
            staging.release()

    def verify(self, tensor: StoredTensor) -> None:
        """Read ``tensor`` back and compare its checksums; blocks.

        Raises:
            StoreCorruptError: naming the first chunk that differs.
        """
        assert tensor.current is not None
        label = Label(tensor.name, role_of(tensor), self.tier.spec.name, "host")
        staging = HostBuffer(max(1, min(tensor.chunk_nbytes, tensor.nbytes)))
        try:
            for (at, nbytes), expected in zip(tensor.chunks(), tensor.checksums, strict=True):
                padded = page_ceil(nbytes)
                self.tier.read(
                    tensor.current, staging.address, offset=at, nbytes=padded, label=label
                ).wait()
                if checksum(staging.address, nbytes) != expected:
                    raise StoreCorruptError(
                        f"{tensor.name} is damaged in {self.tier.file.label}: bytes "
                        f"{at}..{at + nbytes} of it do not match their checksum; restore the "
                        "store from a copy, or start anew with resume='never'"
                    )
        finally:
            staging.release()

    def commit(self, step: int, signature: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Make the current versions of all tensors the durable state of ``step``.

        Raises:
            TierIOError: the disk could not take it; the previous commit stays.
        """
        self.tier.file.sync()
        write_record(
            self._home.record,
            CommitRecord(
                step=step,
                signature=signature,
                tensors={name: tensor.record() for name, tensor in self.tensors.items()},
                state=state,
                layout=self._home.layout.to_json() if self._home.layout is not None else None,
            ),
        )
        for tensor in self.tensors.values():
            tensor.committed = True
        condemned, self._condemned = self._condemned, []
        for block in condemned:
            block.release()

    def close(self) -> None:
        """Give the lock back; safe to call twice. Mapped tensors stay readable."""
        if not self._closed:
            self._closed = True
            self.tier.close()
            self._home.close()


def role_of(tensor: StoredTensor) -> str:
    """What the tensor is in the record of moves."""
    return "state" if "#" in tensor.name else "weight"


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The values of ``tensor`` in order, as 1-D uint8; shares memory where it can."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    return plain.contiguous().reshape(-1).view(torch.uint8)


def pack_tensor(tensor: torch.Tensor) -> dict[str, Any]:
    """A small tensor as JSON, bit for bit."""
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "data": base64.b64encode(_bytes_of(tensor).numpy().tobytes()).decode(),
    }


def unpack_tensor(packed: Mapping[str, Any]) -> torch.Tensor:
    """The tensor that ``pack_tensor`` packed."""
    data = bytearray(base64.b64decode(packed["data"]))
    dtype: torch.dtype = getattr(torch, packed["dtype"])
    if not data:
        return torch.empty(packed["shape"], dtype=dtype)
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(packed["shape"]).clone()


def _record_nbytes(entry: Mapping[str, Any]) -> int:
    dtype: torch.dtype = getattr(torch, entry["dtype"])
    return torch.Size(entry["shape"]).numel() * dtype.itemsize
