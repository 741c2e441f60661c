"""How a consumer's half of O leaves its registers: normalised, packed to 16 bits, transposed and stored.

`s` and `f` are the `Smem` and `Fragments` of rows_sm90.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, Uint32

from ...dims import INT16_BIAS, INT16_MOST, TILE_M


def inverse_sum(s, f, row: int):
    """1 / l, and 0 for a row that saw no key: O is 0 there, and has to stay 0."""
    total = s.sL[f.row + 8 * row] + s.sL[f.row + 8 * row + TILE_M]
    return cutlass.select_(total != 0.0, cute.arch.rcp_approx(total), Float32(0.0))


def pack_output(s, f, words, dtype) -> None:
    """O, normalised, in the 16-bit dtype: (row, pair of columns) words."""
    rOh = cute.make_rmem_tensor(128, dtype)
    for r in range(2):
        inv = inverse_sum(s, f, r)
        for n in range(64):
            f.O[r, n] = f.O[r, n] * inv
    rOh.store(cute.make_tensor(f.rO.iterator, cute.make_layout(128)).load().to(dtype))
    packed = cute.make_tensor(cute.recast_tensor(rOh, Uint32).iterator, cute.make_layout((2, 32), stride=(1, 2)))
    for r in range(2):
        for j in range(32):
            words[r, j] = packed[r, j]


def pack_int16(s, f, words):
    """O as pairs of biased 16-bit integers; returns what an integer of each row is worth in the normalised output.

    An FFMA with 2^23 + 2^15 leaves round(x) + 2^15 in the low bits of the float's mantissa. A NaN or an infinity
    makes the scale one, and with it the row's half. The maximum is taken over sums of two: half the FMNMX, which
    issue at half the rate of FADD, for at most one bit. Two chains a row: one is 32 dependent steps.
    """
    maxima = [[Float32(1.0e-30), Float32(1.0e-30)] for _ in range(2)]
    for n in range(0, 64, 2):
        for r in range(2):
            pair = cute.math.absf(f.O[r, n]) + cute.math.absf(f.O[r, n + 1])
            maxima[r][n // 2 % 2] = cute.arch.fmax(maxima[r][n // 2 % 2], pair, nan=True)
    worth = []
    for r in range(2):
        largest = cute.arch.fmax(maxima[r][0], maxima[r][1], nan=True)
        for offset in (1, 2):
            largest = cute.arch.fmax(largest, cute.arch.shuffle_sync_bfly(largest, offset=offset), nan=True)
        to_int = Float32(INT16_MOST) * cute.arch.rcp_approx(largest)
        for j in range(32):
            low, high = (f.O[r, 2 * j + i] * to_int + Float32(INT16_BIAS) for i in range(2))
            words[r, j] = Uint32(cute.arch.prmt(low.bitcast(Int32), high.bitcast(Int32), 0x5410))
        worth.append(largest * inverse_sum(s, f, r) * Float32(1.0 / INT16_MOST))
    return worth


@cute.jit
def store_rows(f, words, row_at, rows, wg: Constexpr):
    """This thread's two 16-bit rows, to the addresses `row_at`.

    4 x 4 transposes of column pairs inside each quad, then 16 bytes per lane, 64 per quad.
    """
    q = f.lane % 4
    upper = q >= 2
    odd = q % 2 == 1
    v = cute.make_rmem_tensor(4, Uint32)
    for r in cutlass.range_constexpr(2):
        row = f.row + 8 * r
        at = row_at[r] + Int64(wg * 512 + q * 16)
        for g in cutlass.range_constexpr(8):
            a = [words[r, 4 * g + i] for i in range(4)]
            b = [None] * 4
            for i in cutlass.range_constexpr(2):
                x = cute.arch.shuffle_sync_bfly(a[i] if upper else a[i + 2], offset=2)
                b[i] = x if upper else a[i]
                b[i + 2] = a[i + 2] if upper else x
            for i in cutlass.range_constexpr(2):
                x = cute.arch.shuffle_sync_bfly(b[2 * i] if odd else b[2 * i + 1], offset=1)
                v[2 * i] = x if odd else b[2 * i]
                v[2 * i + 1] = b[2 * i + 1] if odd else x
            if row < rows:
                to = cute.make_ptr(Uint32, at + 64 * g, cute.AddressSpace.gmem, assumed_align=16)
                cute.autovec_copy(v, cute.make_tensor(to, cute.make_layout(4)))
