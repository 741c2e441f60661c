"""Row-tile MLA over an FP8 cache for Hopper: launch, shared memory, roles. schedule.py says what the kernel does."""

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float8E4M3FN, Float16, Float32, Int32, Int64, Uint8, Uint32, const_expr, memory
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup

from ...dims import KPE_DIM, TILE32_M, TILE_M
from ..keys import Fp8Key, LaunchConfig
from ..lib.paged import TILE_N
from ..lib.ring import smem_layout
from ..lib.row_map import HeadRows, PackedRows
from ..step import Step, StepArgs
from .params import ITEM_SLOTS, NUM_CONSUMERS, WARPGROUP, Params, Smem
from .schedule import Consumer

NUM_THREADS = NUM_CONSUMERS + WARPGROUP
FIRST_PRODUCER_WARP = NUM_CONSUMERS // 32


class Tile64Fp8(Consumer):
    """Main kernel of decode (HeadRows) and prefill (PackedRows) over FP8 caches."""

    # ------------------------------------------------------------------ host

    def launch(self, args: StepArgs) -> None:
        """Launch the kernel: a CTA for each part and row tile."""
        K = OperandMajorMode.K
        RS, SS = warpgroup.OperandSource.RMEM, warpgroup.OperandSource.SMEM
        Kind = warpgroup.SmemLayoutAtomKind
        num_tiles = self.rows.num_tiles(args.num_heads)

        def mma(dtype, a_source, n=64):
            return sm90.make_trivial_tiled_mma(dtype, dtype, K, K, Float32, (1, 1, 1), (64, n), a_source)

        rope_kind = Kind.K_SW64 if self.rope_fp8 else Kind.K_SW128
        params = Params(
            **self._cache_params(args.ckv, args.kpe),
            mma_nope=mma(Float8E4M3FN, SS),
            mma_rope=mma(self.rope_dtype, SS),
            mma_pv=mma(Float16, RS, self.tile_rows),
            mma_p=mma(Float16, SS),
            mQ=args.q_nope,
            mQpe=args.q_pe,
            mScales=args.scales,
            mIndices=args.kv_indices,
            mTable=args.table,
            mO=args.out,
            mLse=args.lse,
            mPart=args.part,
            num_heads=args.num_heads,
            num_tiles=num_tiles,
            num_parts=args.num_parts,
            item_row0=args.item_row0,
            nope_scale_log2=args.nope_scale_log2,
            rope_scale_log2=args.rope_scale_log2,
            out_scale=args.out_scale,
            ckv_scale_at=args.ckv_scale_at,
            kpe_scale_at=args.kpe_scale_at,
            q_scale_at=args.q_scale_at,
            lse_scale=args.lse_scale,
            sink_at=args.sink_at,
            lay_q=smem_layout(Kind.K_SW128, Float8E4M3FN, (TILE_M, self.dims.ckv, self.q_terms)),
            lay_qr=smem_layout(rope_kind, self.rope_dtype, (TILE_M, KPE_DIM, self.rope_terms)),
            lay_k=smem_layout(Kind.K_SW128, Float8E4M3FN, (TILE_N, self.dims.ckv, self.num_stages)),
            lay_r=smem_layout(rope_kind, self.rope_dtype, (TILE_N, KPE_DIM, self.num_stages)),
            lay_p=smem_layout(Kind.K_SW128, Float16, (self.tile_rows, TILE_N, 2)),
        )
        self.kernel(params).launch(
            grid=[args.num_parts * num_tiles, 1, 1],
            block=[NUM_THREADS, 1, 1],
            stream=args.stream,
            min_blocks_per_mp=1,
            use_pdl=self.use_pdl,
        )

    # ---------------------------------------------------------------- device

    def _storage(self) -> type:
        rope_bytes = TILE_M * KPE_DIM * self.rope_dtype.width // 8

        @cute.struct
        class Storage:
            mbar: cute.struct.MemRange[Int64, self.mbars.total]
            sMax: cute.struct.MemRange[Float32, 2 * TILE_M]
            sFactor: cute.struct.MemRange[Float32, TILE_M]
            sL: cute.struct.MemRange[Float32, 2 * TILE_M]
            sQScale: cute.struct.MemRange[Float32, 2 * TILE_M]
            sAddress: cute.struct.MemRange[Int64, TILE_M]
            sProduce: cute.struct.MemRange[Int32, 32]
            sLoop: cute.struct.MemRange[Int32, 4]
            sRaise: cute.struct.MemRange[Uint32, 2]
            sItem: cute.struct.Align[cute.struct.MemRange[Int32, 8 * ITEM_SLOTS], 16]
            if self.loader.sparse:
                sChosen: cute.struct.Align[cute.struct.MemRange[Int32, 4 * self.num_stages], 16]
            sScales: cute.struct.Align[
                cute.struct.MemRange[Float32, max(1, self.num_scales) * TILE_N * self.num_stages], 16
            ]
            if self.kv_format == "group":
                sVScales: cute.struct.Align[cute.struct.MemRange[Uint32, 2 * 4 * TILE_N // 2], 16]
            sP: cute.struct.Align[cute.struct.MemRange[Float16, 2 * self.tile_rows * TILE_N], 1024]
            sQ: cute.struct.Align[cute.struct.MemRange[Uint8, self.q_terms * TILE_M * self.dims.ckv], 1024]
            sQr: cute.struct.Align[cute.struct.MemRange[Uint8, self.rope_terms * rope_bytes], 1024]
            sK: cute.struct.Align[cute.struct.MemRange[Uint8, self.num_stages * TILE_N * self.dims.ckv], 1024]
            sR: cute.struct.Align[cute.struct.MemRange[Uint8, self.num_stages * rope_bytes], 1024]

        return Storage

    def _smem(self, params: Params) -> Smem:
        st = memory.SmemAllocator().allocate(self._storage())

        def view(field, layout, dtype):
            return field.get_tensor(layout.outer, swizzle=layout.inner, dtype=dtype)

        def plain(field, *shape):
            """Without a swizzle, column-major."""
            return field.get_tensor(cute.make_layout(shape))

        sR = view(st.sR, params.lay_r, self.rope_dtype)
        return Smem(
            mbar=st.mbar.data_ptr(),
            sQ=view(st.sQ, params.lay_q, Float8E4M3FN),
            sQr=view(st.sQr, params.lay_qr, self.rope_dtype),
            sP=view(st.sP, params.lay_p, Float16),
            sK=view(st.sK, params.lay_k, Float8E4M3FN),
            sK_sub=view(st.sK, params.lay_sub, Uint8),
            sR=sR,
            sR_tma=view(st.sR, params.lay_r, Uint8) if const_expr(self.rope_fp8) else sR,
            sScales=st.sScales.get_tensor(cute.make_layout((TILE_N, max(1, self.num_scales), self.num_stages))),
            sVScales=plain(st.sVScales, TILE_N // 2, 4, 2) if self.kv_format == "group" else None,
            sMax=st.sMax.get_tensor(cute.make_layout((2, TILE_M), stride=(TILE_M, 1))),
            sFactor=plain(st.sFactor, TILE_M),
            sL=st.sL.get_tensor(cute.make_layout((2, TILE_M), stride=(TILE_M, 1))),
            sQScale=st.sQScale.get_tensor(cute.make_layout((2, TILE_M), stride=(TILE_M, 1))),
            sAddress=plain(st.sAddress, TILE_M),
            scratch=cute.make_tensor(
                cute.recast_ptr(st.sP.data_ptr(), dtype=Float32), cute.make_layout((TILE_M, 4, 2))
            ),
            sItem=st.sItem.get_tensor(cute.make_layout((ITEM_SLOTS, 8), stride=(8, 1))),
            sChosen=st.sChosen.get_tensor(cute.make_layout((4, self.num_stages))) if self.loader.sparse else None,
            sProduce=plain(st.sProduce, 8, 4),
            sLoop=plain(st.sLoop, 4),
            sRaise=plain(st.sRaise, 2),
            # Raw words of K for zeroing tails: whole 128-byte rows, which the swizzle permutes within themselves.
            k_words=cute.make_tensor(
                cute.recast_ptr(st.sK.data_ptr(), dtype=Int64),
                cute.make_layout(self.num_stages * TILE_N * self.dims.ckv // 8),
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
            for tma in (params.tma_ckv, params.tma_kpe):
                if const_expr(tma is not None):
                    cpasync.prefetch_descriptor(tma)
            with cute.arch.elect_one():
                self.mbars.init(smem.mbar)
                for i in cutlass.range_constexpr(2):
                    smem.sRaise[i] = Uint32(0)
        cute.arch.mbarrier_init_fence()
        part = cta // params.num_tiles
        head0 = (cta - part * params.num_tiles) * TILE_M
        if const_expr(self.use_pdl):
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()
        cute.arch.sync_threads()

        if wg == 2:
            cute.arch.setmaxregister_decrease(self.regs_producer)
            self._produce(params, smem, part, warp_idx - FIRST_PRODUCER_WARP, cute.arch.lane_idx())
        else:
            cute.arch.setmaxregister_increase(self.regs_consumer)
            self._consume(params, smem, part, head0, tidx % WARPGROUP, wg)


class Tile32Fp8(Tile64Fp8):
    """Tiles of 32 rows, under a name of their own in profiles."""


def decode(key: Fp8Key, config: LaunchConfig) -> Step:
    """A decode step: a row tile is 64 heads of one token."""
    return Step(Tile64Fp8(key, HeadRows(), config), key.dtype, False, config, key.sparse)


def decode_32_rows(key: Fp8Key, config: LaunchConfig) -> Step:
    """The same for up to 32 heads."""
    return Step(Tile32Fp8(key, HeadRows(), config, TILE32_M), key.dtype, False, config, key.sparse)


def prefill(key: Fp8Key, config: LaunchConfig) -> Step:
    """A prefill step: a row tile is 64 (token, head) rows of one request."""
    return Step(Tile64Fp8(key, PackedRows(), config), key.dtype, True, config)


def prefill_32_rows(key: Fp8Key, config: LaunchConfig) -> Step:
    """The same for requests of up to 32 rows."""
    return Step(Tile32Fp8(key, PackedRows(), config, TILE32_M), key.dtype, True, config)
