"""Row-tile MLA decode for Hopper: 64 packed query rows against pairs of 64-token KV tiles.

    S = Q K^T (64 x 64 per tile, 576 deep)     O[64 x 512] += P V     V = the first 512 columns of K, same bytes

One CTA of three warpgroups per SM, persistent over the planner's work items (request, token range); the row tile
(64 heads) comes from the CTA index. KV tiles go in pairs, stage 0 and stage 1 ("seesaw", first described with
FlashMLA): each consumer owns half of O's columns and multiplies its own P from registers and the other's from
shared memory.

    role        warps  regs     does, per pair of tiles
    wg 0        0-3    240      S0 = Q K0^T, softmax, O[:, 0:256] += P0 V0[:, 0:256] + P1 V1[:, 0:256]
    wg 1        4-7    240      S1 = Q K1^T, softmax, O[:, 256:512] += P1 V1[:, 256:512] + P0 V0[:, 256:512]
    producer    8-11   24       warp 8 + w fills (stage w % 2, half w / 2) and its share of an item's Q
    (box_rows 8 and gather: 232 / 40)

    mbarrier             count         filled by / waited for by
    full[stage][sub]     1 (128)       producer warp, per 64 x 64 sub-tile (gather: all four warps, per half);
                                       consumer of that stage, before its QK
    empty[stage][half]   4 warps       wg `half` when its PV from that half has drained; producer warp
    q_full               4             TMA of nine Q sub-tiles, and the item's record in sItem; both consumers, per item
    q_empty              8 warps       both consumers at the end of an item (sP1 lives in Q's ninth sub-tile)

    named barrier        arrive -> wait
    SCALE0               wg 0 published its row maxima -> wg 1
    SCALE1               wg 1 published the final maxima of the pair -> wg 0
    P0, P1               P tile is in shared memory -> the other consumer
    INIT, EPI, FILL0/1   inside wg 0; both consumers; inside one consumer

The chain of row maxima per pair: wg 0 takes m from the last pair and its own maxima, wg 1 takes wg 0's. Moving the
reference is lazy (softmax.py), so almost every pair neither rescales O nor P: P0 goes to shared memory unscaled and
is corrected only when wg 1 moved the reference. Row maxima are published before the exponentials so that the other
warpgroup waits for 16 FMNMX, not for 32 EX2.

Shared memory: Q 72 KiB, two K tiles of 72 KiB, P0 8 KiB, statistics 1.5 KiB: 226 of 227 KiB.
Q's ninth sub-tile (rope) is read to registers at the start of an item and its bytes then hold P1.
"""

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import BFloat16, Constexpr, Float16, Float32, Int32, Int64, Uint32, const_expr, memory
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp, warpgroup

from ..config import LaunchConfig
from . import epilogue, paged_kv, softmax, sync, wgmma
from .paged_kv import NUM_SUB, SUB_BYTES, SUB_ELEMS, TILE_N
from .registry import PART_LSE, PART_ROW, TILE_M, DecodeKey
from .rows_params import Fragments, Params, Smem, load_item

HEAD_DIM_V = 512
HEAD_DIM_ROPE = 64
NUM_THREADS = 384
DTYPES = {"bfloat16": BFloat16, "float16": Float16}

BAR_SCALE0, BAR_SCALE1, BAR_P0, BAR_P1, BAR_INIT, BAR_EPI, BAR_FILL0, BAR_FILL1 = range(1, 9)
MB_FULL, MB_EMPTY, MB_Q_FULL, MB_Q_EMPTY, MB_TOTAL = 0, 2 * NUM_SUB, 2 * NUM_SUB + 4, 2 * NUM_SUB + 5, 2 * NUM_SUB + 6

# Order in which each consumer takes the sub-tiles of its stage: the half that is refilled first comes first.
QK_ORDER = (((0, 1, 2, 3), (4, 5, 6, 7, 8)), ((4, 5, 6, 7, 8), (0, 1, 2, 3)))

# (stage, half) in the order in which a pair's halves are released.
RELEASE_ORDER = ((0, 0), (1, 1), (0, 1), (1, 0))


class RowsSm90:
    """Decode main kernel. See the module docstring for the schedule."""

    def __init__(self, key: DecodeKey, config: LaunchConfig):
        self.key = key
        self.dtype = DTYPES[key.dtype]
        self.loader = paged_kv.make_loader(key.box_rows, config.evict_first)
        self.use_pdl = config.use_pdl
        self.regs_consumer, self.regs_producer = (240, 24) if key.box_rows > 8 else (232, 40)

    # ------------------------------------------------------------------ host

    @cute.jit
    def __call__(
        self,
        q_nope: cute.Tensor,  # (batch, H, 512)
        q_pe: cute.Tensor,  # (batch, H, 64)
        ckv: cute.Tensor,  # (pages, page_size, 512)
        kpe: cute.Tensor,  # (pages, page_size, 64)
        kv_indices: cute.Tensor,  # (n,) page ids
        table: cute.Tensor,  # (rows, 8): the plan, see planner.py
        out: cute.Tensor,  # (batch, H, 512)
        lse: cute.Tensor,  # (batch, H) float32
        part: cute.Tensor,  # (rows, PART_ROW) 32-bit words, see registry.py
        num_parts: Int32,
        scale_log2: Float32,  # sm_scale * log2(e)
        lse_scale: Float32,  # 1 for base 2, ln 2 for base e
        stream,
    ):
        K, MN = OperandMajorMode.K, OperandMajorMode.MN
        RS, SS = warpgroup.OperandSource.RMEM, warpgroup.OperandSource.SMEM
        dt = self.dtype
        num_heads = Int32(cute.size(q_nope, mode=[1]))
        num_tiles = cute.ceil_div(num_heads, TILE_M)

        def mma(b_major, n, a_source):
            return sm90.make_trivial_tiled_mma(dt, dt, K, b_major, Float32, (1, 1, 1), (TILE_M, n), a_source)

        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, dt)
        lay_sub = cute.tile_to_shape(atom, (64, 64), order=(0, 1))
        lay_k = cute.tile_to_shape(atom, (TILE_N, HEAD_DIM_V, 2), order=(0, 1, 2))
        # V^T of the same bytes: swapping the modes of a K-major tile gives the MN-major B operand of P V.
        lay_vt = cute.make_composed_layout(lay_k.inner, 0, cute.select(lay_k.outer, mode=[1, 0, 2]))

        # The batch mode of Q is outermost, so rows past H are out of bounds for TMA and arrive as zeros.
        op = cpasync.CopyBulkTensorTileG2SOp()
        q_view = cute.make_tensor(q_nope.iterator, cute.select(q_nope.layout, mode=[1, 2, 0]))
        qpe_view = cute.make_tensor(q_pe.iterator, cute.select(q_pe.layout, mode=[1, 2, 0]))
        tma_q, mQ = cpasync.make_tiled_tma_atom(op, q_view, lay_sub, (64, 64))
        tma_qpe, mQpe = cpasync.make_tiled_tma_atom(op, qpe_view, lay_sub, (64, 64))
        if const_expr(self.key.box_rows > 0):
            box = (self.key.box_rows, 64)
            lay_box = cute.tile_to_shape(atom, box, order=(0, 1))
            ckv_view = cute.make_tensor(ckv.iterator, cute.select(ckv.layout, mode=[1, 2, 0]))
            kpe_view = cute.make_tensor(kpe.iterator, cute.select(kpe.layout, mode=[1, 2, 0]))
            tma_ckv, mCkv = cpasync.make_tiled_tma_atom(op, ckv_view, lay_box, box)
            tma_kpe, mKpe = cpasync.make_tiled_tma_atom(op, kpe_view, lay_box, box)
        else:
            tma_ckv, mCkv, tma_kpe, mKpe = None, ckv, None, kpe

        ckv_unit, kpe_unit = (paged_kv.row_unit(x.stride[0], x.stride[1]) for x in (ckv, kpe))
        params = Params(
            mma_qk=mma(K, TILE_N, SS),
            mma_qk_rs=mma(K, TILE_N, RS),
            mma_pv=mma(MN, HEAD_DIM_V // 2, SS),
            mma_pv_rs=mma(MN, HEAD_DIM_V // 2, RS),
            tma_q=tma_q,
            mQ=mQ,
            tma_qpe=tma_qpe,
            mQpe=mQpe,
            tma_ckv=tma_ckv,
            mCkv=mCkv,
            tma_kpe=tma_kpe,
            mKpe=mKpe,
            mIndices=kv_indices,
            mTable=table,
            mO=out,
            mLse=lse,
            mPart=part,
            num_heads=num_heads,
            page_size=Int32(cute.size(ckv, mode=[1])),
            num_tiles=num_tiles,
            ckv_unit=ckv_unit * 2,
            ckv_page_units=Int32(ckv.stride[0] // ckv_unit),
            ckv_row_units=Int32(ckv.stride[1] // ckv_unit),
            kpe_unit=kpe_unit * 2,
            kpe_page_units=Int32(kpe.stride[0] // kpe_unit),
            kpe_row_units=Int32(kpe.stride[1] // kpe_unit),
            scale_log2=scale_log2,
            lse_scale=lse_scale,
            lay_q=cute.tile_to_shape(atom, (TILE_M, HEAD_DIM_V + HEAD_DIM_ROPE), order=(0, 1)),
            lay_k=lay_k,
            lay_vt=lay_vt,
            lay_sub=lay_sub,
            lay_sub2=cute.tile_to_shape(atom, (64, 64, 2), order=(0, 1, 2)),
            lay_sub9=cute.tile_to_shape(atom, (64, 64, NUM_SUB), order=(0, 1, 2)),
            lay_sub16=cute.tile_to_shape(atom, (64, 64, 16), order=(0, 1, 2)),
        )
        self.kernel(params).launch(
            grid=[num_parts * num_tiles, 1, 1],
            block=[NUM_THREADS, 1, 1],
            stream=stream,
            min_blocks_per_mp=1,
            use_pdl=self.use_pdl,
        )

    # ---------------------------------------------------------------- device

    def _storage(self):
        dt = self.dtype

        @cute.struct
        class Storage:
            mbar: cute.struct.MemRange[Int64, MB_TOTAL]
            sM: cute.struct.MemRange[Float32, TILE_M]
            sScale0: cute.struct.MemRange[Float32, TILE_M]
            sScale1: cute.struct.MemRange[Float32, TILE_M]
            sL: cute.struct.MemRange[Float32, 2 * TILE_M]
            sItem: cute.struct.MemRange[Int32, 32]
            sP0: cute.struct.Align[cute.struct.MemRange[dt, SUB_ELEMS], 1024]
            sQ: cute.struct.Align[cute.struct.MemRange[dt, NUM_SUB * SUB_ELEMS], 1024]
            sK: cute.struct.Align[cute.struct.MemRange[dt, 16 * SUB_ELEMS], 1024]
            sR: cute.struct.Align[cute.struct.MemRange[dt, 2 * SUB_ELEMS], 1024]

        return Storage

    def _smem(self, p: Params):
        st = memory.SmemAllocator().allocate(self._storage())

        def view(field, layout):
            return field.get_tensor(layout.outer, swizzle=layout.inner)

        sQ_sub = view(st.sQ, p.lay_sub9)
        return Smem(
            mbar=st.mbar.data_ptr(),
            sQ=view(st.sQ, p.lay_q),
            sQ_sub=sQ_sub,
            sP0=view(st.sP0, p.lay_sub),
            sP1=sQ_sub[None, None, NUM_SUB - 1],
            sK=view(st.sK, p.lay_k),
            sK_sub=view(st.sK, p.lay_sub16),
            sVt=view(st.sK, p.lay_vt),
            sR=view(st.sR, p.lay_sub2),
            sM=st.sM.get_tensor(cute.make_layout(TILE_M)),
            sScale0=st.sScale0.get_tensor(cute.make_layout(TILE_M)),
            sScale1=st.sScale1.get_tensor(cute.make_layout(TILE_M)),
            sL=st.sL.get_tensor(cute.make_layout(2 * TILE_M)),
            sItem=st.sItem.get_tensor(cute.make_layout((4, 8), stride=(8, 1))),
            # Raw words of K for zeroing tails: whole 128-byte rows, which the swizzle permutes within themselves.
            k_words=cute.make_tensor(
                cute.recast_ptr(st.sK.data_ptr(), dtype=Int64), cute.make_layout(16 * SUB_ELEMS // 4)
            ),
        )

    @cute.kernel
    def kernel(self, p: Params):
        tidx, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        wg = cute.arch.make_warp_uniform(tidx // 128)
        s = self._smem(p)

        if warp_idx == 0:
            cpasync.prefetch_descriptor(p.tma_q)
            cpasync.prefetch_descriptor(p.tma_qpe)
            if const_expr(p.tma_ckv is not None):
                cpasync.prefetch_descriptor(p.tma_ckv)
                cpasync.prefetch_descriptor(p.tma_kpe)
            with cute.arch.elect_one():
                for i in cutlass.range_constexpr(2 * NUM_SUB):
                    cute.arch.mbarrier_init(s.mbar + MB_FULL + i, self.loader.full_arrivals)
                for i in cutlass.range_constexpr(4):
                    cute.arch.mbarrier_init(s.mbar + MB_EMPTY + i, 4)
                cute.arch.mbarrier_init(s.mbar + MB_Q_FULL, 4)
                cute.arch.mbarrier_init(s.mbar + MB_Q_EMPTY, 8)
        cute.arch.mbarrier_init_fence()
        part = cta // p.num_tiles
        head0 = (cta - part * p.num_tiles) * TILE_M
        if const_expr(self.use_pdl):
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()
        # The first item is on its way while the barriers are set up.
        item = cute.make_rmem_tensor(8, Int32)
        if wg == 2:
            load_item(p.mTable, part, item)
        cute.arch.sync_threads()

        if wg == 2:
            cute.arch.setmaxregister_decrease(self.regs_producer)
            self._produce_items(p, s, item, head0, warp_idx - 8, cute.arch.lane_idx())
        else:
            cute.arch.setmaxregister_increase(self.regs_consumer)
            if wg == 0:
                self._consume(p, s, part, head0, tidx % 128, 0)
            else:
                self._consume(p, s, part, head0, tidx % 128, 1)

    # -------------------------------------------------------------- producer

    @cute.jit
    def _produce_items(self, p, s, item, head0, w, lane):
        phase = Int32(1)
        first_row = item[5]
        num_items = item[6]
        for it in cutlass.range(num_items, unroll=1):
            if it > 0:
                load_item(p.mTable, first_row + it, item)
            # The consumers read it after q_full. They may still be in the epilogue of item it - 2, whose Q_EMPTY let
            # the Q of item it - 1 in: not the same slot.
            if (w == 0) & (lane == 0):
                for i in cutlass.range_constexpr(5):
                    s.sItem[it % 4, i] = item[i]
            cute.arch.sync_warp()
            if it == 0:
                # In front of the first K tiles, or Q would arrive behind all of them: 1.5 us at batch 16. Later items
                # load K first, because Q has to wait for the end of the item before.
                self._load_q(p, s, item[0], head0, it, w)
            if const_expr(self.key.box_rows > 0):
                phase = self._tma_pairs(p, s, item, it, head0, phase, w, lane)
            else:
                phase = self._gather_pairs(p, s, item, it, head0, phase, w, lane)

    @cute.jit
    def _tma_pairs(self, p, s, item, it, head0, phase, w, lane):
        """Each warp fills its own (stage, half). Returns the phase of the empty mbarriers."""
        stage = w % 2
        half = w // 2
        full = s.mbar + MB_FULL + stage * NUM_SUB + half * 4
        empty = s.mbar + MB_EMPTY + half * 2 + stage
        kv_end = item[2]
        index_base = item[3]
        first = item[1] // TILE_N + stage
        for block in cutlass.range(first, cute.ceil_div(kv_end, TILE_N) + stage, 2, unroll=1):
            where, boxes = self.loader.lookup(p, index_base, block, kv_end, lane)
            cute.arch.mbarrier_wait(empty, phase)
            phase ^= 1
            self.loader.load(p, s, where, boxes, stage, half, full)
            if (block == first) & (it > 0):
                self._load_q(p, s, item[0], head0, it, w)
        return phase

    @cute.jit
    def _gather_pairs(self, p, s, item, it, head0, phase, w, lane):
        """The four warps share every (stage, half), in the order in which the consumers release them."""
        kv_end = item[2]
        index_base = item[3]
        first = item[1] // TILE_N
        for block in cutlass.range(first, cute.ceil_div(kv_end, TILE_N), 2, unroll=1):
            rows = [self.loader.lookup(p, index_base, block + stage, kv_end, w, lane) for stage in range(2)]
            for stage, half in RELEASE_ORDER:
                num_rows = paged_kv.rows_of_block(block + stage, kv_end) - w * 16
                ckv_rows, kpe_rows = (self.loader.rows(offset, lane) for offset in rows[stage])
                cute.arch.mbarrier_wait(s.mbar + MB_EMPTY + half * 2 + stage, phase)
                full = s.mbar + MB_FULL + stage * NUM_SUB + half * 4
                self.loader.load(p, s, ckv_rows, kpe_rows, num_rows, stage, half, full, w, lane)
            phase ^= 1
            if (block == first) & (it > 0):
                self._load_q(p, s, item[0], head0, it, w)
        return phase

    @cute.jit
    def _load_q(self, p, s, batch, head0, it, w):
        """Two of the nine Q sub-tiles per producer warp, the rope part with the last."""
        batch = cute.arch.make_warp_uniform(batch)
        cute.arch.mbarrier_wait(s.mbar + MB_Q_EMPTY, (it + 1) % 2)
        q_full = s.mbar + MB_Q_FULL
        sQ = cute.group_modes(s.sQ_sub, 0, 2)
        gQ = cute.local_tile(cute.domain_offset((head0, 0, 0), p.mQ), (64, 64), (0, None, None))
        tQs, tQg = cpasync.tma_partition(p.tma_q, 0, cute.make_layout(1), sQ, cute.group_modes(gQ, 0, 2))
        gR = cute.local_tile(cute.domain_offset((head0, 0, 0), p.mQpe), (64, 64), (0, 0, None))
        tRs, tRg = cpasync.tma_partition(p.tma_qpe, 0, cute.make_layout(1), sQ, cute.group_modes(gR, 0, 2))
        if w == 3:
            sync.expect_tx(q_full, 3 * SUB_BYTES)
            cute.copy(p.tma_qpe, tRg[None, batch], tRs[None, NUM_SUB - 1], tma_bar_ptr=q_full)
        else:
            sync.expect_tx(q_full, 2 * SUB_BYTES)
        for i in cutlass.range_constexpr(2):
            cute.copy(p.tma_q, tQg[None, 2 * w + i, batch], tQs[None, 2 * w + i], tma_bar_ptr=q_full)

    # ------------------------------------------------------------- consumers

    def _fragments(self, p: Params, s, t):
        """Descriptors and registers of one consumer thread."""
        thr_qk, thr_pv = p.mma_qk.get_slice(0), p.mma_pv.get_slice(0)
        rO = cute.make_rmem_tensor(thr_pv.partition_shape_C((TILE_M, HEAD_DIM_V // 2)), Float32)
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
        self._consume_items(p, s, self._fragments(p, s, t), p.mTable[part, 6], head0, wg)

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
            cute.copy(f.ldm, f.tQs, f.tQr)
            if const_expr(wg == 0):
                if f.t < TILE_M:
                    s.sM[f.t] = Float32(softmax.NEG_BIG)
                sync.sync(BAR_INIT, 128)
            for pair in cutlass.range(num_pairs, unroll=1):
                left = kv_end - kv_begin - pair * (2 * TILE_N)  # tokens from this pair on
                if const_expr(wg == 0):
                    self._pair_wg0(p, s, f, phase, left, left - TILE_N)
                else:
                    self._pair_wg1(p, s, f, phase, left, left - TILE_N)
                phase ^= 1
            sync.arrive_once_per_warp(s.mbar + MB_Q_EMPTY)
            self._epilogue(p, s, f, it, head0, wg)

    def _qk(self, p, s, f, wg: int, phase, subs, zero: bool):
        """S (+)= Q K^T over the named sub-tiles of stage `wg`, each as it lands; one commit group per sub-tile."""
        for n, j in enumerate(subs):
            if j in self.loader.barrier_subs:
                cute.arch.mbarrier_wait(s.mbar + MB_FULL + wg * NUM_SUB + j, phase)
                if self.loader.generic_proxy:
                    sync.fence_smem_writes()
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
        sync.arrive_once_per_warp(s.mbar + MB_EMPTY + wg * 2 + stage)

    @cute.jit
    def _zero_v_tail(self, s, f, stage: Constexpr, wg: Constexpr, valid):
        """Zero V rows >= valid of this consumer's half: 0 * NaN is NaN, and rows past kv_end may hold anything."""
        if valid < TILE_N:
            first = cutlass.max(valid, Int32(0)) + f.t // 32
            base = (stage * 8 + wg * 4 + f.lane // 8) * (SUB_ELEMS // 4) + (f.lane % 8) * 2
            for row in cutlass.range(first, TILE_N, 4, unroll=1):
                s.k_words[base + row * 16] = Int64(0)
                s.k_words[base + row * 16 + 1] = Int64(0)
            sync.fence_smem_writes()
            sync.sync(BAR_FILL0 + wg, 128)

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
            sync.sync(BAR_SCALE0, 256)
        old = [s.sM[row] for row in rows]
        ref = [softmax.lazy_max(old[r], mx[r]) for r in range(2)]
        scale = [softmax.exp2(old[r] - ref[r]) for r in range(2)]
        # wg 1's O and l still carry the reference of the last pair: they also take wg 0's move.
        total = scale if wg0 else [scale[r] * s.sScale0[rows[r]] for r in range(2)]
        cute.arch.sync_warp()
        for r in range(2):
            self._put_row_stats(s, f, wg, rows[r], ref[r], scale[r])
        sync.arrive(BAR_SCALE0 if wg0 else BAR_SCALE1, 256)
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
            sync.fence_smem_writes()
            softmax.multiply_rows(f.O, 64, scale0, scale1)

    def _pair_wg0(self, p, s, f, phase, valid0, valid1):
        self._qk(p, s, f, 0, phase, QK_ORDER[0][0], True)
        self._qk(p, s, f, 0, phase, QK_ORDER[0][1], False)
        warpgroup.wait_group(0)
        softmax.mask_columns(f.S, 8, valid0, f.lane)
        self._softmax(p, s, f, 0)
        self._zero_v_tail(s, f, 0, 0, valid0)
        # sP0 is free: this S0 needed (stage 0, half 1), refilled only after wg 1 drained its PV of the last P0.
        cute.copy(f.stm, f.tPr, f.tPs0)
        sync.fence_smem_writes()
        self._pv(p.mma_pv_rs, f, f.rP, 0, 0)
        sync.sync(BAR_SCALE1, 256)
        scale = [s.sScale1[f.row], s.sScale1[f.row + 8]]
        self._correct_wg0(f, scale[0], scale[1], softmax.any_rescale(scale[0], scale[1]))
        sync.arrive(BAR_P0, 256)
        for r in range(2):
            f.rL[r] = f.rL[r] * scale[r]
        warpgroup.wait_group(0)
        self._release(s, 0, 0)
        self._zero_v_tail(s, f, 1, 0, valid1)
        sync.sync(BAR_P1, 256)
        self._pv(p.mma_pv, f, f.tOrP1, 0, 1)
        # Not left in flight over the back-edge: ptxas then puts a wait behind every wgmma of the loop.
        warpgroup.wait_group(0)
        self._release(s, 0, 1)

    def _pair_wg1(self, p, s, f, phase, valid0, valid1):
        self._qk(p, s, f, 1, phase, QK_ORDER[1][0], True)
        self._qk(p, s, f, 1, phase, QK_ORDER[1][1], False)
        warpgroup.wait_group(0)
        softmax.mask_columns(f.S, 8, valid1, f.lane)
        self._softmax(p, s, f, 1)
        cute.copy(f.stm, f.tPr, f.tPs1)
        sync.fence_smem_writes()
        self._zero_v_tail(s, f, 1, 1, valid1)
        sync.arrive(BAR_P1, 256)
        self._pv(p.mma_pv_rs, f, f.rP, 1, 1)
        # Not P0 V0 first, which would release stage 0 sooner: the refill of (stage 1, half 1), which this consumer's
        # next QK begins with, comes later then, and that costs more (2 to 3 % at 128 heads).
        sync.sync(BAR_P0, 256)
        self._zero_v_tail(s, f, 0, 1, valid0)
        self._pv(p.mma_pv, f, f.tOrP0, 1, 0)
        warpgroup.wait_group(1)
        self._release(s, 1, 1)
        warpgroup.wait_group(0)
        self._release(s, 1, 0)

    # -------------------------------------------------------------- epilogue

    @cute.jit
    def _epilogue(self, p, s, f, it, head0, wg: Constexpr):
        batch = s.sItem[it % 4, 0]
        part_row = s.sItem[it % 4, 4]
        rows = cutlass.min(p.num_heads - head0, Int32(TILE_M))
        for r in cutlass.range_constexpr(2):
            f.rL[r] = softmax.quad_sum(f.rL[r])
        if f.lane % 4 == 0:
            s.sL[wg * TILE_M + f.row] = f.rL[0]
            s.sL[wg * TILE_M + f.row + 8] = f.rL[1]
        sync.sync(BAR_EPI, 256)
        if const_expr(wg == 0):
            if f.t < rows:
                v = cute.math.log2(s.sL[f.t] + s.sL[f.t + TILE_M]) + s.sM[f.t]
                if part_row >= 0:
                    p.mPart[part_row + head0 + f.t, PART_LSE] = v
                else:
                    p.mLse[batch, head0 + f.t] = v * p.lse_scale
        # Where row 0 of the tile goes, in bytes: one store path for outputs and partials (both 16-bit rows).
        dst = p.mO.iterator.toint() + (Int64(batch) * p.mO.stride[0] + Int64(head0) * p.mO.stride[1]) * 2
        row_bytes = Int64(p.mO.stride[1]) * 2
        if part_row >= 0:
            dst = p.mPart.iterator.toint() + Int64(part_row + head0) * (4 * PART_ROW)
            row_bytes = Int64(4 * PART_ROW)
        words = cute.make_rmem_tensor((2, 32), Uint32)
        if part_row >= 0:
            worth = epilogue.pack_int16(s, f, words)
            for r in cutlass.range_constexpr(2):
                if (f.lane % 4 == 0) & (f.row + 8 * r < rows):
                    p.mPart[part_row + head0 + f.row + 8 * r, PART_LSE + 1 + wg] = worth[r]
        else:
            epilogue.pack_output(s, f, words, self.dtype)
        epilogue.store_rows(f, words, dst, row_bytes, rows, wg)
