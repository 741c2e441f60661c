"""Set-up of the row-tile kernel on host and device: launch, shared memory, barriers, the split into roles.

schedule.py has the schedule.
"""

from typing import Any

import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float32, Int32, Int64, const_expr, memory
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup

from ...dims import TILE_M, HeadDims
from ..keys import DecodeKey, LaunchConfig, PrefillKey
from ..lib import paged
from ..lib.dtypes import CUTLASS_DTYPES
from ..lib.paged import SUB_ELEMS, TILE_N
from ..lib.row_map import HeadRows, PackedRows, RowMap, load_item
from ..step import Step, StepArgs
from .params import ITEM_SLOTS, NUM_THREADS, WARPGROUP, Params, Smem, make_mbarriers, of_place
from .producer import Producer
from .schedule import Consumer

ITEM_WORDS = 8


def _registers(box_rows: int, rows: RowMap, dims: HeadDims) -> tuple[int, int]:
    """Of a consumer and of a producer thread."""
    if box_rows > 8 and rows.header_is_item and dims.ckv > 256 and dims.kpe > 0:
        return 240, 24
    # Other head dimensions spill 8 to 64 bytes at 240 and 24 (512 + 0, 256) or 232 and 40 (gathers).
    return (232, 40) if dims == HeadDims() else (224, 56)


class Tile64(Producer, Consumer):
    """Main kernel of decode (HeadRows) and prefill (PackedRows) over 16-bit caches; params.py's Variant has its
    attributes."""

    kv_format = ""

    def __init__(
        self,
        dtype: str,
        box_rows: int,
        rows: RowMap,
        config: LaunchConfig,
        dims: HeadDims,
        sparse: bool = False,
        converted: bool = False,
    ):
        self.dtype = CUTLASS_DTYPES[dtype]
        self.dims = dims
        self.num_subs = paged.num_ckv_subs(dims)
        # Half as many channels leave room for a second pair.
        self.num_stages = 2 if dims.ckv > 256 else 4
        self.rows = rows
        self.loader = paged.make_loader(box_rows, config.evict_first, sparse, dims)
        self.mbars = make_mbarriers(self.loader, self.num_stages)
        self.converted = converted
        self.use_pdl = config.use_pdl
        self.by_tma = box_rows > 0
        self.box_rows = box_rows
        self.regs_consumer, self.regs_producer = _registers(box_rows, rows, dims)

    # ------------------------------------------------------------------ host

    def launch(self, args: StepArgs) -> None:
        params = self._params(args)
        self.kernel(params).launch(
            grid=[args.num_parts * params.num_tiles, 1, 1],
            block=[NUM_THREADS, 1, 1],
            stream=args.stream,
            min_blocks_per_mp=1,
            use_pdl=self.use_pdl,
        )

    def _params(self, args: StepArgs) -> Params:
        num_tiles = self.rows.num_tiles(args.num_heads)
        ckv_dim, num_subs, stages = self.dims.ckv, self.num_subs, self.num_stages
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, self.dtype)

        def layout(*shape):
            return cute.tile_to_shape(atom, shape, order=tuple(range(len(shape))))

        lay_sub = layout(64, 64)
        lay_k = layout(TILE_N, ckv_dim, stages)
        # V^T of the same bytes: swapping the modes of a K-major tile gives the MN-major B operand of P V.
        lay_vt = cute.make_composed_layout(lay_k.inner, 0, cute.select(lay_k.outer, mode=[1, 0, 2]))

        op = cpasync.CopyBulkTensorTileG2SOp()
        tma_q, mQ = cpasync.make_tiled_tma_atom(op, self.rows.q_view(args.q_nope), lay_sub, (64, 64))
        tma_qpe, mQpe = None, None
        if const_expr(self.dims.kpe > 0):
            tma_qpe, mQpe = cpasync.make_tiled_tma_atom(op, self.rows.q_view(args.q_pe), lay_sub, (64, 64))
        return Params(
            **self._mmas(),
            tma_q=tma_q,
            mQ=mQ,
            tma_qpe=tma_qpe,
            mQpe=mQpe,
            **self._cache(args, atom),
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
            scale_log2=args.nope_scale_log2,
            out_scale=args.out_scale if self.converted else None,
            ckv_scale_at=args.ckv_scale_at,
            q_scale_at=args.q_scale_at,
            lse_scale=args.lse_scale,
            sink_at=args.sink_at,
            lay_q=layout(TILE_M, ckv_dim),
            lay_q_sub=layout(64, 64, num_subs),
            lay_k=lay_k,
            lay_k_sub=layout(64, 64, num_subs * stages),
            lay_vt=lay_vt,
            lay_p=lay_sub if stages == 2 else layout(64, 64, stages // 2),
            lay_r=layout(64, 64, stages),
        )

    def _mmas(self) -> dict[str, cute.TiledMma]:
        K, MN = OperandMajorMode.K, OperandMajorMode.MN
        RS, SS = warpgroup.OperandSource.RMEM, warpgroup.OperandSource.SMEM

        def mma(b_major, n, a_source):
            shape = (TILE_M, n)
            return sm90.make_trivial_tiled_mma(self.dtype, self.dtype, K, b_major, Float32, (1, 1, 1), shape, a_source)

        return {
            "mma_qk": mma(K, TILE_N, SS),
            "mma_qk_rs": mma(K, TILE_N, RS),
            "mma_pv": mma(MN, self.dims.ckv // 2, SS),
            "mma_pv_rs": mma(MN, self.dims.ckv // 2, RS),
        }

    def _cache(self, args: StepArgs, atom) -> dict[str, Any]:
        """What the loaders read of the caches."""
        tma_ckv, mCkv, tma_kpe, mKpe = None, args.ckv, None, args.kpe
        if const_expr(self.by_tma):
            op = cpasync.CopyBulkTensorTileG2SOp()
            box = (self.box_rows, 64)
            lay_box = cute.tile_to_shape(atom, box, order=(0, 1))
            ckv_view = cute.make_tensor(args.ckv.iterator, cute.select(args.ckv.layout, mode=[1, 2, 0]))
            tma_ckv, mCkv = cpasync.make_tiled_tma_atom(op, ckv_view, lay_box, box)
            if const_expr(self.dims.kpe > 0):
                kpe_view = cute.make_tensor(args.kpe.iterator, cute.select(args.kpe.layout, mode=[1, 2, 0]))
                tma_kpe, mKpe = cpasync.make_tiled_tma_atom(op, kpe_view, lay_box, box)
        ckv_unit, kpe_unit = (paged.row_unit(x.stride[0], x.stride[1]) for x in (args.ckv, args.kpe))
        element_bytes = self.dtype.width // 8
        return {
            "tma_ckv": tma_ckv,
            "mCkv": mCkv,
            "tma_kpe": tma_kpe,
            "mKpe": mKpe,
            "ckv_unit": ckv_unit * element_bytes,
            "ckv_page_units": Int32(args.ckv.stride[0] // ckv_unit),
            "ckv_row_units": Int32(args.ckv.stride[1] // ckv_unit),
            "kpe_unit": kpe_unit * element_bytes,
            "kpe_page_units": Int32(args.kpe.stride[0] // kpe_unit),
            "kpe_row_units": Int32(args.kpe.stride[1] // kpe_unit),
        }

    # ---------------------------------------------------------------- device

    def _storage(self):
        dt, num_subs, stages = self.dtype, self.num_subs, self.num_stages
        places = stages // 2

        @cute.struct
        class Storage:
            mbar: cute.struct.MemRange[Int64, self.mbars.total]
            sMax: cute.struct.MemRange[Float32, 2 * TILE_M]
            sSum: cute.struct.MemRange[Float32, TILE_M]
            sRaise: cute.struct.MemRange[Int32, 2]
            sL: cute.struct.MemRange[Float32, 2 * TILE_M]
            sItem: cute.struct.MemRange[Int32, ITEM_SLOTS * ITEM_WORDS]
            if self.loader.sparse:
                sChosen: cute.struct.Align[cute.struct.MemRange[Int32, 4 * stages], 16]
            sP0: cute.struct.Align[cute.struct.MemRange[dt, places * SUB_ELEMS], 1024]
            sQ: cute.struct.Align[cute.struct.MemRange[dt, num_subs * SUB_ELEMS], 1024]
            sP1: cute.struct.Align[cute.struct.MemRange[dt, places * SUB_ELEMS], 1024]
            sK: cute.struct.Align[cute.struct.MemRange[dt, stages * num_subs * SUB_ELEMS], 1024]
            if self.dims.kpe > 0:
                sR: cute.struct.Align[cute.struct.MemRange[dt, stages * SUB_ELEMS], 1024]

        return Storage

    def _smem(self, params: Params) -> Smem:
        st = memory.SmemAllocator().allocate(self._storage())

        def view(field, layout):
            return field.get_tensor(layout.outer, swizzle=layout.inner)

        sP1 = view(st.sP1, params.lay_p)
        return Smem(
            mbar=st.mbar.data_ptr(),
            sQ=view(st.sQ, params.lay_q),
            sQ_sub=view(st.sQ, params.lay_q_sub),
            sQr=of_place(sP1, 0, rank=2),
            sP0=view(st.sP0, params.lay_p),
            sP1=sP1,
            sK=view(st.sK, params.lay_k),
            sK_sub=view(st.sK, params.lay_k_sub),
            sVt=view(st.sK, params.lay_vt),
            sR=view(st.sR, params.lay_r) if const_expr(self.dims.kpe > 0) else None,
            sMax=st.sMax.get_tensor(cute.make_layout((2, TILE_M), stride=(TILE_M, 1))),
            sSum=st.sSum.get_tensor(cute.make_layout(TILE_M)),
            sRaise=st.sRaise.get_tensor(cute.make_layout(2)),
            sL=st.sL.get_tensor(cute.make_layout(2 * TILE_M)),
            sItem=st.sItem.get_tensor(cute.make_layout((ITEM_SLOTS, ITEM_WORDS), stride=(ITEM_WORDS, 1))),
            sChosen=st.sChosen.get_tensor(cute.make_layout((4, self.num_stages))) if self.loader.sparse else None,
            k_words=cute.make_tensor(
                cute.recast_ptr(st.sK.data_ptr(), dtype=Int64),
                cute.make_layout(self.num_stages * self.num_subs * SUB_ELEMS // 4),
            ),
        )

    @cute.kernel
    def kernel(self, params: Params):
        tidx, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        wg = cute.arch.make_warp_uniform(tidx // WARPGROUP)
        smem = self._smem(params)

        if warp_idx == 0:
            for tma in (params.tma_q, params.tma_qpe, params.tma_ckv, params.tma_kpe):
                if const_expr(tma is not None):
                    cpasync.prefetch_descriptor(tma)
            with cute.arch.elect_one():
                self.mbars.init(smem.mbar)
                for i in range(2):
                    smem.sRaise[i] = Int32(0)
        cute.arch.mbarrier_init_fence()
        part = cta // params.num_tiles
        head0 = (cta - part * params.num_tiles) * TILE_M
        if const_expr(self.use_pdl):
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()
        item = cute.make_rmem_tensor(ITEM_WORDS, Int32)
        if const_expr(self.rows.header_is_item):
            # The first item is on its way while the barriers are set up.
            if wg == 2:
                load_item(params.mTable, part, item)
        cute.arch.sync_threads()

        if wg == 2:
            cute.arch.setmaxregister_decrease(self.regs_producer)
            self._produce_items(params, smem, item, part, head0, warp_idx - 8, cute.arch.lane_idx())
        else:
            cute.arch.setmaxregister_increase(self.regs_consumer)
            if wg == 0:
                self._consume(params, smem, part, head0, tidx % WARPGROUP, 0)
            else:
                self._consume(params, smem, part, head0, tidx % WARPGROUP, 1)


def decode(key: DecodeKey, config: LaunchConfig) -> Step:
    main = Tile64(key.dtype, key.box_rows, HeadRows(), config, key.dims, key.sparse)
    return Step(main, key.dtype, False, config, key.sparse)


def prefill(key: PrefillKey, config: LaunchConfig) -> Step:
    main = Tile64(key.dtype, key.box_rows, PackedRows(), config, key.dims, converted=key.converted)
    return Step(main, key.dtype, True, config, converted=key.converted)
