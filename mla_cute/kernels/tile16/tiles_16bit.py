"""Tiles of a 16-bit cache in the tile16 kernel (tile16/setup.py has the schedule): fragments as they lie in memory.

A warp's PV channels are one sub-tile of K. Q takes up to 128 registers; the rest of it, the rope at least, is read from
shared memory for every tile.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32, const_expr

from ...dims import CKV_DIM
from ..lib import barriers, ptx
from ..lib.paged import SUB_BYTES, TILE_N
from ..lib.ring import MB_FULL
from .params import BAR_EPI, NUM_CONSUMERS, P_WORDS

TILE_BYTES = 8 * SUB_BYTES
NOPE_STEPS = CKV_DIM // 16
# 64 channels of Q's 16 rows.
Q_SUB_BYTES = 16 * 128


class SixteenBitTiles:
    """Methods of Tile16."""

    def _set_tiles(self) -> None:
        self.p_tiles = 1
        self.num_stages = 3
        # The first steps (of 16 channels) of Q are in registers. The gather's consumers have 232, which is two too few
        # for all of ckv's. Q gets there through shared memory, as many channels at a time as there is room for.
        self.q_steps, self.q_pass_steps = (NOPE_STEPS, 16) if self.by_tma else (NOPE_STEPS - 4, 8)
        self.q_kept_bytes = ((NOPE_STEPS - self.q_steps) // 4 + 1) * Q_SUB_BYTES
        self.q_transient_bytes = self.q_pass_steps // 4 * Q_SUB_BYTES
        self.mma_dtype = ptx.ptx_name(self.dtype)

    def _to_p_pair(self, low, high):
        return ptx.to_16bit_pair(low, high, self.dtype)

    # -------------------------------------------------------------------- Q

    @cute.jit
    def _load_q(self, p, s, f, request, head0):
        """Q's 16 rows to shared memory in K's swizzle, and from there to A fragments. What stays there: 64 channels at
        a time, the rope last. Rows past H repeat the last one."""
        t = ptx.thread_index()
        row = t // 16
        q16 = t % 16
        head = cutlass.min(head0 + row, p.num_heads - 1)
        nope = ptx.row_address(p.mQ, request, head) + Int64(q16 * 16)
        rope = ptx.row_address(p.mQpe, request, head) + Int64(q16 * 16)
        chunks = [ptx.load_global_16(nope, 256 * i) for i in range(4)]
        kept = s.q_address + row * 128 + (q16 % 8 ^ row % 8) * 16
        if q16 < 8:
            ptx.store_shared(kept, ptx.load_global_16(rope), self.q_kept_bytes - Q_SUB_BYTES)
        elif const_expr(self.q_steps < NOPE_STEPS):
            ptx.store_shared(kept, chunks[3])
        lane = t % 32
        row_bytes = self.q_pass_steps * 32
        for first in cutlass.range_constexpr(0, self.q_steps, self.q_pass_steps):
            for i in cutlass.range_constexpr(self.q_pass_steps // 8):
                at = s.p_address + row * row_bytes + ((q16 + 16 * i) ^ (row % 8)) * 16
                ptx.store_shared(at, chunks[first // 8 + i])
            barriers.sync(BAR_EPI, NUM_CONSUMERS)
            at = s.p_address + lane % 16 * row_bytes
            for step in cutlass.range_constexpr(min(self.q_pass_steps, self.q_steps - first)):
                a = ptx.ldmatrix_x4(at + ((2 * step + lane // 16) ^ (lane % 8)) * 16, 0, False)
                for i, word in enumerate(a):
                    f.rQ[(first + step) * 4 + i] = word
            barriers.sync(BAR_EPI, NUM_CONSUMERS)

    def _q_fragment(self, s, f, step: int) -> list:
        if step < self.q_steps:
            return [f.rQ[step * 4 + j] for j in range(4)]
        sub, in_sub = divmod(step - self.q_steps, 4)
        at = s.q_address + f.lane % 16 * 128 + ((2 * in_sub + f.lane // 16) ^ (f.lane % 8)) * 16
        return ptx.ldmatrix_x4(at, sub * Q_SUB_BYTES, False)

    # ---------------------------------------------------------------- tiles

    @cute.jit
    def _scores(self, p, s, f, slot, phase, left):
        """rNext = scores of the tile in `slot`; -inf from token `left` on."""
        cute.arch.mbarrier_wait(s.mbar + MB_FULL + slot, phase)
        r8 = f.lane % 8
        chunk = f.lane // 8
        rows = f.w * 8 + r8
        acc = [[Float32(0.0)] * 4 for _ in range(4)]
        nope = s.k_address + slot * TILE_BYTES + rows * 128
        rope = s.r_address + slot * SUB_BYTES + rows * 128
        for sub in cutlass.range_constexpr(9):
            at, offset = (nope, sub * SUB_BYTES) if const_expr(sub < 8) else (rope, 0)
            for half in cutlass.range_constexpr(2):
                x = ptx.ldmatrix_x4(at + ((chunk + 4 * half) ^ r8) * 16, offset, False)
                for m in cutlass.range_constexpr(2):
                    a = self._q_fragment(s, f, sub * 4 + half * 2 + m)
                    acc[2 * half + m] = ptx.mma_m16n8k16(acc[2 * half + m], a, [x[2 * m], x[2 * m + 1]], self.mma_dtype)
        token = f.w * 8 + f.l4 * 2
        for j in cutlass.range_constexpr(4):
            score = ((acc[0][j] + acc[1][j]) + (acc[2][j] + acc[3][j])) * p.nope_scale_log2
            f.rNext[j] = score if token + j % 2 < left else -Float32.inf

    def _v_address(self, s, f, slot):
        """Of the sub-tile that this warp's channels are."""
        return s.k_address + slot * TILE_BYTES + f.w * SUB_BYTES

    @cute.jit
    def _clear_tail(self, s, f, slot, left):
        tile = self._v_address(s, f, slot)
        if left < TILE_N:
            lane = ptx.thread_index() % 32
            for row in cutlass.range(cutlass.max(left, Int32(0)) + lane // 8, TILE_N, 4, unroll=1):
                zero = Uint32(0)
                ptx.store_shared(tile + row * 128 + lane % 8 * 16, [zero, zero, zero, zero])
            barriers.fence_smem_writes()
            cute.arch.sync_warp()

    def _multiply_v(self, s, f, slot, parity, acc: list) -> None:
        tile = self._v_address(s, f, slot)
        r8 = f.lane % 8
        quarter = f.lane // 8
        row = quarter % 2 * 8 + r8
        at = [tile + row * 128 + ((2 * c + quarter // 2) ^ r8) * 16 for c in range(4)]
        p_at = s.p_address + (parity * P_WORDS + f.lane * 4) * 4
        for kk in range(4):
            a = ptx.load_shared_16(p_at, kk * 512)
            for c in range(4):
                x = ptx.ldmatrix_x4(at[c], kk * 2048, True)
                for e in range(2):
                    t = 2 * c + e
                    acc[t] = ptx.mma_m16n8k16(acc[t], a, [x[2 * e], x[2 * e + 1]], self.mma_dtype)

    # -------------------------------------------------------------- epilogue

    def _output_factor(self, p, f):
        return p.out_scale

    def _gather_quads(self, f) -> None:
        """A thread has channels 2 l4 and the next of tiles 2 c and 2 c + 1: neighbours trade, so that an even l4 has
        four consecutive ones of the first tile and an odd l4 of the second."""
        odd = f.l4 % 2 == 1
        for c in range(4):
            for j in range(4):
                first, second = f.rO[c * 8 + j], f.rO[c * 8 + 4 + j]
                got = cute.arch.shuffle_sync_bfly(cutlass.select_(odd, first, second), offset=1)
                f.rO[c * 8 + j] = cutlass.select_(odd, got, first)
                f.rO[c * 8 + 4 + j] = cutlass.select_(odd, second, got)

    def _quad(self, f, c: int, r: int) -> list:
        """Four consecutive of the warp's channels 16 c .. 16 c + 15 in row r, after `_gather_quads`."""
        return [f.rO[c * 8 + t * 4 + 2 * r + e] for t in range(2) for e in range(2)]

    def _quad_bytes(self, f):
        """Of a quad in the output, from the first of its 16 channels."""
        return f.l4 % 2 * 16 + f.l4 // 2 * 8
