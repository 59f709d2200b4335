"""Eight bits for a float32: small floating-point numbers, 64 of which share an exponent.

[Note: eight bits] Like the MX formats of the Open Compute Project (OCP Microscaling Formats v1.0,
section 5: elements of 8 bits, a scale of 8 more that is a power of two), with blocks of 64, the
grid of the optimizer's tiles. A *signed* element has a sign, 4 bits of exponent and 3 of mantissa:
an average of gradients. An *unsigned* one has 5 bits of exponent instead of the sign: an average of
squares, whose root then reaches as far down as the other. Neighbours are 6 to 12 % apart, from a
block's largest value down to 2**-14 or 2**-30 of it.

Both are cut out of float32's own bits, so encoding is adding random bits, shifting, and
subtracting the block's exponent: a value goes up or down with the probability that makes the mean
right (``rounding``). A second moment much smaller than its neighbours in the block keeps its
relative precision; with linear codes it would be zero at times, and Adam divide by it: training
diverges. What is not zero is never rounded to zero in unsigned form; in signed form, where it is
smaller than the smallest, it becomes that or zero, at random.

What has been decoded is encoded without a change, whatever the random bits.
"""

import numpy as np
import numpy.typing as npt
import torch

from offload.swap.rounding import BLOCK_NUMEL, blocks_of, random_bits

SHARING = 64  # elements of one exponent
_SHIFT = 20  # keeps 3 bits of float32's mantissa
_MOST_SIGNED, _MOST_UNSIGNED = 127, 255
_MAGNITUDE = np.uint32(0x7FFFFFFF)


def packed_nbytes(numel: int) -> int:
    """Bytes of ``numel`` elements: theirs, then one exponent for each block."""
    return numel + -(-numel // SHARING)


def pack(
    values: torch.Tensor,  # 1-D float32
    packed: torch.Tensor,  # 1-D uint8, packed_nbytes
    *,
    signed: bool,
    key: int,
    start: int,
) -> None:
    """Fill ``packed`` with ``values``, rounded up or down at random.

    A NaN or an infinity takes the other values of its block with it.

    Args:
        values: are destroyed where ``packed`` shares their memory; it may begin at their address.
        key: names the random bits, 0 to 2**64 - 1.
        start: the place of the first element in its tensor, a multiple of ``SHARING``.
    """
    numel = values.numel()
    bits = values.view(torch.int32).numpy().view(np.uint32)
    codes, shared = packed.numpy()[:numel], packed.numpy()[numel:]
    exponents = np.empty_like(shared)  # written last: values may still be where these go
    scratch = _Scratch(min(BLOCK_NUMEL, numel))
    for begin, end in blocks_of(start, start + numel):
        part = slice(begin - start, end - start)
        rows = -(-(end - begin) // SHARING)
        first = (begin - start) // SHARING
        random = random_bits(key, begin, end)
        exponents[first : first + rows] = _pack(
            bits[part], random, codes[part], scratch.of(rows), signed=signed
        )
    shared[:] = exponents


class _Scratch:
    """Memory for one block of random bits: fresh pages would cost more than what is computed."""

    def __init__(self, numel: int) -> None:
        padded = -(-numel // SHARING) * SHARING
        self.found = np.empty(padded, dtype=np.uint32)
        self.other = np.empty(padded, dtype=np.uint32)
        self.codes = np.empty(padded, dtype=np.uint8)
        self.sign = np.empty(padded, dtype=np.uint8)
        self.mask = np.empty(padded, dtype=np.bool_)
        self.below = np.empty(padded, dtype=np.bool_)

    def of(self, rows: int) -> "_Scratch":
        """Of so many rows of ``SHARING`` elements."""
        part: _Scratch = object.__new__(_Scratch)
        for name, array in vars(self).items():
            setattr(part, name, array[: rows * SHARING])
        return part


def _pack(
    bits: npt.NDArray[np.uint32],
    random: npt.NDArray[np.uint32],
    codes: npt.NDArray[np.uint8],
    scratch: _Scratch,
    *,
    signed: bool,
) -> npt.NDArray[np.uint8]:
    """Fill ``codes``, which may lie where ``bits`` do; returns the exponents of their blocks."""
    numel, found = bits.size, scratch.found
    found[numel:] = 0
    flat, other, blocks = found[:numel], scratch.other[:numel], found.reshape(-1, SHARING)
    np.bitwise_and(bits, _MAGNITUDE, out=flat)
    exponents = _exponents(blocks, signed=signed)
    lowest = (exponents << np.uint32(3)) + np.uint32(1)  # the smallest number's upper bits
    np.not_equal(found, 0, out=scratch.mask)
    small = _small_ones(scratch, lowest, random) if signed else None
    np.left_shift(random, np.uint32(_SHIFT - 16), out=other)
    np.add(flat, other, out=flat)
    np.right_shift(found, np.uint32(_SHIFT), out=found)
    whole = _signed(blocks)  # rows against a number each: torch is faster
    torch.maximum(whole, _signed(lowest)[:, None], out=whole)
    made = scratch.codes
    np.copyto(made, found, casting="unsafe")  # modulo 256, as the differences are
    rows = made.reshape(-1, SHARING)
    np.subtract(rows, (lowest - np.uint32(1)).astype(np.uint8)[:, None], out=rows)
    np.multiply(made, scratch.mask.view(np.uint8), out=made)
    if small is not None:
        places, drawn = small
        made[places] = drawn
    if signed:
        np.right_shift(bits, np.uint32(24), out=other)
        sign = scratch.sign[:numel]
        np.copyto(sign, other, casting="unsafe")
        np.bitwise_and(sign, np.uint8(128), out=sign)
        np.bitwise_or(made[:numel], sign, out=made[:numel])
    codes[:] = made[:numel]
    return exponents.astype(np.uint8)


def _exponents(blocks: npt.NDArray[np.uint32], *, signed: bool) -> npt.NDArray[np.uint32]:
    """The smallest exponent of each block with which its largest value fits, if it goes up, too."""
    largest = _signed(blocks).amax(dim=1)  # numpy: five times slower
    highest = (largest.numpy().astype(np.int64) + ((1 << _SHIFT) - 1)) >> _SHIFT
    most = _MOST_SIGNED if signed else _MOST_UNSIGNED
    found: npt.NDArray[np.uint32] = np.maximum((highest - (most - 7)) >> 3, 0).astype(np.uint32)
    return found


def _small_ones(
    scratch: _Scratch, lowest: npt.NDArray[np.uint32], random: npt.NDArray[np.uint32]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]] | None:
    """Places of what is smaller than the smallest number but zero, and whether it becomes that."""
    found, below = scratch.found, scratch.below
    smallest = lowest << np.uint32(_SHIFT)
    torch.lt(
        _signed(found.reshape(-1, SHARING)),
        _signed(smallest)[:, None],
        out=torch.from_numpy(below).view(-1, SHARING),
    )
    np.logical_and(below, scratch.mask, out=below)
    if not below.any():
        return None
    places = np.flatnonzero(below)
    share = found[places].view(np.float32) / smallest.view(np.float32)[places // SHARING]
    return places, random[places] < (share * 65536).astype(np.uint32)


def _signed(numbers: npt.NDArray[np.uint32]) -> torch.Tensor:
    """The same numbers, below 2**31, for torch."""
    return torch.from_numpy(numbers.view(np.int32))


def unpack(
    packed: torch.Tensor,  # 1-D uint8
    values: torch.Tensor,  # 1-D float32, with packed_nbytes of as many elements
    *,
    signed: bool,
) -> None:
    """Fill ``values`` with ``packed``, exactly.

    Both may share memory if ``packed`` ends where ``values`` end or behind: what is written never
    overtakes what is still to be read.
    """
    numel = values.numel()
    codes, shared = packed.numpy()[:numel], packed.numpy()[numel:]
    bits = values.view(torch.int32).numpy().view(np.uint32)
    scratch = _Scratch(min(BLOCK_NUMEL, numel))
    for begin, end in blocks_of(0, numel):
        part = slice(begin, end)
        first, rows = begin // SHARING, -(-(end - begin) // SHARING)
        _unpack(
            codes[part], shared[first : first + rows], bits[part], scratch.of(rows), signed=signed
        )


def _unpack(
    codes: npt.NDArray[np.uint8],
    exponents: npt.NDArray[np.uint8],
    bits: npt.NDArray[np.uint32],
    scratch: _Scratch,
    *,
    signed: bool,
) -> None:
    """Fill ``bits``, which may lie where ``codes`` do."""
    numel, found = codes.size, scratch.found
    flat, made, zero = found[:numel], scratch.codes[:numel], scratch.mask[:numel]
    np.bitwise_and(codes, np.uint8(127 if signed else 255), out=made)
    np.copyto(flat, made)
    whole = _signed(found.reshape(-1, SHARING))
    torch.add(whole, _signed(exponents.astype(np.uint32) << np.uint32(3))[:, None], out=whole)
    np.left_shift(flat, np.uint32(_SHIFT), out=flat)
    np.equal(made, 0, out=zero)
    np.copyto(flat, 0, where=zero)
    if signed:
        other, sign = scratch.other[:numel], scratch.sign[:numel]
        np.bitwise_and(codes, np.uint8(128), out=sign)
        np.copyto(other, sign)
        np.left_shift(other, np.uint32(24), out=other)
        np.bitwise_or(flat, other, out=flat)
    bits[:] = flat
