"""Whether an address is mapped."""

import ctypes

from offload.tiers.hostmem import PAGE

_LIBC = ctypes.CDLL(None)
_RESIDENT = ctypes.create_string_buffer(1)


def is_mapped(address: int) -> bool:
    """Asked of the kernel without taking memory, for that could be mapped just there."""
    return _LIBC.mincore(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), _RESIDENT) == 0
