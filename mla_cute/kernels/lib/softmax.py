"""Online softmax in the base-2 domain on accumulators, relative to references that are raised when they have to be.

P = 2^(score - reference), and a reference cancels in O / l and in lse = reference + log2(l). So any reference does that
keeps P, l and O within their types. It is the largest score of a row's first tiles; later ones may exceed it until a
thread's part of a row sum does MAX_P, which is rare. So a tile needs no row maxima, and nobody waits for anybody's.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32

from . import ptx

# The reference of a row that has seen no key. Every score exceeds it by more than any limit, and -inf less it is -inf,
# where less -inf it would be NaN.
LOWEST = -(2.0 - 2.0**-23) * 2.0**127

# Where P is float16: within its range, and so far above 1 that it is rare.
MAX_P = 2.0**14
# Where P is bfloat16, which has float32's range: what P is multiplied by and added to has to stay within that.
MAX_P_BF16 = 2.0**40
# Above it a key may have nearly all the weight, and a P that is not 1. Then O is divided by the sum of P as it was
# rounded to 16 bits, so that the rounding cancels. Below it the sum is of P as it was before.
LARGE_P = 16.0
# Where P is float16 and is multiplied by scales of up to MAX_UNITS.
MAX_SCALED_P = 2.0**9
# Scales of V are counted in a unit, which is chosen anew when a scale exceeds MAX_UNITS of it: 2^6 units times an e4m3,
# which is below 2^9, fit float16.
MAX_UNITS = 64.0


def exp2(x):
    """2^x, by the EX2 instruction alone."""
    return cute.math.exp2(x, fastmath=True)


def quad_max(x):
    """Maximum over the four lanes that share an accumulator row."""
    x = cute.arch.fmax(x, cute.arch.shuffle_sync_bfly(x, offset=1))
    return cute.arch.fmax(x, cute.arch.shuffle_sync_bfly(x, offset=2))


def quad_sum(x):
    """Sum over the same lanes."""
    x = x + cute.arch.shuffle_sync_bfly(x, offset=1)
    return x + cute.arch.shuffle_sync_bfly(x, offset=2)


def quad_any(condition, lane):
    """1 if the condition holds in one of the same lanes, else 0."""
    mask = cute.arch.vote_ballot_sync(condition)
    return cutlass.select_(((mask >> (lane & ~3)) & 0xF) != 0, Int32(1), Int32(0))


@cute.jit
def put_row(column, row, lane, value):
    """column[row] = value, once for the four lanes that share the row."""
    if lane % 4 == 0:
        column[row] = value


def put_rows(column, row, lane, values, count: int = 2) -> None:
    """The same of a thread's `count` rows, `row` and `row + 8`."""
    for r in range(count):
        put_row(column, row + 8 * r, lane, values[r])


def inverse_sum(total, sink=None):
    """1 / (total + sink), and 0 for a row that saw no key: O is 0 there, and has to stay 0."""
    divisor = total if sink is None else total + sink
    return cutlass.select_(total != 0.0, cute.arch.rcp_approx(divisor), Float32(0.0))


def row_max(s_rc, row: int, num_cols: int):
    """Maximum of row 0 or 1 of a (row, column) view (wgmma.row_col_view), over the lanes that share it."""
    mx = cute.arch.fmax(s_rc[row, 0], s_rc[row, 1])
    for n in range(2, num_cols):
        mx = cute.arch.fmax(mx, s_rc[row, n])
    return quad_max(mx)


def sum_row(p_rc, row: int, num_cols: int):
    """This thread's part of a row's sum."""
    total = Float32(0.0)
    for n in range(num_cols):
        total = total + p_rc[row, n]
    return total


def exp_row(s_rc, to, row: int, num_cols: int, scale_log2, ref):
    """to <- 2^(s * scale_log2 - ref) along a row of two (row, column) views; returns this thread's part of the sum."""
    for n in range(num_cols):
        to[row, n] = exp2(s_rc[row, n] * scale_log2 - ref)
    return sum_row(to, row, num_cols)


def multiply_rows(acc_rc, num_cols: int, scale0, scale1) -> None:
    """Multiply both rows of a (row, column) view, each by its scale."""
    for n in range(num_cols):
        acc_rc[0, n] = acc_rc[0, n] * scale0
        acc_rc[1, n] = acc_rc[1, n] * scale1


@cute.jit
def mask_columns(s_rc, num_n_tiles: cutlass.Constexpr, valid, lane):
    """-inf in columns >= valid of a (row, column) view of `num_n_tiles` 8-column tiles."""
    if valid < 8 * num_n_tiles:
        for n in cutlass.range_constexpr(2 * num_n_tiles):
            col = (n // 2) * 8 + (lane % 4) * 2 + n % 2
            for r in cutlass.range_constexpr(2):
                s_rc[r, n] = s_rc[r, n] if col < valid else -Float32.inf


@cute.jit
def mask_unchosen(s_rc, num_n_tiles: cutlass.Constexpr, chosen_at, lane):
    """-inf in columns that hold no token. `chosen_at`: address of a word per 16 columns, bit i for column i of them."""
    words = ptx.load_shared_16(chosen_at)
    if (words[0] & words[1] & words[2] & words[3] & Uint32(0xFFFF)) != Uint32(0xFFFF):
        own = [word >> Uint32((lane % 4) * 2) for word in words]
        for n in cutlass.range_constexpr(2 * num_n_tiles):
            bit = Uint32(1 << ((n // 2) % 2 * 8 + n % 2))
            for r in cutlass.range_constexpr(2):
                s_rc[r, n] = s_rc[r, n] if (own[n // 4] & bit) != Uint32(0) else -Float32.inf
