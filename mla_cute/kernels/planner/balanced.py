"""Prefill tiles dealt to the parts by cost, the last ones cut (planner/prefill.py explains it)."""

import dataclasses

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from ...dims import TILE_M
from ..keys import COST_CLASSES, TAIL_ITEMS_PER_PART
from .common import NUM_THREADS, NUM_WARPS
from .tiles import EMPTY_AT, KV_LEN, PAIR, Q_LEN, WORK_AT, PrefillTiles, div, div_up

MAX_CUTS = 64  # candidates, and so pieces of a tail tile
INT_MAX = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Tail:
    """Shared memory of the balanced planner; tiles of the tail by slot."""

    class_at: cute.Tensor  # (NUM_WARPS, COST_CLASSES), longest class first
    request: cute.Tensor
    m: cute.Tensor
    pairs: cute.Tensor
    piece: cute.Tensor  # pairs of a piece
    pieces: cute.Tensor
    part_row: cute.Tensor
    cost: cute.Tensor  # (MAX_CUTS,) of each candidate
    level: cute.Tensor  # (MAX_CUTS,) tiles that have a piece s


class BalancedCuts(PrefillTiles):
    @cute.jit
    def _plan_balanced(self, p, r, s_warp, tail, t):
        """Returns the numbers of items and merge entries."""
        num_work, num_empty, longest = self._layout_tiles(p, r, s_warp, t)
        shift = Int32(0)
        while (longest >> shift) >= COST_CLASSES:
            shift = shift + 1
        top = longest >> shift
        self._count_classes(p, r, tail, num_work, shift, top, t)
        cute.arch.sync_threads()
        self._place_classes(s_warp, tail, top, t)
        uncut = div(num_work, p.parts) * p.parts
        self._deal_tiles(p, r, tail, num_work, uncut, shift, top, t)
        cute.arch.sync_threads()
        num_items = uncut
        num_merges = Int32(0)
        if uncut < num_work:
            tail_items, num_merges = self._plan_tail(p, r, s_warp, tail, uncut, num_work - uncut, t)
            num_items = uncut + tail_items
        b = Int32(0)
        for i in cutlass.range(t, num_empty, NUM_THREADS, unroll=1):
            b = self._request_of(p, r[EMPTY_AT, None], b, i)
            self._emit_merge(p, r, num_merges + i, b, i - r[EMPTY_AT, b], Int32(0), Int32(0))
        return num_items, num_merges + num_empty

    @cute.jit
    def _layout_tiles(self, p, r, s_warp, t):
        """Facts and prefix sums of the requests. Returns numbers of tiles with work and empty ones, most pairs."""
        work0 = Int32(0)
        empty0 = Int32(0)
        longest = Int32(0)
        for base in cutlass.range(0, p.batch + 1, NUM_THREADS, unroll=1):
            b = base + t
            work = Int32(0)
            empty = Int32(0)
            if b < p.batch:
                q_len, kv_len = self._load_request(p, r, b)
                empty = self._first_tile_seeing(p, q_len, kv_len, Int32(1))
                work = (q_len * p.num_heads + TILE_M - 1) // TILE_M - empty
                if work > 0:
                    longest = cutlass.max(longest, (kv_len + PAIR - 1) // PAIR)
            work_before, work_sum = self._scan(work, s_warp, t)
            empty_before, empty_sum = self._scan(empty, s_warp, t)
            if b <= p.batch:
                r[WORK_AT, b] = work0 + work_before
                r[EMPTY_AT, b] = empty0 + empty_before
            work0 = work0 + work_sum
            empty0 = empty0 + empty_sum
        longest = cute.arch.warp_redux_sync(longest, "max")
        if t % 32 == 0:
            s_warp[t // 32] = longest
        cute.arch.sync_threads()
        for i in cutlass.range_constexpr(NUM_WARPS):
            longest = cutlass.max(longest, s_warp[i])
        cute.arch.sync_threads()
        return work0, empty0, longest

    @cute.jit
    def _work_tile(self, p, r, b, i):
        """(request, m) of the tile with work number i; `b` is the request of a smaller number."""
        b = self._request_of(p, r[WORK_AT, None], b, i)
        return b, i - r[WORK_AT, b] + r[EMPTY_AT, b + 1] - r[EMPTY_AT, b]

    @cute.jit
    def _bump(self, counter, key, before, peers):
        """Add each class's tiles of the warp to its counter, the first of them for all; returns what was there."""
        at = Int32(0)
        if key >= 0:
            at = counter[key]
        cute.arch.sync_warp()
        if key >= 0:
            if before == 0:
                counter[key] = at + cute.arch.popc(peers)
        cute.arch.sync_warp()
        return at

    @cute.jit
    def _classify(self, key):
        """(lanes of the warp with the same key, how many of them are lower)."""
        peers = Int32(cute.arch.match_sync(0xFFFFFFFF, key))
        return peers, cute.arch.popc(peers & ((1 << cute.arch.lane_idx()) - 1))

    @cute.jit
    def _count_classes(self, p, r, tail, num_work, shift, top, t):
        counter = tail.class_at[t // 32, None]
        for key in cutlass.range(t % 32, top + 1, 32, unroll=1):
            counter[key] = Int32(0)
        cute.arch.sync_warp()
        begin, end = self._share(num_work, t)
        b = Int32(0)
        for base in cutlass.range(begin, end, 32, unroll=1):
            i = base + t % 32
            key = Int32(-1)
            if i < end:
                b, m = self._work_tile(p, r, b, i)
                key = top - (self._pairs(p, r, b, m) >> shift)
            peers, before = self._classify(key)
            self._bump(counter, key, before, peers)

    @cute.jit
    def _place_classes(self, s_warp, tail, top, t):
        """class_at[w, key] = number of tiles that are of longer classes, or of this one and another warp's before w."""
        placed = Int32(0)
        for base in cutlass.range(0, top + 1, NUM_THREADS, unroll=1):
            key = base + t
            count = Int32(0)
            if key <= top:
                for w in cutlass.range_constexpr(NUM_WARPS):
                    count = count + tail.class_at[w, key]
            before, total = self._scan(count, s_warp, t)
            if key <= top:
                at = placed + before
                for w in cutlass.range_constexpr(NUM_WARPS):
                    here = tail.class_at[w, key]
                    tail.class_at[w, key] = at
                    at = at + here
            placed = placed + total
        cute.arch.sync_threads()

    @cute.jit
    def _first_tile_of_class(self, p, r, b, cost_class, shift):
        """First tile with work of request b whose class is at least this."""
        keys = (cutlass.max(cost_class << shift, Int32(1)) - 1) * PAIR + 1
        return self._first_tile_seeing(p, r[Q_LEN, b], r[KV_LEN, b], keys)

    @cute.jit
    def _deal_tiles(self, p, r, tail, num_work, uncut, shift, top, t):
        """Rank every tile; write the items of whole rounds and list the tail."""
        counter = tail.class_at[t // 32, None]
        begin, end = self._share(num_work, t)
        b = Int32(0)
        for base in cutlass.range(begin, end, 32, unroll=1):
            i = base + t % 32
            key = Int32(-1)
            m = Int32(0)
            pairs = Int32(0)
            if i < end:
                b, m = self._work_tile(p, r, b, i)
                pairs = self._pairs(p, r, b, m)
                key = top - (pairs >> shift)
            peers, before = self._classify(key)
            rank = self._bump(counter, key, before, peers) + before
            if i < end:
                cost_class = pairs >> shift
                first = self._first_tile_of_class(p, r, b, cost_class, shift)
                last = self._first_tile_of_class(p, r, b, cost_class + 1, shift) - 1
                rank = rank + first + last - 2 * m
                if rank < uncut:
                    k = div(rank, p.parts)
                    x = rank - k * p.parts
                    if k % 2 == 1:
                        x = p.parts - 1 - x
                    self._emit_item(p, r, k * p.parts + x, b, m, pairs, Int32(0), Int32(-1))
                else:
                    slot = rank - uncut
                    tail.request[slot] = b
                    tail.m[slot] = m
                    tail.pairs[slot] = pairs

    # ----------------------------------------------------------------- tail

    @cute.jit
    def _equal_pieces(self, pairs, limit):
        """(pairs of a piece, number of pieces) when no piece may exceed `limit`."""
        piece = div_up(pairs, div_up(pairs, limit))
        return piece, div_up(pairs, piece)

    @cute.jit
    def _tail_limit(self, p, longest, c):
        return cutlass.max(p.min_blocks // 2, div_up(longest, c))

    @cute.jit
    def _cheapest_cut(self, p, tail, num_tiles, t):
        """(most pairs of a piece, bound of the pieces of a tile) that costs least. One candidate per warp at a time."""
        lane = t % 32
        longest = Int32(0)
        for i in cutlass.range(lane, num_tiles, 32, unroll=1):
            longest = cutlass.max(longest, tail.pairs[i])
        longest = cute.arch.warp_redux_sync(longest, "max")
        for c in cutlass.range(t // 32 + 1, MAX_CUTS + 1, NUM_WARPS, unroll=1):
            limit = self._tail_limit(p, longest, c)
            cost = Int32(INT_MAX)
            # An equal limit costs the same, and the first counts.
            fresh = c == 1
            if c > 1:
                fresh = limit != self._tail_limit(p, longest, c - 1)
            if fresh:
                items = Int32(0)
                for i in cutlass.range(lane, num_tiles, 32, unroll=1):
                    _, pieces = self._equal_pieces(tail.pairs[i], limit)
                    items = items + pieces
                items = cute.arch.warp_redux_sync(items, "add")
                if items <= TAIL_ITEMS_PER_PART * p.parts:
                    cost = div_up(items, p.parts) * (2 * limit + p.overhead)
                    if items > num_tiles:
                        cost = cost + p.penalty
            if lane == 0:
                tail.cost[c - 1] = cost
        cute.arch.sync_threads()
        low = tail.cost[lane]
        high = tail.cost[lane + 32]
        least = cute.arch.warp_redux_sync(cutlass.min(low, high), "min")
        best = Int32(MAX_CUTS)
        if high == least:
            best = lane + 33
        if low == least:
            best = lane + 1
        best = cute.arch.warp_redux_sync(best, "min")
        return self._tail_limit(p, longest, best), best

    @cute.jit
    def _plan_tail(self, p, r, s_warp, tail, index, num_tiles, t):
        """Cut the tail and write its items from item row `index` on. Returns the numbers of items and cut tiles."""
        lane = t % 32
        limit, most = self._cheapest_cut(p, tail, num_tiles, t)
        piece = Int32(0)
        pieces = Int32(0)
        rows = Int32(0)
        cut = Int32(0)
        if t < num_tiles:
            piece, pieces = self._equal_pieces(tail.pairs[t], limit)
            if pieces > 1:
                cut = Int32(1)
                rows = pieces * self._rows(p, r, tail.request[t], tail.m[t])
        part_row, _ = self._scan(rows, s_warp, t)
        cut_before, num_cut = self._scan(cut, s_warp, t)
        _, num_items = self._scan(pieces, s_warp, t)
        if t < num_tiles:
            tail.piece[t] = piece
            tail.pieces[t] = pieces
            tail.part_row[t] = part_row
            if cut == 1:
                self._emit_merge(p, r, cut_before, tail.request[t], tail.m[t], part_row, pieces)
        cute.arch.sync_threads()

        for s in cutlass.range(t // 32, most, NUM_WARPS, unroll=1):
            count = Int32(0)
            for base in cutlass.range(0, num_tiles, 32, unroll=1):
                has = Int32(0)
                if base + lane < num_tiles:
                    if tail.pieces[base + lane] > s:
                        has = Int32(1)
                count = count + has
            count = cute.arch.warp_redux_sync(count, "add")
            if lane == 0:
                tail.level[s] = count
        cute.arch.sync_threads()
        for s in cutlass.range(t // 32, most, NUM_WARPS, unroll=1):
            before = Int32(0)
            if lane < s:
                before = tail.level[lane]
            if lane + 32 < s:
                before = before + tail.level[lane + 32]
            at = index + cute.arch.warp_redux_sync(before, "add")
            for base in cutlass.range(0, num_tiles, 32, unroll=1):
                slot = cutlass.min(base + lane, num_tiles - 1)
                pieces = tail.pieces[slot]
                if base + lane >= num_tiles:
                    pieces = Int32(0)
                at = self._emit_piece(
                    p, r, at, tail.request[slot], tail.m[slot], tail.piece[slot], pieces, tail.part_row[slot], s
                )
        return num_items, num_cut
