"""Buffers, tensors over them, and what the process holds of memory."""

import subprocess
import sys

import pytest

from mappings import is_mapped
from offload.tiers import hostmem
from offload.tiers.hostmem import HUGE_PAGE, PAGE
from offload.tiers.memory import HostBuffer, tensor_at


@pytest.mark.own_process
def test_the_resident_set_falls_when_a_buffer_is_released():
    nbytes = 64 << 20
    before, _ = hostmem.resident_nbytes()
    buffer = HostBuffer(nbytes)
    buffer.view()[:] = b"\x01" * nbytes
    full, _ = hostmem.resident_nbytes()
    buffer.release()
    after, _ = hostmem.resident_nbytes()
    assert full - before > nbytes * 7 // 8
    assert full - after > nbytes * 7 // 8


@pytest.mark.own_process
def test_the_peak_stays_when_the_resident_set_has_fallen():
    resident, _ = hostmem.resident_nbytes()
    peak = hostmem.peak_resident_nbytes()
    nbytes = max(peak - resident, 0) + (32 << 20)
    buffer = HostBuffer(nbytes)
    buffer.view()[:] = bytes(nbytes)
    buffer.release()
    assert hostmem.peak_resident_nbytes() - peak > 16 << 20


FREED = """
from offload.tiers import hostmem
hostmem.return_freed_memory()
large = bytearray(24 << 20)
del large  # glibc now raises its threshold, unless told not to
blocks = [bytearray(1 << 20) for _ in range(64)]
pin = bytearray(200 << 10)  # keeps the heap's end where it is
full = hostmem.resident_nbytes()[0]
del blocks
print(full - hostmem.resident_nbytes()[0])
"""


def test_freed_memory_goes_back_to_the_kernel():
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 60 << 20


def test_trim_heap_may_be_called_at_any_time():
    hostmem.trim_heap()
    hostmem.trim_heap()


@pytest.mark.own_process
@pytest.mark.parametrize("nbytes", [1, PAGE, HUGE_PAGE, HUGE_PAGE + 1])
def test_a_buffer_has_whole_pages_aligned_for_its_size(nbytes):
    buffer = HostBuffer(nbytes)
    assert buffer.nbytes == hostmem.page_ceil(nbytes)
    assert buffer.address % (HUGE_PAGE if buffer.nbytes >= HUGE_PAGE else PAGE) == 0
    assert len(buffer.view()) == buffer.nbytes
    buffer.view(1, 3)[:] = b"abc"
    assert bytes(buffer.view(0, 5)) == b"\0abc\0"
    buffer.release()
    buffer.release()  # once is enough, twice is safe
    assert not is_mapped(buffer.address)


def test_a_tensor_over_a_buffer_shares_its_bytes():
    import torch

    buffer = HostBuffer(PAGE)
    tensor = buffer.tensor(torch.float32, (2, 3), offset=64)
    tensor.copy_(torch.arange(6.0).view(2, 3))
    assert bytes(buffer.view(64, 24)) == tensor.numpy().tobytes()
    assert tensor.is_contiguous()
    assert tensor.data_ptr() == buffer.address + 64
    buffer.release()


@pytest.mark.own_process
def test_released_memory_of_a_tensor_lives_as_long_as_its_last_view():
    import torch

    address = hostmem.map_anonymous(HUGE_PAGE)
    tensor = tensor_at(
        address, torch.float32, (4, 4), on_release=(address, hostmem.page_ceil(HUGE_PAGE))
    )
    tensor.fill_(3)
    view = tensor[1:, 2].t()
    del tensor
    assert view.sum() == 9
    assert is_mapped(address)
    del view
    assert not is_mapped(address)
