"""How a consumer's half of O leaves its registers: normalised, packed to 16 bits, transposed and stored."""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, Uint32, const_expr

from ...dims import PART_ROW, TILE_M
from ..lib import partials, ptx, scalars, softmax
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
            worth = pack_int16(smem, regs, words, self._out_scale(params))
            for r in cutlass.range_constexpr(2):
                if (regs.lane % 4 == 0) & (regs.row + 8 * r < rows):
                    partials.put_worth(params, part_row + regs.row + 8 * r, wg, worth[r])
        else:
            at0 = output_address(params, *self.rows.token_and_head(params, smem, slot, head0, regs.row))
            at1 = output_address(params, *self.rows.token_and_head(params, smem, slot, head0, regs.row + 8))
            pack_output(smem, regs, words, self.dtype, self._sinks(params, regs, head0), self._out_scale(params))
        store_rows(smem, regs, words, (at0, at1), rows, wg)

    def _out_scale(self, params: Params):
        """What V is worth in the output; None: itself."""
        return scalars.output_factor(params) if self.converted else None

    def _sinks(self, params: Params, regs: Fragments, head0) -> list:
        """What sinks add to the sums of this thread's two rows; None where there are no sinks."""
        if not self.loader.sparse:
            return [None, None]
        return [scalars.sink_weight(params, head0 + regs.row + 8 * r, regs.rRef[r]) for r in range(2)]


def _row_factor(smem: Smem, regs: Fragments, row: int, out_scale, sink=None):
    """What a row of O is multiplied by."""
    total = smem.sL[regs.row + 8 * row] + smem.sL[regs.row + 8 * row + TILE_M]
    inverse = softmax.inverse_sum(total, sink)
    return inverse if out_scale is None else inverse * out_scale


def pack_output(smem: Smem, regs: Fragments, words, dtype, sinks: list, out_scale) -> None:
    """O, normalised, in the 16-bit dtype, to `words`: (row, pair of columns)."""
    factors = [_row_factor(smem, regs, r, out_scale, sinks[r]) for r in range(2)]
    for j in range(o_cols(regs) // 2):
        for r in range(2):
            pair = (regs.O[r, 2 * j + i] * factors[r] for i in range(2))
            words[r, j] = ptx.to_16bit_pair(*pair, dtype)


def pack_int16(smem: Smem, regs: Fragments, words, out_scale) -> list:
    """O as pairs of 16-bit integers (lib/partials.py) to `words`; returns what an integer of each row is worth.

    The maximum is taken over sums of two magnitudes: half the FMNMX, which issue at half the rate of FADD, for at most
    one bit. Two maxima a row are kept apart, by turns: one would be a chain of 32 dependent steps.
    """
    maxima = [[Float32(partials.SMALLEST), Float32(partials.SMALLEST)] for _ in range(2)]
    for n in range(0, o_cols(regs), 2):
        for r in range(2):
            pair = cute.math.absf(regs.O[r, n]) + cute.math.absf(regs.O[r, n + 1])
            maxima[r][n // 2 % 2] = cute.arch.fmax(maxima[r][n // 2 % 2], pair, nan=True)
    largest = [cute.arch.fmax(*of_row, nan=True) for of_row in maxima]
    for offset in (1, 2):
        largest = [cute.arch.fmax(x, cute.arch.shuffle_sync_bfly(x, offset=offset), nan=True) for x in largest]
    factors = [partials.int16_factor(x) for x in largest]
    for j in range(o_cols(regs) // 2):
        for r in range(2):
            words[r, j] = partials.int16_words((regs.O[r, 2 * j], regs.O[r, 2 * j + 1]), factors[r])[0]
    return [partials.int16_worth(largest[r] * _row_factor(smem, regs, r, out_scale)) for r in range(2)]


@cute.jit
def store_rows(smem: Smem, regs: Fragments, words, row_at, rows, wg: Constexpr):
    """Store this consumer's columns of rows `regs.row` and `regs.row + 8` to the addresses `row_at`, where the tile has
    them.

    A lane holds two columns of each 8 and shall store 8 of one row: 16 bytes a lane, 64 the four lanes of a row. They
    pass through P0, of which each of the eight warps takes 1 KiB for 16 rows of 32 columns: nobody reads P0 any more
    behind Bar.EPI, nor writes it before Bar.FIRST of the next item. (Transposed by shuffles inside the quads it was 128
    shuffles, and 190 instructions more for each consumer, which a step of one item fetches for the first time.)
    """
    # Of regs.t and regs.lane the compiler would make what follows once, and keep it in registers over all pairs.
    t = Uint32(ptx.thread_index())
    lane = t % 32
    own = Uint32(smem.sP0.iterator.toint()) + t // 32 * 1024
    # Four matrices of 8 x 8 beside each other. A row is 64 bytes; its units of 16 are permuted by two bits of its
    # number, so that the eight rows of a matrix lie in all banks, as two whole rows do.
    put = Int32(own + lane % 8 * 64 + ((lane // 8) ^ (lane % 8 // 2)) * 16)
    get = Int32(own + lane // 4 * 64 + ((lane % 4) ^ (lane // 8)) * 16)
    to = [at + Int64(wg * (8 * o_cols(regs)) + lane % 4 * 16) for at in row_at]
    for g in cutlass.range_constexpr(o_cols(regs) // 8):
        for r in cutlass.range_constexpr(2):
            ptx.store_matrices(put, [words[r, 4 * g + i] for i in range(4)], 8 * 64 * r)
        cute.arch.sync_warp()
        both = [ptx.load_shared_16(get, 8 * 64 * r) for r in range(2)]
        cute.arch.sync_warp()
        for r in cutlass.range_constexpr(2):
            if regs.row + 8 * r < rows:
                ptx.store_global(to[r] + 64 * g, both[r])
