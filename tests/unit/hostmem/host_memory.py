"""What the tests of the kernel's memory calls share."""

from offload.tiers.hostmem import PAGE
from offload.tiers.memory import memory_at

PAGES = 16
NBYTES = PAGES * PAGE


def put(address, data):
    memory_at(address, len(data))[:] = data


def get(address, nbytes=NBYTES):
    return bytes(memory_at(address, nbytes))
