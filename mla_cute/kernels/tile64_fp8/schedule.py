"""The schedule of the FP8 row-tile kernel: 64 or 32 query rows against pairs of 64-token KV tiles.

    S = Q K^T on e4m3 wgmma (rows x tokens)          O^T [512 x 64] += V^T P^T on float16 wgmma

K is multiplied as it is stored. A 16-bit Q becomes high + low e4m3 parts under a scale per row (8 significant bits), or
with accuracy "fast" one part (which costs 4e-2 of the output's norm on normal data); an e4m3 Q is taken as it is. fp8
wgmma takes no MN-major operand, which V is in P V; so the product is transposed and V^T comes from registers: a
transposing ldmatrix, a byte permute and exact conversions to float16. P stays float16: as e4m3 it costs 1.3e-2, more
than all the rest of "high".

One CTA of three warpgroups per SM, persistent over the planner's work items. KV tiles go in pairs, one per consumer;
each consumer owns half of the channels of O^T.

    role        warps  regs     does, per pair of tiles
    wg 0, 1     0-7    240      S = Q K^T of its own tile, P to shared memory, Q K^T of its next tile started,
                                O^T[its 256 channels] += V^T P^T of both tiles
    producer    8-11   24       K tiles through a ring of `num_stages` slots (lib/ring.py)
    (32 rows, whose O^T takes half the registers: 224 and 56; params.py has those of other head dimensions)

    mbarrier       completed by -> waited for by
    full[slot]     the producer warps, and what copies their tile -> both consumers
    empty[slot]    the consumer warps, each when the last of its V fragments is in registers -> producer

The named barriers are params.py's Bar.

Both consumers run the same code, and every pair of an item does: 70 KB instead of the 153 of copies for each consumer
and for an item's last pair. In a model the weights of a layer put the code out of L2, which cost copies 11 to 17 us.

Order in a pair (`_pair`):

    1. Q K^T of the own tile, which was started in the pair before (`ahead`) or is started now; wait for the other tile
       (`other_late`: behind 2), finish S, mask it
    2. P = 2^(S - reference) in registers; wait until the other consumer has multiplied this one's last P (P_FREE);
       P to shared memory, and in format "group" the tile's scales as V's fragments are multiplied by them
    3. ask for new references if P or a scale is out of range; wait for the other consumer's P, and for what it asks (P)
    4. if either has asked, both raise the references: P again, O to the new ones (references.py)
    5. O^T += V^T P^T in eight wgmma steps, two tiles x four blocks of 64 channels (of 256: two blocks). V of a step
       becomes a fragment while the step before is multiplied; a tile's slot is released when the last fragment of it is
       made. `ahead`: Q K^T of the next pair's own tile is started before tile 1's first step; an item's last pair
       starts that of its tile 1, which nobody reads, and whose slot it still has
    6. let the other consumer write its next P (P_FREE)

The reference of a row is what its scores are relative to in the exponent. It is chosen in an item's first pair and then
holds for the item, unless a P leaves float16's range: so a pair exchanges no row maxima. Channel scales per token enter
S as column factors, and P V through P (format "token") or through V's fragments (format "group"). There they are
counted in a unit, a power of two near the largest scale, so that float16 holds them (lib/e4m3.py, unit_below); it is
raised together with the references when a scale exceeds 64 units.

Tiles of 32 rows (`tile_rows`): up to 32 heads of decode, or (token, head) rows of a request of prefill. wgmma has 64
rows of Q, and so both parts of a 16-bit Q are multiplied at once: the high part of row 8 w + i of the tile is row 16 w
+ i of the operand, its low part row 16 w + i + 8. A thread's two rows of S are then the two parts of one row, which it
adds up; no other thread is asked, and every warp has eight rows of P. Of e4m3 queries, and of a rope that is not
split, the low rows are whatever shared memory holds: a row of Q makes one row of S, which nobody reads. P V multiplies
32 rows of P^T instead of 64. For 16-bit queries Q K^T takes half as long as of 64 rows and P V takes half for all: 32
heads at 128 x 8192 take 169 to 233 us where tiles of 64 rows, half of them padding, take 191 to 320
(docs/performance.md).

Shared memory: Q 64 (of one e4m3 part or of 32 rows: 32) KiB + its rope 8 or less, P 16 (8), scales of V 1, three (with
32 KiB of Q: four) tiles of 36 to 41 KiB; of heads of 256 + 64 six tiles of 20. lib/ring.py says how ropes of other
widths lie in the tiles.

Arguments that recur:
    wg, own, other   0 or 1: this consumer, which is also its own tile in a pair, and the other
    item_slot        where the item's record lies in smem.sItem
    gap              how many of the item's last keys the tile's first row does not see (lib/row_map.py, RowMap.gap)
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32, const_expr
from cutlass.cute.nvgpu import warpgroup

from ..lib import barriers, ptx, softmax, wgmma
from ..lib.paged import TILE_N
from ..lib.row_map import Word
from .epilogue import Epilogue
from .math import make_fragments
from .params import (
    ITEM_SLOTS,
    LOOP_FIRST_ROW,
    LOOP_HEAD0,
    LOOP_NUM_ITEMS,
    LOOP_PART,
    P_FREE,
    Bar,
    Fragments,
    Pair,
    Params,
    Smem,
)
from .query import QueryLoad
from .references import References, unchosen

# An item's unit before its first pair. 64 of it are less than any scale that matters, so the first pair chooses another
# unit; the inverse of this one is finite, because the first P of that pair is made with it.
FIRST_UNIT = 2.0**-100


class Consumer(QueryLoad, References, Epilogue):
    """The two consumer warpgroups: methods of Tile64Fp8."""

    # --------------------------------------------------------- a pair of tiles

    def _pair(
        self,
        params: Params,
        smem: Smem,
        regs: Fragments,
        tile: Uint32,
        left: Int32,
        item_slot: Int32,
        gap: Int32,
        wg: Int32,
    ) -> None:
        """The pair whose tile 0 is `tile` among all that the CTA runs; `left`: tokens of the item from it on."""
        slots = tuple(self._slot(tile + i) for i in range(2))
        pair = Pair(tile=tile, slots=slots, valid=(left, left - TILE_N), item_slot=item_slot)
        own, other = wg, 1 - wg
        own_slot = cutlass.select_(own == 0, slots[0], slots[1])
        other_slot = cutlass.select_(own == 0, slots[1], slots[0])
        own_valid = left - own * TILE_N
        if not self.ahead:
            self._start_nope(params, smem, regs, tile + Uint32(own), 0)
        of_other = smem.mbar + self.mbars.full + other_slot, self._phase(tile + Uint32(other))
        if not self.other_late:
            cute.arch.mbarrier_wait(*of_other)
        self._scores(params, smem, regs, tile + Uint32(own))
        if self.loader.sparse:
            softmax.mask_unchosen(regs.S, 8, Int32(smem.sChosen.iterator.toint()) + own_slot * 16, regs.lane)
        else:
            self.rows.mask(params, smem, regs, item_slot, own_valid, gap)
        totals = self._exp(smem, regs, own_slot)
        barriers.sync_of(P_FREE, own)
        sums = cute.make_rmem_tensor((self.own_rows,), Float32)
        for r in range(self.own_rows):
            sums[r] = totals[r]
        self._put_p(smem, regs, own_slot, wg)
        if self.other_late:
            cute.arch.mbarrier_wait(*of_other)
        if self.has_tail:
            for i in range(2):
                self._zero_v_tail(smem, pair.slots[i], wg, pair.valid[i])
        if self.early_v:
            # Its scales come with the other's P.
            self._v_fragment(smem, regs, pair.slots[0], 0, wg, 0, None)
        self._ask_to_raise(smem, pair, self._out_of_range(smem, regs, pair, totals, own_slot))
        Bar.P.sync()
        self._raise_if_asked(smem, regs, pair, sums, own_slot, wg)
        for r in range(self.own_rows):
            regs.rL[r] = regs.rL[r] + sums[r]
        self._multiply_v(params, smem, regs, pair, left, wg)
        barriers.arrive_of(P_FREE, other)

    def _multiply_v(self, params: Params, smem: Smem, regs: Fragments, pair: Pair, left: Int32, wg: Int32) -> None:
        """O^T += V^T P^T of both tiles in steps of 64 channels; with `early_v` the first fragment is there already, but
        for scales."""
        # Tile 0 first: its slot is refilled while tile 1 is multiplied.
        steps = [(i, m) for i in range(2) for m in range(self.blocks)]
        scales = None
        if not self.early_v:
            self._v_fragment(smem, regs, pair.slots[0], 0, wg, 0, None)
        if self.kv_format == "group":
            scales = self._v_scales(smem, regs, 0, wg * 2)
            self._scale_fragment(regs, 0, scales)
        for n, (i, m) in enumerate(steps):
            if self.ahead and n == self.blocks:
                # This is in no branch and not left in flight over the loop's end: ptxas would then wait behind every
                # wgmma. Not earlier, because wg 1 waits for the refill of the slot that the last pair released last.
                ahead = pair.tile + cutlass.select_(left > 2 * TILE_N, Uint32(wg) + 2, Uint32(1))
                self._start_nope(params, smem, regs, ahead, 0)
            warpgroup.fence()
            p = regs.tOrP[None, None, None, i]
            wgmma.issue(params.mma_pv, regs.rO[m], regs.rV[n % 2], p, [(k, k) for k in range(4)], False)
            warpgroup.commit_group()
            if n + 1 < len(steps):
                if n >= 1:
                    # The step that read the buffer of the next fragment has ended.
                    warpgroup.wait_group(1)
                i, m = steps[n + 1]
                if self.kv_format == "group" and m % 2 == 0:
                    scales = self._v_scales(smem, regs, i, wg * 2 + m // 2)
                self._v_fragment(smem, regs, pair.slots[i], m, wg, (n + 1) % 2, scales)
                if m == self.blocks - 1:
                    # The last of this tile's V is in registers.
                    barriers.arrive_once_per_warp(smem.mbar + self.mbars.empty + pair.slots[i])
        warpgroup.wait_group(0)

    # ------------------------------------------------------------------- items

    def _consume(self, params: Params, smem: Smem, part: Int32, head0: Int32, t: Int32, wg: Int32) -> None:
        """All items of `part`, for the heads from `head0` on; `t`: thread of the warpgroup."""
        # What the loop over items needs waits in shared memory: every thread writes and reads it for itself.
        smem.sLoop[LOOP_NUM_ITEMS] = self.rows.num_items(params, part)
        first_row = params.mTable[part, Word.DECODE_FIRST_ROW] if const_expr(self.rows.header_is_item) else Int32(0)
        smem.sLoop[LOOP_FIRST_ROW] = first_row
        smem.sLoop[LOOP_HEAD0] = head0
        smem.sLoop[LOOP_PART] = part
        self._consume_items(params, smem, make_fragments(params, smem, t, wg, self.blocks, self.tile_rows), wg)

    @cute.jit
    def _consume_items(self, params: Params, smem: Smem, regs: Fragments, wg):
        barriers.arrive_of(P_FREE, 1 - wg)
        tile = Uint32(0)  # the number of the pair's tile 0 among all tiles
        it = Int32(0)
        self._fetch_item(params, smem, regs, it, wg)
        while it < smem.sLoop[LOOP_NUM_ITEMS]:
            self._await_item(regs, wg)
            Bar.EPI.sync()
            slot = it % ITEM_SLOTS
            self._fetch_item(params, smem, regs, it + 1, wg)
            self._load_q(params, smem, slot, smem.sLoop[LOOP_HEAD0])
            for m in cutlass.range_constexpr(self.blocks):
                regs.rO[m].fill(0.0)
            regs.rL.fill(0.0)
            for r in cutlass.range_constexpr(self.own_rows):
                regs.rRef[r] = unchosen() if const_expr(self.loader.sparse) else Float32(0.0)
            regs.rUnit[0] = Float32(FIRST_UNIT)
            left = smem.sItem[slot, Word.KV_END] - smem.sItem[slot, Word.KV_BEGIN]
            gap = self.rows.gap(params, smem, slot)
            if const_expr(self.ahead):
                self._start_nope(params, smem, regs, tile + Uint32(wg), 0)
            while left > 0:
                self._pair(params, smem, regs, tile, left, it % ITEM_SLOTS, gap, wg)
                tile += 2
                left -= 2 * TILE_N
            self._epilogue(params, smem, regs, it % ITEM_SLOTS, smem.sLoop[LOOP_HEAD0], wg)
            it += 1

    @cute.jit
    def _fetch_item(self, params: Params, smem: Smem, regs: Fragments, it, wg):
        """Start the copy of item `it`, if there is one, to its slot of smem.sItem; `_await_item` ends it."""
        if wg == 0:
            if (regs.t < 2) & (it < smem.sLoop[LOOP_NUM_ITEMS]):
                table_row = self.rows.item_row(params, smem.sLoop[LOOP_PART], smem.sLoop[LOOP_FIRST_ROW], it)
                if const_expr(self.rows.header_is_item):
                    # The part's own row holds its first item, and is on its way already.
                    table_row = cutlass.select_(it == 0, smem.sLoop[LOOP_PART], table_row)
                slot = it % ITEM_SLOTS
                src = params.mTable.iterator.toint() + Int64(table_row) * 32 + Int64(regs.t * 16)
                dst = Int32(smem.sItem.iterator.toint()) + slot * 32 + regs.t * 16
                ptx.cp_async_small(dst, src, 16, 1)

    @cute.jit
    def _await_item(self, regs: Fragments, wg):
        """Wait for the copy that `_fetch_item` started; the other threads wait at Bar.EPI."""
        if wg == 0:
            if regs.t < 2:
                cute.arch.cp_async_commit_group()
                cute.arch.cp_async_wait_group(0)
