"""Tiles of an FP8 cache in the tile16 kernel: e4m3 becomes float16 in registers, exactly. tiles.py says what the
methods do.

A K tile is four ckv sub-tiles of 64 tokens x 128 bytes in 128-byte swizzle, and a rope tile of 64 tokens x 64 bytes in
64-byte swizzle (e4m3) or 128 bytes in 128-byte swizzle (16 bits). A warp's PV channels are half a ckv sub-tile (of 256
channels: a quarter of one of two).

Q is float16 under a power of two per row (a 16-bit rope beside a 16-bit q_pe stays as it is), and so is P, under the
references and the unit of scales: nothing is lost beyond the cache's own rounding.

The order of channels is that of the bytes. For QK, ldmatrix gives a thread four consecutive channels of a token, which
become its two words of a B fragment; Q is loaded in the same order. For PV, transposing ldmatrix gives it pairs of
channels of two tokens, and a byte permute the even ones of both and the odd ones of both: accumulators 2 c are the even
channels of the warp's channels 16 c .. 16 c + 15, accumulators 2 c + 1 the odd ones.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32, const_expr

from ...dims import HeadDims
from ..lib import barriers, e4m3, ptx, scalars
from ..lib.paged import SUB_BYTES, TILE_N
from ..lib.ring import RingMbarriers, scale_place
from .params import P_WORDS, Bar, Fragments, Params, Smem
from .tiles import Tiles

STEP_BYTES = 32 * 4 * 4  # 32 lanes of four words


class Fp8Tiles(Tiles):
    rope_fp8: bool  # format "tensor": the rope of the cache is e4m3, else it is of `dtype`
    # Of Q as A fragments: 32 of 16 channels, the rope's four, and where it is e4m3 four behind them that take zeros.
    q_total_steps: int

    def __init__(self, dtype: type, dims: HeadDims, sparse: bool, kv_format: str, q_fp8: bool, by_tma: bool):
        super().__init__(dtype, dims, sparse, kv_format, q_fp8)
        self.rope_fp8 = kv_format == "tensor"
        self.tile_bytes = self.nope_steps // 8 * SUB_BYTES
        self.q_total_steps = self.nope_steps + (8 if self.rope_fp8 else 4)
        # Reading Q from shared memory is what a tile has most of there: with 8 steps in registers a tile of format
        # group read 115 KB of Q beside 90 KB of K and P. The gather's consumers have 8 registers less than TMA's, and
        # of 32 steps 8 to 48 bytes spill there.
        self.q_steps = min(32 if by_tma else 28, self.nope_steps)
        self.num_stages = 5 if dims.ckv == 512 else 6
        # What stays in shared memory lies in front of what the warps keep in registers.
        self.q_kept_bytes = (self.q_total_steps - self.q_steps) * STEP_BYTES
        self.q_transient_bytes = self.q_steps * STEP_BYTES

    def to_p_pair(self, low, high):
        return ptx.to_f16x2(low, high)

    # -------------------------------------------------------------------- Q

    @cute.jit
    def load_q(self, params: Params, smem: Smem, regs: Fragments, request, head0):
        """Sixteen threads a row make the A fragments in shared memory, in the order in which K's bytes arrive. Every
        warp reads the first q_steps of them, whose place P takes afterwards."""
        t = ptx.thread_index()
        row = t // 16
        q16 = t % 16
        head = cutlass.min(head0 + row, params.num_heads - 1)
        nope = ptx.row_address(params.mQ, request, head) + Int64(q16 * 16)
        # Address of the row's first word in a step: lane 4 (row % 8), word 0 (row < 8) or 1.
        at = smem.q_address + (row % 8) * 64 + row // 8 * 4
        worth = scalars.score_factors(params, self.rope_fp8)
        scale = Float32(1.0)
        rope_scale = Float32(1.0)
        if const_expr(self.q_fp8):
            for i in cutlass.range_constexpr(self.nope_steps // 16):
                self._put_e4m3(at, ptx.load_global_16(nope, 256 * i), q16 + 16 * i)
        else:
            chunks = [ptx.load_global_16(nope, 256 * i) for i in range(self.nope_steps // 8)]
            scale = self._put_scaled(at, chunks, q16, 0)
        if const_expr(self.rope_steps > 0):
            rope_scale = self._load_q_rope(params, at, request, head, q16)
        if q16 == 0:
            smem.sRow[row, 0] = scale * worth[0]
            smem.sRow[row, 1] = rope_scale * worth[1]
        Bar.ITEM.sync()
        for step in cutlass.range_constexpr(self.q_steps):
            for i, word in enumerate(ptx.load_shared_16(smem.p_address + t % 32 * 16, step * STEP_BYTES)):
                regs.rQ[step * 4 + i] = word
        Bar.ITEM.sync()

    @cute.jit
    def _load_q_rope(self, params: Params, at, request, head, q16):
        """The rope of a thread's row; returns the power of two that the row was divided by."""
        rope = ptx.row_address(params.mQpe, request, head) + Int64(q16 * 16)
        scale = Float32(1.0)
        if const_expr(self.rope_fp8 and self.q_fp8):
            if q16 < self.rope_steps:
                self._put_e4m3(at, ptx.load_global_16(rope), self.nope_steps + q16)
        elif const_expr(self.rope_fp8):
            words = cute.make_rmem_tensor((4,), Uint32)
            words.fill(0)
            if q16 < 2 * self.rope_steps:
                for i, word in enumerate(ptx.load_global_16(rope)):
                    words[i] = word
            # Eight or four of the sixteen threads have a chunk; the others' zeros go to the steps behind the last.
            scale = self._put_scaled(at, [[words[i] for i in range(4)]], q16, self.nope_steps)
        else:
            # Over a 16-bit rope each word of a fragment has channels 2 l4 and 2 l4 + 1 of a chunk of 8, unpermuted.
            if q16 < 8:
                for i, word in enumerate(ptx.load_global_16(rope)):
                    ptx.store_shared(at + self._step_offset(32 + q16 // 2) + q16 % 2 * 8, [word], 16 * i)
        return scale

    def _step_offset(self, step):
        """Offset of a step of Q in shared memory: the steps that stay there come first."""
        return (step + (self.q_total_steps - self.q_steps)) % self.q_total_steps * STEP_BYTES

    def _put_e4m3(self, at, words: list, step) -> None:
        """A step of a row, 16 e4m3 in four words, to shared memory as float16; `at`: the row's first word."""
        for i, word in enumerate(words):
            for pair, value in enumerate(e4m3.e4m3x4_to_f16(word)):
                ptx.store_shared(at + self._step_offset(step), [value], 16 * i + 8 * pair)

    def _put_scaled(self, at, chunks: list, q16, first: int):
        """A thread's chunks q16, q16 + 16, ... of eight 16-bit values of a row to shared memory, from step `first` on,
        divided by a power of two that the row's sixteen threads agree on; returns that power."""
        pair = Uint32(0)
        for words in chunks:
            for word in words:
                pair = ptx.max_abs_16bit(pair, word, self.dtype)
        largest = cute.arch.fmax(*ptx.unpack_16bit(pair, self.dtype))
        for offset in (1, 2, 4, 8):
            largest = cute.arch.fmax(largest, cute.arch.shuffle_sync_bfly(largest, offset=offset))
        # The power is 2^e with 2^e <= largest < 2^(e + 1), its exponent bits alone. Multiplying by 2^-e is exact, and
        # float16 keeps values that are 2^-14 of the largest or more with all their bits.
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

    def column_scales(self, smem: Smem, regs: Fragments, slot) -> list[list]:
        place = scale_place(regs.w * 8) + regs.l4 * 4
        at = smem.scale_address + (slot * self.num_scales * TILE_N + place) * 4
        return [ptx.load_shared_f32x2(at, g * TILE_N * 4) for g in range(self.num_scales)]

    # Where the parts of a token's row lie; `WholeRowTiles` says otherwise. `row` is this lane's, r8 = row % 8, and
    # `chunk` the 16 bytes that it reads of the first of several words.

    def _k_words(self, smem: Smem, slot, row, r8, chunk):
        """From sub and half to ldmatrix's words of channels 128 sub + 64 half .. + 63."""
        at = smem.k_address + slot * self.tile_bytes + row * 128
        return lambda sub, half: ptx.ldmatrix_x4(at + ((chunk + 4 * half) ^ r8) * 16, sub * SUB_BYTES, False)

    def _rope_words(self, smem: Smem, slot, row, r8, chunk):
        """From half to those of a 16-bit rope's channels 32 half .. + 31."""
        at = smem.r_address + slot * (TILE_N * 128) + row * 128
        return lambda half: ptx.ldmatrix_x4(at + ((chunk + 4 * half) ^ r8) * 16, 0, False)

    def _v_words(self, smem: Smem, regs: Fragments, slot, row, r8, chunk):
        """From kk and c to transposing ldmatrix's words of tokens 16 kk .. + 15, the warp's channels 32 c .. + 31."""
        tile = self._v_address(smem, regs, slot) + row * 128
        chunk = self._first_chunk(regs) + chunk
        at = [tile + ((chunk + 2 * c) ^ r8) * 16 for c in range(self.own_channels // 32)]
        return lambda kk, c: ptx.ldmatrix_x4(at[c], kk * 2048, True)

    @cute.jit
    def scores(self, params: Params, smem: Smem, regs: Fragments, slot, phase, left):
        cute.arch.mbarrier_wait(smem.mbar + RingMbarriers.full + slot, phase)
        sees = self.sees(smem, regs, slot, left)
        r8 = regs.lane % 8
        chunk = regs.lane // 8
        row = regs.w * 8 + r8
        words = self._k_words(smem, slot, row, r8, chunk)
        # One accumulator per 128 channels, which is a scale group, and one for the rope.
        subs = self.nope_steps // 8
        acc = [[Float32(0.0)] * 4 for _ in range(subs + 1)]
        for half in cutlass.range_constexpr(2):
            x = [words(sub, half) for sub in range(subs)]
            for m in cutlass.range_constexpr(4):
                for sub in cutlass.range_constexpr(subs):
                    step = sub * 8 + half * 4 + m
                    acc[sub] = self._multiply_q(smem, regs, acc[sub], step, e4m3.e4m3x4_to_f16(x[sub][m]), "f16")
        if const_expr(self.rope_steps == 0):
            pass
        elif const_expr(self.rope_fp8):
            at = smem.r_address + slot * (TILE_N * 64) + row * 64 + (chunk ^ (r8 // 2)) * 16
            x = ptx.ldmatrix_x4(at, 0, False)
            for m in cutlass.range_constexpr(self.rope_steps):
                step = self.nope_steps + m
                acc[subs] = self._multiply_q(smem, regs, acc[subs], step, e4m3.e4m3x4_to_f16(x[m]), "f16")
        else:
            words = self._rope_words(smem, slot, row, r8, chunk)
            x = [*words(0), *words(1)]
            for m in cutlass.range_constexpr(4):
                b = x[2 * m], x[2 * m + 1]
                acc[4] = self._multiply_q(smem, regs, acc[4], 32 + m, b, ptx.ptx_name(self.dtype))
        nope = self._combine(smem, regs, slot, acc)
        for j in cutlass.range_constexpr(4):
            row = regs.row + 8 * (j // 2)
            score = nope[j] * smem.sRow[row, 0]
            if const_expr(self.rope_steps > 0):
                score = nope[j] * smem.sRow[row, 0] + acc[subs][j] * smem.sRow[row, 1]
            regs.rNext[j] = score if sees(j % 2) else -Float32.inf

    def _multiply_q(self, smem: Smem, regs: Fragments, acc, step: int, b, dtype: str):
        """acc + Q's step `step` times b, two words of K."""
        if step < self.q_steps:
            a = [regs.rQ[step * 4 + j] for j in range(4)]
        else:
            a = ptx.load_shared_16(smem.q_address + regs.lane * 16, (step - self.q_steps) * STEP_BYTES)
        return ptx.mma_m16n8k16(acc, a, b, dtype)

    def _combine(self, smem: Smem, regs: Fragments, slot, acc):
        """The sum of the accumulators of 128 channels, times their scales."""
        if self.kv_format == "group":
            scales = self.column_scales(smem, regs, slot)
            parts = [[acc[g][j] * scales[g][j % 2] for g in range(4)] for j in range(4)]
        else:
            parts = [[acc[g][j] for g in range(self.nope_steps // 8)] for j in range(4)]
        sums = [(x[0] + x[1]) + (x[2] + x[3]) if len(x) == 4 else x[0] + x[1] for x in parts]
        if self.kv_format == "token":
            scales = self.column_scales(smem, regs, slot)[0]
            sums = [sums[j] * scales[j % 2] for j in range(4)]
        return sums

    def _v_address(self, smem: Smem, regs: Fragments, slot):
        """Address of the sub-tile of which this warp's channels are a half or a quarter."""
        return smem.k_address + slot * self.tile_bytes + regs.w // (128 // self.own_channels) * SUB_BYTES

    def _first_chunk(self, regs: Fragments):
        """In a row of that sub-tile, of chunks of 16 channels."""
        chunks = self.own_channels // 16
        return regs.w % (8 // chunks) * chunks

    @cute.jit
    def clear_tail(self, smem: Smem, regs: Fragments, slot, left):
        tile = self._v_address(smem, regs, slot)
        if left < TILE_N:
            lane = ptx.thread_index() % 32
            chunks = self.own_channels // 16
            chunk = self._first_chunk(regs) + lane % chunks
            first = cutlass.max(left, Int32(0)) + lane // chunks
            for row in cutlass.range(first, TILE_N, 32 // chunks, unroll=1):
                zero = Uint32(0)
                ptx.store_shared(tile + row * 128 + (chunk ^ (row % 8)) * 16, [zero, zero, zero, zero])
            barriers.fence_smem_writes()
            cute.arch.sync_warp()

    def multiply_v(self, smem: Smem, regs: Fragments, slot, parity, acc: list) -> None:
        r8 = regs.lane % 8
        quarter = regs.lane // 8
        words = self._v_words(smem, regs, slot, quarter % 2 * 8 + r8, r8, quarter // 2)
        group = regs.w // 2 if self.p_tiles > 1 else Int32(0)
        p_at = smem.p_address + ((parity * self.p_tiles + group) * P_WORDS + regs.lane * 4) * 4
        for kk in range(4):
            a = ptx.load_shared_16(p_at, kk * 512)
            for c in range(self.own_channels // 32):
                x = words(kk, c)
                y = [e4m3.e4m3x4_to_f16(e4m3.transpose_pairs(v)) for v in x]
                for q in range(2):
                    t = (2 * c + q) * 2
                    for e in range(2):
                        acc[t + e] = ptx.mma_m16n8k16(acc[t + e], a, [y[2 * q][e], y[2 * q + 1][e]], "f16")

    # -------------------------------------------------------------- epilogue

    def output_factor(self, params: Params, regs: Fragments):
        return regs.rUnit[0] if self.num_scales else scalars.output_factor(params)

    def gather_quads(self, regs: Fragments) -> None:
        """Nothing to do: the even and odd channels of a thread in accumulators 2 c and 2 c + 1 are consecutive."""

    def quad(self, regs: Fragments, c: int, r: int) -> list:
        # Channels 16 c + 4 l4 .. 16 c + 4 l4 + 3 of the warp's.
        even, odd = c * 8 + 2 * r, c * 8 + 4 + 2 * r
        return [regs.rO[even], regs.rO[odd], regs.rO[even + 1], regs.rO[odd + 1]]

    def quad_bytes(self, regs: Fragments):
        return regs.l4 * 8
