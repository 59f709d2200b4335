"""The contract of ``Tier`` as tests."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import ClassVar

import pytest

from offload.allocator.errors import CapacityError, OffloadError, StaleBlockError
from offload.tiers.base import Block, Tier
from offload.tiers.journal import Label
from offload.tiers.testing.memory import Memory, get, pattern, put


class TierContract(ABC):
    """What every tier does. ``bounded`` backends refuse what exceeds ``spec.capacity``."""

    bounded: ClassVar[bool] = True
    large_nbytes: ClassVar[int] = (16 << 20) + 4097  # more than one request of any backend

    @abstractmethod
    def open_tier(self, directory: Path) -> AbstractContextManager[Tier]:
        """A new, empty tier with room for ``4 * large_nbytes``; it may keep files here."""

    @abstractmethod
    def peek(self, tier: Tier, block: Block, offset: int, nbytes: int) -> bytes:
        """Bytes of ``block``, read without the tier's own methods."""

    @abstractmethod
    def poke(self, tier: Tier, block: Block, offset: int, data: bytes) -> None:
        """Change bytes of ``block`` without the tier's own methods."""

    @pytest.fixture
    def tier(self, tmp_path: Path) -> Iterator[Tier]:
        """The tier under test."""
        with self.open_tier(tmp_path) as tier:
            yield tier

    def test_spec_tells_what_the_tier_is(self, tier: Tier) -> None:
        spec = tier.spec
        assert spec.name
        assert spec.kind in {"host", "file", "device"}
        assert spec.align > 0
        assert spec.align & (spec.align - 1) == 0
        assert spec.capacity >= (4 * self.large_nbytes if self.bounded else 0)

    @pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 4097, 1 << 20])
    def test_a_block_holds_what_was_asked_at_an_aligned_offset(
        self, tier: Tier, nbytes: int
    ) -> None:
        block = tier.allocate(nbytes)
        assert block.nbytes == nbytes
        assert block.tier is tier
        assert block.extent.nbytes >= nbytes
        assert block.extent.offset % tier.spec.align == 0

    @pytest.mark.parametrize("nbytes", [1, 511, 4095, 4096, 4097, 3 * 4096 + 7, 1 << 20])
    def test_write_puts_exactly_these_bytes(self, tier: Tier, nbytes: int) -> None:
        block, data = tier.allocate(nbytes), pattern(nbytes)
        put(tier, block, data)
        assert self.peek(tier, block, 0, nbytes) == data

    @pytest.mark.parametrize("nbytes", [1, 511, 4095, 4096, 4097, 3 * 4096 + 7, 1 << 20])
    def test_read_gets_exactly_these_bytes(self, tier: Tier, nbytes: int) -> None:
        block, data = tier.allocate(nbytes), pattern(nbytes, seed=2)
        self.poke(tier, block, 0, data)
        assert get(tier, block, offset=0, nbytes=nbytes) == data

    def test_a_transfer_larger_than_one_request_is_whole(self, tier: Tier) -> None:
        block, data = tier.allocate(self.large_nbytes), pattern(self.large_nbytes)
        put(tier, block, data)
        assert self.peek(tier, block, 0, len(data)) == data
        assert get(tier, block, offset=0, nbytes=len(data)) == data

    @pytest.mark.parametrize(
        ("offset", "nbytes"), [(0, 1), (1, 1), (1, 4096), (4095, 2), (4096, 4096), (5000, 9000)]
    )
    def test_a_partial_write_leaves_the_rest_alone(
        self, tier: Tier, offset: int, nbytes: int
    ) -> None:
        whole = 16384
        block, before = tier.allocate(whole), pattern(whole, seed=3)
        self.poke(tier, block, 0, before)
        data = pattern(nbytes, seed=4)
        put(tier, block, data, offset=offset)
        expected = before[:offset] + data + before[offset + nbytes :]
        assert self.peek(tier, block, 0, whole) == expected

    @pytest.mark.parametrize(
        ("offset", "nbytes"), [(0, 1), (1, 1), (1, 4096), (4095, 2), (4096, 4096), (5000, 9000)]
    )
    def test_a_partial_read_starts_at_its_offset(
        self, tier: Tier, offset: int, nbytes: int
    ) -> None:
        block, before = tier.allocate(16384), pattern(16384, seed=5)
        self.poke(tier, block, 0, before)
        assert get(tier, block, offset=offset, nbytes=nbytes) == before[offset : offset + nbytes]

    @pytest.mark.parametrize("shift", [1, 512, 2049])
    def test_memory_may_have_any_alignment(self, tier: Tier, shift: int) -> None:
        block, data = tier.allocate(9000), pattern(9000, seed=6)
        put(tier, block, data, shift=shift)
        assert self.peek(tier, block, 0, 9000) == data
        assert get(tier, block, offset=0, nbytes=9000, shift=shift) == data

    def test_a_read_writes_no_byte_beyond_its_target(self, tier: Tier) -> None:
        block = tier.allocate(4096)
        self.poke(tier, block, 0, pattern(4096))
        with Memory.of(bytes(4096)) as memory:
            tier.read(block, memory.address, nbytes=100).wait()
            assert memory.data() == pattern(4096)[:100] + bytes(3996)

    def test_without_nbytes_the_rest_of_the_block_moves(self, tier: Tier) -> None:
        block, data = tier.allocate(9000), pattern(9000, seed=7)
        with Memory.of(data) as memory:
            transfer = tier.write(block, memory.address)
            transfer.wait()
            assert transfer.nbytes == 9000
        with Memory(8000) as memory:
            transfer = tier.read(block, memory.address, offset=1000)
            transfer.wait()
            assert transfer.nbytes == 8000
            assert memory.data() == data[1000:]

    def test_moving_no_bytes_is_done_at_once(self, tier: Tier) -> None:
        block = tier.allocate(100)
        self.poke(tier, block, 0, pattern(100))
        with Memory(1) as memory:
            for transfer in (
                tier.write(block, memory.address, nbytes=0),
                tier.read(block, memory.address, offset=100, nbytes=0),
            ):
                assert transfer.done()
                transfer.wait()
        assert self.peek(tier, block, 0, 100) == pattern(100)

    def test_living_blocks_never_share_bytes(self, tier: Tier) -> None:
        sizes = [1, 5000, 4096, 1 << 20, 12345, 4095]
        blocks = [tier.allocate(nbytes) for nbytes in sizes]
        for index, block in enumerate(blocks):
            put(tier, block, pattern(block.nbytes, seed=index))
        for index, block in enumerate(blocks):
            assert self.peek(tier, block, 0, block.nbytes) == pattern(block.nbytes, seed=index)

    def test_many_transfers_in_flight_end_in_any_order(self, tier: Tier) -> None:
        blocks = [tier.allocate(300_000) for _ in range(12)]
        memories = [Memory.of(pattern(300_000, seed=index)) for index in range(12)]
        transfers = [
            tier.write(block, memory.address)
            for block, memory in zip(blocks, memories, strict=True)
        ]
        for transfer in reversed(transfers):
            transfer.wait()
            assert transfer.done()
        for memory in memories:
            memory.__exit__()
        for index, block in enumerate(blocks):
            assert self.peek(tier, block, 0, 300_000) == pattern(300_000, seed=index)

    def test_a_transfer_carries_its_label(self, tier: Tier) -> None:
        label = Label("layer.0", "weight", "here", "there")
        block = tier.allocate(4096)
        with Memory.of(bytes(4096)) as memory:
            for transfer in (
                tier.write(block, memory.address, label=label),
                tier.read(block, memory.address, label=label),
            ):
                transfer.wait()
                assert transfer.label == label

    @pytest.mark.parametrize(("offset", "nbytes"), [(-1, 1), (0, -1), (0, 1 << 20), (1 << 20, 1)])
    def test_a_range_outside_the_block_is_refused(
        self, tier: Tier, offset: int, nbytes: int
    ) -> None:
        block = tier.allocate(5000)
        with Memory(4096) as memory:
            for move in (tier.read, tier.write):
                with pytest.raises(ValueError, match=r"leave a block of \d+ bytes"):
                    move(block, memory.address, offset=offset, nbytes=nbytes)

    def test_a_released_block_can_not_be_used(self, tier: Tier) -> None:
        block = tier.allocate(5000)
        block.release()
        with Memory(4096) as memory:
            for move in (tier.read, tier.write):
                with pytest.raises(StaleBlockError, match="was released"):
                    move(block, memory.address, nbytes=1)
        with pytest.raises(StaleBlockError, match="5000 bytes"):
            block.release()

    def test_a_block_is_released_by_its_context(self, tier: Tier) -> None:
        with tier.allocate(10) as block:
            before = block.released
        assert (before, block.released) == (False, True)
        with tier.allocate(10) as block:
            block.release()  # early is fine too

    def test_the_next_owner_of_the_bytes_has_a_generation_of_its_own(self, tier: Tier) -> None:
        first = tier.allocate(4096)
        first.release()
        second = tier.allocate(4096)
        assert second.generation != first.generation
        put(tier, second, pattern(4096))
        with pytest.raises(StaleBlockError):
            first.check(0, 1)

    def test_released_room_is_used_again(self, tier: Tier) -> None:
        for index in range(40):  # four times what the tier must hold at once
            with tier.allocate(2 * self.large_nbytes // 5) as block:
                put(tier, block, pattern(100, seed=index), offset=index)
        if not self.bounded:
            assert tier.allocate(1).extent.offset < 4 * self.large_nbytes

    def test_a_full_tier_says_what_is_missing(self, tier: Tier) -> None:
        if not self.bounded:
            assert tier.allocate(tier.spec.capacity + 4096).nbytes > tier.spec.capacity
            return
        block = tier.allocate(self.large_nbytes)
        whole = tier.spec.capacity // tier.spec.align * tier.spec.align
        with pytest.raises(CapacityError, match=rf"{whole} bytes"):
            tier.allocate(whole)
        block.release()
        assert tier.allocate(whole).nbytes == whole

    def test_close_ends_the_transfers_and_may_come_twice(self, tier: Tier) -> None:
        block, data = tier.allocate(self.large_nbytes), pattern(self.large_nbytes)
        with Memory.of(data) as memory:
            transfers = [tier.write(block, memory.address) for _ in range(4)]
            tier.close()
            assert all(transfer.done() for transfer in transfers)
            for transfer in transfers:
                transfer.wait()
        tier.close()

    def test_a_closed_tier_moves_nothing(self, tier: Tier) -> None:
        block = tier.allocate(4096)
        tier.close()
        with Memory(4096) as memory:
            for move in (tier.read, tier.write):
                with pytest.raises(OffloadError):
                    move(block, memory.address).wait()
        block.release()  # owners may outlive the tier
