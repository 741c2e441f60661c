"""Row-tile MLA for Hopper: 64 query rows against pairs of 64-token KV tiles.

    S = Q K^T (64 x 64 per tile, 576 deep)     O[64 x 512] += P V     V = the first 512 columns of K, same bytes

One CTA of three warpgroups per SM, persistent over the planner's work items (row tile, token range); which rows a tile
holds is lib/row_map.py's. KV tiles go in pairs, stage 0 and stage 1 ("seesaw", first described with FlashMLA): each
consumer owns half of O's columns and multiplies its own P from registers and the other's from shared memory.

    role        warps  regs     does, per pair of tiles
    wg 0        0-3    240      S0 = Q K0^T, softmax, O[:, 0:256] += P0 V0[:, 0:256] + P1 V1[:, 0:256]
    wg 1        4-7    240      S1 = Q K1^T, softmax, O[:, 256:512] += P1 V1[:, 256:512] + P0 V0[:, 256:512]
    producer    8-11   24       warp 8 + w fills (stage w % 2, half w / 2) and its share of an item's Q
    (box_rows 8, gather and packed rows: 232 / 40)

    mbarrier             count         filled by / waited for by
    full[stage][sub]     1 (128)       producer warp, per 64 x 64 sub-tile (gather: all four warps, per two);
                                       consumer of that stage, before its QK
    empty[stage][half]   4 warps       wg `half` when its PV from that half has drained; producer warp
    q_full               4             TMA of nine Q sub-tiles, and the item's record in sItem; both consumers, per item
    q_empty              8 warps       both consumers after the last QK of an item; producer, for sub-tiles 0..7
    rope_empty           8 warps       both consumers at the end of an item: sP1 lives in Q's ninth sub-tile

    named barrier        arrive -> wait
    SCALE0               wg 0 published its row maxima -> wg 1
    SCALE1               wg 1 published the final maxima of the pair -> wg 0
    P0, P1               P tile is in shared memory -> the other consumer
    INIT, EPI, FILL0/1   inside wg 0; both consumers; inside one consumer

The chain of row maxima per pair: wg 0 takes m from the last pair and its own maxima, wg 1 takes wg 0's. Moving the
reference is lazy (lib/softmax.py), so almost every pair neither rescales O nor P: P0 goes to shared memory unscaled and
is corrected only when wg 1 moved the reference. Row maxima are published before the exponentials so that the other
warpgroup waits for 16 FMNMX, not for 32 EX2.

Shared memory: Q 72 KiB, two K tiles of 72 KiB, P0 8 KiB, statistics 1.5 KiB: 226 of 227 KiB.
Q's ninth sub-tile (rope) is read to registers at the start of an item and its bytes then hold P1.
"""

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float32, Int32, Int64, const_expr, memory
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup

from ...dims import CKV_DIM, KPE_DIM, TILE_M
from ..keys import DecodeKey, LaunchConfig, PrefillKey
from ..lib import paged
from ..lib.dtypes import CUTLASS_DTYPES
from ..lib.paged import NUM_SUB, SUB_ELEMS, TILE_N
from ..lib.row_map import HeadRows, PackedRows, load_item
from ..step import Step, StepArgs
from .params import MB_EMPTY, MB_FULL, MB_Q_EMPTY, MB_Q_FULL, MB_ROPE_EMPTY, MB_TOTAL, Params, Smem
from .producer import Producer
from .schedule import Consumer

NUM_THREADS = 384


class Tile64(Producer, Consumer):
    """Main kernel of decode (HeadRows) and prefill (PackedRows). See the module docstring for the schedule."""

    def __init__(self, dtype: str, box_rows: int, rows: HeadRows | PackedRows, config: LaunchConfig):
        self.dtype = CUTLASS_DTYPES[dtype]
        self.kv_format = ""
        self.rows = rows
        self.loader = paged.make_loader(box_rows, config.evict_first)
        self.use_pdl = config.use_pdl
        self.by_tma = box_rows > 0
        self.box_rows = box_rows
        self.regs_consumer, self.regs_producer = (240, 24) if box_rows > 8 and rows.header_is_item else (232, 40)

    # ------------------------------------------------------------------ host

    def launch(self, args: StepArgs) -> None:
        K, MN = OperandMajorMode.K, OperandMajorMode.MN
        RS, SS = warpgroup.OperandSource.RMEM, warpgroup.OperandSource.SMEM
        dt = self.dtype
        num_tiles = self.rows.num_tiles(args.num_heads)

        def mma(b_major, n, a_source):
            return sm90.make_trivial_tiled_mma(dt, dt, K, b_major, Float32, (1, 1, 1), (TILE_M, n), a_source)

        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, dt)
        lay_sub = cute.tile_to_shape(atom, (64, 64), order=(0, 1))
        lay_k = cute.tile_to_shape(atom, (TILE_N, CKV_DIM, 2), order=(0, 1, 2))
        # V^T of the same bytes: swapping the modes of a K-major tile gives the MN-major B operand of P V.
        lay_vt = cute.make_composed_layout(lay_k.inner, 0, cute.select(lay_k.outer, mode=[1, 0, 2]))

        op = cpasync.CopyBulkTensorTileG2SOp()
        tma_q, mQ = cpasync.make_tiled_tma_atom(op, self.rows.q_view(args.q_nope), lay_sub, (64, 64))
        tma_qpe, mQpe = cpasync.make_tiled_tma_atom(op, self.rows.q_view(args.q_pe), lay_sub, (64, 64))
        if const_expr(self.by_tma):
            box = (self.box_rows, 64)
            lay_box = cute.tile_to_shape(atom, box, order=(0, 1))
            ckv_view = cute.make_tensor(args.ckv.iterator, cute.select(args.ckv.layout, mode=[1, 2, 0]))
            kpe_view = cute.make_tensor(args.kpe.iterator, cute.select(args.kpe.layout, mode=[1, 2, 0]))
            tma_ckv, mCkv = cpasync.make_tiled_tma_atom(op, ckv_view, lay_box, box)
            tma_kpe, mKpe = cpasync.make_tiled_tma_atom(op, kpe_view, lay_box, box)
        else:
            tma_ckv, mCkv, tma_kpe, mKpe = None, args.ckv, None, args.kpe

        ckv_unit, kpe_unit = (paged.row_unit(x.stride[0], x.stride[1]) for x in (args.ckv, args.kpe))
        params = Params(
            mma_qk=mma(K, TILE_N, SS),
            mma_qk_rs=mma(K, TILE_N, RS),
            mma_pv=mma(MN, CKV_DIM // 2, SS),
            mma_pv_rs=mma(MN, CKV_DIM // 2, RS),
            tma_q=tma_q,
            mQ=mQ,
            tma_qpe=tma_qpe,
            mQpe=mQpe,
            tma_ckv=tma_ckv,
            mCkv=mCkv,
            tma_kpe=tma_kpe,
            mKpe=mKpe,
            mIndices=args.kv_indices,
            mTable=args.table,
            mO=args.out,
            mLse=args.lse,
            mPart=args.part,
            num_heads=args.num_heads,
            page_size=Int32(cute.size(args.ckv, mode=[1])),
            num_tiles=num_tiles,
            num_parts=args.num_parts,
            item_row0=args.item_row0,
            ckv_unit=ckv_unit * 2,
            ckv_page_units=Int32(args.ckv.stride[0] // ckv_unit),
            ckv_row_units=Int32(args.ckv.stride[1] // ckv_unit),
            kpe_unit=kpe_unit * 2,
            kpe_page_units=Int32(args.kpe.stride[0] // kpe_unit),
            kpe_row_units=Int32(args.kpe.stride[1] // kpe_unit),
            scale_log2=args.nope_scale_log2,
            lse_scale=args.lse_scale,
            lay_q=cute.tile_to_shape(atom, (TILE_M, CKV_DIM + KPE_DIM), order=(0, 1)),
            lay_k=lay_k,
            lay_vt=lay_vt,
            lay_sub=lay_sub,
            lay_sub2=cute.tile_to_shape(atom, (64, 64, 2), order=(0, 1, 2)),
            lay_sub9=cute.tile_to_shape(atom, (64, 64, NUM_SUB), order=(0, 1, 2)),
            lay_sub16=cute.tile_to_shape(atom, (64, 64, 16), order=(0, 1, 2)),
        )
        self.kernel(params).launch(
            grid=[args.num_parts * num_tiles, 1, 1],
            block=[NUM_THREADS, 1, 1],
            stream=args.stream,
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
                cute.arch.mbarrier_init(s.mbar + MB_ROPE_EMPTY, 8)
        cute.arch.mbarrier_init_fence()
        part = cta // p.num_tiles
        head0 = (cta - part * p.num_tiles) * TILE_M
        if const_expr(self.use_pdl):
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()
        item = cute.make_rmem_tensor(8, Int32)
        if const_expr(self.rows.header_is_item):
            # The first item is on its way while the barriers are set up.
            if wg == 2:
                load_item(p.mTable, part, item)
        cute.arch.sync_threads()

        if wg == 2:
            cute.arch.setmaxregister_decrease(self.regs_producer)
            self._produce_items(p, s, item, part, head0, warp_idx - 8, cute.arch.lane_idx())
        else:
            cute.arch.setmaxregister_increase(self.regs_consumer)
            if wg == 0:
                self._consume(p, s, part, head0, tidx % 128, 0)
            else:
                self._consume(p, s, part, head0, tidx % 128, 1)


def decode(key: DecodeKey, config: LaunchConfig) -> Step:
    return Step(Tile64(key.dtype, key.box_rows, HeadRows(), config), key.dtype, False, config)


def prefill(key: PrefillKey, config: LaunchConfig) -> Step:
    return Step(Tile64(key.dtype, key.box_rows, PackedRows(), config), key.dtype, True, config)
