"""Planner: one CTA turns kv lengths into the work items of a decode step, on the GPU.

    part     one work list; `parts` of them, run by num_tiles CTAs each (one per 64-head row tile of a request)
    item     (request, kv_begin, kv_end) run by one part; requests cut into several items write partial rows
    block    64 tokens; cuts lie on multiples of `cut_unit` blocks: of pairs, as row tiles take them, or of one

Three ways to cut, the cheapest by its largest part is taken (in blocks; `overhead` for starting an item, `penalty`
for having partials at all):

whole     No request is cut. Requests lie on a line, each taking overhead + blocks; part k takes the requests whose
          beginning is nearest to its share [k, k + 1) * payload.       largest part
pieces    Every request is cut into equal pieces of at most P blocks, P the smallest with no more pieces than parts:
          one item per part.                                            P + overhead + penalty
line      Part k takes exactly [k, k + 1) * payload of the line; a request is cut where a boundary falls into it.
                                                                        payload + overhead + penalty

batch_invariant   Pieces again, but of max(FIXED_MIN_BLOCKS, n / FIXED_MAX_PIECES) blocks for a request of n blocks: a
          function of its own length alone, so its arithmetic does not depend on its neighbours. Pieces go to parts
          in order, each to the part in whose share of the line it begins.

Output: one int32 table of 8-word rows, what the decode kernels read
    parts rows   [0, parts)               request, kv_begin, kv_end, first index, partial row or -1 of the part's
                                          first item; that item's table row; number of items; (row 0) merges
    merge rows   [parts, parts + batch)   request, first partial row, pieces: of every request with pieces != 1
    item rows    [parts + batch, ...)     request, kv_begin, kv_end, first index, partial row or -1
Piece s of a request writes the partial rows first + s * H + head. All of it is integer arithmetic on prefix sums
(scratch in global memory), so the plan is a function of the lengths alone.
"""

import dataclasses
from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr, memory
from cutlass.cute.runtime import make_fake_stream

from ...dims import BLOCK
from ..keys import FIXED_MAX_PIECES, FIXED_MIN_BLOCKS, MAX_PARTS, PLANNER
from ..lib.fake import fake_tensor, sym64
from .common import NUM_THREADS, NUM_WARPS, PlannerBase, fake_ints


@dataclasses.dataclass(frozen=True)
class PlanParams:
    mLengths: cute.Tensor
    mLastLen: cute.Tensor
    mTable: cute.Tensor
    mCost: cute.Tensor
    mCount: cute.Tensor
    mFirst: cute.Tensor
    mPieces: cute.Tensor
    batch: Int32
    page_size: Int32
    table_stride: Int32
    num_heads: Int32
    parts: Int32
    min_blocks: Int32
    overhead: Int32
    penalty: Int32
    odd: Int32  # cut_unit - 1


class PlannerArgs(NamedTuple):
    """What the launcher takes."""

    lengths: cute.Tensor  # csr: kv_indptr (batch + 1,); seq_lens (batch,)
    last_len: cute.Tensor  # csr_last: kv_last_page_len (batch,); else anything
    table: cute.Tensor  # (rows, 8)
    scratch: cute.Tensor  # (4, batch + 1)
    parts: Int32
    page_size: Int32
    table_stride: Int32  # seq_lens: entries of a block table row
    num_heads: Int32
    min_blocks: Int32
    overhead: Int32
    penalty: Int32
    cut_unit: Int32  # 1 or 2
    stream: Any


class Planner(PlannerBase):
    name = PLANNER.name

    def compile_args(self) -> tuple:
        return (
            fake_ints(cute.sym_int()),
            fake_ints(cute.sym_int()),
            fake_tensor(Int32, (cute.sym_int(), 8), (8, 1), 16),
            fake_tensor(Int32, (4, cute.sym_int()), (sym64(), 1), 4),
            *(Int32(1) for _ in range(8)),
            make_fake_stream(use_tvm_ffi_env_stream=True),
        )

    @cute.jit
    def __call__(self, *args):
        self._launch(PlannerArgs(*args))

    def _launch(self, args: PlannerArgs) -> None:
        params = PlanParams(
            mLengths=args.lengths,
            mLastLen=args.last_len,
            mTable=args.table,
            mCost=args.scratch[0, None],
            mCount=args.scratch[1, None],
            mFirst=args.scratch[2, None],
            mPieces=args.scratch[3, None],
            batch=Int32(cute.size(args.scratch, mode=[1]) - 1),
            page_size=args.page_size,
            table_stride=args.table_stride,
            num_heads=args.num_heads,
            parts=args.parts,
            min_blocks=args.min_blocks,
            overhead=args.overhead,
            penalty=args.penalty,
            odd=args.cut_unit - 1,
        )
        self.kernel(params).launch(grid=[1, 1, 1], block=[NUM_THREADS, 1, 1], stream=args.stream, use_pdl=self.use_pdl)

    # ------------------------------------------------------------- requests

    @cute.jit
    def _blocks(self, p, b):
        """Blocks of request b, rounded up to cut_unit; 0 when empty or past the batch."""
        blocks = Int32(0)
        if b < p.batch:
            length, _ = self._request(p, b)
            blocks = self._up(p, cute.ceil_div(length, BLOCK))
        return blocks

    def _up(self, p, blocks):
        """To the next multiple of cut_unit."""
        return blocks + (blocks & p.odd)

    @cute.jit
    def _piece_blocks(self, p, blocks, limit):
        """Blocks per piece of a request of `blocks` blocks: equal pieces of at most `limit`, or invariant."""
        if const_expr(self.key.batch_invariant):
            size = cutlass.max(self._up(p, cute.ceil_div(blocks, FIXED_MAX_PIECES)), Int32(FIXED_MIN_BLOCKS))
        else:
            size = self._up(p, cute.ceil_div(blocks, cute.ceil_div(blocks, limit)))
        return size

    @cute.jit
    def _emit(self, p, index, b, block_begin, block_end, part_row):
        length, first = self._request(p, b)
        row = p.parts + p.batch + index
        p.mTable[row, 0] = b
        p.mTable[row, 1] = block_begin * BLOCK
        p.mTable[row, 2] = cutlass.min(block_end * BLOCK, length)
        p.mTable[row, 3] = first
        p.mTable[row, 4] = part_row

    # ----------------------------------------------------------------- line

    @cute.jit
    def _layout_line(self, p, s_warp, t, limit):
        """mCost[b], mCount[b] = prefix sums over the requests before b (also at b = batch) of line length and items.

        limit 0: requests whole; else cut into pieces of at most `limit` blocks. Returns both totals.
        """
        cost0 = Int32(0)
        count0 = Int32(0)
        for base in cutlass.range(0, p.batch + 1, NUM_THREADS, unroll=1):
            b = base + t
            blocks = self._blocks(p, b)
            pieces = Int32(0)
            if blocks > 0:
                pieces = Int32(1)
                if limit > 0:
                    pieces = cute.ceil_div(blocks, self._piece_blocks(p, blocks, limit))
            cost, cost_sum = self._scan(blocks + pieces * p.overhead, s_warp, t)
            count, count_sum = self._scan(pieces, s_warp, t)
            if b <= p.batch:
                p.mCost[b] = cost0 + cost
                p.mCount[b] = count0 + count
            cost0 = cost0 + cost_sum
            count0 = count0 + count_sum
        cute.arch.sync_threads()
        return cost0, count0

    # --------------------------------------------------------------- kernel

    @cute.kernel
    def kernel(self, p: PlanParams):
        t, _, _ = cute.arch.thread_idx()
        alloc = memory.SmemAllocator()

        def words(n):
            return alloc.allocate_tensor(Int32, cute.make_layout(n), 16)

        s_warp, s_start = words(NUM_WARPS), words(MAX_PARTS + 1)
        if const_expr(self.use_pdl):
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()
        if const_expr(self.key.batch_invariant):
            total, num_items = self._layout_line(p, s_warp, t, Int32(1))
            payload = cutlass.max(cute.ceil_div(total, p.parts), p.min_blocks)
            self._share_pieces(p, t, payload, num_items, s_start)
            self._emit_pieces(p, t, num_items, Int32(1))
        else:
            s_cut_b, s_cut_off, s_inner, s_first = (words(MAX_PARTS + 1) for _ in range(4))
            self._plan_balanced(p, t, s_warp, s_start, s_cut_b, s_cut_off, s_inner, s_first)
        cute.arch.sync_threads()
        num_merges = self._list_merges(p, s_warp, t)
        if t < p.parts:
            row = p.parts + p.batch + s_start[t]
            count = s_start[t + 1] - s_start[t]
            p.mTable[t, 5] = row
            p.mTable[t, 6] = count
            p.mTable[t, 7] = num_merges
            if count > 0:
                for i in cutlass.range_constexpr(5):
                    p.mTable[t, i] = p.mTable[row, i]

    @cute.jit
    def _list_merges(self, p, s_warp, t):
        """Rows of the requests that the merge kernel writes: cut ones and empty ones. Returns their number."""
        num_merges = Int32(0)
        for base in cutlass.range(0, p.batch, NUM_THREADS, unroll=1):
            b = base + t
            merged = Int32(0)
            if b < p.batch:
                if p.mPieces[b] != 1:
                    merged = Int32(1)
            before, total = self._scan(merged, s_warp, t)
            if merged == 1:
                row = p.parts + num_merges + before
                p.mTable[row, 0] = b
                p.mTable[row, 1] = p.mFirst[b]
                p.mTable[row, 2] = p.mPieces[b]
            num_merges = num_merges + total
        return num_merges

    @cute.jit
    def _share_pieces(self, p, t, payload, num_items, s_start):
        """s_start[k] = number of pieces that begin before k * payload on the line."""
        if t <= p.parts:
            x = t * payload
            b = self._last_at_or_before(p.mCost, p.batch, x)
            index = p.mCount[b]
            if b < p.batch:
                blocks = self._blocks(p, b)
                if blocks > 0:
                    step = self._piece_blocks(p, blocks, Int32(1)) + p.overhead
                    index = index + cutlass.min(cute.ceil_div(x - p.mCost[b], step), p.mCount[b + 1] - index)
            if t == p.parts:
                index = num_items
            s_start[t] = index

    @cute.jit
    def _emit_pieces(self, p, t, num_items, limit):
        for b in cutlass.range(t, p.batch, NUM_THREADS, unroll=1):
            first = p.mCount[b]
            p.mFirst[b] = first * p.num_heads
            p.mPieces[b] = p.mCount[b + 1] - first
        for i in cutlass.range(t, num_items, NUM_THREADS, unroll=1):
            b = self._last_at_or_before(p.mCount, p.batch, i)
            first = p.mCount[b]
            blocks = self._blocks(p, b)
            size = self._piece_blocks(p, blocks, limit)
            row = i * p.num_heads
            if p.mCount[b + 1] - first == 1:
                row = Int32(-1)
            begin = (i - first) * size
            self._emit(p, i, b, begin, cutlass.min(begin + size, blocks), row)

    @cute.jit
    def _smallest_limit(self, p, t, s_warp, num_requests, num_blocks):
        """Smallest multiple P >= min_blocks of cut_unit that cuts the requests into at most `parts` pieces; 0 if there
        is none.

        16-ary search, one candidate per warp. At most `parts` requests are not empty here, but empty ones may be
        any number, so every warp walks the whole batch.
        """
        lane = t % 32
        w = t // 32
        lo = Int32(0)
        if num_requests <= p.parts:
            lo = cutlass.max(p.min_blocks, self._up(p, cute.ceil_div(num_blocks, p.parts))) >> p.odd
            hi = cutlass.max(lo, num_blocks >> p.odd)
            while lo < hi:
                step = (hi - lo + NUM_WARPS - 1) // NUM_WARPS
                mine = cutlass.min(lo + w * step, hi)
                n = Int32(0)
                for b in cutlass.range(lane, p.batch, 32, unroll=1):
                    n = n + cute.ceil_div(self._blocks(p, b), mine << p.odd)
                for i in cutlass.range_constexpr(5):
                    n = n + cute.arch.shuffle_sync_bfly(n, offset=16 >> i)
                if lane == 0:
                    s_warp[w] = n
                cute.arch.sync_threads()
                below = lo
                above = hi
                for i in cutlass.range_constexpr(NUM_WARPS):
                    candidate = cutlass.min(lo + i * step, hi)
                    if s_warp[i] > p.parts:
                        below = candidate + 1
                for i in cutlass.range_constexpr(NUM_WARPS):
                    candidate = cutlass.min(lo + i * step, hi)
                    if s_warp[i] <= p.parts:
                        above = cutlass.min(above, candidate)
                cute.arch.sync_threads()
                lo = below
                hi = above
        return lo << p.odd

    @cute.jit
    def _cut(self, p, payload, k):
        """Boundary k of the balanced line: (request, block offset inside it)."""
        b = p.batch
        off = Int32(0)
        if k < p.parts:
            x = k * payload
            b = self._last_at_or_before(p.mCost, p.batch, x)
            if b < p.batch:
                off = cutlass.max(x - p.mCost[b] - p.overhead, Int32(0))
                off = off - (off & p.odd)
                if off >= self._blocks(p, b):
                    off = Int32(0)
                    b = b + 1
        return b, off

    @cute.jit
    def _whole_cut(self, p, payload, k):
        """Boundary k moved to the nearest request edge."""
        b = p.batch
        if k < p.parts:
            x = k * payload
            b = self._last_at_or_before(p.mCost, p.batch, x)
            if b < p.batch:
                if x - p.mCost[b] > p.mCost[b + 1] - x:
                    b = b + 1
        return b

    @cute.jit
    def _whole_makespan(self, p, payload, s_cut_b, s_warp, t):
        """Line length of the largest part when requests stay whole; leaves the boundaries in s_cut_b."""
        if t <= p.parts:
            s_cut_b[t] = self._whole_cut(p, payload, t)
        cute.arch.sync_threads()
        worst = Int32(0)
        if t < p.parts:
            worst = p.mCost[s_cut_b[t + 1]] - p.mCost[s_cut_b[t]]
        for i in cutlass.range_constexpr(5):
            worst = cutlass.max(worst, cute.arch.shuffle_sync_bfly(worst, offset=16 >> i))
        if t % 32 == 0:
            s_warp[t // 32] = worst
        cute.arch.sync_threads()
        for i in cutlass.range_constexpr(NUM_WARPS):
            worst = cutlass.max(worst, s_warp[i])
        cute.arch.sync_threads()
        return worst

    @cute.jit
    def _plan_balanced(self, p, t, s_warp, s_start, s_cut_b, s_cut_off, s_inner, s_first):
        total, num_requests = self._layout_line(p, s_warp, t, Int32(0))
        payload = cutlass.max(cute.ceil_div(total, p.parts), p.min_blocks)
        line_cost = payload + p.overhead + p.penalty
        limit = self._smallest_limit(p, t, s_warp, num_requests, total - num_requests * p.overhead)
        pieces_cost = limit + p.overhead + p.penalty
        whole_cost = self._whole_makespan(p, payload, s_cut_b, s_warp, t)
        use_pieces = (limit > 0) & (pieces_cost <= line_cost)
        if use_pieces:
            line_cost = pieces_cost
        if whole_cost <= line_cost:
            if t <= p.parts:
                s_cut_off[t] = Int32(0)
            self._plan_cuts(p, t, s_warp, s_start, s_cut_b, s_cut_off, s_inner, s_first)
        else:
            if use_pieces:
                _, num_items = self._layout_line(p, s_warp, t, limit)
                if t <= p.parts:
                    s_start[t] = cutlass.min(t, num_items)
                self._emit_pieces(p, t, num_items, limit)
            else:
                if t <= p.parts:
                    b, off = self._cut(p, payload, t)
                    s_cut_b[t] = b
                    s_cut_off[t] = off
                self._plan_cuts(p, t, s_warp, s_start, s_cut_b, s_cut_off, s_inner, s_first)

    @cute.jit
    def _plan_cuts(self, p, t, s_warp, s_start, s_cut_b, s_cut_off, s_inner, s_first):
        """Items between the boundaries (s_cut_b, s_cut_off) of the parts."""
        k = t
        cute.arch.sync_threads()
        # inner: the boundary really cuts its request; first: it is the first that does. Counts before a boundary
        # number the items and the split requests.
        inner = Int32(0)
        first = Int32(0)
        if k <= p.parts:
            if s_cut_off[k] > 0:
                inner = Int32(1)
                first = Int32(1)
                if k > 0:
                    if s_cut_b[k - 1] == s_cut_b[k]:
                        if s_cut_off[k - 1] > 0:
                            first = Int32(0)
                        if s_cut_off[k - 1] == s_cut_off[k]:
                            inner = Int32(0)
        inner_before, _ = self._scan(inner, s_warp, t)
        first_before, _ = self._scan(first, s_warp, t)
        if k <= p.parts:
            s_inner[k] = inner_before + inner
            s_first[k] = first_before + first
            s_start[k] = p.mCount[s_cut_b[k]] + inner_before + inner
        cute.arch.sync_threads()

        for b in cutlass.range(t, p.batch, NUM_THREADS, unroll=1):
            self._emit_request(p, b, s_cut_b, s_cut_off, s_inner, s_first)

    @cute.jit
    def _emit_request(self, p, b, s_cut_b, s_cut_off, s_inner, s_first):
        """All pieces of request b: the boundaries in [lo, hi) are those inside it or at its start."""
        lo = Int32(0)
        hi = p.parts + 1
        while lo < hi:  # first boundary at request >= b
            mid = (lo + hi) // 2
            if s_cut_b[mid] < b:
                lo = mid + 1
            else:
                hi = mid
        inner_before = Int32(0)
        split_before = Int32(0)
        if lo > 0:
            inner_before = s_inner[lo - 1]
            split_before = s_first[lo - 1]
        blocks = self._blocks(p, b)
        pieces = Int32(0)
        slot = inner_before + split_before
        if blocks > 0:
            # The last boundary of the request tells how many cuts it has.
            k = lo
            cuts = Int32(0)
            scanning = (k <= p.parts) & (s_cut_b[cutlass.min(k, p.parts)] == b)
            while scanning:
                cuts = s_inner[k] - inner_before
                k = k + 1
                scanning = (k <= p.parts) & (s_cut_b[cutlass.min(k, p.parts)] == b)
            pieces = cuts + 1
            index = p.mCount[b] + inner_before
            begin = Int32(0)
            emitted = Int32(0)
            for j in cutlass.range(lo, k, unroll=1):
                off = s_cut_off[j]
                if off > begin:
                    self._emit(p, index + emitted, b, begin, off, (slot + emitted) * p.num_heads)
                    begin = off
                    emitted = emitted + 1
            row = Int32(-1)
            if pieces > 1:
                row = (slot + emitted) * p.num_heads
            self._emit(p, index + emitted, b, begin, blocks, row)
        p.mFirst[b] = slot * p.num_heads
        p.mPieces[b] = pieces
