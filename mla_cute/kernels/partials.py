"""Where a partial row lies and how its three float32 are stored; registry.py says what its words are.

Every address is 64-bit: a batch-invariant plan may have more rows than the 7,456,540 whose words 32 bits can count.
"""

from cutlass import Int64, Uint32

from .fp8 import store_global
from .registry import PART_LSE, PART_ROW


def row_address(p, row):
    """Of word 0 of partial row `row`; `p` are the parameters of a main kernel."""
    return p.mPart.iterator.toint() + Int64(row) * (4 * PART_ROW)


def put_lse(address, lse) -> None:
    """The log-sum-exp, in base 2, of the partial row at `address`."""
    store_global(address, [lse.bitcast(Uint32)], 4 * PART_LSE)


def put_worth(address, half, worth) -> None:
    """What an integer of columns 256 half .. 256 half + 255 is worth; `half` is 0 or 1, a constant or a value."""
    if isinstance(half, int):
        store_global(address, [worth.bitcast(Uint32)], 4 * (PART_LSE + 1 + half))
    else:
        store_global(address + Int64(half * 4), [worth.bitcast(Uint32)], 4 * (PART_LSE + 1))
