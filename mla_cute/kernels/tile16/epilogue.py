"""How an item of the tile16 kernel ends: O / l to the output, or as 16-bit integers to partial rows (dims.py)."""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int64, const_expr

from ..lib import partials, ptx, scalars, softmax
from .params import NUM_WARPS, Bar, Fragments, Params, Smem
from .tiles import Tiles


class Epilogue:
    tiles: Tiles  # says which channels a thread has, and what they are worth

    def __init__(self, tiles: Tiles):
        self.tiles = tiles

    @cute.jit
    def store(self, params: Params, smem: Smem, regs: Fragments, request, part_row, head0):
        """By all consumers: regs.rO and rL to rows of `request`, heads head0 .. head0 + 15; to partial rows part_row +
        head where part_row >= 0. Heads past the last are not stored."""
        self.tiles.gather_quads(regs)
        for r in cutlass.range_constexpr(2):
            total = softmax.quad_sum(regs.rL[r])
            if regs.l4 == 0:
                smem.sMax[regs.row + 8 * r, regs.w] = total
        Bar.ITEM.sync()
        scale = self.tiles.output_factor(params, regs)
        for r in cutlass.range_constexpr(2):
            x = [smem.sMax[regs.row + 8 * r, w] for w in range(NUM_WARPS)]
            total = ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]))
            regs.rL[r] = total
        # All sums have been read: `_store_partial` puts other values into sMax.
        Bar.ITEM.sync()
        for r in cutlass.range_constexpr(2):
            head = head0 + regs.row + 8 * r
            # A row that saw no key has the sum 0: its O is 0 and has to stay 0.
            inverse = scale * cutlass.select_(regs.rL[r] != 0.0, cute.arch.rcp_approx(regs.rL[r]), Float32(0.0))
            lse = cute.math.log2(regs.rL[r]) + regs.rRef[r]
            if part_row >= 0:
                self._store_partial(params, smem, regs, r, part_row, head, inverse, lse)
            else:
                if const_expr(self.tiles.sparse):
                    divisor = regs.rL[r] + scalars.sink_weight(params, head, regs.rRef[r])
                    inverse = scale * cutlass.select_(regs.rL[r] != 0.0, cute.arch.rcp_approx(divisor), Float32(0.0))
                if head < params.num_heads:
                    at = ptx.row_address(params.mO, request, head)
                    for c in cutlass.range_constexpr(self.tiles.own_channels // 16):
                        self._store_quad(regs, at, c, [x * inverse for x in self.tiles.quad(regs, c, r)])
                    if (regs.w == 0) & (regs.l4 == 0):
                        params.mLse[request, head] = lse * params.lse_scale
        # No warp begins the next item before every warp has ended this one.
        Bar.ITEM.sync()

    def _store_quad(self, regs: Fragments, row_at, c: int, x: list) -> None:
        """Four channels as 16-bit floats; `row_at`: address of the output row."""
        words = [ptx.to_16bit_pair(x[2 * i], x[2 * i + 1], self.tiles.dtype) for i in range(2)]
        ptx.store_global(row_at + Int64(self._quad_at(regs, c)), words)

    def _quad_at(self, regs: Fragments, c: int):
        """Where quad `c` of the thread begins in a row of 16-bit values, in bytes."""
        return regs.w * (2 * self.tiles.own_channels) + c * 32 + self.tiles.quad_bytes(regs)

    @cute.jit
    def _store_partial(self, params: Params, smem: Smem, regs: Fragments, r: Constexpr, part_row, head, inverse, lse):
        """Row r of the thread. Each half of a row, four warps', is integers under a scale of its own."""
        row = regs.row + 8 * r
        largest = self._largest(regs, r)
        if regs.l4 == 0:
            smem.sMax[row, regs.w] = largest
        Bar.ITEM.sync()
        # The warp's half of the row is made from the thread index and not from regs.w: as part of what is kept over all
        # items it spills in the gather.
        half = ptx.thread_index() // 128
        for w in cutlass.range_constexpr(4):
            largest = cute.arch.fmax(largest, smem.sMax[row, half * 4 + w], nan=True)
        to_int = partials.int16_factor(largest)
        if head < params.num_heads:
            at = partials.row_address(params, part_row + head)
            for c in cutlass.range_constexpr(self.tiles.own_channels // 16):
                self._store_integers(regs, at, c, self.tiles.quad(regs, c, r), to_int)
            if (regs.l4 == 0) & (regs.w % 4 == 0):
                partials.put_worth(params, part_row + head, half, partials.int16_worth(largest * inverse))
                if regs.w == 0:
                    partials.put_lse(params, part_row + head, lse)

    def _largest(self, regs: Fragments, r: int):
        """The largest magnitude of row r in the warp's channels, above 0 so that it can be divided by; NaN if one
        is NaN."""
        largest = Float32(partials.SMALLEST)
        for c in range(self.tiles.own_channels // 16):
            for x in self.tiles.quad(regs, c, r):
                largest = cute.arch.fmax(largest, cute.math.absf(x), nan=True)
        for offset in (1, 2):
            largest = cute.arch.fmax(largest, cute.arch.shuffle_sync_bfly(largest, offset=offset), nan=True)
        return largest

    def _store_integers(self, regs: Fragments, row_at, c: int, x: list, to_int) -> None:
        """Four channels as biased 16-bit integers; `row_at`: address of the partial row."""
        words = partials.int16_words(x, to_int)
        ptx.store_global(row_at + Int64(self._quad_at(regs, c)), words)
