"""Planner of prefill: one CTA turns query and kv lengths into the work items of a step, on the GPU.

    row tile  TILE_M rows of a request, a row being a (query token, head) pair; tile m of a request begins at row
              TILE_M * m and sees kv_hi(m) keys, which does not decrease with m
    pair      two 64-token blocks, the unit of costs and cuts here; cuts lie on pairs, as the main kernel takes them
    part      one work list; `parts` of them, each run by one CTA
    item      (row tile, kv_begin, kv_end) run by one part; tiles cut into several items write partial rows
    empty     a tile that sees no key: no item, the merge kernel writes its zeros

Balanced  Tiles are ranked by their pairs, longest first, in at most COST_CLASSES classes; inside a class by request,
          then from the last tile to the first. Whole rounds of one tile per part are dealt out back and forth. The
          tail, fewer tiles than parts, is cut into equal pieces of at most the tail's longest tile / c: of c = 1..64
          the one of least ceil(items / parts) * (piece + overhead), and penalty if anything is cut.
          Its items follow in the order of pieces: every tile's first, then every second.
batch_invariant   Every tile is cut by its own pairs and its request's number of tiles alone. Items go to the parts in
          turn, in the order request, piece, tile.

Ranks come from a stable counting sort. Every warp counts the classes of its share of the tiles; prefix sums over
(class, warp) say where the warp's tiles of a class begin; then it walks its tiles again. That counts equal classes in
order of m; tiles of one request and class lie in one closed-form range of m, in which the order is turned round.

Output: one int32 table of 8-word rows, what the prefill kernels read
    parts rows      [0, parts)                    table row of the part's first item, number of items; (row 0, word 7)
                                                  number of merge entries
    merge rows      [parts, parts + max_tiles)    first global row, first partial row, pieces (0: empty tile), rows; cut
                                                  tiles first, then empty ones (batch_invariant: in order)
    item rows       [parts + max_tiles, ...)      first global row, kv_begin, kv_end, first index, partial row of its
                                                  row 0 or -1, rows, shift. Item k of part p is row k * parts + p
A global row is query token * num_heads + head; query token T (of all requests) sees keys below T + shift. Piece s of a
tile writes the partial rows first + s * rows + r. Facts of the requests are kept in shared memory while they fit, else
in global scratch. All of it is integer arithmetic, so the plan is a function of the lengths alone.
"""

import dataclasses

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Uint32, const_expr, memory
from cutlass.cute.runtime import make_fake_stream

from .fake import fake_tensor, sym64
from .plan_common import NUM_THREADS, NUM_WARPS, PlannerBase, fake_ints
from .registry import (
    BLOCK,
    COST_CLASSES,
    FIXED_MAX_ITEMS,
    FIXED_MAX_PIECES,
    FIXED_MIN_BLOCKS,
    MAX_PARTS,
    PREFILL_PLANNER,
    TAIL_ITEMS_PER_PART,
    TILE_M,
)

PAIR = 2 * BLOCK
SMEM_REQUESTS = 1024
MAX_CUTS = 64  # candidates, and so pieces of a tail tile
SEES_ALL = 1 << 30  # shift of queries without a causal limit
INT_MAX = 2**31 - 1

# A request's facts: rows of a tensor (8, requests + 1). The *_AT are prefix sums, also at b = batch.
Q_START, Q_LEN, KV_LEN, FIRST = 0, 1, 2, 3
WORK_AT, EMPTY_AT = 4, 5  # balanced: tiles with work, empty tiles
ITEM_AT, ROW_AT, MERGE_AT, WHOLE_AT = 4, 5, 6, 7  # batch_invariant: tiles of the requests that are never cut last
FACTS = 8

# A request's tiles that may be cut are two per lane of a warp.
assert FIXED_MAX_ITEMS // 2 <= 64
assert MAX_PARTS <= NUM_THREADS


@dataclasses.dataclass(frozen=True)
class PrefillPlanParams:
    mQoIndptr: cute.Tensor
    mLengths: cute.Tensor
    mLastLen: cute.Tensor
    mTable: cute.Tensor
    mScratch: cute.Tensor
    batch: Int32
    page_size: Int32
    table_stride: Int32
    num_heads: Int32
    parts: Int32
    min_blocks: Int32
    overhead: Int32
    penalty: Int32
    causal: Int32
    item_row: Int32


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


@cute.jit
def _div(a, b):
    """a // b of a >= 0, b > 0. The signed operator rounds down, which costs more."""
    return Int32(Uint32(a) // Uint32(b))


@cute.jit
def _div_up(a, b):
    return _div(a + b - 1, b)


class PrefillPlanner(PlannerBase):
    name = PREFILL_PLANNER.name

    def compile_args(self) -> tuple:
        return (
            fake_ints(cute.sym_int()),
            fake_ints(cute.sym_int()),
            fake_ints(cute.sym_int()),
            fake_tensor(Int32, (cute.sym_int(), 8), (8, 1), 16),
            fake_tensor(Int32, (FACTS, cute.sym_int()), (sym64(), 1), 4),
            *(Int32(1) for _ in range(9)),
            make_fake_stream(use_tvm_ffi_env_stream=True),
        )

    @cute.jit
    def __call__(
        self,
        qo_indptr: cute.Tensor,  # (batch + 1,)
        lengths: cute.Tensor,  # csr: kv_indptr (batch + 1,); seq_lens (batch,)
        last_len: cute.Tensor,  # csr_last: kv_last_page_len (batch,); else anything
        table: cute.Tensor,  # (rows, 8)
        scratch: cute.Tensor,  # (8, batch + 1)
        parts: Int32,
        page_size: Int32,
        table_stride: Int32,  # seq_lens: entries of a block table row
        num_heads: Int32,
        min_blocks: Int32,
        overhead: Int32,
        penalty: Int32,
        causal: Int32,  # 0 or 1
        max_tiles: Int32,
        stream,
    ):
        params = PrefillPlanParams(
            mQoIndptr=qo_indptr,
            mLengths=lengths,
            mLastLen=last_len,
            mTable=table,
            mScratch=scratch,
            batch=Int32(cute.size(scratch, mode=[1]) - 1),
            page_size=page_size,
            table_stride=table_stride,
            num_heads=num_heads,
            parts=parts,
            min_blocks=min_blocks,
            overhead=overhead,
            penalty=penalty,
            causal=causal,
            item_row=parts + max_tiles,
        )
        self.kernel(params).launch(grid=[1, 1, 1], block=[NUM_THREADS, 1, 1], stream=stream, use_pdl=self.use_pdl)

    # ---------------------------------------------------------------- tiles

    @cute.jit
    def _num_tiles(self, p, r, b):
        return (r[Q_LEN, b] * p.num_heads + TILE_M - 1) // TILE_M

    @cute.jit
    def _kv_hi(self, p, r, b, m):
        """Keys that tile m of request b sees."""
        kv_hi = r[KV_LEN, b]
        if p.causal != 0:
            last_token = cutlass.min(_div(TILE_M * m + TILE_M - 1, p.num_heads), r[Q_LEN, b] - 1)
            kv_hi = cutlass.max(kv_hi - r[Q_LEN, b] + last_token + 1, Int32(0))
        return kv_hi

    @cute.jit
    def _pairs(self, p, r, b, m):
        return (self._kv_hi(p, r, b, m) + PAIR - 1) // PAIR

    @cute.jit
    def _first_tile_seeing(self, p, q_len, kv_len, keys):
        """First tile that sees at least `keys` >= 1 keys; the number of tiles when none does.

        Its last token is at least `token`, so it is the tile of that token's first row.
        """
        m = (q_len * p.num_heads + TILE_M - 1) // TILE_M
        if keys <= kv_len:
            m = Int32(0)
            if p.causal != 0:
                token = cutlass.max(q_len - kv_len + keys - 1, Int32(0))
                m = token * p.num_heads // TILE_M
        return m

    @cute.jit
    def _request_of(self, p, at, b, i):
        """The request that index i falls into, by the prefix sums `at`; `b` is that of a smaller index."""
        if i >= at[b + 1]:
            b = self._last_at_or_before(at, p.batch, i)
        return b

    @cute.jit
    def _load_request(self, p, r, b):
        """Keep the facts of request b < batch. Returns (q_len, kv_len)."""
        q_start = p.mQoIndptr[b]
        q_len = cutlass.max(p.mQoIndptr[b + 1] - q_start, Int32(0))
        kv_len, first = self._request(p, b)
        r[Q_START, b] = q_start
        r[Q_LEN, b] = q_len
        r[KV_LEN, b] = kv_len
        r[FIRST, b] = first
        return q_len, kv_len

    # --------------------------------------------------------------- output

    @cute.jit
    def _write_half(self, p, row, half, w0, w1, w2, w3):
        words = cute.make_rmem_tensor((4,), Int32)
        words[0] = w0
        words[1] = w1
        words[2] = w2
        words[3] = w3
        cute.autovec_copy(words, cute.local_tile(p.mTable[row, None], (4,), (half,)))

    @cute.jit
    def _rows(self, p, r, b, m):
        return cutlass.min(r[Q_LEN, b] * p.num_heads - TILE_M * m, Int32(TILE_M))

    @cute.jit
    def _emit_item(self, p, r, index, b, m, piece, s, part_row):
        """Item row `index`: piece s, of `piece` pairs, of tile m of request b."""
        q_start = r[Q_START, b]
        begin = s * piece * PAIR
        end = cutlass.min(begin + piece * PAIR, self._kv_hi(p, r, b, m))
        shift = Int32(SEES_ALL)
        if p.causal != 0:
            shift = r[KV_LEN, b] - r[Q_LEN, b] + 1 - q_start
        row = p.item_row + index
        self._write_half(p, row, 0, q_start * p.num_heads + TILE_M * m, begin, end, r[FIRST, b])
        self._write_half(p, row, 1, part_row, self._rows(p, r, b, m), shift, Int32(0))

    @cute.jit
    def _emit_piece(self, p, r, index, b, m, piece, pieces, part_row, s):
        """Piece s of the tile in each lane of the warp, if it has one. Returns the index after them."""
        vote = cute.arch.vote_ballot_sync(pieces > s)
        if pieces > s:
            mine = index + cute.arch.popc(vote & ((1 << cute.arch.lane_idx()) - 1))
            row = Int32(-1)
            if pieces > 1:
                row = part_row + s * self._rows(p, r, b, m)
            self._emit_item(p, r, mine, b, m, piece, s, row)
        return index + cute.arch.popc(vote)

    @cute.jit
    def _emit_merge(self, p, r, index, b, m, part_row, pieces):
        row = r[Q_START, b] * p.num_heads + TILE_M * m
        self._write_half(p, p.parts + index, 0, row, part_row, pieces, self._rows(p, r, b, m))

    # --------------------------------------------------------------- kernel

    @cute.kernel
    def kernel(self, p: PrefillPlanParams):
        t, _, _ = cute.arch.thread_idx()
        alloc = memory.SmemAllocator()

        def words(*shape):
            return alloc.allocate_tensor(Int32, cute.make_layout(shape, stride=(*shape[1:], 1)), 16)

        s_warp, s_facts = words(NUM_WARPS), words(FACTS, SMEM_REQUESTS + 1)
        tail = None
        if const_expr(not self.key.batch_invariant):
            tail = Tail(
                words(NUM_WARPS, COST_CLASSES), *(words(MAX_PARTS) for _ in range(6)), words(MAX_CUTS), words(MAX_CUTS)
            )
        if const_expr(self.use_pdl):
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()
        if p.batch <= SMEM_REQUESTS:
            self._plan(p, s_facts, s_warp, tail, t)
        else:
            self._plan(p, p.mScratch, s_warp, tail, t)

    @cute.jit
    def _plan(self, p, r, s_warp, tail, t):
        num_items = Int32(0)
        num_merges = Int32(0)
        if const_expr(self.key.batch_invariant):
            num_items, num_merges = self._plan_invariant(p, r, s_warp, t)
        else:
            num_items, num_merges = self._plan_balanced(p, r, s_warp, tail, t)
        if t < p.parts:
            p.mTable[t, 0] = p.item_row + t
            p.mTable[t, 1] = _div(cutlass.max(num_items - t, Int32(0)) + p.parts - 1, p.parts)
            if t == 0:
                p.mTable[0, 7] = num_merges

    # ------------------------------------------------------------- balanced

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
        uncut = _div(num_work, p.parts) * p.parts
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
    def _share(self, n, t):
        """[begin, end) of n tiles, the share of the thread's warp."""
        share = (n + NUM_THREADS - 1) // NUM_THREADS * 32
        begin = t // 32 * share
        return begin, cutlass.min(begin + share, n)

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
                    k = _div(rank, p.parts)
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
        piece = _div_up(pairs, _div_up(pairs, limit))
        return piece, _div_up(pairs, piece)

    @cute.jit
    def _tail_limit(self, p, longest, c):
        return cutlass.max(p.min_blocks // 2, _div_up(longest, c))

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
                    cost = _div_up(items, p.parts) * (2 * limit + p.overhead)
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

    # ------------------------------------------------------ batch invariant

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
        return cutlass.min(cutlass.max(_div(Int32(FIXED_MAX_ITEMS), tiles), Int32(1)), Int32(FIXED_MAX_PIECES))

    @cute.jit
    def _fixed_pieces(self, p, r, b, m, most):
        """(pairs of a piece, pieces, rows) of tile m of request b, cut into at most `most` > 1; 0 pieces past its end."""
        piece = Int32(1)
        pieces = Int32(0)
        rows = Int32(0)
        if m < self._num_tiles(p, r, b):
            pairs = self._pairs(p, r, b, m)
            piece = cutlass.max(_div_up(pairs, most), Int32(FIXED_MIN_BLOCKS // 2))
            pieces = _div_up(pairs, piece)
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
                s = _div(base + lane, tiles)
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
