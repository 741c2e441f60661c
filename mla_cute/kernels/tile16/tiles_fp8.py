"""Tiles of an FP8 cache in the tile16 kernel (tile16/setup.py has the schedule): e4m3 becomes float16 in registers.

Q is float16 under a power of two per row, a 16-bit rope as it is.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32, const_expr

from ..lib import barriers, e4m3, ptx, scalars
from ..lib.paged import SUB_BYTES, TILE_N
from ..lib.ring import MB_FULL
from .params import BAR_EPI, NUM_CONSUMERS, P_WORDS, Q_TOTAL_STEPS, STEP_BYTES

TILE_BYTES = 4 * SUB_BYTES


class Fp8Tiles:
    """Methods of Tile16Fp8."""

    def _set_tiles(self) -> None:
        # P times the scales of each channel group.
        self.p_tiles = max(1, self.num_scales)
        self.q_steps = 8 if self.kv_format == "group" else 24
        self.num_stages = 4 if self.kv_format == "group" else 5
        # Of Q in shared memory: what stays there, in front of what the warps keep in registers.
        self.q_kept_bytes = (Q_TOTAL_STEPS - self.q_steps) * STEP_BYTES
        self.q_transient_bytes = self.q_steps * STEP_BYTES

    def _to_p_pair(self, low, high):
        return ptx.to_f16x2(low, high)

    # -------------------------------------------------------------------- Q

    @cute.jit
    def _load_q(self, p, s, f, request, head0):
        """Q as A fragments, in the order in which K's bytes arrive: float16 under a power of two per row, a 16-bit rope
        as it is. Sixteen threads a row make them in shared memory; every warp reads the first q_steps, whose place P
        takes then. Rows past H repeat the last one."""
        t = ptx.thread_index()
        row = t // 16
        q16 = t % 16
        head = cutlass.min(head0 + row, p.num_heads - 1)
        nope = ptx.row_address(p.mQ, request, head) + Int64(q16 * 16)
        rope = ptx.row_address(p.mQpe, request, head) + Int64(q16 * 16)
        # The word of lane 4 (row % 8) that begins a step.
        at = s.q_address + (row % 8) * 64 + row // 8 * 4
        worth = scalars.score_factors(p, self.rope_fp8)
        scale = Float32(1.0)
        rope_scale = Float32(1.0)
        if const_expr(self.q_fp8):
            for i in cutlass.range_constexpr(2):
                self._put_e4m3(at, ptx.load_global_16(nope, 256 * i), q16 + 16 * i)
        else:
            scale = self._put_scaled(at, [ptx.load_global_16(nope, 256 * i) for i in range(4)], q16, 0)
        if const_expr(self.rope_fp8 and self.q_fp8):
            if q16 < 4:
                self._put_e4m3(at, ptx.load_global_16(rope), 32 + q16)
        elif const_expr(self.rope_fp8):
            words = cute.make_rmem_tensor((4,), Uint32)
            words.fill(0)
            if q16 < 8:
                for i, word in enumerate(ptx.load_global_16(rope)):
                    words[i] = word
            # Of the sixteen threads eight have a chunk; the others' zeros go to the steps behind the last one.
            rope_scale = self._put_scaled(at, [[words[i] for i in range(4)]], q16, 32)
        else:
            # A 16-bit K fragment has channels 2 l4 and the next of a chunk of 8 in each register.
            if q16 < 8:
                for i, word in enumerate(ptx.load_global_16(rope)):
                    ptx.store_shared(at + self._step_offset(32 + q16 // 2) + q16 % 2 * 8, [word], 16 * i)
        if q16 == 0:
            s.sRow[row, 0] = scale * worth[0]
            s.sRow[row, 1] = rope_scale * worth[1]
        barriers.sync(BAR_EPI, NUM_CONSUMERS)
        for step in cutlass.range_constexpr(self.q_steps):
            for i, word in enumerate(ptx.load_shared_16(s.p_address + t % 32 * 16, step * STEP_BYTES)):
                f.rQ[step * 4 + i] = word
        barriers.sync(BAR_EPI, NUM_CONSUMERS)

    def _step_offset(self, step):
        """Of a step of Q in shared memory: those that stay there come first."""
        return (step + (Q_TOTAL_STEPS - self.q_steps)) % Q_TOTAL_STEPS * STEP_BYTES

    def _put_e4m3(self, at, words: list, step) -> None:
        """16 e4m3 of a row, a whole step."""
        for i, word in enumerate(words):
            for pair, value in enumerate(e4m3.e4m3x4_to_f16(word)):
                ptx.store_shared(at + self._step_offset(step), [value], 16 * i + 8 * pair)

    def _put_scaled(self, at, chunks: list, q16, first: int):
        """Chunks q16, q16 + 16, .. of eight 16-bit values of a row, from step `first` on; returns what they are to be
        multiplied by again."""
        pair = Uint32(0)
        for words in chunks:
            for word in words:
                pair = ptx.max_abs_16bit(pair, word, self.dtype)
        largest = cute.arch.fmax(*ptx.unpack_16bit(pair, self.dtype))
        for offset in (1, 2, 4, 8):
            largest = cute.arch.fmax(largest, cute.arch.shuffle_sync_bfly(largest, offset=offset))
        # 2^-e, 2^e with 2^e <= largest < 2^(e + 1): exact, and float16 keeps what is 2^-14 of it or more in full.
        bits = cutlass.min(largest.bitcast(Int32) & Int32(0x7F800000), Int32(0x7E000000))
        bits = cutlass.max(bits, Int32(0x01000000))
        inverse = (Int32(0x7F000000) - bits).bitcast(Float32)
        for i, words in enumerate(chunks):
            to = at + self._step_offset(first + 8 * i + q16 // 2) + q16 % 2 * 32
            for j, word in enumerate(words):
                x = [v * inverse for v in ptx.unpack_16bit(word, self.dtype)]
                ptx.store_shared(to, [ptx.to_f16x2(*x)], j // 2 * 16 + j % 2 * 8)
        return bits.bitcast(Float32)

    # ---------------------------------------------------------------- tiles

    def _column_scales(self, s, f, slot, group: int) -> list:
        """Scales of this thread's two tokens."""
        at = s.scale_address + ((slot * self.num_scales + group) * TILE_N + f.w * 8 + f.l4 * 2) * 4
        return ptx.load_shared_f32x2(at)

    @cute.jit
    def _scores(self, p, s, f, slot, phase, left):
        """rNext = scores of the tile in `slot`; -inf from token `left` on."""
        cute.arch.mbarrier_wait(s.mbar + MB_FULL + slot, phase)
        r8 = f.lane % 8
        chunk = f.lane // 8
        rows = f.w * 8 + r8
        at = s.k_address + slot * TILE_BYTES + rows * 128
        acc = [[Float32(0.0)] * 4 for _ in range(5)]
        for half in cutlass.range_constexpr(2):
            x = [ptx.ldmatrix_x4(at + ((chunk + 4 * half) ^ r8) * 16, sub * SUB_BYTES, False) for sub in range(4)]
            for m in cutlass.range_constexpr(4):
                for sub in cutlass.range_constexpr(4):
                    step = sub * 8 + half * 4 + m
                    acc[sub] = self._multiply_q(s, f, acc[sub], step, e4m3.e4m3x4_to_f16(x[sub][m]), "f16")
        if const_expr(self.rope_fp8):
            at = s.r_address + slot * (TILE_N * 64) + rows * 64 + (chunk ^ (r8 // 2)) * 16
            x = ptx.ldmatrix_x4(at, 0, False)
            for m in cutlass.range_constexpr(4):
                acc[4] = self._multiply_q(s, f, acc[4], 32 + m, e4m3.e4m3x4_to_f16(x[m]), "f16")
        else:
            at = s.r_address + slot * (TILE_N * 128) + rows * 128
            x = [word for half in range(2) for word in ptx.ldmatrix_x4(at + ((chunk + 4 * half) ^ r8) * 16, 0, False)]
            for m in cutlass.range_constexpr(4):
                b = x[2 * m], x[2 * m + 1]
                acc[4] = self._multiply_q(s, f, acc[4], 32 + m, b, ptx.ptx_name(self.dtype))
        nope = self._combine(s, f, slot, acc)
        token = f.w * 8 + f.l4 * 2
        for j in cutlass.range_constexpr(4):
            row = f.row + 8 * (j // 2)
            score = nope[j] * s.sRow[row, 0] + acc[4][j] * s.sRow[row, 1]
            f.rNext[j] = score if token + j % 2 < left else -Float32.inf

    def _multiply_q(self, s, f, acc, step: int, b, dtype: str):
        if step < self.q_steps:
            a = [f.rQ[step * 4 + j] for j in range(4)]
        else:
            a = ptx.load_shared_16(s.q_address + f.lane * 16, (step - self.q_steps) * STEP_BYTES)
        return ptx.mma_m16n8k16(acc, a, b, dtype)

    def _combine(self, s, f, slot, acc):
        """Sum over the four 128-channel accumulators, times their scales."""
        if self.kv_format == "group":
            scales = [self._column_scales(s, f, slot, g) for g in range(4)]
            parts = [[acc[g][j] * scales[g][j % 2] for g in range(4)] for j in range(4)]
        else:
            parts = [[acc[g][j] for g in range(4)] for j in range(4)]
        sums = [(x[0] + x[1]) + (x[2] + x[3]) for x in parts]
        if self.kv_format == "token":
            scales = self._column_scales(s, f, slot, 0)
            sums = [sums[j] * scales[j % 2] for j in range(4)]
        return sums

    def _v_address(self, s, f, slot):
        """Of the sub-tile whose half this warp's channels are."""
        return s.k_address + slot * TILE_BYTES + f.w // 2 * SUB_BYTES

    @cute.jit
    def _clear_tail(self, s, f, slot, left):
        tile = self._v_address(s, f, slot)
        if left < TILE_N:
            lane = ptx.thread_index() % 32
            chunk = f.w % 2 * 4 + lane % 4
            first = cutlass.max(left, Int32(0)) + lane // 4
            for row in cutlass.range(first, TILE_N, 8, unroll=1):
                zero = Uint32(0)
                ptx.store_shared(tile + row * 128 + (chunk ^ (row % 8)) * 16, [zero, zero, zero, zero])
            barriers.fence_smem_writes()
            cute.arch.sync_warp()

    def _multiply_v(self, s, f, slot, parity, acc: list) -> None:
        tile = self._v_address(s, f, slot)
        r8 = f.lane % 8
        quarter = f.lane // 8
        row = quarter % 2 * 8 + r8
        chunk = f.w % 2 * 4 + quarter // 2
        at = [tile + row * 128 + ((chunk + 2 * c) ^ r8) * 16 for c in range(2)]
        group = f.w // 2 if self.p_tiles > 1 else Int32(0)
        p_at = s.p_address + ((parity * self.p_tiles + group) * P_WORDS + f.lane * 4) * 4
        for kk in range(4):
            a = ptx.load_shared_16(p_at, kk * 512)
            for c in range(2):
                x = ptx.ldmatrix_x4(at[c], kk * 2048, True)
                y = [e4m3.e4m3x4_to_f16(e4m3.transpose_pairs(v)) for v in x]
                for q in range(2):
                    t = (2 * c + q) * 2
                    for e in range(2):
                        acc[t + e] = ptx.mma_m16n8k16(acc[t + e], a, [y[2 * q][e], y[2 * q + 1][e]], "f16")

    # -------------------------------------------------------------- epilogue

    def _output_factor(self, p, f):
        """What the sums of P V are worth."""
        return f.rUnit[0] if self.num_scales else scalars.output_factor(p)

    def _gather_quads(self, f) -> None:
        """Nothing to do: V's order of channels gives each thread quads."""

    def _quad(self, f, c: int, r: int) -> list:
        """Channels 16 c + 4 l4 .. + 3 of the warp's 64 in row r."""
        even, odd = c * 8 + 2 * r, c * 8 + 4 + 2 * r
        return [f.rO[even], f.rO[odd], f.rO[even + 1], f.rO[odd + 1]]

    def _quad_bytes(self, f):
        """Of a quad in the output, from the first of its 16 channels."""
        return f.l4 * 8
