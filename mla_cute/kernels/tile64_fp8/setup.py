"""Row-tile MLA over an FP8 cache for Hopper: 64 query rows against pairs of 64-token KV tiles.

    S = Q K^T on e4m3 wgmma (rows x tokens)          O^T [512 x 64] += V^T P^T on float16 wgmma

K is multiplied as it is stored. A 16-bit Q becomes high + low e4m3 parts under a scale per row (8 significant bits; one
part alone costs 4e-2 of the output's norm on normal data), an e4m3 Q is taken as it is. fp8 wgmma takes no MN-major
operand, which V is in P V; so the product is transposed and V^T comes from registers: a transposing ldmatrix, a byte
permute and exact conversions to float16. P stays float16: as e4m3 it costs 1.3e-2, more than all the rest.

One CTA of three warpgroups per SM, persistent over the planner's work items. KV tiles go in pairs, one per consumer;
each consumer owns half of the channels of O^T.

    role        warps  regs     does, per pair of tiles
    wg 0, 1     0-7    240      S = Q K^T of its own tile, P to shared memory, Q K^T of its next tile started,
                                O^T[its 256 channels] += V^T P^T of both tiles
    producer    8-11   24       K tiles through a ring of `num_stages` slots

    mbarrier         count            filled by / waited for by
    full[slot]       4 (+32 / 128)    producer warps (+ the lanes that copy scales / gather: all lanes); both consumers
    empty[slot]      8 warps          a consumer when the last of its V fragments is in registers; producer

    named barrier    arrive -> wait
    P                both consumers: P of both tiles is in shared memory, and who asks for `_move` has said so
    P_FREE0, 1       wg 1 (0) has drained its P V of a pair -> wg 0 (1), before it writes its next P
    MAX              inside `_move`: the row maxima of both tiles are published
    Q, EPI           both consumers: Q is in shared memory; the item's record, row sums and addresses are
    FILL0, 1         inside one consumer

P is relative to a reference per row that holds for the item: both consumers together move it in an item's first pair
and when a P leaves float16's range (`_move`); so a pair exchanges no row maxima. Channel scales per token enter S as
column factors and P V through P (format "token") or through V's fragments (format "group"), counted in a unit that
follows the largest scale so that float16 holds them.

Shared memory: Q 64 (e4m3: 32) KiB + its rope 8 or less, P 16, three (e4m3 Q: four) tiles of 36 to 41 KiB.
"""

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float8E4M3FN, Float16, Float32, Int32, Int64, Uint8, Uint32, const_expr, memory
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup

from ...dims import CKV_DIM, KPE_DIM, TILE_M
from ..keys import Fp8Key, LaunchConfig
from ..lib.dtypes import CUTLASS_DTYPES
from ..lib.paged import TILE_N
from ..lib.ring import MB_EMPTY, MB_FULL, RingProducer, smem_layout
from ..lib.row_map import HeadRows, PackedRows
from ..step import Step, StepArgs
from .params import MB_TOTAL, Params, Smem
from .schedule import Fp8Consumer

NUM_THREADS = 384


class Tile64Fp8(RingProducer, Fp8Consumer):
    """Main kernel of decode (HeadRows) and prefill (PackedRows) over FP8 caches. See the module docstring."""

    def __init__(self, key: Fp8Key, rows: HeadRows | PackedRows, config: LaunchConfig):
        kv_format, q_fp8 = key.kv_format, key.q_fp8
        self.dtype = CUTLASS_DTYPES[key.dtype]
        self.rows = rows
        self.q_fp8 = q_fp8
        self._set_cache(key.box_rows, config.evict_first, kv_format)
        self.rope_dtype = Float8E4M3FN if self.rope_fp8 else self.dtype
        self.q_terms = 1 if q_fp8 else 2
        self.rope_terms = self.q_terms if self.rope_fp8 else 1
        # Q K^T is added up in float32 after each of that many parts of its depth.
        self.score_chunks = 4 if kv_format == "group" or config.accuracy == "high" else 1
        self.num_stages = 4 if q_fp8 else 3
        # The next pair's Q K^T is issued before this pair's P V; with three slots its tile may be waiting for them.
        self.ahead = self.num_stages >= 4
        self.use_pdl = config.use_pdl
        self.regs_consumer, self.regs_producer = 240, 24

    # ------------------------------------------------------------------ host

    def launch(self, args: StepArgs) -> None:
        K = OperandMajorMode.K
        RS, SS = warpgroup.OperandSource.RMEM, warpgroup.OperandSource.SMEM
        Kind = warpgroup.SmemLayoutAtomKind
        num_tiles = self.rows.num_tiles(args.num_heads)

        def mma(dtype, a_source):
            return sm90.make_trivial_tiled_mma(dtype, dtype, K, K, Float32, (1, 1, 1), (64, 64), a_source)

        rope_kind = Kind.K_SW64 if self.rope_fp8 else Kind.K_SW128
        params = Params(
            **self._cache_params(args.ckv, args.kpe),
            mma_nope=mma(Float8E4M3FN, SS),
            mma_rope=mma(self.rope_dtype, SS),
            mma_pv=mma(Float16, RS),
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
            lay_q=smem_layout(Kind.K_SW128, Float8E4M3FN, (TILE_M, CKV_DIM, self.q_terms)),
            lay_qr=smem_layout(rope_kind, self.rope_dtype, (TILE_M, KPE_DIM, self.rope_terms)),
            lay_k=smem_layout(Kind.K_SW128, Float8E4M3FN, (TILE_N, CKV_DIM, self.num_stages)),
            lay_r=smem_layout(rope_kind, self.rope_dtype, (TILE_N, KPE_DIM, self.num_stages)),
            lay_p=smem_layout(Kind.K_SW128, Float16, (TILE_M, TILE_N, 2)),
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
        rope_bytes = TILE_M * KPE_DIM * self.rope_dtype.width // 8

        @cute.struct
        class Storage:
            mbar: cute.struct.MemRange[Int64, MB_TOTAL]
            sMax: cute.struct.MemRange[Float32, 2 * TILE_M]
            sMove: cute.struct.MemRange[Float32, TILE_M]
            sL: cute.struct.MemRange[Float32, 2 * TILE_M]
            sQScale: cute.struct.MemRange[Float32, 2 * TILE_M]
            sAddress: cute.struct.MemRange[Int64, TILE_M]
            sProduce: cute.struct.MemRange[Int32, 32]
            sLoop: cute.struct.MemRange[Int32, 4]
            sLeaves: cute.struct.MemRange[Uint32, 2]
            sItem: cute.struct.Align[cute.struct.MemRange[Int32, 32], 16]
            sScales: cute.struct.Align[
                cute.struct.MemRange[Float32, max(1, self.num_scales) * TILE_N * self.num_stages], 16
            ]
            sP: cute.struct.Align[cute.struct.MemRange[Float16, 2 * TILE_M * TILE_N], 1024]
            sQ: cute.struct.Align[cute.struct.MemRange[Uint8, self.q_terms * TILE_M * CKV_DIM], 1024]
            sQr: cute.struct.Align[cute.struct.MemRange[Uint8, self.rope_terms * rope_bytes], 1024]
            sK: cute.struct.Align[cute.struct.MemRange[Uint8, self.num_stages * TILE_N * CKV_DIM], 1024]
            sR: cute.struct.Align[cute.struct.MemRange[Uint8, self.num_stages * rope_bytes], 1024]

        return Storage

    def _smem(self, p: Params):
        st = memory.SmemAllocator().allocate(self._storage())

        def view(field, layout, dtype):
            return field.get_tensor(layout.outer, swizzle=layout.inner, dtype=dtype)

        def plain(field, *shape):
            """Column-major."""
            return field.get_tensor(cute.make_layout(shape))

        sR = view(st.sR, p.lay_r, self.rope_dtype)
        return Smem(
            mbar=st.mbar.data_ptr(),
            sQ=view(st.sQ, p.lay_q, Float8E4M3FN),
            sQr=view(st.sQr, p.lay_qr, self.rope_dtype),
            sP=view(st.sP, p.lay_p, Float16),
            sK=view(st.sK, p.lay_k, Float8E4M3FN),
            sK_sub=view(st.sK, p.lay_sub, Uint8),
            sR=sR,
            sR_tma=view(st.sR, p.lay_r, Uint8) if const_expr(self.rope_fp8) else sR,
            sScales=st.sScales.get_tensor(cute.make_layout((TILE_N, max(1, self.num_scales), self.num_stages))),
            sMax=st.sMax.get_tensor(cute.make_layout((2, TILE_M), stride=(TILE_M, 1))),
            sMove=plain(st.sMove, TILE_M),
            sL=st.sL.get_tensor(cute.make_layout((2, TILE_M), stride=(TILE_M, 1))),
            sQScale=st.sQScale.get_tensor(cute.make_layout((2, TILE_M), stride=(TILE_M, 1))),
            sAddress=plain(st.sAddress, TILE_M),
            scratch=cute.make_tensor(
                cute.recast_ptr(st.sP.data_ptr(), dtype=Float32), cute.make_layout((TILE_M, 4, 2))
            ),
            sItem=st.sItem.get_tensor(cute.make_layout((4, 8), stride=(8, 1))),
            sProduce=plain(st.sProduce, 8, 4),
            sLoop=plain(st.sLoop, 4),
            sLeaves=plain(st.sLeaves, 2),
            # Raw words of K for zeroing tails: whole 128-byte rows, which the swizzle permutes within themselves.
            k_words=cute.make_tensor(
                cute.recast_ptr(st.sK.data_ptr(), dtype=Int64),
                cute.make_layout(self.num_stages * TILE_N * CKV_DIM // 8),
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
            if const_expr(self.by_tma):
                cpasync.prefetch_descriptor(p.tma_ckv)
                cpasync.prefetch_descriptor(p.tma_kpe)
            with cute.arch.elect_one():
                for i in cutlass.range_constexpr(self.num_stages):
                    cute.arch.mbarrier_init(s.mbar + MB_FULL + i, self.loader.full_arrivals)
                    cute.arch.mbarrier_init(s.mbar + MB_EMPTY + i, 8)
                for i in cutlass.range_constexpr(2):
                    s.sLeaves[i] = Uint32(0)
        cute.arch.mbarrier_init_fence()
        part = cta // p.num_tiles
        head0 = (cta - part * p.num_tiles) * TILE_M
        if const_expr(self.use_pdl):
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()
        cute.arch.sync_threads()

        if wg == 2:
            cute.arch.setmaxregister_decrease(self.regs_producer)
            self._produce(p, s, part, warp_idx - 8, cute.arch.lane_idx())
        else:
            cute.arch.setmaxregister_increase(self.regs_consumer)
            if wg == 0:
                self._consume(p, s, part, head0, tidx % 128, 0)
            else:
                self._consume(p, s, part, head0, tidx % 128, 1)


def decode(key: Fp8Key, config: LaunchConfig) -> Step:
    return Step(Tile64Fp8(key, HeadRows(), config), key.dtype, False, config)


def prefill(key: Fp8Key, config: LaunchConfig) -> Step:
    return Step(Tile64Fp8(key, PackedRows(), config), key.dtype, True, config)
