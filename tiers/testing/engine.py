"""The contract of ``FileEngine`` as tests."""

import contextlib
import errno
import os
import resource
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from offload.allocator.errors import TierIOError
from offload.tiers.engines.base import FileEngine, OpenFile
from offload.tiers.file import TierFile
from offload.tiers.hostmem import PAGE
from offload.tiers.testing.memory import Memory, pattern

_FILE_NBYTES = 256 * PAGE
_SIZES = [PAGE, 3 * PAGE, 65 * PAGE, _FILE_NBYTES]


class EngineContract(ABC):
    """What every engine and every wrapper of one does.

    The bytes of the file are written and seen by the kernel's own calls, not by the engine.
    """

    @abstractmethod
    def open_engine(self, file: OpenFile) -> FileEngine:
        """The engine under test, for ``file``."""

    def directory(self, default: Path) -> Path:
        """Where the file lies: another file system than the default's, if need be."""
        return default

    @pytest.fixture
    def file(self, tmp_path: Path) -> Iterator[TierFile]:
        """An unlinked file of patterned bytes."""
        with TierFile(self.directory(tmp_path), None, self.open_engine) as file:
            file.grow(_FILE_NBYTES)
            os.pwrite(file.fd, pattern(_FILE_NBYTES), 0)
            os.fdatasync(file.fd)
            yield file

    def test_it_has_a_name(self, file: TierFile) -> None:
        assert file.engine.name

    @pytest.mark.parametrize("nbytes", _SIZES)
    def test_a_read_fills_memory_with_the_file_s_bytes(self, file: TierFile, nbytes: int) -> None:
        offset = _FILE_NBYTES - nbytes
        with Memory(nbytes) as memory:
            file.read(offset, memory.address, nbytes)
            assert memory.data() == pattern(_FILE_NBYTES)[offset:]

    @pytest.mark.parametrize("nbytes", _SIZES)
    def test_a_write_changes_exactly_its_range(self, file: TierFile, nbytes: int) -> None:
        offset = (_FILE_NBYTES - nbytes) // 2 // PAGE * PAGE
        data, before = pattern(nbytes, seed=2), pattern(_FILE_NBYTES)
        with Memory.of(data) as memory:
            file.write(offset, memory.address, nbytes)
            assert memory.data() == data
        found = os.pread(file.fd, 2 * _FILE_NBYTES, 0)
        assert found == before[:offset] + data + before[offset + nbytes :]

    def test_a_read_writes_no_byte_beyond_its_target(self, file: TierFile) -> None:
        with Memory.of(pattern(3 * PAGE, seed=3)) as memory:
            file.read(0, memory.address + PAGE, PAGE)
            around = pattern(3 * PAGE, seed=3)
            expected = around[:PAGE] + pattern(_FILE_NBYTES)[:PAGE] + around[2 * PAGE :]
            assert memory.data() == expected

    def test_a_request_of_many_mebibytes_is_whole(self, file: TierFile) -> None:
        nbytes = (17 << 20) + PAGE
        file.grow(_FILE_NBYTES + nbytes)
        data = pattern(nbytes, seed=4)
        with Memory.of(data) as memory:
            file.write(_FILE_NBYTES, memory.address, nbytes)
        with Memory(nbytes) as memory:
            file.read(_FILE_NBYTES, memory.address, nbytes)
            assert memory.data() == data
        assert os.pread(file.fd, nbytes, _FILE_NBYTES) == data

    def test_counts_are_those_of_the_bytes_that_moved(self, file: TierFile) -> None:
        with Memory(4 * PAGE) as memory:
            moved = file.engine.read(PAGE, memory.address, 4 * PAGE)
            assert 0 < moved <= 4 * PAGE
            assert memory.data()[:moved] == pattern(_FILE_NBYTES)[PAGE : PAGE + moved]
            moved = file.engine.write(0, memory.address, 4 * PAGE)
            assert 0 < moved <= 4 * PAGE
            assert os.pread(file.fd, moved, 0) == memory.data()[:moved]

    def test_a_read_comes_short_at_the_end_and_gets_nothing_beyond(self, file: TierFile) -> None:
        with Memory(4 * PAGE) as memory:
            moved = file.engine.read(_FILE_NBYTES - 2 * PAGE, memory.address, 4 * PAGE)
            assert 0 < moved <= 2 * PAGE
            assert memory.data()[:moved] == pattern(_FILE_NBYTES)[-2 * PAGE :][:moved]
            assert file.engine.read(_FILE_NBYTES, memory.address, PAGE) == 0
            with pytest.raises(TierIOError, match=f"ends at byte {_FILE_NBYTES}, {PAGE} bytes"):
                file.read(_FILE_NBYTES - PAGE, memory.address, 2 * PAGE)

    def test_an_odd_end_of_the_file_is_met_exactly(self, file: TierFile) -> None:
        os.ftruncate(file.fd, PAGE + 100)
        with Memory(4 * PAGE) as memory, pytest.raises(TierIOError, match=f"byte {PAGE + 100}, "):
            file.read(0, memory.address, 4 * PAGE)

    def test_threads_may_call_at_once(self, file: TierFile) -> None:
        nbytes = 16 * PAGE
        numbers = range(_FILE_NBYTES // nbytes)

        def rewrite(number: int) -> bytes:
            data = pattern(nbytes, seed=number)
            with Memory.of(data) as memory:
                file.write(number * nbytes, memory.address, nbytes)
            with Memory(nbytes) as memory:
                file.read(number * nbytes, memory.address, nbytes)
                return memory.data()

        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(rewrite, numbers))
        assert found == [pattern(nbytes, seed=number) for number in numbers]
        assert os.pread(file.fd, _FILE_NBYTES, 0) == b"".join(found)

    def test_an_error_of_the_kernel_is_raised_with_its_number(self, file: TierFile) -> None:
        with Memory(PAGE) as memory, _files_limited_to(_FILE_NBYTES):
            with pytest.raises(OSError) as raised:  # noqa: PT011  (its number is what counts)
                file.engine.write(_FILE_NBYTES, memory.address, PAGE)
            assert raised.value.errno == errno.EFBIG
            with pytest.raises(TierIOError, match=f"write of {PAGE} bytes at byte {_FILE_NBYTES}"):
                file.write(_FILE_NBYTES, memory.address, PAGE)
        assert os.fstat(file.fd).st_size == _FILE_NBYTES

    def test_a_closed_engine_moves_nothing_and_may_be_closed_again(self, file: TierFile) -> None:
        with Memory.of(pattern(PAGE, seed=5)) as memory:
            file.write(0, memory.address, PAGE)
            file.engine.close()
            file.engine.close()
            for move in (file.engine.read, file.engine.write):
                with pytest.raises(OSError, match="Bad file descriptor"):
                    move(PAGE, memory.address, PAGE)
            assert memory.data() == pattern(PAGE, seed=5)
        assert os.pread(file.fd, PAGE, PAGE) == pattern(_FILE_NBYTES)[PAGE : 2 * PAGE]


@contextlib.contextmanager
def _files_limited_to(nbytes: int) -> Iterator[None]:
    """No file may be written beyond ``nbytes`` meanwhile."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
