"""How the kernels read packed weights, and the order in which activations lie beside them.

Codes of b bits repeat their place in a byte after a group of P = 8 / gcd(8, b) codes: two codes to a byte at 4 bits,
four in three bytes at 6. So a row is taken apart into P *planes*: plane p holds the codes p, p + P, p + 2P, …, which
all have the same shift. A plane of activations meets a plane of weights in one matrix product; their sum is that of
the row, since integers may be added in any order. Nothing has to be interleaved in registers.
"""

import functools
import math

import triton
import triton.language as tl

BLOCK = (
    128  # planes of activations are padded with zeros to whole blocks, so that products need no mask for them
)


@functools.cache
def planes(bits: int) -> int:
    """How many planes a row of `bits`-bit codes has."""
    return 8 // math.gcd(8, bits)


def columns(in_features: int, bits: int) -> int:
    """Codes in the longest plane of a row."""
    return -(-in_features // planes(bits))


@functools.cache
def padded_columns(in_features: int, bits: int) -> int:
    """The same, rounded up to whole blocks."""
    return -(-columns(in_features, bits) // BLOCK) * BLOCK


@triton.jit
def load_codes(
    rows,
    column,
    row_bytes,
    PLANE: tl.constexpr,
    PLANES: tl.constexpr,
    BITS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Codes of a plane times 2^(8 - BITS), int8 (n, j).

    rows (n, 1) are addresses of packed rows and column (1, j) places in the plane. WHOLE: no column lies beyond the
    row; else what lies there reads as some number. A code is brought to the top of a byte: flipping the highest bit
    then turns the stored offset number into a two's complement one. The factor is divided out of the finished sum.
    """
    FIRST: tl.constexpr = PLANE * BITS // 8
    SHIFT: tl.constexpr = PLANE * BITS % 8
    byte = column * (BITS * PLANES // 8) + FIRST
    top = tl.load(rows + byte) if WHOLE else tl.load(rows + byte, mask=byte < row_bytes, other=0)
    if SHIFT + BITS > 8:  # the code goes on in the next byte
        byte += 1
        high = tl.load(rows + byte) if WHOLE else tl.load(rows + byte, mask=byte < row_bytes, other=0)
        top = ((top >> SHIFT) << (8 - BITS)) | (high << (16 - SHIFT - BITS))
    else:
        top = top << (8 - BITS - SHIFT)
        if SHIFT > 0:  # codes of earlier planes lie below
            top = top & (256 - (1 << (8 - BITS)))
    return (top ^ 128).to(tl.int8, bitcast=True)
