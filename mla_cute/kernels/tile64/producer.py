"""The producer warpgroup of the row-tile kernel (tile64/setup.py has the schedule): K tiles and Q."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr
from cutlass.cute.nvgpu import cpasync

from ..lib import barriers, paged
from ..lib.paged import NUM_SUB, SUB_BYTES, TILE_N
from ..lib.row_map import load_item
from .params import MB_EMPTY, MB_FULL, MB_Q_EMPTY, MB_Q_FULL, MB_ROPE_EMPTY, RELEASE_ORDER


class Producer:
    """Methods of Tile64."""

    @cute.jit
    def _produce_items(self, p, s, item, part, head0, w, lane):
        """`item`: the part's first item where its header holds it."""
        phase = Int32(1)
        first_row = Int32(0)
        num_items = Int32(0)
        if const_expr(self.rows.header_is_item):
            first_row = item[5]
            num_items = item[6]
        else:
            num_items = self.rows.num_items(p, part)
        # Two registers less than a loop over a range: the count waits in a word of sItem that no item uses, which each
        # warp writes and reads for itself.
        s.sItem[0, 7] = num_items
        it = Int32(0)
        while it < s.sItem[0, 7]:
            if const_expr(self.rows.header_is_item):
                if it > 0:
                    load_item(p.mTable, self.rows.item_row(p, part, first_row, it), item)
            else:
                load_item(p.mTable, self.rows.item_row(p, part, first_row, it), item)
            # The consumers read it after q_full. They may be as far back as the epilogue of item it - 2, whose last QK
            # let the Q of item it - 1 in.
            if (w == 0) & (lane == 0):
                for i in cutlass.range_constexpr(self.rows.item_words):
                    s.sItem[it % 4, i] = item[i]
            cute.arch.sync_warp()
            # In front of K: the last QK of the item before frees Q sooner than its PVs free K; and in the first item Q
            # would arrive behind all K (1.5 us at batch 16).
            self._load_q(p, s, item, head0, it, w)
            if it == 0:
                self._load_q_rope(p, s, item, head0, it, w)
            if const_expr(self.by_tma):
                phase = self._tma_pairs(p, s, item, it, head0, phase, w, lane)
            else:
                phase = self._gather_pairs(p, s, item, it, head0, phase, w, lane)
            it += 1

    @cute.jit
    def _tma_pairs(self, p, s, item, it, head0, phase, w, lane):
        """Each warp fills its own (stage, half). Returns the phase of the empty mbarriers."""
        stage = w % 2
        half = w // 2
        full = s.mbar + MB_FULL + stage * NUM_SUB + half * 4
        empty = s.mbar + MB_EMPTY + half * 2 + stage
        kv_end = item[2]
        index_base = item[3]
        first = item[1] // TILE_N + stage
        for block in cutlass.range(first, cute.ceil_div(kv_end, TILE_N) + stage, 2, unroll=1):
            where, boxes = self.loader.lookup(p, index_base, block, kv_end, lane)
            cute.arch.mbarrier_wait(empty, phase)
            phase ^= 1
            self.loader.load(p, s, where, boxes, stage, half, full)
            if (block == first) & (it > 0):
                self._load_q_rope(p, s, item, head0, it, w)
        return phase

    @cute.jit
    def _gather_pairs(self, p, s, item, it, head0, phase, w, lane):
        """The four warps share every (stage, half), in the order in which the consumers release them."""
        kv_end = item[2]
        index_base = item[3]
        first = item[1] // TILE_N
        for block in cutlass.range(first, cute.ceil_div(kv_end, TILE_N), 2, unroll=1):
            rows = [self.loader.lookup(p, index_base, block + stage, kv_end, w, lane) for stage in range(2)]
            for stage, half in RELEASE_ORDER:
                num_rows = paged.rows_of_block(block + stage, kv_end) - w * 16
                ckv_rows, kpe_rows = (self.loader.rows(offset, lane) for offset in rows[stage])
                cute.arch.mbarrier_wait(s.mbar + MB_EMPTY + half * 2 + stage, phase)
                full = s.mbar + MB_FULL + stage * NUM_SUB + half * 4
                self.loader.load(p, s, ckv_rows, kpe_rows, num_rows, stage, half, full, w, lane)
            phase ^= 1
            if (block == first) & (it > 0):
                self._load_q_rope(p, s, item, head0, it, w)
        return phase

    @cute.jit
    def _load_q(self, p, s, item, head0, it, w):
        """Two of Q's sub-tiles 0..7 per producer warp; warp 3 also announces the rope sub-tile."""
        row0, batch = (cute.arch.make_warp_uniform(x) for x in self.rows.q_at(item, head0))
        cute.arch.mbarrier_wait(s.mbar + MB_Q_EMPTY, (it + 1) % 2)
        q_full = s.mbar + MB_Q_FULL
        sQ = cute.group_modes(s.sQ_sub, 0, 2)
        gQ = cute.local_tile(cute.domain_offset((row0, 0, 0), p.mQ), (64, 64), (0, None, None))
        tQs, tQg = cpasync.tma_partition(p.tma_q, 0, cute.make_layout(1), sQ, cute.group_modes(gQ, 0, 2))
        num_subs = Int32(2)
        if w == 3:
            num_subs = Int32(3)
        barriers.expect_tx(q_full, num_subs * SUB_BYTES)
        for i in cutlass.range_constexpr(2):
            cute.copy(p.tma_q, tQg[None, 2 * w + i, batch], tQs[None, 2 * w + i], tma_bar_ptr=q_full)

    @cute.jit
    def _load_q_rope(self, p, s, item, head0, it, w):
        """Q's ninth sub-tile, by warp 3."""
        if w == 3:
            row0, batch = (cute.arch.make_warp_uniform(x) for x in self.rows.q_at(item, head0))
            cute.arch.mbarrier_wait(s.mbar + MB_ROPE_EMPTY, (it + 1) % 2)
            sQ = cute.group_modes(s.sQ_sub, 0, 2)
            gR = cute.local_tile(cute.domain_offset((row0, 0, 0), p.mQpe), (64, 64), (0, 0, None))
            tRs, tRg = cpasync.tma_partition(p.tma_qpe, 0, cute.make_layout(1), sQ, cute.group_modes(gR, 0, 2))
            cute.copy(p.tma_qpe, tRg[None, batch], tRs[None, NUM_SUB - 1], tma_bar_ptr=s.mbar + MB_Q_FULL)
