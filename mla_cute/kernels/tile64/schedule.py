"""The two consumer warpgroups of the row-tile kernel (tile64/setup.py has the schedule)."""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, Uint32, const_expr
from cutlass.cute.nvgpu import warp, warpgroup

from ...dims import CKV_DIM, PART_ROW, TILE_M
from ..lib import barriers, partials, softmax, wgmma
from ..lib.paged import NUM_SUB, SUB_ELEMS, TILE_N
from ..lib.row_map import output_address
from . import epilogue
from .params import (
    BAR_EPI,
    BAR_FILL0,
    BAR_INIT,
    BAR_P0,
    BAR_P1,
    BAR_SCALE0,
    BAR_SCALE1,
    MB_EMPTY,
    MB_FULL,
    MB_Q_EMPTY,
    MB_Q_FULL,
    MB_ROPE_EMPTY,
    Fragments,
    Params,
)

# Order in which each consumer takes the sub-tiles of its stage: the half that is refilled first comes first.
QK_ORDER = (((0, 1, 2, 3), (4, 5, 6, 7, 8)), ((4, 5, 6, 7, 8), (0, 1, 2, 3)))


class Consumer:
    """Methods of Tile64."""

    def _fragments(self, p: Params, s, t):
        """Descriptors and registers of one consumer thread."""
        thr_qk, thr_pv = p.mma_qk.get_slice(0), p.mma_pv.get_slice(0)
        rO = cute.make_rmem_tensor(thr_pv.partition_shape_C((TILE_M, CKV_DIM // 2)), Float32)
        rS = cute.make_rmem_tensor(thr_qk.partition_shape_C((TILE_M, TILE_N)), Float32)
        rP = cute.make_rmem_tensor(p.mma_pv_rs.get_slice(0).partition_shape_A((TILE_M, TILE_N)), self.dtype)
        rQr = cute.make_rmem_tensor(p.mma_qk_rs.get_slice(0).partition_shape_A((TILE_M, 64)), self.dtype)
        ldm = cute.make_tiled_copy_A(
            cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), self.dtype), p.mma_qk_rs
        ).get_slice(t)
        stm = cute.make_tiled_copy_C(
            cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), self.dtype), p.mma_qk
        ).get_slice(t)
        rPc = cute.make_tensor(rP.iterator, rS.layout)
        lane = t % 32
        return Fragments(
            t=t,
            lane=lane,
            row=(t // 32) * 16 + lane // 4,
            tSrQ=thr_qk.make_fragment_A(thr_qk.partition_A(s.sQ)),
            tSrK=thr_qk.make_fragment_B(thr_qk.partition_B(s.sK)),
            tSrR=thr_qk.make_fragment_B(thr_qk.partition_B(s.sR)),
            tOrV=thr_pv.make_fragment_B(thr_pv.partition_B(s.sVt)),
            tOrP0=thr_pv.make_fragment_A(thr_pv.partition_A(s.sP0)),
            tOrP1=thr_pv.make_fragment_A(thr_pv.partition_A(s.sP1)),
            rO=rO,
            rS=rS,
            rP=rP,
            rPc=rPc,
            rQr=rQr,
            rL=cute.make_rmem_tensor((2,), Float32),
            S=wgmma.row_col_view(rS, 8),
            O=wgmma.row_col_view(rO, 32),
            ldm=ldm,
            stm=stm,
            tQs=ldm.partition_S(s.sP1),
            tQr=ldm.retile(rQr),
            tPr=stm.retile(rPc),
            tPs0=stm.partition_D(s.sP0),
            tPs1=stm.partition_D(s.sP1),
        )

    def _consume(self, p: Params, s, part, head0, t, wg: int):
        self._consume_items(p, s, self._fragments(p, s, t), self.rows.num_items(p, part), head0, wg)

    @cute.jit
    def _consume_items(self, p, s, f, num_items, head0, wg: Constexpr):
        phase = Int32(0)
        q_phase = Int32(0)
        for it in cutlass.range(num_items, unroll=1):
            f.rO.fill(0.0)
            f.rL.fill(0.0)
            cute.arch.mbarrier_wait(s.mbar + MB_Q_FULL, q_phase)
            q_phase ^= 1
            kv_begin = s.sItem[it % 4, 1]
            kv_end = s.sItem[it % 4, 2]
            num_pairs = (cute.ceil_div(kv_end, TILE_N) - kv_begin // TILE_N + 1) >> 1
            gap = self.rows.gap(p, s, it % 4)
            cute.copy(f.ldm, f.tQs, f.tQr)
            if const_expr(wg == 0):
                if f.t < TILE_M:
                    s.sM[f.t] = Float32(softmax.LOWEST)
                barriers.sync(BAR_INIT, 128)
            for pair in cutlass.range(num_pairs, unroll=1):
                left = kv_end - kv_begin - pair * (2 * TILE_N)  # tokens from this pair on
                if const_expr(wg == 0):
                    self._pair_wg0(p, s, f, phase, left, left - TILE_N, it % 4, gap)
                else:
                    self._pair_wg1(p, s, f, phase, left, left - TILE_N, it % 4, gap)
                phase ^= 1
            barriers.arrive_once_per_warp(s.mbar + MB_ROPE_EMPTY)
            self._epilogue(p, s, f, it, head0, wg)

    def _qk(self, p, s, f, wg: int, phase, subs, zero: bool):
        """S (+)= Q K^T over the named sub-tiles of stage `wg`, each as it lands; one commit group per sub-tile."""
        for n, j in enumerate(subs):
            if j in self.loader.barrier_subs:
                cute.arch.mbarrier_wait(s.mbar + MB_FULL + wg * NUM_SUB + j, phase)
                if self.loader.generic_proxy:
                    barriers.fence_smem_writes()
            warpgroup.fence()
            first = zero and n == 0
            if j < 8:
                ks = [(4 * j + k, 4 * j + k) for k in range(4)]
                wgmma.issue(p.mma_qk, f.rS, f.tSrQ, f.tSrK[None, None, None, wg], ks, first)
            else:
                ks = [(k, k) for k in range(4)]
                wgmma.issue(p.mma_qk_rs, f.rS, f.rQr, f.tSrR[None, None, None, wg], ks, first)
            warpgroup.commit_group()

    def _pv(self, tiled_mma, f, a, wg: int, stage: int):
        warpgroup.fence()
        v = wgmma.v_slice(f.tOrV, wg, stage)
        wgmma.issue(tiled_mma, f.rO, a, v, [(k, k) for k in range(4)], False)
        warpgroup.commit_group()

    def _release(self, s, wg: int, stage: int):
        """This consumer's half of V of `stage` is drained (K of that half was read earlier)."""
        barriers.arrive_once_per_warp(s.mbar + MB_EMPTY + wg * 2 + stage)

    @cute.jit
    def _release_q(self, s, left):
        """After a pair's QK, `left` tokens from it on: in the last pair, so that Q of the next item arrives during the
        softmax, the PVs and the epilogue."""
        if left <= 2 * TILE_N:
            barriers.arrive_once_per_warp(s.mbar + MB_Q_EMPTY)

    @cute.jit
    def _zero_v_tail(self, s, f, stage: Constexpr, wg: Constexpr, valid):
        """Zero V rows >= valid of this consumer's half: 0 * NaN is NaN, and rows past kv_end may hold anything."""
        if valid < TILE_N:
            first = cutlass.max(valid, Int32(0)) + f.t // 32
            base = (stage * 8 + wg * 4 + f.lane // 8) * (SUB_ELEMS // 4) + (f.lane % 8) * 2
            for row in cutlass.range(first, TILE_N, 4, unroll=1):
                s.k_words[base + row * 16] = Int64(0)
                s.k_words[base + row * 16 + 1] = Int64(0)
            barriers.fence_smem_writes()
            barriers.sync(BAR_FILL0 + wg, 128)

    @cute.jit
    def _put_row_stats(self, s, f, wg: Constexpr, row, ref, scale):
        if f.lane % 4 == 0:
            s.sM[row] = ref
            if const_expr(wg == 0):
                s.sScale0[row] = scale
            else:
                s.sScale1[row] = scale

    def _softmax(self, p, s, f, wg: int):
        """P of this consumer's tile in registers (f.rP); publishes row maxima before the exponentials."""
        wg0 = wg == 0
        rows = (f.row, f.row + 8)
        mx = [softmax.row_max(f.S, r, 16) * p.scale_log2 for r in range(2)]
        if not wg0:
            barriers.sync(BAR_SCALE0, 256)
        old = [s.sM[row] for row in rows]
        ref = [softmax.lazy_max(old[r], mx[r]) for r in range(2)]
        scale = [softmax.exp2(old[r] - ref[r]) for r in range(2)]
        # wg 1's O and l still carry the reference of the last pair: they also take wg 0's move.
        total = scale if wg0 else [scale[r] * s.sScale0[rows[r]] for r in range(2)]
        cute.arch.sync_warp()
        for r in range(2):
            self._put_row_stats(s, f, wg, rows[r], ref[r], scale[r])
        barriers.arrive(BAR_SCALE0 if wg0 else BAR_SCALE1, 256)
        for r in range(2):
            f.rL[r] = f.rL[r] * total[r] + softmax.exp_row(f.S, r, 16, p.scale_log2, ref[r])
        softmax.scale_rows(f.O, 64, total[0], total[1], softmax.any_rescale(total[0], total[1]))
        f.rPc.store(f.rS.load().to(self.dtype))

    @cute.jit
    def _correct_wg0(self, f, scale0, scale1, need):
        """wg 1 moved the reference: rescale the P0 already in shared memory, and O once its PV has drained."""
        if need:
            warpgroup.wait_group(0)
            softmax.multiply_rows(f.S, 16, scale0, scale1)
            f.rPc.store(f.rS.load().to(self.dtype))
            cute.copy(f.stm, f.tPr, f.tPs0)
            barriers.fence_smem_writes()
            softmax.multiply_rows(f.O, 64, scale0, scale1)

    def _pair_wg0(self, p, s, f, phase, valid0, valid1, slot, gap):
        self._qk(p, s, f, 0, phase, QK_ORDER[0][0], True)
        self._qk(p, s, f, 0, phase, QK_ORDER[0][1], False)
        warpgroup.wait_group(0)
        self._release_q(s, valid0)
        self.rows.mask(p, s, f, slot, valid0, gap)
        self._softmax(p, s, f, 0)
        self._zero_v_tail(s, f, 0, 0, valid0)
        # sP0 is free: this S0 needed (stage 0, half 1), refilled only after wg 1 drained its PV of the last P0.
        cute.copy(f.stm, f.tPr, f.tPs0)
        barriers.fence_smem_writes()
        self._pv(p.mma_pv_rs, f, f.rP, 0, 0)
        barriers.sync(BAR_SCALE1, 256)
        scale = [s.sScale1[f.row], s.sScale1[f.row + 8]]
        self._correct_wg0(f, scale[0], scale[1], softmax.any_rescale(scale[0], scale[1]))
        barriers.arrive(BAR_P0, 256)
        for r in range(2):
            f.rL[r] = f.rL[r] * scale[r]
        warpgroup.wait_group(0)
        self._release(s, 0, 0)
        self._zero_v_tail(s, f, 1, 0, valid1)
        barriers.sync(BAR_P1, 256)
        self._pv(p.mma_pv, f, f.tOrP1, 0, 1)
        # Not left in flight over the back-edge: ptxas then puts a wait behind every wgmma of the loop.
        warpgroup.wait_group(0)
        self._release(s, 0, 1)

    def _pair_wg1(self, p, s, f, phase, valid0, valid1, slot, gap):
        self._qk(p, s, f, 1, phase, QK_ORDER[1][0], True)
        self._qk(p, s, f, 1, phase, QK_ORDER[1][1], False)
        warpgroup.wait_group(0)
        self._release_q(s, valid0)
        self.rows.mask(p, s, f, slot, valid1, gap)
        self._softmax(p, s, f, 1)
        cute.copy(f.stm, f.tPr, f.tPs1)
        barriers.fence_smem_writes()
        self._zero_v_tail(s, f, 1, 1, valid1)
        barriers.arrive(BAR_P1, 256)
        self._pv(p.mma_pv_rs, f, f.rP, 1, 1)
        # Not P0 V0 first, which would release stage 0 sooner: the refill of (stage 1, half 1), which this consumer's
        # next QK begins with, comes later then, and that costs more (2 to 3 % at 128 heads).
        barriers.sync(BAR_P0, 256)
        self._zero_v_tail(s, f, 0, 1, valid0)
        self._pv(p.mma_pv, f, f.tOrP0, 1, 0)
        warpgroup.wait_group(1)
        self._release(s, 1, 1)
        warpgroup.wait_group(0)
        self._release(s, 1, 0)

    # -------------------------------------------------------------- epilogue

    @cute.jit
    def _epilogue(self, p, s, f, it, head0, wg: Constexpr):
        slot = it % 4
        rows = self.rows.num_rows(p, s, slot, head0)
        part_row = self.rows.part_row(s, slot, head0)
        for r in cutlass.range_constexpr(2):
            f.rL[r] = softmax.quad_sum(f.rL[r])
        if f.lane % 4 == 0:
            s.sL[wg * TILE_M + f.row] = f.rL[0]
            s.sL[wg * TILE_M + f.row + 8] = f.rL[1]
        barriers.sync(BAR_EPI, 256)
        if const_expr(wg == 0):
            if f.t < rows:
                v = cute.math.log2(s.sL[f.t] + s.sL[f.t + TILE_M]) + s.sM[f.t]
                if self.rows.is_partial(s, slot):
                    partials.put_lse(p, part_row + f.t, v)
                else:
                    token, head = self.rows.token_and_head(p, s, slot, head0, f.t)
                    p.mLse[token, head] = v * p.lse_scale
        # Outputs and partials are both rows of 512 16-bit values: one store path, from the address of each row.
        words = cute.make_rmem_tensor((2, 32), Uint32)
        at0 = Int64(0)
        at1 = Int64(0)
        if self.rows.is_partial(s, slot):
            at0 = partials.row_address(p, part_row + f.row)
            at1 = at0 + 8 * 4 * PART_ROW
            worth = epilogue.pack_int16(s, f, words)
            for r in cutlass.range_constexpr(2):
                if (f.lane % 4 == 0) & (f.row + 8 * r < rows):
                    partials.put_worth(p, part_row + f.row + 8 * r, wg, worth[r])
        else:
            at0 = output_address(p, *self.rows.token_and_head(p, s, slot, head0, f.row))
            at1 = output_address(p, *self.rows.token_and_head(p, s, slot, head0, f.row + 8))
            epilogue.pack_output(s, f, words, self.dtype)
        epilogue.store_rows(f, words, (at0, at1), rows, wg)
