"""The consumer warps of the tile16 kernel (tile16/setup.py has the schedule)."""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, Uint32, const_expr

from ...dims import INT16_BIAS, INT16_MOST
from ..lib import barriers, e4m3, partials, ptx, softmax
from ..lib.paged import TILE_N
from ..lib.ring import MB_EMPTY
from ..lib.softmax import MAX_P, MAX_SCALED_P, MAX_UNITS
from .params import BAR_EPI, BAR_MOVE, MB_P, NUM_CONSUMERS, NUM_WARPS, P_WORDS, Fragments


class Tile16Consumer:
    """Methods of the tile16 kernels; `Fp8Tiles` or `SixteenBitTiles` read the tiles."""

    def _fragments(self, w, lane):
        def registers(n, dtype=Float32):
            return cute.make_rmem_tensor((n,), dtype)

        return Fragments(
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
        s.sLoop[1, w] = part  # whose row holds the first item, and where the others are
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
            if it == 0:
                s.sLoop[1, w] = p.mTable[table_row, 5]
            left = kv_end - kv_begin  # tokens from the tile at hand on
            self._load_q(p, s, f, request, s.sLoop[4, w])
            f.rO.fill(0.0)
            f.rL.fill(0.0)
            f.rRef.fill(0.0)
            f.rUnit[0] = Float32(2.0**-100)
            f.first[0] = Int32(1)
            self._scores(p, s, f, slot, phase, left)
            for _ in cutlass.range(cute.ceil_div(left, TILE_N) - 1, unroll=1):
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

    # ---------------------------------------------------------------- tiles

    def _next_scores(self, f) -> None:
        for i in range(4):
            f.rS[i] = f.rNext[i]

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
            ptx.store_shared(at, [self._to_p_pair(x[2 * r], x[2 * r + 1]) for r in range(2)], g * P_WORDS * 4)
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
        barriers.arrive_once_per_warp(s.mbar + MB_P + parity)

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
        barriers.sync(BAR_MOVE, NUM_CONSUMERS)
        keep = Float32(1.0)
        if const_expr(self.num_scales > 0):
            largest = s.sBig[0]
            for w in cutlass.range_constexpr(NUM_WARPS - 1):
                largest = cute.arch.fmax(largest, s.sBig[w + 1])
            if largest > f.rUnit[0] * MAX_UNITS:
                unit = e4m3.unit_below(largest)
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
                if mx > -Float32.inf:
                    ref = mx
            moved = softmax.exp2(cutlass.min(f.rRef[r] - ref, Float32(0.0)))
            f.rRef[r] = ref
            f.rL[r] = f.rL[r] * moved
            for t in cutlass.range_constexpr(8):
                for e in cutlass.range_constexpr(2):
                    f.rO[t * 4 + 2 * r + e] = f.rO[t * 4 + 2 * r + e] * (moved * keep)
        f.first[0] = Int32(0)
        self._exp(s, f, slot, parity, left)
        barriers.sync(BAR_MOVE, NUM_CONSUMERS)

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
        # Rows past kv_end may hold NaN: this warp's 64 channels of them become zeros.
        self._clear_tail(s, f, slot, left)
        acc = [[f.rO[t * 4 + j] for j in range(4)] for t in range(8)]
        self._multiply_v(s, f, slot, parity, acc)
        for t in cutlass.range_constexpr(8):
            for j in cutlass.range_constexpr(4):
                f.rO[t * 4 + j] = acc[t][j]
        cute.arch.sync_warp()
        barriers.arrive_once_per_warp(s.mbar + MB_EMPTY + slot)

    # -------------------------------------------------------------- epilogue

    @cute.jit
    def _epilogue(self, p, s, f, request, part_row, head0):
        """O / l to the output, or as 16-bit integers under a scale to the partial rows (dims.py)."""
        self._gather_quads(f)
        for r in cutlass.range_constexpr(2):
            total = softmax.quad_sum(f.rL[r])
            if f.l4 == 0:
                s.sMax[f.row + 8 * r, f.w] = total
        barriers.sync(BAR_EPI, NUM_CONSUMERS)
        scale = self._output_factor(p, f)
        for r in cutlass.range_constexpr(2):
            x = [s.sMax[f.row + 8 * r, w] for w in range(NUM_WARPS)]
            total = ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]))
            f.rL[r] = total
        barriers.sync(BAR_EPI, NUM_CONSUMERS)
        for r in cutlass.range_constexpr(2):
            head = head0 + f.row + 8 * r
            # 0 for a row that saw no key: O is 0 there, and has to stay 0.
            inverse = scale * cutlass.select_(f.rL[r] != 0.0, cute.arch.rcp_approx(f.rL[r]), Float32(0.0))
            lse = cute.math.log2(f.rL[r]) + f.rRef[r]
            if part_row >= 0:
                self._store_partial(p, s, f, r, part_row, head, inverse, lse)
            else:
                if head < p.num_heads:
                    at = p.mO.iterator.toint() + (Int64(request) * p.mO.stride[0] + Int64(head) * p.mO.stride[1]) * 2
                    for c in cutlass.range_constexpr(4):
                        self._store_quad(f, at, c, [x * inverse for x in self._quad(f, c, r)])
                    if (f.w == 0) & (f.l4 == 0):
                        p.mLse[request, head] = lse * p.lse_scale
        barriers.sync(BAR_EPI, NUM_CONSUMERS)

    def _store_quad(self, f, row_at, c: int, x: list) -> None:
        words = [ptx.to_16bit_pair(x[2 * i], x[2 * i + 1], self.dtype) for i in range(2)]
        ptx.store_global(row_at + Int64(f.w * 128 + c * 32 + self._quad_bytes(f)), words)

    @cute.jit
    def _store_partial(self, p, s, f, r: Constexpr, part_row, head, inverse, lse):
        row = f.row + 8 * r
        largest = self._largest(f, r)
        if f.l4 == 0:
            s.sMax[row, f.w] = largest
        barriers.sync(BAR_EPI, NUM_CONSUMERS)
        half = ptx.thread_index() // 128  # of the warp, asked for again: kept over all items it spills in the gather
        for w in cutlass.range_constexpr(4):
            largest = cute.arch.fmax(largest, s.sMax[row, half * 4 + w], nan=True)
        to_int = Float32(INT16_MOST) * cute.arch.rcp_approx(largest)
        if head < p.num_heads:
            at = partials.row_address(p, part_row + head)
            for c in cutlass.range_constexpr(4):
                self._store_integers(f, at, c, self._quad(f, c, r), to_int)
            if (f.l4 == 0) & (f.w % 4 == 0):
                partials.put_worth(p, part_row + head, half, largest * inverse * Float32(1.0 / INT16_MOST))
                if f.w == 0:
                    partials.put_lse(p, part_row + head, lse)

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
        ptx.store_global(row_at + Int64(f.w * 128 + c * 32 + self._quad_bytes(f)), words)
