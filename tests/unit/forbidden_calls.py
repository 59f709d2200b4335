"""Run a ``NumaTier`` where a seccomp filter refuses one system call, as containers do."""

import ctypes
import struct
import sys

from offload.allocator.errors import TierIOError
from offload.tiers import mempolicy
from offload.tiers.numa import NumaTier

LOAD_NUMBER, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, REFUSE_WITH_EPERM = 0x7FFF0000, 0x00050001
SET_NO_NEW_PRIVS, SET_SECCOMP, FILTER = 38, 22, 2

number = mempolicy._number(sys.argv[1])
program = b"".join(
    struct.pack("HBBI", *instruction)
    for instruction in (
        (LOAD_NUMBER, 0, 0, 0),
        (JUMP_IF_EQUAL, 0, 1, number),
        (RETURN, 0, 0, REFUSE_WITH_EPERM),
        (RETURN, 0, 0, ALLOW),
    )
)
code = ctypes.create_string_buffer(program)


class Program(ctypes.Structure):
    _fields_ = (("count", ctypes.c_ushort), ("code", ctypes.c_void_p))


libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
argument = ctypes.byref(Program(4, ctypes.addressof(code)))
assert libc.prctl(SET_SECCOMP, FILTER, argument) == 0, ctypes.get_errno()

try:
    NumaTier(mempolicy.allowed_nodes()[0], 1 << 20)
except TierIOError as error:
    sys.stdout.write(f"TierIOError {error.errno} {error}\n")
