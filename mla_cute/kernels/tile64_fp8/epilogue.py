"""How O^T leaves the FP8 row-tile kernel's registers: normalised, packed to 16 bits, stored.

`p`, `s` and `f` are its `Params`, `Smem` and `Fragments`. A thread holds two neighbouring channels of 16 rows,
a word each; the eight lanes of a row store 32 bytes, a whole sector.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, Uint32

from ...dims import INT16_BIAS, INT16_MOST
from ..lib import barriers, partials, ptx
from .params import BAR_FILL0


def _row(f, j: int, e: int):
    return 8 * j + f.lane % 4 * 2 + e


def _inverse_sum(s, row):
    """1 / l, and 0 for a row that saw no key: O is 0 there, and has to stay 0."""
    total = s.sL[0, row] + s.sL[1, row]
    return cutlass.select_(total != 0.0, cute.arch.rcp_approx(total), Float32(0.0))


def _pair(f, m: int, j: int, e: int):
    """Channels 2 g and 2 g + 1 of block m in row (j, e)."""
    return f.rO[m][4 * j + e], f.rO[m][4 * j + 2 + e]


def _fmax_abs(largest, *values):
    for x in values:
        largest = cute.arch.fmax(largest, cute.math.absf(x), nan=True)
    return largest


def _to_int16_pair(low, high, to_int):
    low, high = low * to_int + Float32(INT16_BIAS), high * to_int + Float32(INT16_BIAS)
    return Uint32(cute.arch.prmt(low.bitcast(Int32), high.bitcast(Int32), 0x5410))


def _first_word(f, wg: int):
    """Byte of this thread's word of block 0 in a row of 512 16-bit values."""
    return Int64((wg * 256 + f.t // 32 * 16 + f.lane // 4 * 2) * 2)


@cute.jit
def store_output(s, f, rows, scale, dtype: Constexpr, wg: Constexpr):
    """To the rows at s.sAddress, times `scale`."""
    for j in cutlass.range_constexpr(8):
        for e in cutlass.range_constexpr(2):
            row = _row(f, j, e)
            inverse = _inverse_sum(s, row) * scale
            words = [ptx.to_16bit_pair(*(x * inverse for x in _pair(f, m, j, e)), dtype) for m in range(4)]
            if row < rows:
                at = s.sAddress[row] + _first_word(f, wg)
                for m in cutlass.range_constexpr(4):
                    ptx.store_global(at + 128 * m, [words[m]])


@cute.jit
def store_partial(p, s, f, part_row, rows, scale, wg: Constexpr):
    """To the rows at s.sAddress as biased 16-bit integers, and what an integer is worth (lib/partials.py)."""
    for j in cutlass.range_constexpr(8):
        for e in cutlass.range_constexpr(2):
            largest = Float32(1.0e-30)
            for m in cutlass.range_constexpr(4):
                largest = _fmax_abs(largest, *_pair(f, m, j, e))
            for i in cutlass.range_constexpr(3):
                largest = cute.arch.fmax(largest, cute.arch.shuffle_sync_bfly(largest, offset=4 << i), nan=True)
            if f.lane < 4:
                s.scratch[_row(f, j, e), f.t // 32, wg] = largest
    barriers.sync(BAR_FILL0 + wg, 128)
    for j in cutlass.range_constexpr(8):
        for e in cutlass.range_constexpr(2):
            row = _row(f, j, e)
            largest = s.scratch[row, 0, wg]
            for i in cutlass.range_constexpr(3):
                largest = cute.arch.fmax(largest, s.scratch[row, i + 1, wg], nan=True)
            to_int = Float32(INT16_MOST) * cute.arch.rcp_approx(largest)
            words = []
            for m in cutlass.range_constexpr(4):
                words.append(_to_int16_pair(*_pair(f, m, j, e), to_int))
            if row < rows:
                at = s.sAddress[row] + _first_word(f, wg)
                for m in cutlass.range_constexpr(4):
                    ptx.store_global(at + 128 * m, [words[m]])
                if (f.lane < 4) & (f.t < 32):
                    worth = largest * _inverse_sum(s, row) * scale * Float32(1.0 / INT16_MOST)
                    partials.put_worth(p, part_row + row, wg, worth)


@cute.jit
def put_addresses(p, s, f, part_row, partial, token, head):
    """Threads 0..63: where row f.t of the tile goes."""
    at = p.mO.iterator.toint() + (Int64(token) * p.mO.stride[0] + Int64(head) * p.mO.stride[1]) * 2
    if partial:
        at = partials.row_address(p, part_row + f.t)
    s.sAddress[f.t] = at
