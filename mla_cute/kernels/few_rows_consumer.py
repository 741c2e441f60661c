"""The consumer warps of the few-rows kernel (few_rows_sm90.py has the schedule)."""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, Uint32, const_expr

from . import fp8, softmax, sync
from .few_rows_params import (
    BAR_EPI,
    BAR_MOVE,
    MB_P,
    NUM_WARPS,
    P_WORDS,
    Q_TOTAL_STEPS,
    STEP_BYTES,
    FewFragments,
)
from .paged_kv import TILE_N
from .registry import INT16_BIAS, INT16_MAX, PART_LSE
from .rows_fp8_consumer import MAX_P, MAX_SCALED_P, MAX_UNITS
from .rows_fp8_params import MB_EMPTY, MB_FULL

TILE_BYTES = TILE_N * 512
SUB_BYTES = TILE_N * 128
NUM_THREADS = 32 * NUM_WARPS
_TO_INT = INT16_MAX * (1 - 2.0**-20)


class FewRowsConsumer:
    """Methods of FewRowsSm90."""

    def _fragments(self, w, lane):
        def registers(n, dtype=Float32):
            return cute.make_rmem_tensor((n,), dtype)

        return FewFragments(
            w=w,
            lane=lane,
            row=lane // 4,
            l4=lane % 4,
            rQ=registers(self.q_steps * 4, Uint32),
            rO=registers(32),
            rS=registers(4),
            rNext=registers(4),
            rL=registers(2),
            rSums=registers(2),
            rRef=registers(2),
            rUnit=registers(1),
            first=registers(1, Int32),
        )

    @cute.jit
    def _consume(self, p, s, part, head0, w, lane):
        f = self._fragments(w, lane)
        # What outlives a tile's work waits in words of shared memory that each warp writes and reads for itself.
        s.sLoop[0, w] = self.rows.num_items(p, part)
        s.sLoop[1, w] = self._first_row(p, part)
        s.sLoop[4, w] = head0
        slot = Int32(0)
        phase = Int32(0)
        parity = Int32(0)  # of the tile's number in the stream
        p_phase = Int32(0)
        it = Int32(0)
        while it < s.sLoop[0, w]:
            table_row = s.sLoop[1, w] + it
            kv_begin = p.mTable[table_row, 1]
            kv_end = p.mTable[table_row, 2]
            request = p.mTable[table_row, 0]
            s.sLoop[2, w] = request
            s.sLoop[3, w] = p.mTable[table_row, 4]
            # Tiles come in pairs, as the planner cuts and the producer fills them.
            num_tiles = (cute.ceil_div(kv_end, TILE_N) - kv_begin // TILE_N + 1) // 2 * 2
            left = kv_end - kv_begin
            self._load_q(p, s, f, request, s.sLoop[4, w])
            f.rO.fill(0.0)
            f.rL.fill(0.0)
            f.rRef.fill(0.0)
            f.rUnit[0] = Float32(2.0**-100)
            f.first[0] = Int32(1)
            self._scores(p, s, f, slot, phase, left)
            for _ in cutlass.range(num_tiles - 1, unroll=1):
                self._next_scores(f)
                self._softmax(p, s, f, slot, parity, left)
                next_slot = slot + 1
                if next_slot == self.num_stages:
                    next_slot = Int32(0)
                    phase ^= 1
                self._scores(p, s, f, next_slot, phase, left - TILE_N)
                self._agree(p, s, f, slot, parity, p_phase, left)
                self._pv(s, f, slot, parity, left)
                slot = next_slot
                left -= TILE_N
                parity ^= 1
                if parity == 0:
                    p_phase ^= 1
            self._next_scores(f)
            self._softmax(p, s, f, slot, parity, left)
            self._agree(p, s, f, slot, parity, p_phase, left)
            self._pv(s, f, slot, parity, left)
            slot += 1
            if slot == self.num_stages:
                slot = Int32(0)
                phase ^= 1
            parity ^= 1
            if parity == 0:
                p_phase ^= 1
            self._epilogue(p, s, f, s.sLoop[2, w], s.sLoop[3, w], s.sLoop[4, w])
            it += 1

    # -------------------------------------------------------------------- Q

    @cute.jit
    def _load_q(self, p, s, f, request, head0):
        """Q as A fragments, in the order in which K's bytes arrive: float16 under a power of two per row, a 16-bit rope
        as it is. Sixteen threads a row make them in shared memory; every warp reads the first q_steps, whose place P
        takes then. Rows past H repeat the last one."""
        t = fp8.thread_index()
        row = t // 16
        q16 = t % 16
        head = cutlass.min(head0 + row, p.num_heads - 1)
        nope = fp8.row_address(p.mQ, request, head) + Int64(q16 * 16)
        rope = fp8.row_address(p.mQpe, request, head) + Int64(q16 * 16)
        # The word of lane 4 (row % 8) that begins a step.
        at = s.q_address + (row % 8) * 64 + row // 8 * 4
        scale = Float32(1.0)
        rope_scale = Float32(1.0)
        if const_expr(self.q_fp8):
            for i in cutlass.range_constexpr(2):
                self._put_e4m3(at, fp8.load_global_16(nope, 256 * i), q16 + 16 * i)
        else:
            scale = self._put_scaled(at, [fp8.load_global_16(nope, 256 * i) for i in range(4)], q16, 0)
        if const_expr(self.rope_fp8 and self.q_fp8):
            if q16 < 4:
                self._put_e4m3(at, fp8.load_global_16(rope), 32 + q16)
        elif const_expr(self.rope_fp8):
            words = cute.make_rmem_tensor((4,), Uint32)
            words.fill(0)
            if q16 < 8:
                for i, word in enumerate(fp8.load_global_16(rope)):
                    words[i] = word
            # Of the sixteen threads eight have a chunk; the others' zeros go to the steps behind the last one.
            rope_scale = self._put_scaled(at, [[words[i] for i in range(4)]], q16, 32)
        else:
            # A 16-bit K fragment has channels 2 l4 and the next of a chunk of 8 in each register.
            if q16 < 8:
                for i, word in enumerate(fp8.load_global_16(rope)):
                    fp8.store_shared(at + self._step_offset(32 + q16 // 2) + q16 % 2 * 8, [word], 16 * i)
        if q16 == 0:
            s.sRow[row, 0] = scale * p.nope_scale_log2
            s.sRow[row, 1] = rope_scale * p.rope_scale_log2
        sync.sync(BAR_EPI, NUM_THREADS)
        for step in cutlass.range_constexpr(self.q_steps):
            for i, word in enumerate(fp8.load_shared_16(s.p_address + t % 32 * 16, step * STEP_BYTES)):
                f.rQ[step * 4 + i] = word
        sync.sync(BAR_EPI, NUM_THREADS)

    def _step_offset(self, step):
        """Of a step of Q in shared memory: those that stay there come first."""
        return (step + (Q_TOTAL_STEPS - self.q_steps)) % Q_TOTAL_STEPS * STEP_BYTES

    def _put_e4m3(self, at, words: list, step) -> None:
        """16 e4m3 of a row, a whole step."""
        for i, word in enumerate(words):
            for pair, value in enumerate(fp8.e4m3x4_to_f16(word)):
                fp8.store_shared(at + self._step_offset(step), [value], 16 * i + 8 * pair)

    def _put_scaled(self, at, chunks: list, q16, first: int):
        """Chunks q16, q16 + 16, .. of eight 16-bit values of a row, from step `first` on; returns what they are to be
        multiplied by again."""
        pair = Uint32(0)
        for words in chunks:
            for word in words:
                pair = fp8.max_abs_16bit(pair, word, self.dtype)
        largest = cute.arch.fmax(*fp8.unpack_16bit(pair, self.dtype))
        for offset in (1, 2, 4, 8):
            largest = cute.arch.fmax(largest, cute.arch.shuffle_sync_bfly(largest, offset=offset))
        # 2^-e, 2^e with 2^e <= largest < 2^(e + 1): exact, and float16 keeps what is 2^-14 of it or more in full.
        bits = cutlass.min(largest.bitcast(Int32) & Int32(0x7F800000), Int32(0x7E000000))
        bits = cutlass.max(bits, Int32(0x01000000))
        inverse = (Int32(0x7F000000) - bits).bitcast(Float32)
        for i, words in enumerate(chunks):
            to = at + self._step_offset(first + 8 * i + q16 // 2) + q16 % 2 * 32
            for j, word in enumerate(words):
                x = [v * inverse for v in fp8.unpack_16bit(word, self.dtype)]
                fp8.store_shared(to, [fp8.to_f16x2(*x)], j // 2 * 16 + j % 2 * 8)
        return bits.bitcast(Float32)

    # ---------------------------------------------------------------- tiles

    def _next_scores(self, f) -> None:
        for i in range(4):
            f.rS[i] = f.rNext[i]

    def _column_scales(self, s, f, slot, group: int) -> list:
        """Scales of this thread's two tokens."""
        at = s.scale_address + ((slot * self.num_scales + group) * TILE_N + f.w * 8 + f.l4 * 2) * 4
        return fp8.load_shared_f32x2(at)

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
            x = [fp8.ldmatrix_x4(at + ((chunk + 4 * half) ^ r8) * 16, sub * SUB_BYTES, False) for sub in range(4)]
            for m in cutlass.range_constexpr(4):
                for sub in cutlass.range_constexpr(4):
                    step = sub * 8 + half * 4 + m
                    acc[sub] = self._multiply_q(s, f, acc[sub], step, fp8.e4m3x4_to_f16(x[sub][m]), "f16")
        if const_expr(self.rope_fp8):
            at = s.r_address + slot * (TILE_N * 64) + rows * 64 + (chunk ^ (r8 // 2)) * 16
            x = fp8.ldmatrix_x4(at, 0, False)
            for m in cutlass.range_constexpr(4):
                acc[4] = self._multiply_q(s, f, acc[4], 32 + m, fp8.e4m3x4_to_f16(x[m]), "f16")
        else:
            at = s.r_address + slot * (TILE_N * 128) + rows * 128
            x = [word for half in range(2) for word in fp8.ldmatrix_x4(at + ((chunk + 4 * half) ^ r8) * 16, 0, False)]
            name = "bf16" if self.dtype.__name__ == "BFloat16" else "f16"
            for m in cutlass.range_constexpr(4):
                acc[4] = self._multiply_q(s, f, acc[4], 32 + m, (x[2 * m], x[2 * m + 1]), name)
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
            a = fp8.load_shared_16(s.q_address + f.lane * 16, (step - self.q_steps) * STEP_BYTES)
        return fp8.mma_m16n8k16(acc, a, b, dtype)

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

    def _p_address(self, s, f, parity):
        """Where this warp's part of P goes: fragment words 0, 1 or 2, 3 of step w / 2."""
        return s.p_address + (parity * self.p_tiles * P_WORDS + f.w // 2 * 128 + f.lane * 4 + f.w % 2 * 2) * 4

    def _exp(self, s, f, slot, parity, left):
        """P of rS to shared memory, once per scale group; returns whether the tile needs `_move`. Row sums to rSums."""
        e = [softmax.exp2(f.rS[j] - f.rRef[j // 2]) for j in range(4)]
        for r in range(2):
            f.rSums[r] = e[2 * r] + e[2 * r + 1]
        most = MAX_SCALED_P if self.num_scales else MAX_P
        leaves = (f.rSums[0] > most) | (f.rSums[1] > most)
        at = self._p_address(s, f, parity)
        inverse = cute.arch.rcp_approx(f.rUnit[0])
        token = f.w * 8 + f.l4 * 2
        for g in range(self.p_tiles):
            x = e
            if self.num_scales:
                scales = self._column_scales(s, f, slot, g)
                scales = [cutlass.select_(token + i < left, scales[i], Float32(0.0)) for i in range(2)]
                leaves = leaves | (cute.arch.fmax(*scales) > f.rUnit[0] * MAX_UNITS)
                x = [e[j] * (scales[j % 2] * inverse) for j in range(4)]
            fp8.store_shared(at, [fp8.to_f16x2(x[2 * r], x[2 * r + 1]) for r in range(2)], g * P_WORDS * 4)
        return leaves

    @cute.jit
    def _softmax(self, p, s, f, slot, parity, left):
        leaves = self._exp(s, f, slot, parity, left)
        any_leaves = cute.arch.vote_any_sync(leaves | (f.first[0] != 0))
        flag = Int32(0)
        if any_leaves:
            flag = Int32(1)
        if f.lane == 0:
            s.sFlags[f.w, parity] = flag
        cute.arch.sync_warp()
        sync.arrive_once_per_warp(s.mbar + MB_P + parity)

    @cute.jit
    def _agree(self, p, s, f, slot, parity, p_phase, left):
        """All warps' P of the tile is in shared memory, relative to the references in rRef."""
        cute.arch.mbarrier_wait(s.mbar + MB_P + parity, p_phase)
        flags = s.sFlags[0, parity]
        for w in cutlass.range_constexpr(NUM_WARPS - 1):
            flags = flags | s.sFlags[w + 1, parity]
        if flags != 0:
            self._move(s, f, slot, parity, left)
        for r in cutlass.range_constexpr(2):
            f.rL[r] = f.rL[r] + f.rSums[r]

    @cute.jit
    def _move(self, s, f, slot, parity, left):
        """All warps: references and unit to what the tile holds, its P again, O and the sums to the new references."""
        for r in cutlass.range_constexpr(2):
            mx = softmax.quad_max(cute.arch.fmax(f.rS[2 * r], f.rS[2 * r + 1]))
            if f.l4 == 0:
                s.sMax[f.row + 8 * r, f.w] = mx
        self._put_largest_scale(s, f, slot, left)
        sync.sync(BAR_MOVE, NUM_THREADS)
        keep = Float32(1.0)
        if const_expr(self.num_scales > 0):
            largest = s.sBig[0]
            for w in cutlass.range_constexpr(NUM_WARPS - 1):
                largest = cute.arch.fmax(largest, s.sBig[w + 1])
            if largest > f.rUnit[0] * MAX_UNITS:
                unit = fp8.unit_below(largest)
                keep = f.rUnit[0] / unit
                f.rUnit[0] = unit
        for r in cutlass.range_constexpr(2):
            mx = s.sMax[f.row + 8 * r, 0]
            for w in cutlass.range_constexpr(NUM_WARPS - 1):
                mx = cute.arch.fmax(mx, s.sMax[f.row + 8 * r, w + 1])
            ref = cute.arch.fmax(f.rRef[r], mx)
            if f.first[0] != 0:
                # Down, too; a row that sees nothing keeps 0.
                ref = f.rRef[r]
                if mx > softmax.NEG_BIG:
                    ref = mx
            moved = softmax.exp2(cutlass.min(f.rRef[r] - ref, Float32(0.0)))
            f.rRef[r] = ref
            f.rL[r] = f.rL[r] * moved
            for t in cutlass.range_constexpr(8):
                for e in cutlass.range_constexpr(2):
                    f.rO[t * 4 + 2 * r + e] = f.rO[t * 4 + 2 * r + e] * (moved * keep)
        f.first[0] = Int32(0)
        self._exp(s, f, slot, parity, left)
        sync.sync(BAR_MOVE, NUM_THREADS)

    @cute.jit
    def _put_largest_scale(self, s, f, slot, left):
        """Of this warp's tokens."""
        if const_expr(self.num_scales > 0):
            token = f.w * 8 + f.l4 * 2
            largest = Float32(0.0)
            for g in cutlass.range_constexpr(self.num_scales):
                scales = self._column_scales(s, f, slot, g)
                for i in cutlass.range_constexpr(2):
                    largest = cute.arch.fmax(largest, scales[i] if token + i < left else Float32(0.0))
            largest = softmax.quad_max(largest)
            if f.lane == 0:
                s.sBig[f.w] = largest

    @cute.jit
    def _pv(self, s, f, slot, parity, left):
        tile = s.k_address + slot * TILE_BYTES + f.w // 2 * SUB_BYTES
        if left < TILE_N:
            # Rows past kv_end may hold NaN: zero this warp's 64 channels of them.
            lane = fp8.thread_index() % 32
            chunk = f.w % 2 * 4 + lane % 4
            first = cutlass.max(left, Int32(0)) + lane // 4
            for row in cutlass.range(first, TILE_N, 8, unroll=1):
                zero = Uint32(0)
                fp8.store_shared(tile + row * 128 + (chunk ^ (row % 8)) * 16, [zero, zero, zero, zero])
            sync.fence_smem_writes()
            cute.arch.sync_warp()
        r8 = f.lane % 8
        quarter = f.lane // 8
        row = quarter % 2 * 8 + r8
        chunk = f.w % 2 * 4 + quarter // 2
        at = [tile + row * 128 + ((chunk + 2 * c) ^ r8) * 16 for c in range(2)]
        group = f.w // 2 if const_expr(self.p_tiles > 1) else Int32(0)
        p_at = s.p_address + ((parity * self.p_tiles + group) * P_WORDS + f.lane * 4) * 4
        acc = [[f.rO[t * 4 + j] for j in range(4)] for t in range(8)]
        for kk in cutlass.range_constexpr(4):
            a = fp8.load_shared_16(p_at, kk * 512)
            for c in cutlass.range_constexpr(2):
                x = fp8.ldmatrix_x4(at[c], kk * 2048, True)
                y = [fp8.e4m3x4_to_f16(fp8.transpose_pairs(v)) for v in x]
                for q in cutlass.range_constexpr(2):
                    t = (2 * c + q) * 2
                    for e in cutlass.range_constexpr(2):
                        acc[t + e] = fp8.mma_m16n8k16(acc[t + e], a, [y[2 * q][e], y[2 * q + 1][e]], "f16")
        for t in cutlass.range_constexpr(8):
            for j in cutlass.range_constexpr(4):
                f.rO[t * 4 + j] = acc[t][j]
        cute.arch.sync_warp()
        sync.arrive_once_per_warp(s.mbar + MB_EMPTY + slot)

    # -------------------------------------------------------------- epilogue

    def _quad(self, f, c: int, r: int) -> list:
        """Channels 16 c + 4 l4 .. + 3 of the warp's 64 in row r."""
        even, odd = c * 8 + 2 * r, c * 8 + 4 + 2 * r
        return [f.rO[even], f.rO[odd], f.rO[even + 1], f.rO[odd + 1]]

    @cute.jit
    def _epilogue(self, p, s, f, request, part_row, head0):
        """O / l to the output, or as 16-bit integers under a scale to the partial rows (registry.py)."""
        for r in cutlass.range_constexpr(2):
            total = softmax.quad_sum(f.rL[r])
            if f.l4 == 0:
                s.sMax[f.row + 8 * r, f.w] = total
        sync.sync(BAR_EPI, NUM_THREADS)
        scale = p.out_scale
        if const_expr(self.num_scales > 0):
            scale = f.rUnit[0]
        for r in cutlass.range_constexpr(2):
            x = [s.sMax[f.row + 8 * r, w] for w in range(NUM_WARPS)]
            total = ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]))
            f.rL[r] = total
        sync.sync(BAR_EPI, NUM_THREADS)
        for r in cutlass.range_constexpr(2):
            head = head0 + f.row + 8 * r
            # 0 for a row that saw no key: O is 0 there, and has to stay 0.
            inverse = scale * cutlass.select_(f.rL[r] != 0.0, cute.arch.rcp_approx(f.rL[r]), Float32(0.0))
            lse = cute.math.log2(f.rL[r]) + f.rRef[r]
            if part_row >= 0:
                self._store_partial(p, s, f, r, part_row, head, inverse)
                if (head < p.num_heads) & (f.lane % 4 == 0) & (f.w == 0):
                    p.mPart[part_row + head, PART_LSE] = lse
            else:
                if head < p.num_heads:
                    at = p.mO.iterator.toint() + (Int64(request) * p.mO.stride[0] + Int64(head) * p.mO.stride[1]) * 2
                    for c in cutlass.range_constexpr(4):
                        self._store_quad(f, at, c, [x * inverse for x in self._quad(f, c, r)])
                    if (f.w == 0) & (f.l4 == 0):
                        p.mLse[request, head] = lse * p.lse_scale
        sync.sync(BAR_EPI, NUM_THREADS)

    def _store_quad(self, f, row_at, c: int, x: list) -> None:
        words = [fp8.to_16bit_pair(x[2 * i], x[2 * i + 1], self.dtype) for i in range(2)]
        fp8.store_global(row_at + Int64(f.w * 128 + c * 32 + f.l4 * 8), words)

    @cute.jit
    def _store_partial(self, p, s, f, r: Constexpr, part_row, head, inverse):
        row = f.row + 8 * r
        largest = self._largest(f, r)
        if f.l4 == 0:
            s.sMax[row, f.w] = largest
        sync.sync(BAR_EPI, NUM_THREADS)
        half = f.w // 4
        for w in cutlass.range_constexpr(4):
            largest = cute.arch.fmax(largest, s.sMax[row, half * 4 + w], nan=True)
        to_int = Float32(_TO_INT) * cute.arch.rcp_approx(largest)
        if head < p.num_heads:
            at = p.mPart.iterator.toint() + Int64(part_row + head) * Int64(4 * p.mPart.stride[0])
            for c in cutlass.range_constexpr(4):
                self._store_integers(f, at, c, self._quad(f, c, r), to_int)
            if (f.l4 == 0) & (f.w % 4 == 0):
                p.mPart[part_row + head, PART_LSE + 1 + half] = largest * inverse * Float32(1.0 / _TO_INT)

    def _largest(self, f, r: int):
        largest = Float32(1.0e-30)
        for c in range(4):
            for x in self._quad(f, c, r):
                largest = cute.arch.fmax(largest, cute.math.absf(x), nan=True)
        for offset in (1, 2):
            largest = cute.arch.fmax(largest, cute.arch.shuffle_sync_bfly(largest, offset=offset), nan=True)
        return largest

    def _store_integers(self, f, row_at, c: int, x: list, to_int) -> None:
        bits = [(v * to_int + Float32(INT16_BIAS)).bitcast(Int32) for v in x]
        words = [Uint32(cute.arch.prmt(bits[2 * i], bits[2 * i + 1], 0x5410)) for i in range(2)]
        fp8.store_global(row_at + Int64(f.w * 128 + c * 32 + f.l4 * 8), words)
