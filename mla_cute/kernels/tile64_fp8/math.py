"""What a consumer of tile64_fp8 computes of a pair: scores, P, and fragments of V. schedule.py says when."""

import cutlass
import cutlass.cute as cute
from cutlass import Float16, Float32, Int32, Int64, Uint32, const_expr
from cutlass.cute.nvgpu import warp, warpgroup

from ...dims import TILE_M
from ..lib import barriers, e4m3, ptx, softmax, wgmma
from ..lib.paged import SUB_BYTES, TILE_N
from ..lib.ring import scale_place
from .params import FILL, WARPGROUP, Fragments, Params, Smem, Variant


def make_fragments(params: Params, smem: Smem, t: Int32, wg: Int32, blocks: int, tile_rows: int) -> Fragments:
    """Descriptors and registers of consumer thread `t` of its warpgroup. `blocks` and `tile_rows`: Variant's."""
    thr_nope, thr_rope, thr_pv = (m.get_slice(0) for m in (params.mma_nope, params.mma_rope, params.mma_pv))
    acc = thr_nope.partition_shape_C((TILE_M, TILE_N))
    rS, rT = cute.make_rmem_tensor(acc, Float32), cute.make_rmem_tensor(acc, Float32)
    own_rows = tile_rows // 32
    rP = cute.make_rmem_tensor(16 * own_rows, Float16)
    stm, tPr, tPs = None, None, None
    if tile_rows == TILE_M:
        stm = cute.make_tiled_copy_C(cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), Float16), params.mma_p)
        stm = stm.get_slice(t)
        rPc = cute.make_tensor(rP.iterator, rS.layout)
        tPr, tPs = stm.retile(rPc), stm.partition_D(smem.sP[None, None, wg])
    lane = t % 32
    return Fragments(
        t=t,
        lane=lane,
        row=(t // 32) * (8 * own_rows) + lane // 4,
        tSrQ=thr_nope.make_fragment_A(thr_nope.partition_A(smem.sQ)),
        tSrK=thr_nope.make_fragment_B(thr_nope.partition_B(smem.sK)),
        tSrQr=thr_rope.make_fragment_A(thr_rope.partition_A(smem.sQr)),
        tSrR=thr_rope.make_fragment_B(thr_rope.partition_B(smem.sR)),
        tOrP=thr_pv.make_fragment_B(thr_pv.partition_B(smem.sP)),
        rO=tuple(cute.make_rmem_tensor(thr_pv.partition_shape_C((64, tile_rows)), Float32) for _ in range(blocks)),
        rS=rS,
        rT=rT,
        rP=rP,
        rV=tuple(cute.make_rmem_tensor(thr_pv.partition_shape_A((64, TILE_N)), Float16) for _ in range(2)),
        rL=cute.make_rmem_tensor((own_rows,), Float32),
        rRef=cute.make_rmem_tensor((own_rows,), Float32),
        rUnit=cute.make_rmem_tensor((1,), Float32),
        S=wgmma.row_col_view(rS, 8),
        T=wgmma.row_col_view(rT, 8),
        stm=stm,
        tPr=tPr,
        tPs=tPs,
    )


class PairMath(Variant):
    """Methods of Tile64Fp8. `tile` is a tile's number among all that the CTA runs, `slot` where it lies in the ring;
    `valid` are the tokens of the item from the tile's first one on."""

    def _slot(self, tile: Uint32) -> Int32:
        # The slot is made uniform because wgmma descriptors are made of it, in uniform registers then.
        return cute.arch.make_warp_uniform(Int32(tile % self.num_stages))

    def _phase(self, tile: Uint32) -> Uint32:
        """The phase of the slot's full mbarrier that the tile completes."""
        return tile // self.num_stages % 2

    @property
    def has_tail(self) -> bool:
        """Whether rows past the item's end may hold anything. The sparse gather writes zeros there."""
        return not self.loader.sparse

    # --------------------------------------------------------------- scores

    def _start_nope(self, params: Params, smem: Smem, regs: Fragments, tile: Uint32, chunk: int, acc=None) -> None:
        """acc (None: T) = Q K^T over one of `score_chunks` parts of the depth of a tile; asynchronous."""
        slot = self._slot(tile)
        if chunk == 0:
            cute.arch.mbarrier_wait(smem.mbar + self.mbars.full + slot, self._phase(tile))
            if self.loader.generic_proxy:
                barriers.fence_smem_writes()
        steps = self.dims.ckv // 32 // self.score_chunks  # a wgmma multiplies 32 e4m3 or 16 16-bit values of the depth
        warpgroup.fence()
        for term in reversed(range(self.q_terms)):
            self._issue(params.mma_nope, regs.rT if acc is None else acc, regs.tSrQ[None, None, None, term],
                        regs.tSrK[None, None, None, slot], range(chunk * steps, (chunk + 1) * steps),
                        term == self.q_terms - 1)  # fmt: skip
        warpgroup.commit_group()

    def _start_rope(self, params: Params, regs: Fragments, slot: Int32, acc) -> None:
        """acc = Qr R^T; asynchronous."""
        steps = self.dims.kpe // (32 if self.rope_fp8 else 16)
        warpgroup.fence()
        for term in reversed(range(self.rope_terms)):
            self._issue(params.mma_rope, acc, regs.tSrQr[None, None, None, term], regs.tSrR[None, None, None, slot],
                        range(steps), term == self.rope_terms - 1)  # fmt: skip
        warpgroup.commit_group()

    def _issue(self, tiled_mma, acc, a, b, steps, zero_first: bool) -> None:
        wgmma.issue(tiled_mma, acc, a, b, [(k, k) for k in steps], zero_first)

    def _scores(self, params: Params, smem: Smem, regs: Fragments, tile: Uint32) -> None:
        """S = b (Qr R^T) + a sum over scale groups of scale (Q K^T) - reference, in units of log2; ends what
        `_start_nope` began."""
        slot = self._slot(tile)
        a, b = ([smem.sQScale[i, regs.row + 8 * r] for r in range(self.own_rows)] for i in range(2))
        nope, rope = regs.S, regs.T
        if self.score_chunks == 1:
            nope, rope = regs.T, regs.S
        else:
            self._sum_parts(params, smem, regs, tile, slot)
        if self.dims.kpe:
            self._start_rope(params, regs, slot, regs.rS if self.score_chunks == 1 else regs.rT)
        warpgroup.wait_group(0)
        for c in range(4):
            scales = self._column_scales(smem, regs, slot, 0, c) if self.num_scales == 1 else []
            for n in range(4 * c, 4 * c + 4):
                for r in range(self.own_rows):
                    factor = a[r] * scales[n % 4] if scales else a[r]
                    first = -regs.rRef[r]
                    if self.dims.kpe:
                        first = self._of_parts(rope, r, n, self.rope_parts) * b[r] - regs.rRef[r]
                    # What `_sum_parts` made is of both parts of Q already.
                    q_parts = self.q_parts if self.score_chunks == 1 else 1
                    regs.S[r, n] = first + self._of_parts(nope, r, n, q_parts) * factor

    def _of_parts(self, scores, r: int, n: int, parts: int):
        """Row r of a (row, column) view of an accumulator, from all parts of Q: of 32 rows they are two of its rows."""
        if self.own_rows == 1 and parts == 2:
            return scores[0, n] + scores[1, n]
        return scores[r, n]

    def _sum_parts(self, params: Params, smem: Smem, regs: Fragments, tile: Uint32, slot: Int32) -> None:
        """S = sum over parts of the depth of Q K^T, each times its tokens' scales where parts have their own."""
        self._start_nope(params, smem, regs, tile, 1, regs.rS)
        for part in range(1, self.score_chunks):
            if part > 1:
                self._start_nope(params, smem, regs, tile, part)
            warpgroup.wait_group(0)
            for c in range(4):
                of_s = of_t = [Float32(1.0)] * 4
                if self.num_scales == 4:
                    # T holds part 0 at first, beside part 1 in S.
                    of_t = self._column_scales(smem, regs, slot, part if part > 1 else 0, c)
                    of_s = self._column_scales(smem, regs, slot, 1, c) if part == 1 else of_s
                for n in range(4 * c, 4 * c + 4):
                    for r in range(self.own_rows):
                        s = self._of_parts(regs.S, r, n, self.q_parts if part == 1 else 1)
                        regs.S[r, n] = s * of_s[n % 4] + self._of_parts(regs.T, r, n, self.q_parts) * of_t[n % 4]

    def _column_scales(self, smem: Smem, regs: Fragments, slot: Int32, group: int, c: int) -> list[Float32]:
        """Scales of this thread's four of tokens 16 c .. 16 c + 15, 0 where there is no token; they lie as
        lib/ring.py, scale_place, says."""
        base = Int32(smem.sScales.iterator.toint())
        at = base + ((slot * self.num_scales + group) * TILE_N + regs.lane % 4 * 4) * 4
        return [x.bitcast(Float32) for x in ptx.load_shared_16(at, 64 * c)]

    # -------------------------------------------------------------------- P

    def _exp(self, smem: Smem, regs: Fragments, slot: Int32) -> list[Float32]:
        """P = 2^S as float16 in rP, times the token's scale in units in format "token"; returns this thread's share of
        the sums of its rows, without the scales."""
        totals = [Float32(0.0)] * self.own_rows
        words = cute.recast_tensor(regs.rP, Uint32)
        inverse = cute.arch.rcp_approx(regs.rUnit[0])
        for j in range(8):
            if self.kv_format == "token" and j % 2 == 0:
                scales = [x * inverse for x in self._column_scales(smem, regs, slot, 0, j // 2)]
            for r in range(self.own_rows):
                e = [softmax.exp2(regs.S[r, 2 * j + i]) for i in range(2)]
                totals[r] = totals[r] + (e[0] + e[1])
                if self.kv_format == "token":
                    e = [e[i] * scales[j % 2 * 2 + i] for i in range(2)]
                words[self.own_rows * j + r] = ptx.to_f16x2(*e)
        return totals

    def _put_p(self, smem: Smem, regs: Fragments, slot: Int32, wg) -> None:
        """P from rP to shared memory, for wgmma of both consumers to read once they have met, and in format "group" the
        scales that go with the own tile's V. `slot`: the own tile's."""
        if self.kv_format == "group":
            self._put_v_scales(smem, regs, slot, wg)
        if self.tile_rows == TILE_M:
            cute.copy(regs.stm, regs.tPr, regs.tPs)
        else:
            # Of a warp's eight rows four 8 x 8 matrices beside each other, and the four behind them.
            words = cute.recast_tensor(regs.rP, Uint32)
            t = ptx.thread_index() % WARPGROUP
            row = t // 32 * 8 + t % 8
            at = Int32(smem.sP.iterator.toint()) + wg * (self.tile_rows * TILE_N * 2) + row * 128
            for i in range(2):
                chunk = (t % 32 // 8 + 4 * i) ^ (row % 8)
                ptx.store_matrices(at + chunk * 16, [words[4 * i + j] for j in range(4)])
        barriers.fence_smem_writes()

    # -------------------------------------------------------------------- V

    @cute.jit
    def _zero_v_tail(self, smem: Smem, slot, wg, valid):
        """Zero V rows >= valid of this warpgroup's half: 0 * NaN is NaN, and rows past kv_end may hold anything."""
        if valid < TILE_N:
            t = ptx.thread_index() % WARPGROUP
            # 256 bytes of a row are 32 words in two sub-tiles; the swizzle permutes within a row of a sub-tile. 128
            # bytes are 16 words in one, so that a warp takes two rows at a time.
            first = cutlass.max(valid, Int32(0)) + t // (8 * self.blocks)
            sub = t % 32 // 16 if const_expr(self.blocks == 4) else Int32(0)
            base = (slot * self.blocks + wg * (self.blocks // 2) + sub) * (SUB_BYTES // 8) + t % 16
            for row in cutlass.range(first, TILE_N, 16 // self.blocks, unroll=1):
                smem.k_words[base + row * 16] = Int64(0)
            barriers.fence_smem_writes()
            barriers.sync_of(FILL, wg)

    def _v_fragment(
        self, smem: Smem, regs: Fragments, slot: Int32, m: int, wg: Int32, buffer: int, scales: list | None
    ) -> None:
        """A operand of O^T += V^T P^T: channels 64 m .. of this warpgroup's half, 64 tokens, as float16 in rV[buffer].

        A transposing load gives a thread (two channels) x (two tokens); row g of a warp's 16 is channel 2 g, row g + 8
        channel 2 g + 1.
        """
        words = cute.recast_tensor(regs.rV[buffer], Uint32)
        chunk = (m % 2) * 4 + regs.t // 32
        address = Int32(smem.sK.iterator.toint()) + (slot * 2 + wg) * (self.blocks // 2 * SUB_BYTES)
        address = address + regs.lane * 128 + (chunk ^ (regs.lane % 8)) * 16
        for half in range(2):
            x = ptx.ldmatrix_x4(address, m // 2 * SUB_BYTES + half * (SUB_BYTES // 2), True)
            for j in range(4):
                at = (half * 2 + j // 2) * 4 + j % 2 * 2
                words[at], words[at + 1] = e4m3.e4m3x4_to_f16(e4m3.transpose_pairs(x[j]))
        if scales:
            self._scale_fragment(regs, buffer, scales)

    def _scale_fragment(self, regs: Fragments, buffer: int, scales: list) -> None:
        """rV[buffer] times the scales of its tokens, `_v_scales`'s."""
        words = cute.recast_tensor(regs.rV[buffer], Uint32)
        for i in range(16):
            # Words 2 j and 2 j + 1 are two channels of the thread's two of tokens 8 j .. 8 j + 7.
            words[i] = ptx.multiply_f16x2(words[i], scales[i // 2])

    def _put_v_scales(self, smem: Smem, regs: Fragments, slot: Int32, tile) -> None:
        """The scales of pair tile `tile`, in units, as pairs of float16 to smem.sVScales: each warp those of a group,
        each lane those of two tokens. Were they made where V is multiplied, every thread would make 16 for two of its
        fragments: 300 of a pair's 1300 instructions, and 8 to 12 % of the time of 128 requests of 8192 tokens."""
        at = Int32(smem.sScales.iterator.toint()) + (slot * self.num_scales * TILE_N + regs.t * 2) * 4
        inverse = cute.arch.rcp_approx(regs.rUnit[0])
        x = [v * inverse for v in ptx.load_shared_f32x2(at, 0)]
        # Pairs of tokens in the order of `scale_place` once more, so that four of a thread's lie together again.
        place = scale_place(regs.lane & 31)  # the compiler does not know that a lane is below 32
        to = Int32(smem.sVScales.iterator.toint()) + (tile * WARPGROUP + (regs.t // 32) * 32 + place) * 4
        ptx.store_shared(to, [ptx.to_f16x2(*x)])

    def _v_scales(self, smem: Smem, regs: Fragments, tile: int, group: int) -> list[Uint32]:
        """Of pair tile `tile`, this thread's two tokens of every eight, from smem.sVScales."""
        at = Int32(smem.sVScales.iterator.toint()) + (tile * WARPGROUP + group * 32 + regs.lane % 4 * 4) * 4
        return ptx.load_shared_16(at, 0) + ptx.load_shared_16(at, 64)
