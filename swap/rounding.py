"""Stochastic rounding of float32 to bfloat16: right on average, and the same bits in any order.

[Note: why not to the nearest] A moving average changes by less than half of a bfloat16 step, so the
nearest value is the old one: with beta2 = 0.999 a second moment stays where it is for ever. Here a
value between two neighbours becomes the upper one with the probability of its distance from the
lower one, so that errors cancel over the steps instead of adding up.

[Note: random bits by position] The 16 random bits of an element depend on a key and on its place
in its tensor, on nothing else: not on tiles, the budget, threads or anybody's generator. They come
from one shuffled list of all 65,536 numbers: each block of as many elements begins in it at a place
of its own, which is hashed from key and block. So the bits of an element are uniform over the keys,
the draws of different steps are independent, and making them costs nothing but reading them:
rounding must keep up with a drive.

[Note: upper halves] The upper 16 bits of one number and the lower ones of the next are a number
too, at an address in the middle of the first. Cut off to 16 bits it is the upper half: one pass
through memory, where to shift and to cut off are two. Numpy reads numbers at any address.
"""

import functools
import itertools
import math
import sys

import numpy as np
import numpy.typing as npt
import torch

BLOCK_NUMEL = 1 << 16  # as many as 16 bits have values; fits into a core's cache
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_NAN_BITS = 0x7FC0


def round_to_bf16(
    values: torch.Tensor,  # 1-D float32
    rounded: torch.Tensor,  # 1-D bfloat16, as many elements
    *,
    key: int,
    start: int,
) -> None:
    """Fill ``rounded`` with ``values``, rounded up or down at random.

    What bfloat16 can hold stays as it is, zeros with their sign and infinities included; NaN stays
    NaN. Between its largest number and infinity it is one of these.

    Args:
        values: are destroyed where ``rounded`` shares their memory; it may begin at their address,
            not behind it.
        key: names the random bits, 0 to 2**64 - 1.
        start: the place of the first element in its tensor.
    """
    numbers = values.numpy()
    bits = numbers.view(np.uint32)
    upper = rounded.view(torch.int16).numpy().view(np.uint16)
    scratch = np.empty(min(BLOCK_NUMEL, values.numel()), dtype=np.uint32)
    for begin, end in blocks_of(start, start + values.numel()):
        part = slice(begin - start, end - start)
        found = scratch[: end - begin]
        np.add(bits[part], random_bits(key, begin, end), out=found)
        if math.isnan(np.maximum.reduce(numbers[part])):
            found[np.isnan(numbers[part])] = _NAN_BITS << 16  # a carry could make it a number
        take_upper_halves(found, upper[part])


def round_and_destroy(
    values: torch.Tensor,  # 1-D float32
    rounded: torch.Tensor,  # 1-D bfloat16, as many elements, in other memory
    *,
    key: int,
    start: int,
) -> None:
    """``round_to_bf16`` in ``values`` themselves: fewer calls and bytes, for what is in a cache."""
    numbers = values.numpy()
    if math.isnan(np.maximum.reduce(numbers)):
        round_to_bf16(values, rounded, key=key, start=start)
        return
    bits = numbers.view(np.uint32)
    for begin, end in blocks_of(start, start + values.numel()):
        part = bits[begin - start : end - start]
        np.add(part, random_bits(key, begin, end), out=part)
    take_upper_halves(bits, rounded.view(torch.int16).numpy().view(np.uint16))


def take_upper_halves(
    bits: npt.NDArray[np.uint32],
    upper: npt.NDArray[np.uint16],  # as many elements, in other memory
) -> None:
    """Fill ``upper`` with the upper 16 bits of each number; see [Note: upper halves]."""
    if sys.byteorder == "little" and bits.size:
        between = bits.view(np.uint8)[2:-2].view(np.uint32)
        np.copyto(upper[:-1], between, casting="unsafe")
        upper[-1] = bits[-1] >> np.uint32(16)
    else:
        np.copyto(upper, bits >> np.uint32(16), casting="unsafe")


def widen(
    rounded: torch.Tensor,  # 1-D bfloat16
    values: torch.Tensor,  # 1-D float32, as many elements
) -> None:
    """Fill ``values`` with ``rounded``, exactly.

    Both may share memory if ``rounded`` begins at the middle of ``values`` or behind it: what is
    written never overtakes what is still to be read.
    """
    ahead = rounded.data_ptr() - values.data_ptr()
    for begin in range(0, values.numel(), BLOCK_NUMEL):
        part, wide = rounded[begin : begin + BLOCK_NUMEL], values[begin : begin + BLOCK_NUMEL]
        overlaps = 0 <= ahead < 4 * (begin + wide.numel()) - 2 * begin
        wide.copy_(part.clone() if overlaps else part)


def blocks_of(start: int, stop: int) -> list[tuple[int, int]]:
    """(begin, end) of the parts of the range that lie in one block of random bits each."""
    inner = range((start // BLOCK_NUMEL + 1) * BLOCK_NUMEL, stop, BLOCK_NUMEL)
    edges = [start, *inner, stop]
    return list(itertools.pairwise(edges)) if stop > start else []


def random_bits(key: int, begin: int, end: int) -> npt.NDArray[np.uint32]:
    """16 random bits for each of the elements from ``begin`` to ``end``, all in one block."""
    block, first = divmod(begin, BLOCK_NUMEL)
    offset = _mix(key ^ _mix(block)) % BLOCK_NUMEL + first
    return _shuffled()[offset : offset + end - begin]


def _mix(number: int) -> int:
    """SplitMix64 (Steele et al., OOPSLA 2014): 64 bits that look random."""
    number = (number + _GOLDEN) & _MASK
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    number = (number ^ number >> 27) * 0x94D049BB133111EB & _MASK
    return number ^ number >> 31


@functools.cache
def _shuffled() -> npt.NDArray[np.uint32]:
    """All numbers of 16 bits in an order that looks random, twice."""
    order = np.array([_mix(number) for number in range(BLOCK_NUMEL)], dtype=np.uint64).argsort()
    return np.tile(order.astype(np.uint32), 2)
