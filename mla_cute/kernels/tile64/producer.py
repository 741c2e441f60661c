"""The producer warpgroup of the row-tile kernel (schedule.py has the schedule): K tiles and Q.

Arguments that recur:
    item, it       the item's words in registers (lib/row_map.py's Word), and its number in the part
    head0          the first head of a decode tile (lib/row_map.py)
    phase          parity of the phase of the empty mbarriers that a warp waits for next
    w, lane        warp of the producer, 0 .. 3, and lane
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr
from cutlass.cute.nvgpu import cpasync

from ..lib import barriers, paged
from ..lib.paged import NUM_SUB, SUB_BYTES, TILE_N
from ..lib.row_map import Word, load_item
from .params import ITEM_SLOTS, RELEASE_ORDER, Params, Smem, Variant

# The word of sItem's slot 0 that no item uses.
COUNT_WORD = 7


class Producer(Variant):
    """The producer warpgroup: methods of Tile64."""

    @cute.jit
    def _produce_items(self, params: Params, smem: Smem, item, part, head0, w, lane):
        """Fetch all items of the part. `item` holds the first one already where `rows.header_is_item`."""
        phase = Int32(1)
        first_row = Int32(0)
        num_items = Int32(0)
        if const_expr(self.rows.header_is_item):
            first_row = item[Word.DECODE_FIRST_ROW]
            num_items = item[Word.DECODE_NUM_ITEMS]
        else:
            num_items = self.rows.num_items(params, part)
        # The count waits in a word of shared memory, which each warp writes and reads for itself: that takes two
        # registers less than a loop over a range.
        smem.sItem[0, COUNT_WORD] = num_items
        it = Int32(0)
        while it < smem.sItem[0, COUNT_WORD]:
            if const_expr(self.rows.header_is_item):
                if it > 0:
                    load_item(params.mTable, self.rows.item_row(params, part, first_row, it), item)
            else:
                load_item(params.mTable, self.rows.item_row(params, part, first_row, it), item)
            # The consumers read the record after q_full. They may be as far back as the epilogue of item it - 2, whose
            # last QK let the Q of item it - 1 in.
            if (w == 0) & (lane == 0):
                for i in cutlass.range_constexpr(self.rows.item_words):
                    smem.sItem[it % ITEM_SLOTS, i] = item[i]
            cute.arch.sync_warp()
            # Q goes in front of K: the last QK of the item before frees Q sooner than its PVs free K; and in the first
            # item Q would arrive behind all K (1.5 us at batch 16).
            self._load_q(params, smem, item, head0, it, w)
            if it == 0:
                self._load_q_rope(params, smem, item, head0, it, w)
            if const_expr(self.by_tma):
                phase = self._tma_pairs(params, smem, item, it, head0, phase, w, lane)
            else:
                phase = self._gather_pairs(params, smem, item, it, head0, phase, w, lane)
            it += 1

    @cute.jit
    def _tma_pairs(self, params: Params, smem: Smem, item, it, head0, phase, w, lane):
        """The item's K tiles: each warp fills its own (stage, half). Returns the next phase."""
        stage = w % 2
        half = w // 2
        full = self.full(smem, stage, half * 4)
        empty = self.empty(smem, stage, half)
        kv_end = item[Word.KV_END]
        index_base = item[Word.FIRST_INDEX]
        first = item[Word.KV_BEGIN] // TILE_N + stage
        for block in cutlass.range(first, cute.ceil_div(kv_end, TILE_N) + stage, 2, unroll=1):
            where, boxes = self.loader.lookup(params, index_base, block, kv_end, lane)
            cute.arch.mbarrier_wait(empty, phase)
            phase ^= 1
            self.loader.load(params, smem, where, boxes, stage, half, full)
            if (block == first) & (it > 0):
                self._load_q_rope(params, smem, item, head0, it, w)
        return phase

    @cute.jit
    def _gather_pairs(self, params: Params, smem: Smem, item, it, head0, phase, w, lane):
        """The same where the four warps share every (stage, half), in the order in which the consumers release them."""
        kv_end = item[Word.KV_END]
        index_base = item[Word.FIRST_INDEX]
        first = item[Word.KV_BEGIN] // TILE_N
        for block in cutlass.range(first, cute.ceil_div(kv_end, TILE_N), 2, unroll=1):
            rows = [self.loader.lookup(params, index_base, block + stage, kv_end, w, lane) for stage in range(2)]
            for stage, half in RELEASE_ORDER:
                held = self.loader.held(rows[stage], block + stage, kv_end, w)
                ckv_rows, kpe_rows = (self.loader.rows(offset, lane) for offset in rows[stage][:2])
                cute.arch.mbarrier_wait(self.empty(smem, stage, half), phase)
                if const_expr(self.loader.sparse and stage == half):
                    # The stage's first half to be free: its consumer has masked the tile that was there.
                    paged.tell_chosen(smem, stage, w, lane, held, smem.mbar + self.mbars.chosen + stage)
                full = self.full(smem, stage, half * 4)
                self.loader.load(params, smem, ckv_rows, kpe_rows, held, stage, half, full, w, lane)
            phase ^= 1
            if (block == first) & (it > 0):
                self._load_q_rope(params, smem, item, head0, it, w)
        return phase

    @cute.jit
    def _load_q(self, params: Params, smem: Smem, item, head0, it, w):
        """Two of Q's sub-tiles 0..7 per producer warp; warp 3 also announces the bytes of the ninth, the rope."""
        row0, batch = (cute.arch.make_warp_uniform(x) for x in self.rows.q_at(item, head0))
        cute.arch.mbarrier_wait(smem.mbar + self.mbars.q_empty, (it + 1) % 2)
        q_full = smem.mbar + self.mbars.q_full
        sQ = cute.group_modes(smem.sQ_sub, 0, 2)
        gQ = cute.local_tile(cute.domain_offset((row0, 0, 0), params.mQ), (64, 64), (0, None, None))
        tQs, tQg = cpasync.tma_partition(params.tma_q, 0, cute.make_layout(1), sQ, cute.group_modes(gQ, 0, 2))
        num_subs = Int32(2)
        if w == 3:
            num_subs = Int32(3)
        barriers.expect_tx(q_full, num_subs * SUB_BYTES)
        for i in cutlass.range_constexpr(2):
            cute.copy(params.tma_q, tQg[None, 2 * w + i, batch], tQs[None, 2 * w + i], tma_bar_ptr=q_full)

    @cute.jit
    def _load_q_rope(self, params: Params, smem: Smem, item, head0, it, w):
        """Q's ninth sub-tile, by warp 3. Its bytes hold P1 until the item before ends."""
        if w == 3:
            row0, batch = (cute.arch.make_warp_uniform(x) for x in self.rows.q_at(item, head0))
            cute.arch.mbarrier_wait(smem.mbar + self.mbars.rope_empty, (it + 1) % 2)
            q_full = smem.mbar + self.mbars.q_full
            sQ = cute.group_modes(smem.sQ_sub, 0, 2)
            gR = cute.local_tile(cute.domain_offset((row0, 0, 0), params.mQpe), (64, 64), (0, 0, None))
            tRs, tRg = cpasync.tma_partition(params.tma_qpe, 0, cute.make_layout(1), sQ, cute.group_modes(gR, 0, 2))
            cute.copy(params.tma_qpe, tRg[None, batch], tRs[None, NUM_SUB - 1], tma_bar_ptr=q_full)
