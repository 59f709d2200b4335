"""How fast states and masters change their form, on one core: beside what a drive moves.

Each figure is bytes of float32 a second: what is encoded or decoded while a tile is stepped. A
parameter of AdamW has two states; the forms are those of ``docs/optimizer.md``.
"""

import sys
import time
from collections.abc import Callable

import torch

from benchlib import Result, arguments, finish
from offload.swap.eightbit import pack, packed_nbytes, unpack
from offload.swap.masters import combine, split
from offload.swap.rounding import round_and_destroy, widen

_NUMEL = 1 << 18  # calls so short that others of the machine seldom interrupt them
_REPEATS = 100


def measure(result: Result, numel: int) -> None:
    """Every form, both ways."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(numel, generator=generator) * torch.randn(numel, generator=generator).exp()
    squares, out, scratch = values.square(), torch.empty(numel), values.clone()
    half = torch.empty(numel, dtype=torch.bfloat16)
    low = torch.empty(numel, dtype=torch.int16)
    packed = torch.empty(packed_nbytes(numel), dtype=torch.uint8)
    ways: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
        "master": (lambda: split(values, half, low), lambda: combine(half, low, out)),
        "bf16 state": (
            lambda: round_and_destroy(scratch, half, key=1, start=0),
            lambda: widen(half, out),
        ),
        "8bit state, signed": (
            lambda: pack(values, packed, signed=True, key=1, start=0),
            lambda: unpack(packed, out, signed=True),
        ),
        "8bit state, unsigned": (
            lambda: pack(squares, packed, signed=False, key=1, start=0),
            lambda: unpack(packed, out, signed=False),
        ),
    }
    for way, (encode, decode) in ways.items():
        encode_s, decode_s = _fastest(encode), _fastest(decode)
        result.add(
            way=way,
            encoded_bytes_per_s=values.nbytes / encode_s,
            decoded_bytes_per_s=values.nbytes / decode_s,
            both_ns_a_number=(encode_s + decode_s) / numel * 1e9,
        )


def _fastest(call: Callable[[], None]) -> float:
    """Seconds of the fastest of some calls: what the core does when it is left alone."""
    call()
    times = []
    for _ in range(_REPEATS):
        began_s = time.perf_counter()
        call()
        times.append(time.perf_counter() - began_s)
    return min(times)


def main() -> int:
    """Run and print."""
    options = arguments(__doc__ or "").parse_args()
    torch.set_num_threads(1)  # as a tile is stepped
    result = Result("Forms of states and masters, on one core")
    measure(result, _NUMEL)
    return finish(result, options.json)


if __name__ == "__main__":
    sys.exit(main())
