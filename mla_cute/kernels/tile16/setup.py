"""tile16: MLA for Hopper: 16 query rows (heads of one token) on mma.sync, nothing padded.

    S = Q K^T, O += P V on m16n8k16, 16-bit inputs, float32 accumulators

wgmma would pad 16 heads to its 64 rows. Over an FP8 cache that takes longer than the loads: e4m3 is converted to
float16 exactly, in registers; Q (under a power of two per row) and P are float16, so nothing is lost beyond the cache's
own rounding (tiles_fp8.py). Over a 16-bit cache it is a matter of latency: a tile is half of a pair, there is less
code, and no copy of P waits for another warpgroup (tiles_16bit.py).

More heads are tiles of 16, a CTA each, which find the keys in L2: for steps so small that time is latency.

One CTA per SM, persistent over the planner's work items: 8 consumer warps and the producer warps of lib/ring.py.

    warp w      QK: S[16 rows, tokens 8 w .. 8 w + 7] over all 576 channels; Q in registers for the whole item.
                K by ldmatrix (FP8: a thread gets 4 channels of a token, in whose order Q was loaded)
                PV: O[16 rows, channels 64 w .. 64 w + 63]; V by transposing ldmatrix (FP8: and a byte permute)
    P           goes to the other warps through shared memory, in the order of mma's A fragments

    per tile i  softmax(i), QK(i + 1), PV(i): the exchange of P hides behind QK

    mbarrier         count            filled by / waited for by
    full, empty      as in tile64_fp8/setup.py; empty by a warp after its PV
    p[parity]        8 warps          a warp's P of tile i is in shared memory; every warp before PV(i)

Row maxima are not exchanged: P is made relative to the references that hold so far, and only when some P (or scale) of
a tile leaves its range, and in the first tile of an item, all warps together move references and unit (`_move`).
Registers: 240 / 24 (gather 232 / 40). Shared memory: five (format "group": four) tiles of 36 to 41 KiB, or three
of 72 KiB.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8, const_expr, memory
from cutlass.cute.nvgpu import cpasync, warpgroup

from ...dims import CKV_DIM, KPE_DIM, TILE16_M
from ..keys import DecodeKey, Fp8Key, LaunchConfig
from ..lib.dtypes import CUTLASS_DTYPES
from ..lib.paged import TILE_N
from ..lib.ring import MB_EMPTY, MB_FULL, RingProducer, smem_layout
from ..lib.row_map import HeadRows
from ..step import Step, StepArgs
from .params import MB_P, MB_TOTAL, NUM_WARPS, P_WORDS, Params, Smem
from .schedule import Tile16Consumer
from .tiles_16bit import SixteenBitTiles
from .tiles_fp8 import Fp8Tiles

NUM_THREADS = 384


class _Tile16(RingProducer, Tile16Consumer):
    in_pairs = False

    def __init__(self, dtype: str, box_rows: int, kv_format: str, q_fp8: bool, config: LaunchConfig):
        self.dtype = CUTLASS_DTYPES[dtype]
        self.rows = HeadRows()
        self.q_fp8 = q_fp8
        self._set_cache(box_rows, config.evict_first, kv_format)
        self._set_tiles()
        self.use_pdl = config.use_pdl
        self.regs_consumer, self.regs_producer = (240, 24) if box_rows else (232, 40)

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
            num_heads=args.num_heads,
            num_tiles=num_tiles,
            nope_scale_log2=args.nope_scale_log2,
            rope_scale_log2=args.rope_scale_log2,
            out_scale=args.out_scale,
            ckv_scale_at=args.ckv_scale_at,
            kpe_scale_at=args.kpe_scale_at,
            q_scale_at=args.q_scale_at,
            lse_scale=args.lse_scale,
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

    def _smem(self, p):
        rope_dtype = Uint8 if self.rope_fp8 else self.dtype
        scales = max(1, self.num_scales)
        num_scales = scales * TILE_N * self.num_stages if self.kv_format else 4
        # Three 16-bit tiles leave 11 KiB for the rest.
        num_row_scales, num_big = (32, NUM_WARPS) if self.kv_format else (2, 1)
        kept = self.q_kept_bytes
        transient = max(self.q_transient_bytes, 2 * self.p_tiles * P_WORDS * 4)

        @cute.struct
        class Storage:
            mbar: cute.struct.MemRange[Int64, MB_TOTAL]
            sProduce: cute.struct.MemRange[Int32, 32]
            sLoop: cute.struct.MemRange[Int32, 5 * NUM_WARPS]
            sRow: cute.struct.MemRange[Float32, num_row_scales]
            sFlags: cute.struct.MemRange[Int32, 2 * NUM_WARPS]
            sMax: cute.struct.MemRange[Float32, 16 * NUM_WARPS]
            sBig: cute.struct.MemRange[Float32, num_big]
            sScales: cute.struct.Align[cute.struct.MemRange[Float32, num_scales], 16]
            sQP: cute.struct.Align[cute.struct.MemRange[Uint8, kept + transient], 16]
            sK: cute.struct.Align[cute.struct.MemRange[self.kv_dtype, self.num_stages * TILE_N * CKV_DIM], 1024]
            sR: cute.struct.Align[cute.struct.MemRange[rope_dtype, self.num_stages * TILE_N * KPE_DIM], 1024]

        st = memory.SmemAllocator().allocate(Storage)
        return Smem(
            mbar=st.mbar.data_ptr(),
            sK_sub=st.sK.get_tensor(p.lay_sub.outer, swizzle=p.lay_sub.inner),
            sR_tma=st.sR.get_tensor(p.lay_r.outer, swizzle=p.lay_r.inner),
            sScales=st.sScales.get_tensor(cute.make_layout((TILE_N, scales, self.num_stages)))
            if self.kv_format
            else None,
            k_address=Int32(st.sK.data_ptr().toint()),
            r_address=Int32(st.sR.data_ptr().toint()),
            q_address=Int32(st.sQP.data_ptr().toint()),
            p_address=Int32(st.sQP.data_ptr().toint()) + kept,
            scale_address=Int32(st.sScales.data_ptr().toint()),
            sProduce=st.sProduce.get_tensor(cute.make_layout((8, 4))),
            sLoop=st.sLoop.get_tensor(cute.make_layout((5, NUM_WARPS))),
            sRow=st.sRow.get_tensor(cute.make_layout((num_row_scales // 2, 2))),
            sFlags=st.sFlags.get_tensor(cute.make_layout((NUM_WARPS, 2))),
            sMax=st.sMax.get_tensor(cute.make_layout((16, NUM_WARPS), stride=(NUM_WARPS, 1))),
            sBig=st.sBig.get_tensor(cute.make_layout(num_big)),
        )

    @cute.kernel
    def kernel(self, p: Params):
        cta, _, _ = cute.arch.block_idx()
        part = cta // p.num_tiles
        warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        s = self._smem(p)
        if warp_idx == 0:
            if const_expr(self.by_tma):
                cpasync.prefetch_descriptor(p.tma_ckv)
                cpasync.prefetch_descriptor(p.tma_kpe)
            with cute.arch.elect_one():
                for i in cutlass.range_constexpr(self.num_stages):
                    cute.arch.mbarrier_init(s.mbar + MB_FULL + i, self.loader.full_arrivals)
                    cute.arch.mbarrier_init(s.mbar + MB_EMPTY + i, NUM_WARPS)
                for i in cutlass.range_constexpr(2):
                    cute.arch.mbarrier_init(s.mbar + MB_P + i, NUM_WARPS)
        cute.arch.mbarrier_init_fence()
        if const_expr(self.use_pdl):
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()
        cute.arch.sync_threads()
        if warp_idx >= NUM_WARPS:
            cute.arch.setmaxregister_decrease(self.regs_producer)
            self._produce(p, s, part, warp_idx - NUM_WARPS, cute.arch.lane_idx())
        else:
            cute.arch.setmaxregister_increase(self.regs_consumer)
            self._consume(p, s, part, (cta - part * p.num_tiles) * TILE16_M, warp_idx, cute.arch.lane_idx())


class Tile16Fp8(_Tile16, Fp8Tiles):
    """Main kernel of decode over FP8 caches, for few heads or few keys. See the module docstring."""


class Tile16(_Tile16, SixteenBitTiles):
    """The same over 16-bit caches."""


def decode(key: DecodeKey, config: LaunchConfig) -> Step:
    return Step(Tile16(key.dtype, key.box_rows, "", False, config), key.dtype, False, config)


def decode_fp8(key: Fp8Key, config: LaunchConfig) -> Step:
    main = Tile16Fp8(key.dtype, key.box_rows, key.kv_format, key.q_fp8, config)
    return Step(main, key.dtype, False, config)
