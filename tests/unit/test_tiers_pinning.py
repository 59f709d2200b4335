"""Pinning: registration in pieces, errors that are read and cleared, and refusals that say why."""

import ctypes
import errno
import itertools
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from offload.allocator.errors import TierIOError
from offload.tiers import pinning
from offload.tiers.hostmem import PAGE
from offload.tiers.journal import Journal
from offload.tiers.memory import HostBuffer
from offload.tiers.pinned import PinnedTier
from offload.tiers.pinning import CudaPinner, LockPinner, PinRefusedError

BASE = 16 << 20
GIB = 1 << 30
OUT_OF_MEMORY, ALREADY_REGISTERED, UNLOADING = 2, 712, 4


class FakeCudart:
    """A CUDA runtime that refuses by rule, and keeps its last error until it is read."""

    def __init__(self, refuse=None, refuse_unregister=0):
        self.registered = {}
        self.flags = set()
        self.sticky = 0
        self.refuse, self.refuse_unregister = refuse or {}, refuse_unregister

    def register(self, address, nbytes, flags):
        self.flags.add(flags)
        code = self.refuse.get(len(self.registered), 0)
        if code:
            self.sticky = code
        else:
            self.registered[address] = nbytes
        return code

    def unregister(self, address):
        if self.refuse_unregister:
            self.sticky = self.refuse_unregister
            return self.refuse_unregister
        del self.registered[address]
        return 0

    def last_error(self):
        code, self.sticky = self.sticky, 0
        return code

    def error_text(self, code):
        return {2: "out of memory", 712: "already registered", 4: "unloading"}[code]


def test_a_range_is_registered_whole_where_one_call_can():
    library = FakeCudart()
    pinner = CudaPinner(library)
    pinner.pin(BASE, 3 * GIB)
    assert library.registered == {BASE: 3 * GIB}
    assert library.flags == {1}  # portable
    pinner.unpin(BASE, 3 * GIB)
    assert library.registered == {}


def test_one_call_registers_less_than_512_gib():
    library = FakeCudart()
    CudaPinner(library).pin(BASE, 600 * GIB)
    assert max(library.registered.values()) < 512 * GIB
    assert sum(library.registered.values()) == 600 * GIB
    starts = sorted(library.registered)
    assert starts[0] == BASE
    assert all(a + library.registered[a] == b for a, b in itertools.pairwise(starts))


@pytest.mark.parametrize(("failing", "piece"), [(0, 8192), (1, 8192), (3, 4096)])
def test_a_refused_piece_takes_those_before_it_back(failing, piece):
    library = FakeCudart(refuse={failing: OUT_OF_MEMORY})
    told = (
        f"cudaHostRegister of {piece} bytes (28.00 KiB in all, {failing} pieces before it) "
        "failed: out of memory (CUDA error 2)"
    )
    with pytest.raises(PinRefusedError, match=re.escape(told)):
        CudaPinner(library, piece_nbytes=2 * PAGE).pin(BASE, 7 * PAGE)
    assert library.registered == {}
    assert library.sticky == 0


def test_the_error_of_a_refusal_does_not_stick():
    library = FakeCudart(refuse={0: ALREADY_REGISTERED})
    with pytest.raises(PinRefusedError, match="already registered"):
        CudaPinner(library).pin(BASE, PAGE)
    assert library.sticky == 0


def test_a_piece_that_can_not_be_taken_back_is_an_error():
    library = FakeCudart(refuse={1: OUT_OF_MEMORY}, refuse_unregister=ALREADY_REGISTERED)
    with pytest.raises(TierIOError, match="cudaHostUnregister at 0x1000000 failed"):
        CudaPinner(library, piece_nbytes=PAGE).pin(BASE, 2 * PAGE)
    assert library.sticky == 0


def test_a_process_that_ends_has_nothing_to_unregister():
    library = FakeCudart()
    pinner = CudaPinner(library)
    pinner.pin(BASE, PAGE)
    library.refuse_unregister = UNLOADING
    pinner.unpin(BASE, PAGE)


def test_a_pool_registers_its_own_mapping_once():
    library = FakeCudart()
    with PinnedTier(5 * PAGE, pinners=[CudaPinner(library)]) as pool:
        assert pool.memory == "registered"
        block = pool.allocate(PAGE)
        assert library.registered == {pool._base: 5 * PAGE}
        assert pool._base <= pool.address(block) < pool._base + 5 * PAGE
    assert library.registered == {}


def test_a_pool_that_may_not_register_is_pageable_and_says_so():
    library, journal = FakeCudart(refuse={0: OUT_OF_MEMORY}), Journal()
    with PinnedTier(5 * PAGE, pinners=[CudaPinner(library)], journal=journal) as pool:
        assert pool.memory == "pageable"
    (notice,) = journal.notices
    assert "not registered: cudaHostRegister of 20480 bytes" in notice
    assert "pageable memory" in notice


def test_without_a_driver_the_pool_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    journal = Journal()
    with PinnedTier(PAGE, pinners=[CudaPinner()], journal=journal) as pool:
        assert pool.memory == "pageable"
    (notice,) = journal.notices
    assert "torch finds no CUDA device, so no driver to register with" in notice


def test_without_a_runtime_library_the_refusal_says_what_to_install(monkeypatch):
    def missing(path):
        raise OSError(path)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(PinRefusedError, match="pip install nvidia-cuda-runtime"):
        CudaPinner().pin(BASE, PAGE)


def test_the_runtime_that_torch_has_loaded_is_preferred():
    maps = (
        "7f0-7f1 r-xp 00000000 08:01 42   /usr/lib/libc.so.6\n"
        "7f1-7f2 r-xp 00000000 08:01 43   /a place/lib/libcudart.so.12\n"
        "7f2-7f3 r--p 00001000 08:01 43   /a place/lib/libcudart.so.12\n"
        "7f3-7f4 rw-p 00000000 00:00 0\n"
        "7f4-7f5 rw-p 00000000 00:00 0    [heap]\n"
    )
    assert pinning._loaded_cudarts(maps) == ["/a place/lib/libcudart.so.12"]


CUDART = r"""
#include <stddef.h>
static int last;
int cudaHostRegister(void *p, size_t n, unsigned f) { return last = f == 1 && n == 4096 ? 0 : 2; }
int cudaHostUnregister(void *p) { return last = 0; }
int cudaGetLastError(void) { int code = last; last = 0; return code; }
const char *cudaGetErrorString(int code) { return code == 2 ? "out of memory" : "no error"; }
"""


def test_the_library_is_called_as_c_declares_it(tmp_path, monkeypatch):
    source, library = tmp_path / "cudart.c", tmp_path / "libcudart.so.12"
    source.write_text(CUDART)
    compiler = subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", library, source], capture_output=True, check=False
    )
    if compiler.returncode:
        pytest.skip("no C compiler")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(pinning, "_loaded_cudarts", lambda maps: [str(library)])
    pinner = CudaPinner()
    pinner.pin(1 << 46, PAGE)  # an address that needs more than 32 bits
    pinner.unpin(1 << 46, PAGE)
    with pytest.raises(PinRefusedError, match=r"out of memory \(CUDA error 2\)"):
        pinner.pin(1 << 46, 8 << 30)
    assert pinner._library.last_error() == 0


class FakeLocks:
    def __init__(self, code=0, unlock_code=0):
        self.code, self.unlock_code = code, unlock_code
        self.calls = []

    def lock(self, address, nbytes):
        self.calls.append("lock")
        return self.code

    def unlock(self, address, nbytes):
        self.calls.append("unlock")
        return self.unlock_code


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOMEM, errno.EAGAIN])
def test_a_refused_lock_names_the_limit_and_what_mends_it(monkeypatch, code):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (8 << 20, 8 << 20))
    locks = FakeLocks(code)
    told = re.escape(
        f"mlock of 16.00 MiB (16777216 bytes) failed: {os.strerror(code)}. RLIMIT_MEMLOCK is "
        "8.00 MiB: ulimit -l 16384 before the start, or CAP_IPC_LOCK, mends it"
    )
    with pytest.raises(PinRefusedError, match=told):
        LockPinner(locks).pin(BASE, 16 << 20)
    assert locks.calls == ["lock", "unlock"]  # no part of it stays locked


def test_a_lock_that_can_not_be_undone_is_an_error():
    with pytest.raises(TierIOError, match="munlock of 4096 bytes failed"):
        LockPinner(FakeLocks(unlock_code=errno.EINVAL)).unpin(BASE, PAGE)


def locked_kib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmLck:"))


@pytest.mark.own_process
def test_locked_memory_is_locked_until_it_is_given_back():
    buffer, before = HostBuffer(8 * PAGE), locked_kib()
    pinner = LockPinner()
    try:
        pinner.pin(buffer.address, buffer.nbytes)
    except PinRefusedError:
        pytest.skip("mlock of 32 KiB is refused here")
    assert locked_kib() == before + 32
    pinner.unpin(buffer.address, buffer.nbytes)
    assert locked_kib() == before
    buffer.release()


LIMITED = """
import os, resource
from offload.tiers.journal import Journal
from offload.tiers.pinned import PinnedTier
from offload.tiers.pinning import LockPinner
resource.setrlimit(resource.RLIMIT_MEMLOCK, (64 << 10, 64 << 10))
if os.getuid() == 0:  # root may lock without a limit
    os.setgid(65534)
    os.setuid(65534)
journal = Journal()
with PinnedTier(1 << 20, pinners=[LockPinner()], journal=journal) as pool:
    print(pool.memory)
print(*journal.notices)
"""


def test_a_user_over_the_limit_gets_pageable_memory_and_the_reason():
    done = subprocess.run(
        [sys.executable, "-c", LIMITED], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    memory, notice = done.stdout.splitlines()
    assert memory == "pageable"
    assert "mlock of 1.00 MiB (1048576 bytes) failed: Cannot allocate memory" in notice
    assert "RLIMIT_MEMLOCK is 64.00 KiB: ulimit -l 1024 before the start" in notice
