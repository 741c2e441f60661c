"""The schedule of the row-tile kernel: 64 query rows against pairs of 64-token K tiles.

    S = Q K^T (64 x 64 per tile, 576 deep)     O[64 x 512] += P V     V = the first 512 columns of K, same bytes

One CTA of three warpgroups (wg) per SM, persistent over the planner's work items: a row tile and a range of tokens of
its request. Which rows a tile holds is lib/row_map.py's. K tiles go in pairs, one in stage 0 and one in stage 1
("seesaw", first described with FlashMLA): each consumer owns half of O's columns, makes P of its own tile, and
multiplies its own P from registers and the other's from shared memory.

    role        warps  regs     does, per pair of tiles
    wg 0        0-3    240      S0 = Q K0^T, softmax, O[:, 0:256] += P0 V0[:, 0:256] + P1 V1[:, 0:256]
    wg 1        4-7    240      S1 = Q K1^T, softmax, O[:, 256:512] += P1 V1[:, 256:512] + P0 V0[:, 256:512]
    producer    8-11   24       warp 8 + w fills (stage w % 2, half w / 2) and its share of an item's Q
    (box_rows 8, the gather and packed rows: 232 and 40 registers; setup.py has those of other head dimensions)

    mbarrier             filled by / waited for by (params.py has the arrivals)
    full[stage][sub]     producer warp of that half, per 64 x 64 sub-tile (gather: all four warps, per two sub-tiles) /
                         the consumer of that stage, before its QK of that sub-tile
    empty[half][stage]   wg `half`, when its PV from that half of the stage has drained / the producer's refill
    q_full               TMA of the nine sub-tiles of Q, and the item's record in sItem / both consumers, per item
    q_empty              both consumers, after the last QK of an item / producer, for sub-tiles 0..7 of the next Q
    rope_empty           both consumers, after the last pair of an item / producer, for the ninth
    chosen[stage]        sparse: producer warps, which of the stage's rows hold tokens / the consumer of that stage,
                         before its mask

The named barriers are params.py's Bar.

Order in a pair      wg 0                                     wg 1
                     QK, wait, mask                           QK, wait, mask
                     P0 and PV with it, in two parts          P1 and PV with it, in two parts
                     P0 to shared memory -> P0                P1 to shared memory -> P1
                     wait, releases its half of stage 0       waits for P0
                     waits for P1, PV with P1                 PV with P0
                     wait, releases its half of stage 1       wait, releases its half of stage 1
                                                              wait, releases its half of stage 0

"-> X" is an arrival at named barrier X, "wait" is for this consumer's own wgmmas. Where a tile goes past kv_end, which
only the last pair's do, each consumer zeroes the rows past it in its half of V before the PV that reads them.

References (lib/softmax.py). The consumers exchange row maxima in an item's first pair alone (`_choose_references`).
After that neither waits for the other's softmax, and P of 32 tokens is multiplied while that of the other 32 is made.
Exchanging maxima in every pair, which one consumer handed to the other, took 3 to 5 % longer at 128 heads.

P of a later key may be above 1 then. In bfloat16 that costs up to 2^-9 of the output where this key has nearly all the
weight, whose P would be 1 under its own score. So parts of P with a large row sum (LARGE_P) enter O / l with the sum of
what was rounded; the log-sum-exp is of what was not.

A row some of whose P is out of range counts neither that part of its tile nor the one behind it: its P is 0 there, in
registers and in shared memory, and its warp does not release V. Behind the barriers P0 and P1 all consumer warps read
whether one of them asks for other references (sRaise). If so, all meet in `_raise_if_asked`, which raises those of the
rows that asked and multiplies what did not count. The other rows' P is 0 there and their references stay: what a row
becomes never depends on the rows beside it, which may be another request's.

Shared memory: Q 72 KiB, two K tiles of 72 KiB, P0 8 KiB, what goes by rows 1.3 KiB: 226 of 227 KiB. Q's ninth sub-tile
(the rope) is read to registers at the start of an item, and its bytes hold P1 from then on.

Head dimensions. Heads of 256 + 64 leave room for a second pair: stages 0 and 1 are one place, 2 and 3 another, each
with a P0 and a P1 and their barriers, and pairs take the places by turns. What is said of stages 0 and 1 above holds of
each place. Of a rope of 32 channels QK takes half the sub-tile (lib/paged.py); without one its sub-tile, rope_empty and
Q's rope are not there.

Arguments that recur:
    wg               0 or 1, a constant: the consumer
    valid0, valid1   tokens of the item from the pair's first and from its second tile on: below 64, or negative, where
                     the tile goes past kv_end
    slot             where the item's record lies in sItem
    gap              RowMap.gap of the item
    turn             of the pair (params.py's Variant)
    first            the pair is its item's first
    asks             of `_own_pv`: per part of this consumer's tile, a bit for each of this thread's two rows: set where
                     the part does not count for the row
"""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float16, Float32, Int32, const_expr
from cutlass.cute.nvgpu import warpgroup

from ..lib import barriers, softmax, wgmma
from ..lib.paged import TILE_N
from ..lib.row_map import Word
from . import math
from .epilogue import Epilogue
from .params import ITEM_SLOTS, Bar, Fragments, Params, Smem, of_place


class Consumer(Epilogue):
    """The two consumer warpgroups: methods of Tile64."""

    # ---------------------------------------------------------- a pair of tiles

    def _pair_wg0(self, params: Params, smem: Smem, regs: Fragments, turn, first, valid0, valid1, slot, gap) -> None:
        place = self.place_of(turn)
        stage0, stage1 = (self.stage_of(place, tile) for tile in range(2))
        self._qk(params, smem, regs, 0, stage0, turn)
        self._release_q(smem, valid0)
        self._mask(params, smem, regs, stage0, turn, valid0, slot, gap)
        self._choose_references(params, smem, regs, 0, first)
        math.zero_v_tail(smem, regs, stage0, 0, valid0)
        asks = self._own_pv(params, smem, regs, 0, stage0, turn)
        # P0's place is free: this S0 needed (stage 0, half 1), refilled only after wg 1 drained its PV of the P0 that
        # was there.
        math.put_p(regs, smem.sP0, place)
        self._tell_p(Bar.P0, place)
        warpgroup.wait_group(0)
        self._release_unless(smem, 0, stage0, asks)
        # Behind P1, which says that wg 1 has seen the tile arrive: TMA would write over zeros that were there before.
        self._await_p(Bar.P1, place)
        math.zero_v_tail(smem, regs, stage1, 0, valid1)
        math.add_pv(params.mma_pv, regs, of_place(regs.tOrP1, place, rank=3), 0, stage1)
        # This PV is not left in flight over the back-edge: ptxas then puts a wait behind every wgmma of the loop.
        warpgroup.wait_group(0)
        self._raise_if_asked(params, smem, regs, 0, place, asks, turn)
        self._release(smem, 0, stage1)

    def _pair_wg1(self, params: Params, smem: Smem, regs: Fragments, turn, first, valid0, valid1, slot, gap) -> None:
        place = self.place_of(turn)
        stage0, stage1 = (self.stage_of(place, tile) for tile in range(2))
        self._qk(params, smem, regs, 1, stage1, turn)
        self._release_q(smem, valid0)
        self._mask(params, smem, regs, stage1, turn, valid1, slot, gap)
        self._choose_references(params, smem, regs, 1, first)
        math.zero_v_tail(smem, regs, stage1, 1, valid1)
        asks = self._own_pv(params, smem, regs, 1, stage1, turn)
        math.put_p(regs, smem.sP1, place)
        self._tell_p(Bar.P1, place)
        # P0 V0 does not go first, although stage 0 would then be released sooner: the refill of (stage 1, half 1), with
        # which this consumer's next QK begins, would come later. Even in front of this consumer's softmax, where it has
        # nothing to wait for, it costs 1 to 2 % in decode of 128 heads and 7 to 11 % in prefill.
        self._await_p(Bar.P0, place)
        math.zero_v_tail(smem, regs, stage0, 1, valid0)
        math.add_pv(params.mma_pv, regs, of_place(regs.tOrP0, place, rank=3), 1, stage0)
        self._raise_if_asked(params, smem, regs, 1, place, asks, turn)
        warpgroup.wait_group(1)
        self._release(smem, 1, stage1)
        warpgroup.wait_group(0)
        self._release(smem, 1, stage0)

    # ---------------------------------------------------------- an item, all items

    def _consume(self, params: Params, smem: Smem, part: Int32, head0: Int32, t: Int32, wg: int) -> None:
        """Run the part's items as thread `t` of consumer `wg`."""
        regs = math.make_fragments(params, smem, t, self.dtype, self.dims.ckv, self.converted)
        self._consume_items(params, smem, regs, self.rows.num_items(params, part), head0, wg)

    @cute.jit
    def _consume_items(self, params: Params, smem: Smem, regs: Fragments, num_items, head0, wg: Constexpr):
        turn = self.first_turn(0)
        for it in cutlass.range(num_items, unroll=1):
            regs.rO.fill(0.0)
            regs.rL.fill(0.0)
            regs.rW.fill(0.0)
            cute.arch.mbarrier_wait(smem.mbar + self.mbars.q_full, it & 1)
            slot = it & (ITEM_SLOTS - 1)
            # An item begins at a multiple of TILE_N.
            tokens = smem.sItem[slot, Word.KV_END] - smem.sItem[slot, Word.KV_BEGIN]
            gap = self.rows.gap(params, smem, slot)
            if const_expr(self.dims.kpe > 0):
                cute.copy(regs.ldm, regs.tQs, regs.tQr)
            for begin in cutlass.range(0, tokens, 2 * TILE_N, unroll=1):
                first, left = begin == 0, tokens - begin
                if const_expr(wg == 0):
                    self._pair_wg0(params, smem, regs, turn, first, left, left - TILE_N, slot, gap)
                else:
                    self._pair_wg1(params, smem, regs, turn, first, left, left - TILE_N, slot, gap)
                turn = self.next_turn(turn)
            barriers.arrive_once_per_warp(smem.mbar + self.mbars.rope_empty)
            self._epilogue(params, smem, regs, slot, head0, wg)

    # ---------------------------------------------------------- steps of a pair

    def _qk_order(self, wg: int) -> list[int]:
        """The order in which a consumer takes the sub-tiles of its tile, the rope's behind the last of ckv: the half
        that is refilled first comes first."""
        half = self.num_subs // 2
        last = list(range(half, self.num_subs + (self.dims.kpe > 0)))
        return [*range(half), *last] if wg == 0 else [*last, *range(half)]

    def _qk(self, params: Params, smem: Smem, regs: Fragments, wg: int, stage, turn) -> None:
        """S = Q K^T over the sub-tiles of the stage, each as it lands, in a commit group of its own; to the end."""
        for n, sub in enumerate(self._qk_order(wg)):
            if sub in self.loader.barrier_subs:
                cute.arch.mbarrier_wait(self.full(smem, stage, sub), self.parity_of(turn))
                if self.loader.generic_proxy:
                    barriers.fence_smem_writes()
            warpgroup.fence()
            if sub == self.num_subs:
                ks = [(k, k) for k in range(self.dims.kpe // 16)]
                wgmma.issue(params.mma_qk_rs, regs.rS, regs.rQr, regs.tSrR[None, None, None, stage], ks, n == 0)
            else:
                ks = [(4 * sub + k, 4 * sub + k) for k in range(4)]
                wgmma.issue(params.mma_qk, regs.rS, regs.tSrQ, regs.tSrK[None, None, None, stage], ks, n == 0)
            warpgroup.commit_group()
        warpgroup.wait_group(0)

    def _mask(self, params: Params, smem: Smem, regs: Fragments, stage, turn, valid, slot, gap) -> None:
        """-inf where a row of S does not see the token: past the item's end, above the diagonal, no token chosen."""
        if self.loader.sparse:
            cute.arch.mbarrier_wait(smem.mbar + self.mbars.chosen + stage, self.parity_of(turn))
            softmax.mask_unchosen(regs.S, 8, Int32(smem.sChosen.iterator.toint()) + stage * 16, regs.lane)
        else:
            self.rows.mask(params, smem, regs, slot, valid, gap)

    @cute.jit
    def _choose_references(self, params: Params, smem: Smem, regs: Fragments, wg: Constexpr, first):
        """In an item's first pair: the row maxima of both tiles, which the consumers exchange."""
        if first:
            maxima = math.row_maxima(regs)
            softmax.put_rows(smem.sMax[wg, None], regs.row, regs.lane, maxima)
            Bar.FIRST.sync()
            for r in cutlass.range_constexpr(2):
                # A row that sees no key of the pair has a reference that every score of a later one is out of range of.
                other = cute.arch.fmax(smem.sMax[1 - wg, regs.row + 8 * r], Float32(softmax.LOWEST))
                regs.rRef[r] = cute.arch.fmax(maxima[r], other)

    @cute.jit
    def _own_pv(self, params: Params, smem: Smem, regs: Fragments, wg: Constexpr, stage, turn):
        """P of this consumer's tile in regs.rP, its row sums added to rL and rW, its PV started, part by part.

        Returns `asks`: a part does not count for a row some of whose P is out of range in it or in one in front of
        it, and the warp asks to raise references."""
        most = softmax.MAX_P if const_expr(self.dtype is Float16) else softmax.MAX_P_BF16
        asks = []
        for part in cutlass.range_constexpr(math.PARTS):
            sum0, sum1 = math.make_p(regs, part)
            weight0, weight1 = sum0, sum1
            rows = Int32(0) if const_expr(part == 0) else asks[part - 1]
            if cute.arch.vote_any_sync((sum0 > softmax.LARGE_P) | (sum1 > softmax.LARGE_P) | (rows != 0)):
                rounded0, rounded1 = math.rounded_sums(regs, part)
                weight0 = rounded0 if sum0 > softmax.LARGE_P else sum0
                weight1 = rounded1 if sum1 > softmax.LARGE_P else sum1
                rows = rows | softmax.quad_any(sum0 > most, regs.lane) | softmax.quad_any(sum1 > most, regs.lane) * 2
                math.clear_p(regs, part, rows)
                if rows % 2 != 0:
                    sum0, weight0 = Float32(0.0), Float32(0.0)
                if rows >= 2:
                    sum1, weight1 = Float32(0.0), Float32(0.0)
            regs.rL[0] = regs.rL[0] + sum0
            regs.rL[1] = regs.rL[1] + sum1
            regs.rW[0] = regs.rW[0] + weight0
            regs.rW[1] = regs.rW[1] + weight1
            math.add_pv(params.mma_pv_rs, regs, regs.rP, wg, stage, part)
            asks = [*asks, rows]
        if asks[-1] != 0:
            smem.sRaise[wg] = turn + 1
        return asks

    @cute.jit
    def _raise_if_asked(self, params: Params, smem: Smem, regs: Fragments, wg: Constexpr, place, asks, turn):
        """Behind the barriers P0 and P1: if a warp of either consumer has asked, all come here and nobody else waits.

        The references of the rows that asked rise to their maxima in the tiles that they asked in. What was added up
        follows them, and the parts of P that did not count are made and multiplied; what did count is 0 in this P. A
        stage is multiplied if one of its consumer's warps asked, and only then is it still there.
        """
        asked = [smem.sRaise[tile] == turn + 1 for tile in range(2)]
        if asked[0] | asked[1]:
            warpgroup.wait_group(0)
            maxima = math.row_maxima(regs)
            own = [maxima[r] if (asks[-1] >> r) % 2 != 0 else Float32(softmax.LOWEST) for r in range(2)]
            softmax.put_rows(smem.sMax[wg, None], regs.row, regs.lane, own)
            Bar.RAISE.sync()
            factors = [None, None]
            for r in cutlass.range_constexpr(2):
                highest = cute.arch.fmax(own[r], smem.sMax[1 - wg, regs.row + 8 * r])
                ref = cute.arch.fmax(regs.rRef[r], highest)
                factors[r] = softmax.exp2(regs.rRef[r] - ref)
                regs.rRef[r] = ref
                regs.rL[r] = regs.rL[r] * factors[r]
                regs.rW[r] = regs.rW[r] * factors[r]
            softmax.multiply_rows(regs.O, math.o_cols(regs), *factors)
            for part in cutlass.range_constexpr(math.PARTS):
                sums = math.make_p(regs, part)
                # No P that counts is above 1 now.
                for r in cutlass.range_constexpr(2):
                    counts = sums[r] if (asks[part] >> r) % 2 != 0 else Float32(0.0)
                    regs.rL[r] = regs.rL[r] + counts
                    regs.rW[r] = regs.rW[r] + counts
                math.clear_p(regs, part, ~asks[part])
            math.put_p(regs, (smem.sP0, smem.sP1)[wg], place)
            Bar.RAISE.sync()
            for tile in cutlass.range_constexpr(2):
                if asked[tile]:
                    p = of_place((regs.tOrP0, regs.tOrP1)[tile], place, rank=3)
                    math.add_pv(params.mma_pv, regs, p, wg, self.stage_of(place, tile))
                    warpgroup.wait_group(0)
            if const_expr(wg == 0):
                if cute.arch.vote_any_sync(asks[-1] != 0):
                    self._release(smem, 0, self.stage_of(place, 0))
            Bar.RAISE.sync()

    # A pair in the other place needs nothing that a consumer releases behind its wait for P. So a warp may arrive for P
    # of that pair before another has arrived for P of this one: hence a barrier for each place. Before the next pair in
    # the same place comes the wait for its K.

    def _tell_p(self, first: Bar, place) -> None:
        """P of `place` is in shared memory. `first`: the barrier of place 0."""
        if self.num_stages == 2:
            first.arrive()
        else:
            barriers.arrive_of(first, place)

    def _await_p(self, first: Bar, place) -> None:
        if self.num_stages == 2:
            first.sync()
        else:
            barriers.sync_of(first, place)

    @cute.jit
    def _release_unless(self, smem: Smem, wg: Constexpr, stage, asks):
        """A warp that asks to raise references multiplies V once more, and releases it behind that."""
        if not cute.arch.vote_any_sync(asks[-1] != 0):
            self._release(smem, wg, stage)

    def _release(self, smem: Smem, wg: int, stage) -> None:
        """This consumer's half of V of `stage` is drained (K of that half was read earlier)."""
        barriers.arrive_once_per_warp(self.empty(smem, stage, wg))

    @cute.jit
    def _release_q(self, smem: Smem, left):
        """After the QK of the item's last pair, so that Q of the next item arrives during the softmax, the PVs and the
        epilogue. `left`: tokens of the item from this pair on."""
        if left <= 2 * TILE_N:
            barriers.arrive_once_per_warp(smem.mbar + self.mbars.q_empty)
