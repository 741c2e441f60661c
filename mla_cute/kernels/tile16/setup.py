"""The tile16 kernel's launch, shared memory and roles, and what compiles it; schedule.py has the schedule.

Registers: 240 for consumers, 24 for producers (gather 232 and 40). Shared memory: five tiles of 36 to 41 KiB, or
three of 72 KiB; of heads of 256 + 64 six of 20 or five of 40 KiB.
"""

import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8, const_expr, memory
from cutlass.cute.nvgpu import cpasync, warpgroup

from ...dims import KPE_DIM, TILE16_M
from ..keys import DecodeKey, Fp8Key, LaunchConfig
from ..lib.dtypes import CUTLASS_DTYPES
from ..lib.paged import TILE_N
from ..lib.ring import RingMbarriers, RingProducer, smem_layout
from ..lib.row_map import HeadRows
from ..lib.whole_rows import WholeRowLoader, are_whole
from ..step import Step, StepArgs
from .params import LOOP_WORDS, NUM_CONSUMERS, NUM_WARPS, P_WORDS, Params, Smem, make_mbarriers
from .schedule import Consumer
from .tiles import Tiles
from .tiles_16bit import SixteenBitTiles
from .tiles_fp8 import Fp8Tiles
from .tiles_rows import WholeRowTiles

NUM_PRODUCER_WARPS = 4  # of lib/ring.py
NUM_THREADS = NUM_CONSUMERS + 32 * NUM_PRODUCER_WARPS


class Tile16(RingProducer):
    """Main kernel of decode, for few heads or few keys. `RingProducer._set_cache` sets what the ring is told of the
    cache: kv_format, num_scales, rope_fp8, kv_dtype, num_subs, box_rows, by_tma, loader."""

    in_pairs = False  # consumers take single tiles

    dtype: type  # cutlass.BFloat16 or cutlass.Float16, of outputs; as in `Tiles`
    q_fp8: bool
    rows: HeadRows  # which of the plan's items a part has
    num_stages: int  # slots of the ring
    mbars: RingMbarriers
    tiles: Tiles  # how the consumers read this kind of cache
    consumer: Consumer
    use_pdl: bool  # programmatic dependent launch: the kernel starts while the one before it ends
    regs_consumer: int  # registers of a thread
    regs_producer: int

    def __init__(self, tiles: Tiles, box_rows: int, config: LaunchConfig, sparse: bool):
        self.tiles, self.dtype, self.q_fp8, self.num_stages = tiles, tiles.dtype, tiles.q_fp8, tiles.num_stages
        self.dims = tiles.dims
        self.rows = HeadRows()
        self._set_cache(box_rows, config.evict_first, tiles.kv_format, sparse)
        if tiles.whole_rows:
            self.loader = WholeRowLoader(self.loader)
        self.mbars = make_mbarriers(self.num_stages, self.loader.full_arrivals)
        self.consumer = Consumer(tiles, self.rows, self.mbars)
        self.use_pdl = config.use_pdl
        self.regs_consumer, self.regs_producer = 240, 24
        if not box_rows:
            # 512 + 0: 8 bytes spill at 232 and 40, of lists of tokens at 224 and 56.
            self.regs_consumer, self.regs_producer = (224, 56) if self.dims == (512, 0) and not sparse else (232, 40)

    # ------------------------------------------------------------------ host

    def launch(self, args: StepArgs) -> None:
        Kind = warpgroup.SmemLayoutAtomKind

        rope_kind = Kind.K_SW64 if self.rope_fp8 else Kind.K_SW128
        rope_dtype = Uint8 if self.rope_fp8 else self.dtype
        num_tiles = cute.ceil_div(args.num_heads, TILE16_M)
        params = Params(
            **self._cache_params(args.ckv, args.kpe),
            mQ=args.q_nope,
            mQpe=args.q_pe,
            mScales=args.scales,
            mIndices=args.kv_indices,
            mTable=args.table,
            mO=args.out,
            mLse=args.lse,
            mPart=args.part,
            whole=are_whole(args.ckv, args.kpe, args.scales) if const_expr(self.tiles.whole_rows) else None,
            num_heads=args.num_heads,
            num_tiles=num_tiles,
            nope_scale_log2=args.nope_scale_log2,
            rope_scale_log2=args.rope_scale_log2,
            out_scale=args.out_scale,
            ckv_scale_at=args.ckv_scale_at,
            kpe_scale_at=args.kpe_scale_at,
            q_scale_at=args.q_scale_at,
            lse_scale=args.lse_scale,
            sink_at=args.sink_at,
            lay_r=smem_layout(rope_kind, rope_dtype, (TILE_N, KPE_DIM, self.num_stages)),
        )
        self.kernel(params).launch(
            grid=[args.num_parts * num_tiles, 1, 1],
            block=[NUM_THREADS, 1, 1],
            stream=args.stream,
            min_blocks_per_mp=1,
            use_pdl=self.use_pdl,
        )

    # ---------------------------------------------------------------- device

    def _smem(self, params: Params) -> Smem:
        rope_dtype = Uint8 if self.rope_fp8 else self.dtype
        scales = max(1, self.num_scales)
        whole = self.tiles.whole_rows
        has_scales = bool(self.kv_format) and not whole
        num_scales = scales * TILE_N * self.num_stages if has_scales else 4
        num_keys = self.num_stages * self.tiles.tile_bytes * 8 // self.kv_dtype.width
        num_rope = 8 if whole else self.num_stages * TILE_N * KPE_DIM
        align = 16 if whole else 1024  # of a swizzle's pattern
        # Three 16-bit tiles leave 11 KiB for the rest, so what only FP8 caches use is shrunk to a stub there.
        num_row_scales, num_max_scales = (2 * TILE16_M, NUM_WARPS) if self.kv_format else (2, 1)
        kept = self.tiles.q_kept_bytes
        transient = max(self.tiles.q_transient_bytes, 2 * self.tiles.p_tiles * P_WORDS * 4)

        @cute.struct
        class Storage:
            mbar: cute.struct.MemRange[Int64, self.mbars.total]
            sProduce: cute.struct.MemRange[Int32, 8 * NUM_PRODUCER_WARPS]
            sLoop: cute.struct.MemRange[Int32, LOOP_WORDS * NUM_WARPS]
            sRow: cute.struct.MemRange[Float32, num_row_scales]
            sFlags: cute.struct.MemRange[Int32, 2 * NUM_WARPS]
            sMax: cute.struct.MemRange[Float32, TILE16_M * NUM_WARPS]
            sMaxScale: cute.struct.MemRange[Float32, num_max_scales]
            if self.tiles.sparse:
                sChosen: cute.struct.MemRange[Int32, NUM_PRODUCER_WARPS * self.num_stages]
            sScales: cute.struct.Align[cute.struct.MemRange[Float32, num_scales], 16]
            sQP: cute.struct.Align[cute.struct.MemRange[Uint8, kept + transient], 16]
            sK: cute.struct.Align[cute.struct.MemRange[self.kv_dtype, num_keys], align]
            sR: cute.struct.Align[cute.struct.MemRange[rope_dtype, num_rope], align]

        st = memory.SmemAllocator().allocate(Storage)
        return Smem(
            mbar=st.mbar.data_ptr(),
            sK_sub=None if whole else st.sK.get_tensor(params.lay_sub.outer, swizzle=params.lay_sub.inner),
            sR_tma=None if whole else st.sR.get_tensor(params.lay_r.outer, swizzle=params.lay_r.inner),
            sScales=st.sScales.get_tensor(cute.make_layout((TILE_N, scales, self.num_stages))) if has_scales else None,
            k_address=Int32(st.sK.data_ptr().toint()),
            r_address=Int32(st.sR.data_ptr().toint()),
            q_address=Int32(st.sQP.data_ptr().toint()),
            p_address=Int32(st.sQP.data_ptr().toint()) + kept,
            scale_address=Int32(st.sScales.data_ptr().toint()),
            sProduce=st.sProduce.get_tensor(cute.make_layout((8, NUM_PRODUCER_WARPS))),
            sLoop=st.sLoop.get_tensor(cute.make_layout((LOOP_WORDS, NUM_WARPS))),
            sRow=st.sRow.get_tensor(cute.make_layout((num_row_scales // 2, 2))),
            sFlags=st.sFlags.get_tensor(cute.make_layout((NUM_WARPS, 2))),
            sMax=st.sMax.get_tensor(cute.make_layout((TILE16_M, NUM_WARPS), stride=(NUM_WARPS, 1))),
            sMaxScale=st.sMaxScale.get_tensor(cute.make_layout(num_max_scales)),
            sChosen=st.sChosen.get_tensor(cute.make_layout((NUM_PRODUCER_WARPS, self.num_stages)))
            if self.tiles.sparse
            else None,
        )

    @cute.kernel
    def kernel(self, params: Params):
        cta, _, _ = cute.arch.block_idx()
        # A part's CTAs, one per row tile, follow each other.
        part = cta // params.num_tiles
        warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        smem = self._smem(params)
        if warp_idx == 0:
            for tma in (params.tma_ckv, params.tma_kpe):
                if const_expr(tma is not None):
                    cpasync.prefetch_descriptor(tma)
            with cute.arch.elect_one():
                self.mbars.init(smem.mbar, self.loader.arrivals(params) if const_expr(self.tiles.whole_rows) else None)
        cute.arch.mbarrier_init_fence()
        if const_expr(self.use_pdl):
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()
        cute.arch.sync_threads()
        if warp_idx >= NUM_WARPS:
            cute.arch.setmaxregister_decrease(self.regs_producer)
            self._produce(params, smem, part, warp_idx - NUM_WARPS, cute.arch.lane_idx())
        else:
            cute.arch.setmaxregister_increase(self.regs_consumer)
            head0 = (cta - part * params.num_tiles) * TILE16_M
            self.consumer.consume(params, smem, part, head0, warp_idx, cute.arch.lane_idx())


class Tile16Fp8(Tile16):
    """The same over FP8 caches, under a name of its own in profiles."""


def decode(key: DecodeKey, config: LaunchConfig) -> Step:
    tiles = SixteenBitTiles(CUTLASS_DTYPES[key.dtype], key.dims, key.sparse, by_tma=key.box_rows > 0)
    return Step(Tile16(tiles, key.box_rows, config, key.sparse), key.dtype, False, config, key.sparse)


def decode_fp8(key: Fp8Key, config: LaunchConfig) -> Step:
    facts = CUTLASS_DTYPES[key.dtype], key.dims, key.sparse, key.kv_format, key.q_fp8
    by_tma = key.box_rows > 0
    tiles = Fp8Tiles(*facts, by_tma) if by_tma or key.kv_format != "group" else WholeRowTiles(*facts)
    return Step(Tile16Fp8(tiles, key.box_rows, config, key.sparse), key.dtype, False, config, key.sparse)
