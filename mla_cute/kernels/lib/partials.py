"""Partial rows: where one lies, how 16-bit integers are made of its outputs, and how its three float32 are stored.

dims.py says what a partial row's words are. The three main kernels write them, merge.py reads them.

Every offset is 64-bit: a batch-invariant plan may have more rows than the 7,456,540 whose words 32 bits can count. The
float32 are stored through the tensor and not by inline PTX, behind which ptxas makes two copies of the row tiles' whole
epilogue (832 instructions).

`params` are the `Params` of a main kernel, of which `mPart` is read: (partial rows, PART_ROW) words.
"""

import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32

from ...dims import INT16_BIAS, INT16_MOST, PART_LSE, PART_ROW

# Where the search for a row's largest element begins: above 0, so that a row of zeros has a finite factor.
SMALLEST = 1.0e-30


def row_address(params, row):
    """Address of word 0 of partial row `row`."""
    return params.mPart.iterator.toint() + Int64(row) * (4 * PART_ROW)


def int16_factor(largest):
    """What a row's elements are multiplied by, so that its largest one becomes INT16_MOST.

    `largest`: float32, at least SMALLEST; NaN or infinity makes NaN of the row's half.
    """
    return Float32(INT16_MOST) * cute.arch.rcp_approx(largest)


def int16_words(values, factor) -> list:
    """An even number of float32, multiplied by `factor` (`int16_factor`), as words of two biased 16-bit integers.

    An FFMA with 2^23 + 2^15 leaves round(x) + 2^15 in the low 16 bits of the float32's mantissa; 0x5410 takes those of
    two. All products are made before all words: in another order tile16 has other machine code.
    """
    bits = [(x * factor + Float32(INT16_BIAS)).bitcast(Int32) for x in values]
    return [Uint32(cute.arch.prmt(bits[i], bits[i + 1], 0x5410)) for i in range(0, len(bits), 2)]


def int16_worth(largest):
    """What an integer is worth in the output; `largest`: what the row's largest element is in the output."""
    return largest * Float32(1.0 / INT16_MOST)


def put_lse(params, row, lse) -> None:
    """Store the log-sum-exp of a partial row, in base 2."""
    params.mPart[Int64(row), PART_LSE] = lse


def put_worth(params, row, half, worth) -> None:
    """Store what an integer of columns 256 half .. 256 half + 255 is worth; `half` is 0 or 1, a constant or a value."""
    params.mPart[Int64(row), PART_LSE + 1 + half] = worth
