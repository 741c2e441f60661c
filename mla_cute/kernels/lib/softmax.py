"""Online softmax in the base-2 domain on wgmma accumulators, with a reference maximum that is raised lazily.

Scores are S * scale_log2. The reference m of a row is raised only when the row's maximum exceeds it by more than
LAZY_LOG2; P = 2^(s - m) may therefore reach 2^8, which bf16, f16 and the float32 sums hold without loss, and the
reference cancels in O / l and in lse = m + log2(l). Rescaling O (64 FMUL per row) is then rare.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Uint32

from . import ptx

# Running maxima start at the lowest finite float32 rather than at -inf: -inf - -inf would be NaN in a row whose scores
# are all masked. Any number above it would hide scores below it.
LOWEST = -(2.0 - 2.0**-23) * 2.0**127
# By how much a row's maximum exceeds its reference, in log2 units, before the reference is raised.
LAZY_LOG2 = 8.0

# Over FP8 caches P is float16, and the reference goes by row sums: it is raised when a thread's part of one exceeds
# MAX_P. That is within float16, and so far above 1 that it is rare, so a pair of tiles needs no row maxima.
MAX_P = 2.0**14
# The same limit where P is multiplied by scales of up to MAX_UNITS.
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


def row_max(s_rc, row: int, num_cols: int):
    """Maximum of row 0 or 1 of a (row, column) view (wgmma.row_col_view), over the lanes that share it."""
    mx = cute.arch.fmax(s_rc[row, 0], s_rc[row, 1])
    for n in range(2, num_cols):
        mx = cute.arch.fmax(mx, s_rc[row, n])
    return quad_max(mx)


@cute.jit
def lazy_max(old, new):
    """The new reference: `old` unless `new` exceeds it by more than LAZY_LOG2 (NaN keeps `old`)."""
    ref = old
    if new > old + LAZY_LOG2:
        ref = new
    return ref


def exp_row(s_rc, row: int, num_cols: int, scale_log2, ref):
    """s <- 2^(s * scale_log2 - ref) along a row; returns this thread's part of the row sum."""
    total = Float32(0.0)
    for n in range(num_cols):
        e = exp2(s_rc[row, n] * scale_log2 - ref)
        s_rc[row, n] = e
        total = total + e
    return total


def any_rescale(scale0, scale1):
    """Warp-uniform: some row of this warp has a scale other than 1 (1 is exact, so skipping changes no bit)."""
    return cute.arch.vote_any_sync((scale0 != Float32(1.0)) | (scale1 != Float32(1.0)))


def multiply_rows(acc_rc, num_cols: int, scale0, scale1) -> None:
    """Multiply both rows of a (row, column) view, each by its scale."""
    for n in range(num_cols):
        acc_rc[0, n] = acc_rc[0, n] * scale0
        acc_rc[1, n] = acc_rc[1, n] * scale1


@cute.jit
def scale_rows(acc_rc, num_cols: cutlass.Constexpr, scale0, scale1, need):
    """The same, if `need`."""
    if need:
        multiply_rows(acc_rc, num_cols, scale0, scale1)


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
