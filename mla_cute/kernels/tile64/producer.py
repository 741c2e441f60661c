"""The producer warpgroup of the row-tile kernel (schedule.py has the schedule): K tiles and Q.

Arguments that recur:
    item, it       the item's words in registers (lib/row_map.py's Word), and its number in the part
    head0          the first head of a decode tile (lib/row_map.py)
    turn           of the pair at hand (params.py's Variant)
    w, lane        warp of the producer, 0 .. 3, and lane
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr
from cutlass.cute.nvgpu import cpasync

from ..lib import barriers, paged
from ..lib.paged import SUB_BYTES, TILE_N
from ..lib.row_map import Word, load_item
from .params import ITEM_SLOTS, RELEASE_ORDER, Params, Smem, Variant

# The word of sItem's slot 0 that no item uses.
COUNT_WORD = 7


class Producer(Variant):
    """The producer warpgroup: methods of Tile64."""

    @cute.jit
    def _produce_items(self, params: Params, smem: Smem, item, part, head0, w, lane):
        """Fetch all items of the part. `item` holds the first one already where `rows.header_is_item`."""
        turn = self.first_turn(1)
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
                turn = self._tma_pairs(params, smem, item, it, head0, turn, w, lane)
            else:
                turn = self._gather_pairs(params, smem, item, it, head0, turn, w, lane)
            it += 1

    @cute.jit
    def _tma_pairs(self, params: Params, smem: Smem, item, it, head0, turn, w, lane):
        """The item's K tiles: each warp fills its own (tile of the pair, half). Returns the next turn."""
        tile = w % 2
        half = w // 2
        first_sub = half * (self.num_subs // 2)
        stage = self.stage_of(0, tile)
        full = self.full(smem, stage, first_sub)
        empty = self.empty(smem, stage, half)
        kv_end = item[Word.KV_END]
        index_base = item[Word.FIRST_INDEX]
        first = item[Word.KV_BEGIN] // TILE_N + tile
        for block in cutlass.range(first, cute.ceil_div(kv_end, TILE_N) + tile, 2, unroll=1):
            where, boxes = self.loader.lookup(params, index_base, block, kv_end, lane)
            if const_expr(self.num_stages > 2):
                stage = self.stage_of(self.place_of(turn), tile)
                full = self.full(smem, stage, first_sub)
                empty = self.empty(smem, stage, half)
            cute.arch.mbarrier_wait(empty, self.parity_of(turn))
            turn = self.next_turn(turn)
            self.loader.load(params, smem, where, boxes, stage, half, full)
            if (block == first) & (it > 0):
                self._load_q_rope(params, smem, item, head0, it, w)
        return turn

    @cute.jit
    def _gather_pairs(self, params: Params, smem: Smem, item, it, head0, turn, w, lane):
        """The same where the four warps share every (tile, half), in the order in which the consumers release them."""
        kv_end = item[Word.KV_END]
        index_base = item[Word.FIRST_INDEX]
        first = item[Word.KV_BEGIN] // TILE_N
        for block in cutlass.range(first, cute.ceil_div(kv_end, TILE_N), 2, unroll=1):
            rows = [self.loader.lookup(params, index_base, block + tile, kv_end, w, lane) for tile in range(2)]
            place = self.place_of(turn)
            for tile, half in RELEASE_ORDER:
                stage = self.stage_of(place, tile)
                held = self.loader.held(rows[tile], block + tile, kv_end, w)
                ckv_rows, kpe_rows = (self.loader.rows(offset, lane) for offset in rows[tile][:2])
                cute.arch.mbarrier_wait(self.empty(smem, stage, half), self.parity_of(turn))
                if const_expr(self.loader.sparse and tile == half):
                    # The stage's first half to be free: its consumer has masked the tile that was there.
                    paged.tell_chosen(smem, stage, w, lane, held, smem.mbar + self.mbars.chosen + stage)
                full = self.full(smem, stage, half * (self.num_subs // 2))
                self.loader.load(params, smem, ckv_rows, kpe_rows, held, stage, half, full, w, lane)
            turn = self.next_turn(turn)
            if (block == first) & (it > 0):
                self._load_q_rope(params, smem, item, head0, it, w)
        return turn

    @cute.jit
    def _load_q(self, params: Params, smem: Smem, item, head0, it, w):
        """A fourth of Q's sub-tiles per producer warp; warp 3 also announces the bytes of the rope."""
        row0, batch = (cute.arch.make_warp_uniform(x) for x in self.rows.q_at(item, head0))
        cute.arch.mbarrier_wait(smem.mbar + self.mbars.q_empty, (it + 1) % 2)
        q_full = smem.mbar + self.mbars.q_full
        sQ = cute.group_modes(smem.sQ_sub, 0, 2)
        gQ = cute.local_tile(cute.domain_offset((row0, 0, 0), params.mQ), (64, 64), (0, None, None))
        tQs, tQg = cpasync.tma_partition(params.tma_q, 0, cute.make_layout(1), sQ, cute.group_modes(gQ, 0, 2))
        own = self.num_subs // 4
        num_subs = Int32(own)
        if const_expr(self.dims.kpe > 0):
            if w == 3:
                num_subs = Int32(own + 1)
        barriers.expect_tx(q_full, num_subs * SUB_BYTES)
        for i in cutlass.range_constexpr(own):
            cute.copy(params.tma_q, tQg[None, own * w + i, batch], tQs[None, own * w + i], tma_bar_ptr=q_full)

    @cute.jit
    def _load_q_rope(self, params: Params, smem: Smem, item, head0, it, w):
        """Q's rope, if there is one, by warp 3. Its bytes hold P1 until the item before ends."""
        if const_expr(self.dims.kpe > 0):
            if w == 3:
                row0, batch = (cute.arch.make_warp_uniform(x) for x in self.rows.q_at(item, head0))
                cute.arch.mbarrier_wait(smem.mbar + self.mbars.rope_empty, (it + 1) % 2)
                q_full = smem.mbar + self.mbars.q_full
                sR = cute.group_modes(smem.sQr, 0, 2)
                gR = cute.local_tile(cute.domain_offset((row0, 0, 0), params.mQpe), (64, 64), (0, 0, None))
                tRs, tRg = cpasync.tma_partition(params.tma_qpe, 0, cute.make_layout(1), sR, cute.group_modes(gR, 0, 2))
                cute.copy(params.tma_qpe, tRg[None, batch], tRs, tma_bar_ptr=q_full)
