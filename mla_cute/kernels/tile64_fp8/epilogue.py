"""How O^T leaves the registers of tile64_fp8's consumers: normalised, packed to 16 bits, stored.

A thread holds two neighbouring channels of 16 rows, a word each; the eight lanes of a row store 32 bytes, a whole
sector.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int64, const_expr

from ..lib import barriers, partials, ptx, scalars, softmax
from .params import FILL, Bar, Fragments, Params, Smem, Variant


class Epilogue(Variant):
    """The end of an item: a method of Tile64Fp8."""

    @cute.jit
    def _epilogue(self, params: Params, smem: Smem, regs: Fragments, slot, head0, wg):
        """O^T / l to the output, or as 16-bit integers under a scale to the partial rows (dims.py); lse beside them.

        `slot`: where the item's record lies in smem.sItem."""
        rows = self.rows.num_rows(params, smem, slot, head0)
        part_row = self.rows.part_row(smem, slot, head0)
        partial = self.rows.is_partial(smem, slot)
        for r in cutlass.range_constexpr(self.own_rows):
            regs.rL[r] = softmax.quad_sum(regs.rL[r])
        softmax.put_rows(smem.sL[wg, None], regs.row, regs.lane, regs.rL, self.own_rows)
        if wg == 0:
            softmax.put_rows(smem.sMax[0, None], regs.row, regs.lane, regs.rRef, self.own_rows)
        else:
            if regs.t < rows:
                token, head = self.rows.token_and_head(params, smem, slot, head0, regs.t)
                put_addresses(params, smem, regs, part_row, partial, token, head)
        Bar.EPI.sync()
        if wg == 0:
            if regs.t < rows:
                v = cute.math.log2(smem.sL[0, regs.t] + smem.sL[1, regs.t]) + smem.sMax[0, regs.t]
                if partial:
                    partials.put_lse(params, part_row + regs.t, v)
                else:
                    token, head = self.rows.token_and_head(params, smem, slot, head0, regs.t)
                    params.mLse[token, head] = v * params.lse_scale
        # With channel scales the output is counted in the unit, else in what the scale of the tensor says.
        scale = regs.rUnit[0]
        if const_expr(self.num_scales == 0):
            scale = scalars.output_factor(params)
        if partial:
            store_partial(params, smem, regs, part_row, rows, scale, wg)
        else:
            sinks = params if const_expr(self.loader.sparse) else None
            store_output(smem, regs, rows, scale, self.dtype, wg, sinks, head0)


def groups(regs: Fragments) -> int:
    """Of eight rows, that a tile has."""
    return cute.size(regs.rO[0]) // 4


def _row(regs: Fragments, j: int, e: int):
    """Row of the tile that this thread has as its (j, e)-th, two of every eight."""
    return 8 * j + regs.lane % 4 * 2 + e


def _inverse_sum(smem: Smem, row, sink=None):
    return softmax.inverse_sum(smem.sL[0, row] + smem.sL[1, row], sink)


def _channels(regs: Fragments, m: int, j: int, e: int):
    """This thread's two channels, which are neighbours, of block m in row (j, e)."""
    return regs.rO[m][4 * j + e], regs.rO[m][4 * j + 2 + e]


def _fmax_abs(largest, *values):
    for x in values:
        largest = cute.arch.fmax(largest, cute.math.absf(x), nan=True)
    return largest


def _first_word(regs: Fragments, wg):
    """Where this thread's word of block 0 begins in a row of 16-bit values, in bytes."""
    return Int64((wg * (64 * len(regs.rO)) + regs.t // 32 * 16 + regs.lane // 4 * 2) * 2)


@cute.jit
def store_output(smem: Smem, regs: Fragments, rows, scale, dtype: Constexpr, wg, sinks, head0):
    """Store O, times `scale`, to the rows at smem.sAddress. `sinks`: the kernel's Params where there may be sinks, of
    heads from `head0` on, else None."""
    for j in cutlass.range_constexpr(groups(regs)):
        for e in cutlass.range_constexpr(2):
            row = _row(regs, j, e)
            sink = None
            if const_expr(sinks is not None):
                sink = scalars.sink_weight(sinks, head0 + row, smem.sMax[0, row])
            inverse = _inverse_sum(smem, row, sink) * scale
            channels = [_channels(regs, m, j, e) for m in range(len(regs.rO))]
            words = [ptx.to_16bit_pair(*(x * inverse for x in pair), dtype) for pair in channels]
            if row < rows:
                at = smem.sAddress[row] + _first_word(regs, wg)
                for m in cutlass.range_constexpr(len(regs.rO)):
                    ptx.store_global(at + 128 * m, [words[m]])


@cute.jit
def store_partial(params: Params, smem: Smem, regs: Fragments, part_row, rows, scale, wg):
    """Store O to the rows at smem.sAddress as biased 16-bit integers, and what an integer is worth, times `scale`
    (lib/partials.py)."""
    for j in cutlass.range_constexpr(groups(regs)):
        for e in cutlass.range_constexpr(2):
            largest = Float32(partials.SMALLEST)
            for m in cutlass.range_constexpr(len(regs.rO)):
                largest = _fmax_abs(largest, *_channels(regs, m, j, e))
            for i in cutlass.range_constexpr(3):
                largest = cute.arch.fmax(largest, cute.arch.shuffle_sync_bfly(largest, offset=4 << i), nan=True)
            if regs.lane < 4:
                smem.scratch[_row(regs, j, e), regs.t // 32, wg] = largest
    barriers.sync_of(FILL, wg)
    for j in cutlass.range_constexpr(groups(regs)):
        for e in cutlass.range_constexpr(2):
            row = _row(regs, j, e)
            largest = smem.scratch[row, 0, wg]
            for i in cutlass.range_constexpr(3):
                largest = cute.arch.fmax(largest, smem.scratch[row, i + 1, wg], nan=True)
            to_int = partials.int16_factor(largest)
            words = []
            for m in cutlass.range_constexpr(len(regs.rO)):
                words.extend(partials.int16_words(_channels(regs, m, j, e), to_int))
            if row < rows:
                at = smem.sAddress[row] + _first_word(regs, wg)
                for m in cutlass.range_constexpr(len(regs.rO)):
                    ptx.store_global(at + 128 * m, [words[m]])
                if (regs.lane < 4) & (regs.t < 32):
                    worth = partials.int16_worth(largest * _inverse_sum(smem, row) * scale)
                    partials.put_worth(params, part_row + row, wg, worth)


@cute.jit
def put_addresses(params: Params, smem: Smem, regs: Fragments, part_row, partial, token, head):
    """Write to smem.sAddress where row regs.t of the tile goes; called by the threads whose row exists."""
    at = params.mO.iterator.toint() + (Int64(token) * params.mO.stride[0] + Int64(head) * params.mO.stride[1]) * 2
    if partial:
        at = partials.row_address(params, part_row + regs.t)
    smem.sAddress[regs.t] = at
