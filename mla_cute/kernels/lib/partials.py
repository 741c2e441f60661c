"""Where a partial row lies and how its three float32 are stored; dims.py says what its words are.

Every offset is 64-bit: a batch-invariant plan may have more rows than the 7,456,540 whose words 32 bits can count. The
float32 are stored through the tensor and not by inline PTX, behind which ptxas makes two copies of the row tiles' whole
epilogue (832 instructions).
"""

from cutlass import Int64

from ...dims import PART_LSE, PART_ROW


def row_address(p, row):
    """Of word 0 of partial row `row`; `p` are the parameters of a main kernel."""
    return p.mPart.iterator.toint() + Int64(row) * (4 * PART_ROW)


def put_lse(p, row, lse) -> None:
    """The log-sum-exp of a partial row, in base 2."""
    p.mPart[Int64(row), PART_LSE] = lse


def put_worth(p, row, half, worth) -> None:
    """What an integer of columns 256 half .. 256 half + 255 is worth; `half` is 0 or 1, a constant or a value."""
    p.mPart[Int64(row), PART_LSE + 1 + half] = worth
