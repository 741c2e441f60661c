"""Tiles of a 16-bit cache in the tile16 kernel: fragments as they lie in memory. tiles.py says what the methods do.

A K tile is eight ckv sub-tiles of 64 tokens x 64 channels and one of rope, 64 tokens x 128 bytes each, in 128-byte
swizzle. A warp's PV channels are one ckv sub-tile (of 256 channels: half of one). Q takes up to 128 registers; the rest
of it, the rope at least, is read from shared memory for every tile.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32, const_expr

from ...dims import HeadDims
from ..lib import barriers, ptx
from ..lib.paged import SUB_BYTES, TILE_N
from ..lib.ring import RingMbarriers
from .params import P_WORDS, Bar, Fragments, Params, Smem
from .tiles import Tiles

Q_SUB_BYTES = 16 * 128  # 64 channels of Q's 16 rows


class SixteenBitTiles(Tiles):
    q_pass_steps: int  # steps of Q that pass through shared memory at a time, on their way to registers
    mma_dtype: str  # "bf16" or "f16", of all operands

    def __init__(self, dtype: type, dims: HeadDims, sparse: bool, by_tma: bool):
        super().__init__(dtype, dims, sparse, kv_format="", q_fp8=False)
        self.tile_bytes = self.nope_steps // 4 * SUB_BYTES
        self.num_stages = 3 if dims.ckv == 512 else 5
        # By TMA all of q_nope is in registers. The gather's consumers have 232 each, which is two too few for 512
        # channels, so there 64 channels of it stay in shared memory beside the rope.
        self.q_steps, self.q_pass_steps = self.nope_steps, 16
        if not by_tma:
            self.q_pass_steps = 8
            if dims.ckv == 512:
                self.q_steps -= 4
        self.q_kept_bytes = ((self.nope_steps - self.q_steps) // 4 + 1) * Q_SUB_BYTES
        self.q_transient_bytes = self.q_pass_steps // 4 * Q_SUB_BYTES
        self.mma_dtype = ptx.ptx_name(self.dtype)

    def to_p_pair(self, low, high):
        return ptx.to_16bit_pair(low, high, self.dtype)

    # -------------------------------------------------------------------- Q

    @cute.jit
    def load_q(self, params: Params, smem: Smem, regs: Fragments, request, head0):
        """Q's 16 rows go to shared memory in K's swizzle, sixteen threads a row, and from there to A fragments. What
        stays there is 64 channels at a time, the rope last."""
        t = ptx.thread_index()
        row = t // 16
        q16 = t % 16
        head = cutlass.min(head0 + row, params.num_heads - 1)
        nope = ptx.row_address(params.mQ, request, head) + Int64(q16 * 16)
        chunks = [ptx.load_global_16(nope, 256 * i) for i in range(self.nope_steps // 8)]
        kept = smem.q_address + row * 128 + (q16 % 8 ^ row % 8) * 16
        if q16 < 8:
            self._keep_rope(params, kept, request, head, q16)
        elif const_expr(self.q_steps < self.nope_steps):
            ptx.store_shared(kept, chunks[self.nope_steps // 8 - 1])
        lane = t % 32
        row_bytes = self.q_pass_steps * 32
        for first in cutlass.range_constexpr(0, self.q_steps, self.q_pass_steps):
            for i in cutlass.range_constexpr(self.q_pass_steps // 8):
                at = smem.p_address + row * row_bytes + ((q16 + 16 * i) ^ (row % 8)) * 16
                ptx.store_shared(at, chunks[first // 8 + i])
            Bar.ITEM.sync()
            at = smem.p_address + lane % 16 * row_bytes
            for step in cutlass.range_constexpr(min(self.q_pass_steps, self.q_steps - first)):
                a = ptx.ldmatrix_x4(at + ((2 * step + lane // 16) ^ (lane % 8)) * 16, 0, False)
                for i, word in enumerate(a):
                    regs.rQ[(first + step) * 4 + i] = word
            Bar.ITEM.sync()

    @cute.jit
    def _keep_rope(self, params: Params, kept, request, head, q16):
        """Chunk q16 of the rope of a row, if it has so many."""
        rope = ptx.row_address(params.mQpe, request, head) + Int64(q16 * 16)
        if const_expr(self.rope_steps == 4):
            ptx.store_shared(kept, ptx.load_global_16(rope), self.q_kept_bytes - Q_SUB_BYTES)
        else:
            if q16 < 2 * self.rope_steps:
                ptx.store_shared(kept, ptx.load_global_16(rope), self.q_kept_bytes - Q_SUB_BYTES)

    def _q_fragment(self, smem: Smem, regs: Fragments, step: int) -> list:
        """A fragment of 16 channels of Q; the rope's steps are the last."""
        if step < self.q_steps:
            return [regs.rQ[step * 4 + j] for j in range(4)]
        sub, in_sub = divmod(step - self.q_steps, 4)
        at = smem.q_address + regs.lane % 16 * 128 + ((2 * in_sub + regs.lane // 16) ^ (regs.lane % 8)) * 16
        return ptx.ldmatrix_x4(at, sub * Q_SUB_BYTES, False)

    # ---------------------------------------------------------------- tiles

    @cute.jit
    def scores(self, params: Params, smem: Smem, regs: Fragments, slot, phase, left):
        cute.arch.mbarrier_wait(smem.mbar + RingMbarriers.full + slot, phase)
        sees = self.sees(smem, regs, slot, left)
        r8 = regs.lane % 8
        chunk = regs.lane // 8
        rows = regs.w * 8 + r8
        # Four accumulators: a chain of nine mma that wait for each other, not of 36.
        acc = [[Float32(0.0)] * 4 for _ in range(4)]
        nope = smem.k_address + slot * self.tile_bytes + rows * 128
        rope = smem.r_address + slot * SUB_BYTES + rows * 128
        for pair in cutlass.range_constexpr((self.nope_steps + self.rope_steps) // 2):
            sub, half = pair // 2, pair % 2
            in_rope = sub * 4 >= self.nope_steps
            at, offset = (rope, 0) if const_expr(in_rope) else (nope, sub * SUB_BYTES)
            x = ptx.ldmatrix_x4(at + ((chunk + 4 * half) ^ r8) * 16, offset, False)
            for m in cutlass.range_constexpr(2):
                a = self._q_fragment(smem, regs, sub * 4 + half * 2 + m)
                acc[2 * half + m] = ptx.mma_m16n8k16(acc[2 * half + m], a, [x[2 * m], x[2 * m + 1]], self.mma_dtype)
        for j in cutlass.range_constexpr(4):
            score = ((acc[0][j] + acc[1][j]) + (acc[2][j] + acc[3][j])) * params.nope_scale_log2
            regs.rNext[j] = score if sees(j % 2) else -Float32.inf

    def _v_address(self, smem: Smem, regs: Fragments, slot):
        """Address of the sub-tile that this warp's channels are, or half of."""
        sub = regs.w if self.own_channels == 64 else regs.w // 2
        return smem.k_address + slot * self.tile_bytes + sub * SUB_BYTES

    @cute.jit
    def clear_tail(self, smem: Smem, regs: Fragments, slot, left):
        tile = self._v_address(smem, regs, slot)
        if left < TILE_N:
            lane = ptx.thread_index() % 32
            zero = Uint32(0)
            if const_expr(self.own_channels == 64):
                for row in cutlass.range(cutlass.max(left, Int32(0)) + lane // 8, TILE_N, 4, unroll=1):
                    ptx.store_shared(tile + row * 128 + lane % 8 * 16, [zero, zero, zero, zero])
            else:
                chunk = regs.w % 2 * 4 + lane % 4
                for row in cutlass.range(cutlass.max(left, Int32(0)) + lane // 4, TILE_N, 8, unroll=1):
                    ptx.store_shared(tile + row * 128 + (chunk ^ (row % 8)) * 16, [zero, zero, zero, zero])
            barriers.fence_smem_writes()
            cute.arch.sync_warp()

    def multiply_v(self, smem: Smem, regs: Fragments, slot, parity, acc: list) -> None:
        tile = self._v_address(smem, regs, slot)
        r8 = regs.lane % 8
        quarter = regs.lane // 8
        row = quarter % 2 * 8 + r8
        fragments = self.own_channels // 16
        first = 0 if self.own_channels == 64 else regs.w % 2 * 4
        at = [tile + row * 128 + ((first + 2 * c + quarter // 2) ^ r8) * 16 for c in range(fragments)]
        p_at = smem.p_address + (parity * P_WORDS + regs.lane * 4) * 4
        for kk in range(4):
            a = ptx.load_shared_16(p_at, kk * 512)
            for c in range(fragments):
                x = ptx.ldmatrix_x4(at[c], kk * 2048, True)
                for e in range(2):
                    t = 2 * c + e
                    acc[t] = ptx.mma_m16n8k16(acc[t], a, [x[2 * e], x[2 * e + 1]], self.mma_dtype)

    # -------------------------------------------------------------- epilogue

    def output_factor(self, params: Params, regs: Fragments):
        return params.out_scale

    def gather_quads(self, regs: Fragments) -> None:
        """A thread has channels 2 l4 and 2 l4 + 1 of accumulators 2 c and 2 c + 1. Neighbours trade, so that an even l4
        has four consecutive ones of the first accumulator and an odd l4 four of the second."""
        odd = regs.l4 % 2 == 1
        for c in range(self.own_channels // 16):
            for j in range(4):
                first, second = regs.rO[c * 8 + j], regs.rO[c * 8 + 4 + j]
                got = cute.arch.shuffle_sync_bfly(cutlass.select_(odd, first, second), offset=1)
                regs.rO[c * 8 + j] = cutlass.select_(odd, got, first)
                regs.rO[c * 8 + 4 + j] = cutlass.select_(odd, second, got)

    def quad(self, regs: Fragments, c: int, r: int) -> list:
        return [regs.rO[c * 8 + t * 4 + 2 * r + e] for t in range(2) for e in range(2)]

    def quad_bytes(self, regs: Fragments):
        return regs.l4 % 2 * 16 + regs.l4 // 2 * 8
