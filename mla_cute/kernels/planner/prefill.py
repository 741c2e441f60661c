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

from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr, memory
from cutlass.cute.runtime import make_fake_stream

from ..keys import COST_CLASSES, FACTS, MAX_PARTS, PREFILL_PLANNER
from ..lib.fake import fake_tensor, sym64
from .balanced import MAX_CUTS, BalancedCuts, Tail
from .common import NUM_THREADS, NUM_WARPS, fake_ints
from .invariant import InvariantCuts
from .tiles import PrefillPlanParams, div

SMEM_REQUESTS = 1024

assert MAX_PARTS <= NUM_THREADS


class PrefillPlannerArgs(NamedTuple):
    """What the launcher takes."""

    qo_indptr: cute.Tensor  # (batch + 1,)
    lengths: cute.Tensor  # csr: kv_indptr (batch + 1,); seq_lens (batch,)
    last_len: cute.Tensor  # csr_last: kv_last_page_len (batch,); else anything
    table: cute.Tensor  # (rows, 8)
    scratch: cute.Tensor  # (FACTS, batch + 1)
    parts: Int32
    page_size: Int32
    table_stride: Int32  # seq_lens: entries of a block table row
    num_heads: Int32
    min_blocks: Int32
    overhead: Int32
    penalty: Int32
    causal: Int32  # 0 or 1
    max_tiles: Int32
    stream: Any


class PrefillPlanner(BalancedCuts, InvariantCuts):
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
    def __call__(self, *args):
        self._launch(PrefillPlannerArgs(*args))

    def _launch(self, args: PrefillPlannerArgs) -> None:
        params = PrefillPlanParams(
            mQoIndptr=args.qo_indptr,
            mLengths=args.lengths,
            mLastLen=args.last_len,
            mTable=args.table,
            mScratch=args.scratch,
            batch=Int32(cute.size(args.scratch, mode=[1]) - 1),
            page_size=args.page_size,
            table_stride=args.table_stride,
            num_heads=args.num_heads,
            parts=args.parts,
            min_blocks=args.min_blocks,
            overhead=args.overhead,
            penalty=args.penalty,
            causal=args.causal,
            item_row=args.parts + args.max_tiles,
        )
        self.kernel(params).launch(grid=[1, 1, 1], block=[NUM_THREADS, 1, 1], stream=args.stream, use_pdl=self.use_pdl)

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
            p.mTable[t, 1] = div(cutlass.max(num_items - t, Int32(0)) + p.parts - 1, p.parts)
            if t == 0:
                p.mTable[0, 7] = num_merges
