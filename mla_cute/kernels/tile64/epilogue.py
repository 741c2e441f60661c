"""How a consumer's half of O leaves its registers: normalised, packed to 16 bits, transposed and stored."""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int64, Uint32, const_expr

from ...dims import PART_ROW, TILE_M
from ..lib import partials, scalars, softmax
from ..lib.row_map import output_address
from .math import o_cols
from .params import Bar, Fragments, Params, Smem, Variant


class Epilogue(Variant):
    """Methods of Tile64."""

    @cute.jit
    def _epilogue(self, params: Params, smem: Smem, regs: Fragments, slot, head0, wg: Constexpr):
        """Store the rows of the item in `slot`: to the output, or as partial rows. wg 0 stores their log-sum-exps."""
        rows = self.rows.num_rows(params, smem, slot, head0)
        part_row = self.rows.part_row(smem, slot, head0)
        for r in cutlass.range_constexpr(2):
            regs.rL[r] = softmax.quad_sum(regs.rL[r])
            regs.rW[r] = softmax.quad_sum(regs.rW[r])
        if regs.lane % 4 == 0:
            for r in cutlass.range_constexpr(2):
                smem.sL[wg * TILE_M + regs.row + 8 * r] = regs.rW[r]
                if const_expr(wg == 1):
                    smem.sSum[regs.row + 8 * r] = regs.rL[r]
        Bar.EPI.sync()
        if const_expr(wg == 0):
            for r in cutlass.range_constexpr(2):
                row = regs.row + 8 * r
                if (regs.lane % 4 == 0) & (row < rows):
                    lse = cute.math.log2(regs.rL[r] + smem.sSum[row]) + regs.rRef[r]
                    if self.rows.is_partial(smem, slot):
                        partials.put_lse(params, part_row + row, lse)
                    else:
                        token, head = self.rows.token_and_head(params, smem, slot, head0, row)
                        params.mLse[token, head] = lse * params.lse_scale
        # Outputs and partials are both rows of 16-bit values: one store path, from the address of each row.
        words = cute.make_rmem_tensor((2, o_cols(regs) // 2), Uint32)
        at0 = Int64(0)
        at1 = Int64(0)
        if self.rows.is_partial(smem, slot):
            at0 = partials.row_address(params, part_row + regs.row)
            at1 = at0 + 8 * 4 * PART_ROW
            worth = pack_int16(smem, regs, words)
            for r in cutlass.range_constexpr(2):
                if (regs.lane % 4 == 0) & (regs.row + 8 * r < rows):
                    partials.put_worth(params, part_row + regs.row + 8 * r, wg, worth[r])
        else:
            at0 = output_address(params, *self.rows.token_and_head(params, smem, slot, head0, regs.row))
            at1 = output_address(params, *self.rows.token_and_head(params, smem, slot, head0, regs.row + 8))
            pack_output(smem, regs, words, self.dtype, self._sinks(params, regs, head0))
        store_rows(regs, words, (at0, at1), rows, wg)

    def _sinks(self, params: Params, regs: Fragments, head0) -> list:
        """What sinks add to the sums of this thread's two rows; None where there are no sinks."""
        if not self.loader.sparse:
            return [None, None]
        return [scalars.sink_weight(params, head0 + regs.row + 8 * r, regs.rRef[r]) for r in range(2)]


def inverse_sum(smem: Smem, regs: Fragments, row: int, sink=None):
    """1 / (l + sink), and 0 for a row that saw no key: O is 0 there, and has to stay 0."""
    total = smem.sL[regs.row + 8 * row] + smem.sL[regs.row + 8 * row + TILE_M]
    divisor = total if sink is None else total + sink
    return cutlass.select_(total != 0.0, cute.arch.rcp_approx(divisor), Float32(0.0))


def pack_output(smem: Smem, regs: Fragments, words, dtype, sinks: list) -> None:
    """O, normalised, in the 16-bit dtype, to `words`: (row, pair of columns)."""
    cols = o_cols(regs)
    rOh = cute.make_rmem_tensor(2 * cols, dtype)
    for r in range(2):
        inverse = inverse_sum(smem, regs, r, sinks[r])
        for n in range(cols):
            regs.O[r, n] = regs.O[r, n] * inverse
    rOh.store(cute.make_tensor(regs.rO.iterator, cute.make_layout(2 * cols)).load().to(dtype))
    pairs = cute.make_layout((2, cols // 2), stride=(1, 2))
    packed = cute.make_tensor(cute.recast_tensor(rOh, Uint32).iterator, pairs)
    for r in range(2):
        for j in range(cols // 2):
            words[r, j] = packed[r, j]


def pack_int16(smem: Smem, regs: Fragments, words) -> list:
    """O as pairs of 16-bit integers (lib/partials.py) to `words`; returns what an integer of each row is worth.

    The maximum is taken over sums of two magnitudes: half the FMNMX, which issue at half the rate of FADD, for at most
    one bit. Two maxima a row are kept apart, by turns: one would be a chain of 32 dependent steps.
    """
    maxima = [[Float32(partials.SMALLEST), Float32(partials.SMALLEST)] for _ in range(2)]
    for n in range(0, o_cols(regs), 2):
        for r in range(2):
            pair = cute.math.absf(regs.O[r, n]) + cute.math.absf(regs.O[r, n + 1])
            maxima[r][n // 2 % 2] = cute.arch.fmax(maxima[r][n // 2 % 2], pair, nan=True)
    worth = []
    for r in range(2):
        largest = cute.arch.fmax(maxima[r][0], maxima[r][1], nan=True)
        for offset in (1, 2):
            largest = cute.arch.fmax(largest, cute.arch.shuffle_sync_bfly(largest, offset=offset), nan=True)
        factor = partials.int16_factor(largest)
        for j in range(o_cols(regs) // 2):
            words[r, j] = partials.int16_words((regs.O[r, 2 * j], regs.O[r, 2 * j + 1]), factor)[0]
        worth.append(partials.int16_worth(largest * inverse_sum(smem, regs, r)))
    return worth


@cute.jit
def store_rows(regs: Fragments, words, row_at, rows, wg: Constexpr):
    """This thread's columns of two 16-bit rows, to the addresses `row_at`, where the tile has them.

    4 x 4 transposes of column pairs inside each quad, then 16 bytes per lane, 64 per quad.
    """
    q = regs.lane % 4
    upper = q >= 2
    odd = q % 2 == 1
    v = cute.make_rmem_tensor(4, Uint32)
    for r in cutlass.range_constexpr(2):
        row = regs.row + 8 * r
        at = row_at[r] + Int64(wg * (8 * o_cols(regs)) + q * 16)
        for g in cutlass.range_constexpr(o_cols(regs) // 8):
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
