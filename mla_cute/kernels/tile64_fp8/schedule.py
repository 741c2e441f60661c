"""The two consumer warpgroups of the FP8 row-tile kernel (tile64_fp8/setup.py has the schedule)."""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, Uint32, const_expr
from cutlass.cute.nvgpu import warp, warpgroup

from ...dims import TILE_M
from ..lib import barriers, e4m3, partials, ptx, scalars, softmax, wgmma
from ..lib.paged import TILE_N
from ..lib.ring import MB_EMPTY, MB_FULL
from ..lib.softmax import MAX_P, MAX_SCALED_P, MAX_UNITS
from . import epilogue
from .params import BAR_EPI, BAR_FILL0, BAR_MAX, BAR_P, BAR_P_FREE0, BAR_Q, NUM_CONSUMERS, Fragments

# Steps of 32 e4m3 in a ckv row.
NOPE_STEPS = 16


class Fp8Consumer:
    """Methods of Tile64Fp8."""

    def _fragments(self, p, s, t):
        """Descriptors and registers of one consumer thread."""
        thr_nope, thr_rope, thr_pv = (m.get_slice(0) for m in (p.mma_nope, p.mma_rope, p.mma_pv))
        acc = thr_nope.partition_shape_C((TILE_M, TILE_N))
        rS, rT = cute.make_rmem_tensor(acc, Float32), cute.make_rmem_tensor(acc, Float32)
        rP = cute.make_rmem_tensor(32, cutlass.Float16)
        stm = cute.make_tiled_copy_C(
            cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), cutlass.Float16), p.mma_p
        ).get_slice(t)
        rPc = cute.make_tensor(rP.iterator, rS.layout)
        lane = t % 32
        return Fragments(
            t=t,
            lane=lane,
            row=(t // 32) * 16 + lane // 4,
            tSrQ=thr_nope.make_fragment_A(thr_nope.partition_A(s.sQ)),
            tSrK=thr_nope.make_fragment_B(thr_nope.partition_B(s.sK)),
            tSrQr=thr_rope.make_fragment_A(thr_rope.partition_A(s.sQr)),
            tSrR=thr_rope.make_fragment_B(thr_rope.partition_B(s.sR)),
            tOrP=thr_pv.make_fragment_B(thr_pv.partition_B(s.sP)),
            rO=tuple(cute.make_rmem_tensor(thr_pv.partition_shape_C((64, TILE_M)), Float32) for _ in range(4)),
            rS=rS,
            rT=rT,
            rP=rP,
            rV=tuple(cute.make_rmem_tensor(thr_pv.partition_shape_A((64, TILE_N)), cutlass.Float16) for _ in range(2)),
            rL=cute.make_rmem_tensor((2,), Float32),
            rRef=cute.make_rmem_tensor((2,), Float32),
            rUnit=cute.make_rmem_tensor((1,), Float32),
            S=wgmma.row_col_view(rS, 8),
            T=wgmma.row_col_view(rT, 8),
            stm=stm,
            tPr=stm.retile(rPc),
            tPs=tuple(stm.partition_D(s.sP[None, None, i]) for i in range(2)),
        )

    def _consume(self, p, s, part, head0, t, wg: int):
        # What the loop over items needs waits in shared memory: every thread writes and reads it for itself.
        s.sLoop[0] = self.rows.num_items(p, part)
        s.sLoop[1] = p.mTable[part, 5] if const_expr(self.rows.header_is_item) else Int32(0)
        s.sLoop[2] = head0
        s.sLoop[3] = part
        self._consume_items(p, s, self._fragments(p, s, t), wg)

    @cute.jit
    def _consume_items(self, p, s, f, wg: Constexpr):
        barriers.arrive(BAR_P_FREE0 + 1 - wg, NUM_CONSUMERS)
        tile = Uint32(0)  # index of the pair's first tile in the stream of all tiles
        it = Int32(0)
        self._fetch_item(p, s, f, it, wg)
        while it < s.sLoop[0]:
            self._await_item(f, wg)
            barriers.sync(BAR_EPI, NUM_CONSUMERS)
            slot = it % 4
            self._fetch_item(p, s, f, it + 1, wg)
            self._load_q(p, s, f, slot, s.sLoop[2], wg)
            for m in cutlass.range_constexpr(4):
                f.rO[m].fill(0.0)
            f.rL.fill(0.0)
            f.rRef.fill(0.0)
            f.rUnit[0] = Float32(2.0**-100)
            left = s.sItem[slot, 2] - s.sItem[slot, 1]
            gap = self.rows.gap(p, s, slot)
            if const_expr(self.ahead):
                self._start_nope(p, s, f, tile + wg, 0)
            # The last pair apart: tails, and nothing to start ahead, are only there.
            while left > 2 * TILE_N:
                self._pair(p, s, f, tile, left, it % 4, gap, wg, False)
                tile += 2
                left -= 2 * TILE_N
            self._pair(p, s, f, tile, left, it % 4, gap, wg, True)
            tile += 2
            self._epilogue(p, s, f, it % 4, s.sLoop[2], wg)
            it += 1

    # ---------------------------------------------------------------- items

    @cute.jit
    def _fetch_item(self, p, s, f, it, wg: Constexpr):
        """Start the copy of item `it`, if there is one, to s.sItem[it % 4]; `_await_item` ends it."""
        if const_expr(wg == 0):
            if (f.t < 2) & (it < s.sLoop[0]):
                table_row = self.rows.item_row(p, s.sLoop[3], s.sLoop[1], it)
                if const_expr(self.rows.header_is_item):
                    # The part's own row holds its first item, and is on its way already.
                    table_row = cutlass.select_(it == 0, s.sLoop[3], table_row)
                slot = it % 4
                src = p.mTable.iterator.toint() + Int64(table_row) * 32 + Int64(f.t * 16)
                dst = Int32(s.sItem.iterator.toint()) + slot * 32 + f.t * 16
                ptx.cp_async_small(dst, src, 16, 1)

    @cute.jit
    def _await_item(self, f, wg: Constexpr):
        if const_expr(wg == 0):
            if f.t < 2:
                cute.arch.cp_async_commit_group()
                cute.arch.cp_async_wait_group(0)

    @cute.jit
    def _load_q(self, p, s, f, slot, head0, wg: Constexpr):
        """Q of the item to shared memory, as e4m3: four threads a row. Rows past the tile's repeat its last one."""
        t = ptx.thread_index()
        row = t // 4
        q4 = t % 4
        last = self.rows.num_rows(p, s, slot, head0) - 1
        token, head = self.rows.token_and_head(p, s, slot, head0, cutlass.min(row, last))
        nope = ptx.row_address(p.mQ, token, head) + Int64(q4 * 16)
        rope = ptx.row_address(p.mQpe, token, head) + Int64(q4 * 16)
        r8 = row % 8
        to_nope = Int32(s.sQ.iterator.toint()) + row * 128
        to_rope = Int32(s.sQr.iterator.toint())
        worth = scalars.score_factors(p, self.rope_fp8)
        scales = [Float32(1.0), Float32(1.0)]
        if const_expr(self.q_fp8):
            for i in cutlass.range_constexpr(8):
                words = ptx.load_global_16(nope, i * 64)
                ptx.store_shared(to_nope + ((q4 + 4 * (i % 2)) ^ r8) * 16, words, i // 2 * 8192)
        else:
            inverse, scales[0] = self._row_scale(nope, 16)
            # A loop, and Q read again from L1: unrolled it keeps 200 registers and is 2000 instructions that run once.
            for i in cutlass.range(4, unroll=1):
                at = [to_nope + i * 8192 + ((q4 // 2 + 2 * j) ^ r8) * 16 + q4 % 2 * 8 for j in range(4)]
                self._put_split(nope + Int64(i * 256), inverse, at, 64 * 512)
        if const_expr(self.rope_fp8):
            to_rope = to_rope + row * 64
            if const_expr(self.q_fp8):
                ptx.store_shared(to_rope + (q4 ^ (row // 2 % 4)) * 16, ptx.load_global_16(rope, 0))
            else:
                inverse, scales[1] = self._row_scale(rope, 2)
                at = [to_rope + ((q4 // 2 + 2 * j) ^ (row // 2 % 4)) * 16 + q4 % 2 * 8 for j in range(2)]
                self._put_split(rope, inverse, at, 64 * 64)
        else:
            for i in cutlass.range_constexpr(2):
                words = ptx.load_global_16(rope, i * 64)
                ptx.store_shared(to_rope + row * 128 + ((q4 + 4 * i) ^ r8) * 16, words)
        if q4 == 0:
            for i in cutlass.range_constexpr(2):
                s.sQScale[i, row] = scales[i] * worth[i]
        barriers.fence_smem_writes()
        barriers.sync(BAR_Q, NUM_CONSUMERS)

    def _row_scale(self, address, chunks: int):
        """(448 / amax, amax / 448) of a row, from this thread's 16-byte chunks, 64 bytes apart."""
        words = [ptx.load_global_16(address, i * 64) for i in range(chunks)]
        pair = Uint32(0)
        for chunk in words:
            for word in chunk:
                pair = ptx.max_abs_16bit(pair, word, self.dtype)
        largest = cute.arch.fmax(*ptx.unpack_16bit(pair, self.dtype))
        largest = cute.arch.fmax(softmax.quad_max(largest), Float32(1.0e-30))
        return cute.arch.rcp_approx(largest) * e4m3.E4M3_MAX, largest * Float32(1.0 / e4m3.E4M3_MAX)

    def _put_split(self, address, inverse, to: list, low_offset: int) -> None:
        """Chunks of a row, 64 bytes apart from `address` on, times `inverse` as high and low e4m3 parts to `to`."""
        for i, at in enumerate(to):
            words = ptx.load_global_16(address, i * 64)
            x = [v * inverse for word in words for v in ptx.unpack_16bit(word, self.dtype)]
            first, second = e4m3.split_e4m3(x[:4]), e4m3.split_e4m3(x[4:])
            ptx.store_shared(at, [first[0], second[0]])
            ptx.store_shared(at, [first[1], second[1]], low_offset)

    # ---------------------------------------------------------------- tiles

    def _slot(self, tile):
        # Uniform: wgmma descriptors are made of it, in uniform registers then.
        return cute.arch.make_warp_uniform(Int32(tile % self.num_stages))

    def _phase(self, tile):
        return tile // self.num_stages % 2

    def _start_nope(self, p, s, f, tile, chunk: int, acc=None):
        """acc (None: T) = Q K^T over one of `score_chunks` parts of the depth of a tile; asynchronous."""
        slot = self._slot(tile)
        if chunk == 0:
            cute.arch.mbarrier_wait(s.mbar + MB_FULL + slot, self._phase(tile))
            if self.loader.generic_proxy:
                barriers.fence_smem_writes()
        steps = NOPE_STEPS // self.score_chunks
        warpgroup.fence()
        for term in reversed(range(self.q_terms)):
            self._issue(p.mma_nope, f.rT if acc is None else acc, f.tSrQ[None, None, None, term],
                        f.tSrK[None, None, None, slot], range(chunk * steps, (chunk + 1) * steps),
                        term == self.q_terms - 1)  # fmt: skip
        warpgroup.commit_group()

    def _start_rope(self, p, f, slot, acc):
        """acc = Qr R^T; asynchronous."""
        warpgroup.fence()
        for term in reversed(range(self.rope_terms)):
            self._issue(p.mma_rope, acc, f.tSrQr[None, None, None, term], f.tSrR[None, None, None, slot],
                        range(64 // (32 if self.rope_fp8 else 16)), term == self.rope_terms - 1)  # fmt: skip
        warpgroup.commit_group()

    def _issue(self, tiled_mma, acc, a, b, steps, zero_first: bool):
        wgmma.issue(tiled_mma, acc, a, b, [(k, k) for k in steps], zero_first)

    def _scores(self, p, s, f, tile):
        """S = b (Qr R^T) + a sum over scale groups of scale (Q K^T) - reference, in units of log2; ends what
        `_start_nope` began."""
        slot = self._slot(tile)
        a, b = ([s.sQScale[i, f.row + 8 * r] for r in range(2)] for i in range(2))
        nope, rope = f.S, f.T
        if self.score_chunks == 1:
            nope, rope = f.T, f.S
            self._start_rope(p, f, slot, f.rS)
        else:
            self._sum_parts(p, s, f, tile, slot)
            self._start_rope(p, f, slot, f.rT)
        warpgroup.wait_group(0)
        for j in range(8):
            scales = self._column_scales(s, f, slot, 0, j) if self.num_scales == 1 else []
            for n in (2 * j, 2 * j + 1):
                for r in range(2):
                    factor = a[r] * scales[n % 2] if scales else a[r]
                    f.S[r, n] = (rope[r, n] * b[r] - f.rRef[r]) + nope[r, n] * factor

    def _sum_parts(self, p, s, f, tile, slot):
        """S = sum over parts of the depth of Q K^T, each times its tokens' scales where parts have their own."""
        self._start_nope(p, s, f, tile, 1, f.rS)
        for part in range(1, self.score_chunks):
            if part > 1:
                self._start_nope(p, s, f, tile, part)
            warpgroup.wait_group(0)
            for j in range(8):
                of_s = of_t = [Float32(1.0)] * 2
                if self.num_scales == 4:
                    # T holds part 0 at first, beside part 1 in S.
                    of_t = self._column_scales(s, f, slot, part if part > 1 else 0, j)
                    of_s = self._column_scales(s, f, slot, 1, j) if part == 1 else of_s
                for n in (2 * j, 2 * j + 1):
                    for r in range(2):
                        f.S[r, n] = f.S[r, n] * of_s[n % 2] + f.T[r, n] * of_t[n % 2]

    def _column_scales(self, s, f, slot, group: int, j: int) -> list:
        """Scales of this thread's two of tokens 8 j .. 8 j + 7."""
        return ptx.load_shared_f32x2(self._scale_address(s, f, slot, group), 32 * j) if self.num_scales else []

    def _scale_address(self, s, f, slot, group):
        """Of the scale of token 2 (lane % 4)."""
        return Int32(s.sScales.iterator.toint()) + ((slot * self.num_scales + group) * TILE_N + f.lane % 4 * 2) * 4

    def _exp(self, s, f, slot, valid, last: bool) -> list:
        """P of S as float16 in rP, times the token's scale in format "token"; returns the sums of the two rows."""
        totals = [Float32(0.0), Float32(0.0)]
        words = cute.recast_tensor(f.rP, Uint32)
        inverse = cute.arch.rcp_approx(f.rUnit[0])
        for j in range(8):
            scales = [x * inverse for x in self._column_scales(s, f, slot, 0, j)] if self.kv_format == "token" else []
            if scales and last:
                token = 8 * j + f.lane % 4 * 2
                scales = [cutlass.select_(token + i < valid, scales[i], Float32(0.0)) for i in range(2)]
            for r in range(2):
                e = [softmax.exp2(f.S[r, 2 * j + i]) for i in range(2)]
                totals[r] = totals[r] + (e[0] + e[1])
                words[2 * j + r] = ptx.to_f16x2(*([e[i] * scales[i] for i in range(2)] if scales else e))
        return totals

    def _put_p(self, f, wg: int):
        cute.copy(f.stm, f.tPr, f.tPs[wg])
        barriers.fence_smem_writes()

    @cute.jit
    def _move(self, s, f, slots, valid, totals, first, wg: Constexpr, last: Constexpr):
        """The rare part of a pair, by all consumers together: move the references, and the unit of P V, to what the
        pair holds; P and the row sums again; O to the new references. In the first pair of an item, and when P would
        leave the range of float16."""
        rows = (f.row, f.row + 8)
        mx = [softmax.row_max(f.S, r, 16) for r in range(2)]
        for r in cutlass.range_constexpr(2):
            self._put_row(f, s.sMax[wg, None], rows[r], mx[r])
        barriers.sync(BAR_MAX, NUM_CONSUMERS)
        keep = self._move_unit(s, f, slots, valid)
        for r in cutlass.range_constexpr(2):
            # Relative to the old reference, as S is. Down only in the first pair; a row that sees nothing keeps 0.
            both = cute.arch.fmax(mx[r], s.sMax[1 - wg, rows[r]])
            up = cute.arch.fmax(both, Float32(0.0))
            if first:
                up = Float32(0.0)
                if both > -Float32.inf:
                    up = both
            f.rRef[r] = f.rRef[r] + up
            # Down only in the first pair, where O and the sums are 0.
            moved = softmax.exp2(cutlass.min(-up, Float32(0.0)))
            if const_expr(wg == 0):
                self._put_row(f, s.sMove, rows[r], moved * keep)
            f.rL[r] = f.rL[r] * moved
            for n in cutlass.range_constexpr(16):
                f.S[r, n] = f.S[r, n] - up
        again = self._exp(s, f, slots[wg], valid[wg], last)
        for r in cutlass.range_constexpr(2):
            totals[r] = again[r]
        self._put_p(f, wg)
        barriers.sync(BAR_P, NUM_CONSUMERS)
        for j in cutlass.range_constexpr(8):
            for e in cutlass.range_constexpr(2):
                scale = s.sMove[8 * j + f.lane % 4 * 2 + e]
                for m in cutlass.range_constexpr(4):
                    f.rO[m][4 * j + e] = f.rO[m][4 * j + e] * scale
                    f.rO[m][4 * j + 2 + e] = f.rO[m][4 * j + 2 + e] * scale

    @cute.jit
    def _move_unit(self, s, f, slots, valid):
        """Formats with scales: raise the unit of P V when a scale exceeds it 2^6-fold; returns O's factor."""
        keep = Float32(1.0)
        if const_expr(self.num_scales > 0):
            largest = self._largest_scale(s, f, slots, valid)
            for offset in cutlass.range_constexpr(5):
                largest = cute.arch.fmax(largest, cute.arch.shuffle_sync_bfly(largest, offset=1 << offset))
            if largest > f.rUnit[0] * MAX_UNITS:
                unit = e4m3.unit_below(largest)
                keep = f.rUnit[0] / unit
                f.rUnit[0] = unit
        return keep

    @cute.jit
    def _largest_scale(self, s, f, slots, valid):
        """Of this lane's tokens of both tiles."""
        largest = Float32(0.0)
        for i in cutlass.range_constexpr(2):
            for h in cutlass.range_constexpr(2):
                token = f.lane + 32 * h
                for g in cutlass.range_constexpr(self.num_scales):
                    x = s.sScales[token, g, slots[i]]
                    largest = cute.arch.fmax(largest, x if token < valid[i] else Float32(0.0))
        return largest

    def _is_first(self, s, item_slot, left):
        """The pair from which `left` tokens of the item are left is its first."""
        return left == s.sItem[item_slot, 2] - s.sItem[item_slot, 1]

    def _scale_leaves(self, s, f, slot, valid):
        """One of this thread's scales of its warpgroup's own tile exceeds what the unit allows."""
        token = f.t % TILE_N
        largest = s.sScales[token, f.t // TILE_N % self.num_scales, slot]
        if self.num_scales > 2:
            largest = cute.arch.fmax(largest, s.sScales[token, f.t // TILE_N + 2, slot])
        return (token < valid) & (largest > f.rUnit[0] * MAX_UNITS)

    def _pair(self, p, s, f, tile, left, item_slot, gap, wg: int, last: bool):
        """A pair of tiles whose first is `tile` of the stream; `left`: tokens of the item from it on."""
        slots = [self._slot(tile + i) for i in range(2)]
        valid = [left, left - TILE_N]
        own, other = wg, 1 - wg
        if not self.ahead:
            self._start_nope(p, s, f, tile + own, 0)
        cute.arch.mbarrier_wait(s.mbar + MB_FULL + slots[other], self._phase(tile + other))
        self._scores(p, s, f, tile + own)
        if last or not self.rows.header_is_item:
            self.rows.mask(p, s, f, item_slot, valid[own], gap)
        totals = self._exp(s, f, slots[own], valid[own], last)
        # The other warpgroup has drained its P V of the last pair, which read this one's P.
        barriers.sync(BAR_P_FREE0 + own, NUM_CONSUMERS)
        sums = cute.make_rmem_tensor((2,), Float32)
        for r in range(2):
            sums[r] = totals[r]
        self._put_p(f, wg)
        if last:
            for i in range(2):
                self._zero_v_tail(s, f, slots[i], wg, valid[i])
        # The first tile of the pair first: its slot is refilled while the second is multiplied.
        steps = [(i, m) for i in range(2) for m in range(4)]
        if not self.num_scales:
            # Before the wait for the other's P; with scales there are no registers left for it.
            self._v_fragment(s, f, slots[0], 0, wg, 0, None)
        most = MAX_SCALED_P if self.kv_format == "token" else MAX_P
        leaves = (totals[0] > most) | (totals[1] > most) | self._is_first(s, item_slot, left)
        if self.num_scales > 0:
            leaves = leaves | self._scale_leaves(s, f, slots[own], valid[own])
        self._ask_to_move(s, tile, leaves)
        barriers.sync(BAR_P, NUM_CONSUMERS)
        self._move_if(s, f, slots, valid, sums, tile, item_slot, wg, last)
        for r in range(2):
            f.rL[r] = f.rL[r] + sums[r]
        scales = None
        if self.num_scales:
            if self.kv_format == "group":
                scales = self._v_scales(s, f, slots[0], valid[0], wg * 2, last)
            self._v_fragment(s, f, slots[0], 0, wg, 0, scales)
        for n, (i, m) in enumerate(steps):
            if self.ahead and not last and n == 4 * wg:
                # Not in a branch and not left in flight over the loop's end: ptxas then waits behind every wgmma.
                # wg 1 waits for the refill of the slot that the last pair released last.
                self._start_nope(p, s, f, tile + 2 + own, 0)
            warpgroup.fence()
            wgmma.issue(p.mma_pv, f.rO[m], f.rV[n % 2], f.tOrP[None, None, None, i], [(k, k) for k in range(4)], False)
            warpgroup.commit_group()
            if n + 1 < len(steps):
                if n >= 1:
                    warpgroup.wait_group(1)
                i, m = steps[n + 1]
                if self.kv_format == "group" and m % 2 == 0:
                    scales = self._v_scales(s, f, slots[i], valid[i], wg * 2 + m // 2, last)
                self._v_fragment(s, f, slots[i], m, wg, (n + 1) % 2, scales)
                if m == 3:
                    # The last of this tile's V is in registers.
                    barriers.arrive_once_per_warp(s.mbar + MB_EMPTY + slots[i])
        warpgroup.wait_group(0)
        barriers.arrive(BAR_P_FREE0 + other, NUM_CONSUMERS)

    @cute.jit
    def _ask_to_move(self, s, tile, leaves):
        """Before BAR_P. Pairs take turns at two words: a warp may still have to read the last pair's."""
        if leaves:
            s.sLeaves[tile // 2 % 2] = tile + 1

    @cute.jit
    def _move_if(self, s, f, slots, valid, sums, tile, item_slot, wg: Constexpr, last: Constexpr):
        if s.sLeaves[tile // 2 % 2] == tile + 1:
            self._move(s, f, slots, valid, sums, self._is_first(s, item_slot, valid[0]), wg, last)

    @cute.jit
    def _put_row(self, f, column, row, value):
        if f.lane % 4 == 0:
            column[row] = value

    def _put_rows(self, f, column, values):
        for r in range(2):
            self._put_row(f, column, f.row + 8 * r, values[r])

    @cute.jit
    def _zero_v_tail(self, s, f, slot, wg: Constexpr, valid):
        """Zero V rows >= valid of this warpgroup's half: 0 * NaN is NaN, and rows past kv_end may hold anything."""
        if valid < TILE_N:
            t = ptx.thread_index() % 128
            first = cutlass.max(valid, Int32(0)) + t // 32
            # 256 bytes of a row are 32 words in two sub-tiles; the swizzle permutes within a row of a sub-tile.
            base = (slot * 4 + wg * 2 + t % 32 // 16) * 1024 + t % 16
            for row in cutlass.range(first, TILE_N, 4, unroll=1):
                s.k_words[base + row * 16] = Int64(0)
            barriers.fence_smem_writes()
            barriers.sync(BAR_FILL0 + wg, 128)

    def _v_fragment(self, s, f, slot, m: int, wg: int, buffer: int, scales: list | None):
        """A operand of O^T += V^T P^T: channels 64 m .. of this warpgroup's half, 64 tokens, as float16 in rV[buffer].

        A transposing load gives a thread (two channels) x (two tokens); row g of a warp's 16 is channel 2 g, row g + 8
        channel 2 g + 1.
        """
        words = cute.recast_tensor(f.rV[buffer], Uint32)
        chunk = (m % 2) * 4 + f.t // 32
        address = Int32(s.sK.iterator.toint()) + slot * (4 * 8192) + f.lane * 128 + (chunk ^ (f.lane % 8)) * 16
        for half in range(2):
            x = ptx.ldmatrix_x4(address, (wg * 2 + m // 2) * 8192 + half * 4096, True)
            for j in range(4):
                low, high = e4m3.e4m3x4_to_f16(e4m3.transpose_pairs(x[j]))
                if scales:
                    scale = scales[half * 4 + j]
                    low, high = ptx.multiply_f16x2(low, scale), ptx.multiply_f16x2(high, scale)
                at = (half * 2 + j // 2) * 4 + j % 2 * 2
                words[at] = low
                words[at + 1] = high

    def _v_scales(self, s, f, slot, valid, group: int, last: bool) -> list:
        """Scales of this thread's two tokens of every eight for a channel group, in units, as pairs of float16."""
        inverse = cute.arch.rcp_approx(f.rUnit[0])
        at = self._scale_address(s, f, slot, group)
        pairs = []
        for j in range(8):
            x = [v * inverse for v in ptx.load_shared_f32x2(at, 32 * j)]
            if last:
                token = 8 * j + f.lane % 4 * 2
                x = [cutlass.select_(token + i < valid, x[i], Float32(0.0)) for i in range(2)]
            pairs.append(ptx.to_f16x2(*x))
        return pairs

    # -------------------------------------------------------------- epilogue

    @cute.jit
    def _epilogue(self, p, s, f, slot, head0, wg: Constexpr):
        """O^T / l to the output, or as 16-bit integers under a scale to the partial rows (dims.py)."""
        rows = self.rows.num_rows(p, s, slot, head0)
        part_row = self.rows.part_row(s, slot, head0)
        partial = self.rows.is_partial(s, slot)
        for r in cutlass.range_constexpr(2):
            f.rL[r] = softmax.quad_sum(f.rL[r])
        self._put_rows(f, s.sL[wg, None], [f.rL[0], f.rL[1]])
        if const_expr(wg == 0):
            self._put_rows(f, s.sMax[0, None], [f.rRef[0], f.rRef[1]])
        else:
            if f.t < rows:
                token, head = self.rows.token_and_head(p, s, slot, head0, f.t)
                epilogue.put_addresses(p, s, f, part_row, partial, token, head)
        barriers.sync(BAR_EPI, NUM_CONSUMERS)
        if const_expr(wg == 0):
            if f.t < rows:
                v = cute.math.log2(s.sL[0, f.t] + s.sL[1, f.t]) + s.sMax[0, f.t]
                if partial:
                    partials.put_lse(p, part_row + f.t, v)
                else:
                    token, head = self.rows.token_and_head(p, s, slot, head0, f.t)
                    p.mLse[token, head] = v * p.lse_scale
        scale = f.rUnit[0]
        if const_expr(self.num_scales == 0):
            scale = scalars.output_factor(p)
        if partial:
            epilogue.store_partial(p, s, f, part_row, rows, scale, wg)
        else:
            epilogue.store_output(s, f, rows, scale, self.dtype, wg)
