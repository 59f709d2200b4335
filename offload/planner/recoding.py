"""How fast one thread changes the form of states and masters, beside the optimizer's own step."""

import statistics
import time
from collections.abc import Callable

import torch

from offload.swap.eightbit import pack, packed_nbytes, unpack
from offload.swap.masters import combine, split
from offload.swap.rounding import round_and_destroy, widen
from offload.swap.tile_blocks import block_numel
from offload.tiers.machine import Work

_NUMEL = 1 << 20  # of one tile
_REPEATS = 5


def measure_recoding() -> dict[Work, float]:
    """Bytes of float32 a second of each form, there and back; on the thread that calls."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(_NUMEL, generator=generator)
    out = torch.empty(_NUMEL)
    half = torch.empty(_NUMEL, dtype=torch.bfloat16)
    low = torch.empty(_NUMEL, dtype=torch.int16)
    packed = torch.empty(packed_nbytes(_NUMEL), dtype=torch.uint8)

    scratch = torch.empty(block_numel(_NUMEL))

    def round_states() -> None:
        for rounded in half.split(scratch.numel()):
            widen(rounded, scratch)
            round_and_destroy(scratch, rounded, key=1, start=0)

    def pack_states() -> None:
        unpack(packed, out, signed=True)
        pack(values, packed, signed=True, key=1, start=0)

    def split_masters() -> None:
        combine(half, low, out)
        widen(half, out)  # a gradient
        split(values, half, low)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a tile is stepped
    try:
        return {
            "bf16 states": values.nbytes / _seconds(round_states),
            "8bit states": values.nbytes / _seconds(pack_states),
            "masters": values.nbytes / _seconds(split_masters),
        }
    finally:
        torch.set_num_threads(threads)


def _seconds(call: Callable[[], None]) -> float:
    """Median of some calls."""
    call()
    taken: list[float] = []
    for _ in range(_REPEATS):
        began_s = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began_s)
    return max(statistics.median(taken), 1e-9)
