"""How the Q of an item comes into shared memory as e4m3, once per item, by both consumer warpgroups of tile64_fp8."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32, const_expr

from ...dims import KPE_DIM, TILE_M
from ..lib import barriers, e4m3, ptx, scalars, softmax
from ..lib.paged import SUB_BYTES
from .params import Bar, Params, Smem, Variant


class QueryLoad(Variant):
    """Four threads load a row: thread q4 of them takes the 16-byte chunks q4, q4 + 4, ... of it in global memory."""

    @cute.jit
    def _load_q(self, params: Params, smem: Smem, slot, head0):
        """Rows past the tile's repeat its last one. Ends with Q in shared memory for both consumers."""
        if const_expr(self.tile_rows == TILE_M):
            self._load_rows(params, smem, slot, head0)
        else:
            if ptx.thread_index() < 4 * self.tile_rows:
                self._load_rows(params, smem, slot, head0)
        barriers.fence_smem_writes()
        Bar.Q.sync()

    def _operand_row(self, row):
        """Where a tile's row is in the operand of Q K^T; of 32 rows the low part is eight rows behind it."""
        return row if self.tile_rows == TILE_M else row // 8 * 16 + row % 8

    @cute.jit
    def _load_rows(self, params: Params, smem: Smem, slot, head0):
        t = ptx.thread_index()
        row = t // 4
        q4 = t % 4
        last = self.rows.num_rows(params, smem, slot, head0) - 1
        token, head = self.rows.token_and_head(params, smem, slot, head0, cutlass.min(row, last))
        nope = ptx.row_address(params.mQ, token, head) + Int64(q4 * 16)
        # Swizzles: the 16-byte chunk index of a 128-byte row is xored with row % 8, of a 64-byte row with row / 2 % 4.
        r8 = row % 8
        to_nope = Int32(smem.sQ.iterator.toint()) + self._operand_row(row) * 128
        worth = scalars.score_factors(params, self.rope_fp8)
        scales = [Float32(1.0), Float32(1.0)]
        if const_expr(self.q_fp8):
            for i in cutlass.range_constexpr(2 * self.blocks):
                words = ptx.load_global_16(nope, i * 64)
                ptx.store_shared(to_nope + ((q4 + 4 * (i % 2)) ^ r8) * 16, words, i // 2 * SUB_BYTES)
        else:
            inverse, scales[0] = self._row_scale(nope, 4 * self.blocks)
            # A loop, and Q read again from L1: unrolled it keeps 200 registers and is 2000 instructions that run once.
            for i in cutlass.range(self.blocks, unroll=1):
                at = [to_nope + i * SUB_BYTES + ((q4 // 2 + 2 * j) ^ r8) * 16 + q4 % 2 * 8 for j in range(4)]
                low = TILE_M * self.dims.ckv if const_expr(self.tile_rows == TILE_M) else 8 * 128
                self._put_parts(nope + Int64(i * 256), inverse, at, low)
        if const_expr(self.dims.kpe > 0):
            scales[1] = self._load_q_rope(params, smem, token, head, row, q4)
        if q4 == 0:
            for i in cutlass.range_constexpr(2):
                smem.sQScale[i, row] = scales[i] * worth[i]

    @cute.jit
    def _load_q_rope(self, params: Params, smem: Smem, token, head, row, q4):
        """The rope of a row; returns what an integer of the e4m3 parts made of a 16-bit one is worth, else 1."""
        rope = ptx.row_address(params.mQpe, token, head) + Int64(q4 * 16)
        to = Int32(smem.sQr.iterator.toint())
        scale = Float32(1.0)
        if const_expr(self.rope_fp8):
            to = to + self._operand_row(row) * 64
            if const_expr(not self.q_fp8):
                inverse, scale = self._row_scale(rope, self.dims.kpe // 32)
                chunks = range(self.dims.kpe // 32)
                at = [to + ((q4 // 2 + 2 * j) ^ (row // 2 % 4)) * 16 + q4 % 2 * 8 for j in chunks]
                low = TILE_M * KPE_DIM if const_expr(self.tile_rows == TILE_M) else 8 * KPE_DIM
                self._put_parts(rope, inverse, at, low)
            elif const_expr(self.dims.kpe == 64):
                ptx.store_shared(to + (q4 ^ (row // 2 % 4)) * 16, ptx.load_global_16(rope, 0))
            else:
                if q4 < 2:
                    ptx.store_shared(to + (q4 ^ (row // 2 % 4)) * 16, ptx.load_global_16(rope, 0))
        else:
            for i in cutlass.range_constexpr(2):
                words = ptx.load_global_16(rope, i * 64)
                ptx.store_shared(to + self._operand_row(row) * 128 + ((q4 + 4 * i) ^ (row % 8)) * 16, words)
        return scale

    def _row_scale(self, address: Int64, chunks: int) -> tuple[Float32, Float32]:
        """(448 / amax, amax / 448) of a row of `dtype`, from this thread's 16-byte chunks, 64 bytes apart."""
        words = [ptx.load_global_16(address, i * 64) for i in range(chunks)]
        pair = Uint32(0)
        for chunk in words:
            for word in chunk:
                pair = ptx.max_abs_16bit(pair, word, self.dtype)
        largest = cute.arch.fmax(*ptx.unpack_16bit(pair, self.dtype))
        largest = cute.arch.fmax(softmax.quad_max(largest), Float32(1.0e-30))
        if self.q_parts == 1:
            # The division is IEEE: in a row whose amax is 1.75 times a power of two one bf16 value of sixteen lies
            # halfway between two e4m3, and an inverse that is off by an ulp would send half of those to the odd one.
            inverse = ptx.divide(Float32(e4m3.E4M3_MAX), largest)
        else:
            inverse = cute.arch.rcp_approx(largest) * e4m3.E4M3_MAX
        return inverse, largest * Float32(1.0 / e4m3.E4M3_MAX)

    def _put_parts(self, address: Int64, inverse: Float32, to: list, low_offset: int) -> None:
        """Chunks of a row, 64 bytes apart from `address` on and multiplied by `inverse`, as e4m3: rounded to the
        addresses `to`, or split, the high parts to `to` and the low ones `low_offset` bytes behind them."""
        for i, at in enumerate(to):
            words = ptx.load_global_16(address, i * 64)
            x = [v * inverse for word in words for v in ptx.unpack_16bit(word, self.dtype)]
            if self.q_parts == 1:
                ptx.store_shared(at, [e4m3.to_e4m3x4(x[:4]), e4m3.to_e4m3x4(x[4:])])
                continue
            first, second = e4m3.split_e4m3(x[:4]), e4m3.split_e4m3(x[4:])
            ptx.store_shared(at, [first[0], second[0]])
            ptx.store_shared(at, [first[1], second[1]], low_offset)
