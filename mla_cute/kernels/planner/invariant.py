"""Prefill tiles cut by their own request alone (planner/prefill.py explains it)."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from ..keys import FIXED_MAX_ITEMS, FIXED_MAX_PIECES, FIXED_MIN_BLOCKS
from .common import NUM_THREADS, NUM_WARPS
from .tiles import ITEM_AT, KV_LEN, MERGE_AT, Q_LEN, ROW_AT, WHOLE_AT, PrefillTiles, div, div_up

# A request's tiles that may be cut are two per lane of a warp.
assert FIXED_MAX_ITEMS // 2 <= 64


class InvariantCuts(PrefillTiles):
    @cute.jit
    def _plan_invariant(self, p, r, s_warp, t):
        """Returns the numbers of items and merge entries."""
        num_whole = self._layout_whole(p, r, s_warp, t)
        for b in cutlass.range(t // 32, p.batch, NUM_WARPS, unroll=1):
            self._count_request(p, r, b, t % 32)
        cute.arch.sync_threads()
        num_items, num_merges = self._place_requests(p, r, s_warp, t)
        for b in cutlass.range(t // 32, p.batch, NUM_WARPS, unroll=1):
            self._emit_request(p, r, b, t % 32)
        self._emit_whole(p, r, num_whole, t)
        return num_items, num_merges

    @cute.jit
    def _max_pieces(self, p, r, b):
        """Pieces that a tile of request b may have."""
        tiles = cutlass.max(self._num_tiles(p, r, b), Int32(1))
        return cutlass.min(cutlass.max(div(Int32(FIXED_MAX_ITEMS), tiles), Int32(1)), Int32(FIXED_MAX_PIECES))

    @cute.jit
    def _fixed_pieces(self, p, r, b, m, most):
        """(pairs of a piece, pieces, rows) of tile m of request b, cut in at most `most` > 1; no piece past the end."""
        piece = Int32(1)
        pieces = Int32(0)
        rows = Int32(0)
        if m < self._num_tiles(p, r, b):
            pairs = self._pairs(p, r, b, m)
            piece = cutlass.max(div_up(pairs, most), Int32(FIXED_MIN_BLOCKS // 2))
            pieces = div_up(pairs, piece)
            rows = self._rows(p, r, b, m)
        return piece, pieces, rows

    @cute.jit
    def _layout_whole(self, p, r, s_warp, t):
        """Facts of the requests, and WHOLE_AT over the tiles of those with too many tiles to cut. Returns their sum."""
        whole0 = Int32(0)
        for base in cutlass.range(0, p.batch + 1, NUM_THREADS, unroll=1):
            b = base + t
            whole = Int32(0)
            if b < p.batch:
                self._load_request(p, r, b)
                if self._max_pieces(p, r, b) == 1:
                    whole = self._num_tiles(p, r, b)
            before, total = self._scan(whole, s_warp, t)
            if b <= p.batch:
                r[WHOLE_AT, b] = whole0 + before
            whole0 = whole0 + total
        cute.arch.sync_threads()
        return whole0

    @cute.jit
    def _count_request(self, p, r, b, lane):
        """Put items, partial rows and merge entries of request b where their prefix sums will be."""
        most = self._max_pieces(p, r, b)
        tiles = self._num_tiles(p, r, b)
        merges = self._first_tile_seeing(p, r[Q_LEN, b], r[KV_LEN, b], Int32(1))
        items = tiles - merges
        part_rows = Int32(0)
        if most > 1:
            items = Int32(0)
            merges = Int32(0)
            for m in cutlass.range(lane, tiles, 32, unroll=1):
                _, pieces, rows = self._fixed_pieces(p, r, b, m, most)
                items = items + pieces
                if pieces > 1:
                    part_rows = part_rows + pieces * rows
                if pieces != 1:
                    merges = merges + 1
            items = cute.arch.warp_redux_sync(items, "add")
            merges = cute.arch.warp_redux_sync(merges, "add")
            part_rows = cute.arch.warp_redux_sync(part_rows, "add")
        if lane == 0:
            r[ITEM_AT, b] = items
            r[ROW_AT, b] = part_rows
            r[MERGE_AT, b] = merges

    @cute.jit
    def _place_requests(self, p, r, s_warp, t):
        """Turn the counts of the requests into prefix sums. Returns the numbers of items and merge entries."""
        item0 = Int32(0)
        row0 = Int32(0)
        merge0 = Int32(0)
        for base in cutlass.range(0, p.batch, NUM_THREADS, unroll=1):
            b = base + t
            items = Int32(0)
            rows = Int32(0)
            merges = Int32(0)
            if b < p.batch:
                items = r[ITEM_AT, b]
                rows = r[ROW_AT, b]
                merges = r[MERGE_AT, b]
            item_before, item_sum = self._scan(items, s_warp, t)
            row_before, row_sum = self._scan(rows, s_warp, t)
            merge_before, merge_sum = self._scan(merges, s_warp, t)
            if b < p.batch:
                r[ITEM_AT, b] = item0 + item_before
                r[ROW_AT, b] = row0 + row_before
                r[MERGE_AT, b] = merge0 + merge_before
            item0 = item0 + item_sum
            row0 = row0 + row_sum
            merge0 = merge0 + merge_sum
        cute.arch.sync_threads()
        return item0, merge0

    @cute.jit
    def _merge_cut(self, p, r, b, m, pieces, rows, row, merge, lane):
        """Merge entries of the tiles in the warp's lanes that need one.

        Returns the first partial row of the lane's tile, and the next partial row and merge entry after all of them.
        """
        taken = Int32(0)
        if pieces > 1:
            taken = pieces * rows
        incl = taken
        for i in cutlass.range_constexpr(5):
            y = cute.arch.shuffle_sync_up(incl, offset=1 << i, mask_and_clamp=0)
            if lane >= (1 << i):
                incl = incl + y
        part_row = row + incl - taken
        merged = (rows > 0) & (pieces != 1)
        vote = cute.arch.vote_ballot_sync(merged)
        if merged:
            shown = part_row
            if pieces == 0:
                shown = Int32(0)
            mine = merge + cute.arch.popc(vote & ((1 << lane) - 1))
            self._emit_merge(p, r, mine, b, m, shown, pieces)
        return part_row, row + cute.arch.warp_redux_sync(taken, "add"), merge + cute.arch.popc(vote)

    @cute.jit
    def _emit_request(self, p, r, b, lane):
        """Items and merge entries of request b, if its tiles may be cut.

        A lane first holds two tiles, then one (piece, tile) at a time: at most FIXED_MAX_ITEMS of them in all.
        """
        most = self._max_pieces(p, r, b)
        tiles = self._num_tiles(p, r, b)
        if (most > 1) & (tiles > 0):
            index = r[ITEM_AT, b]
            piece0, pieces0, rows = self._fixed_pieces(p, r, b, lane, most)
            part_row0, row, merge = self._merge_cut(p, r, b, lane, pieces0, rows, r[ROW_AT, b], r[MERGE_AT, b], lane)
            piece1 = Int32(1)
            pieces1 = Int32(0)
            part_row1 = Int32(0)
            if tiles > 32:
                piece1, pieces1, rows = self._fixed_pieces(p, r, b, lane + 32, most)
                part_row1, row, merge = self._merge_cut(p, r, b, lane + 32, pieces1, rows, row, merge, lane)
            cells = tiles * cute.arch.warp_redux_sync(cutlass.max(pieces0, pieces1), "max")
            for base in cutlass.range(0, cells, 32, unroll=1):
                s = div(base + lane, tiles)
                m = base + lane - s * tiles
                piece = cute.arch.shuffle_sync(piece0, m % 32)
                pieces = cute.arch.shuffle_sync(pieces0, m % 32)
                part_row = cute.arch.shuffle_sync(part_row0, m % 32)
                if tiles > 32:
                    high_piece = cute.arch.shuffle_sync(piece1, m % 32)
                    high_pieces = cute.arch.shuffle_sync(pieces1, m % 32)
                    high_part_row = cute.arch.shuffle_sync(part_row1, m % 32)
                    if m >= 32:
                        piece = high_piece
                        pieces = high_pieces
                        part_row = high_part_row
                if base + lane >= cells:
                    pieces = Int32(0)
                index = self._emit_piece(p, r, index, b, m, piece, pieces, part_row, s)

    @cute.jit
    def _emit_whole(self, p, r, num_whole, t):
        """Items and empty tiles of the requests that are never cut."""
        begin, end = self._share(num_whole, t)
        b = Int32(0)
        for i in cutlass.range(begin + t % 32, end, 32, unroll=1):
            b = self._request_of(p, r[WHOLE_AT, None], b, i)
            m = i - r[WHOLE_AT, b]
            pairs = self._pairs(p, r, b, m)
            if pairs > 0:
                empty = self._first_tile_seeing(p, r[Q_LEN, b], r[KV_LEN, b], Int32(1))
                self._emit_item(p, r, r[ITEM_AT, b] + m - empty, b, m, pairs, Int32(0), Int32(-1))
            else:
                self._emit_merge(p, r, r[MERGE_AT, b] + m, b, m, Int32(0), Int32(0))
