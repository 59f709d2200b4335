"""Anonymous memory that goes back when a test ends, and a file to map."""

import os

import pytest
from host_memory import NBYTES

from offload.tiers import hostmem
from offload.tiers.testing import pattern


@pytest.fixture
def memory():
    """Maps anonymous memory; gives all of it back."""
    mapped = []

    def make(nbytes, **options):
        address = hostmem.map_anonymous(nbytes, **options)
        mapped.append((address, hostmem.page_ceil(nbytes)))
        return address

    yield make
    for address, nbytes in mapped:
        hostmem.unmap(address, nbytes)


@pytest.fixture
def file(tmp_path):
    """A file of ``NBYTES`` patterned bytes: (path, descriptor)."""
    path = tmp_path / "file"
    path.write_bytes(pattern(NBYTES))
    fd = os.open(path, os.O_RDWR)
    yield path, fd
    os.close(fd)
