"""Producers of K tiles from the paged cache into 128-byte-swizzled shared memory.

A K tile is 64 tokens x 576: nine 64 x 64 sub-tiles (eight of ckv, one of kpe), each of 8 KiB. Half 0 of a tile is
ckv sub-tiles 0..3, half 1 is ckv sub-tiles 4..7 and kpe. By TMA, each of the four producer warps owns one
(stage, half) of a pair of tiles and every sub-tile has its own full mbarrier; by cp.async, the four warps fill every
half together and it has one full mbarrier.

Page sizes fall into classes by box_rows = gcd(page_size, 64), the rows that are contiguous whatever the block:
  box_rows >= 8   TMA boxes of box_rows x 64 (8-row swizzle atoms stay 1024-byte aligned): `TmaLoader`
  box_rows <  8   cp.async of 16 bytes per lane: `GatherLoader`
Neither looks up a page id past the request's end, and neither writes the rows past it: whatever shared memory held
stays there, scores of those rows are masked and their V rows are zeroed by the consumers.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, Int64, const_expr
from cutlass._mlir.dialects import llvm
from cutlass.cute.nvgpu import cpasync

from . import sync

TILE_N = 64
SUB_ELEMS = 64 * 64
SUB_BYTES = 2 * SUB_ELEMS
NUM_SUB = 9
# createpolicy encoding of L2::evict_first, as the TMA cache-hint operand: every KV byte is read once per step.
EVICT_FIRST = 0x12F0000000000000


def _cp_async_16(smem_addr, gmem_addr, smem_offset: int, gmem_offset: int) -> None:
    llvm.inline_asm(
        None,
        [smem_addr.ir_value(), gmem_addr.ir_value()],
        f"cp.async.cg.shared.global.L2::128B [$0+{smem_offset}], [$1+{gmem_offset}], 16;",
        "r,l,~{memory}",
        has_side_effects=True,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )


def rows_of_block(block, kv_end):
    """Tokens of a 64-token block that lie before kv_end: 0..64."""
    return cutlass.max(cutlass.min(kv_end - block * TILE_N, Int32(TILE_N)), Int32(0))


class TmaLoader:
    """One TMA box per page part and sub-tile. Lane i of the warp looks up the page of box i.

    The time from a half's release to the issue of its first box is on the critical path, so everything the boxes need
    is in uniform registers before the wait for the release (`lookup`): 280 of 6100 cycles a pair at 128 heads.
    """

    full_arrivals = 1
    one_barrier_per_half = False

    def __init__(self, box_rows: int, evict_first: bool, frugal: bool):
        self.late = frugal and box_rows == 8
        self.box_rows = box_rows
        self.num_boxes = TILE_N // box_rows
        self.evict_first = evict_first

    def _copy(self, atom, src, dst, mbar):
        if self.evict_first:
            cute.copy(atom, src, dst, tma_bar_ptr=mbar, cache_policy=Int64(EVICT_FIRST))
        else:
            cute.copy(atom, src, dst, tma_bar_ptr=mbar)

    @cute.jit
    def _lookup_lane(self, p, index_base, block, kv_end, lane):
        token = block * TILE_N
        if const_expr(self.num_boxes > 1):
            token = token + lane * self.box_rows
        page = Int32(0)
        row = Int32(0)
        if (token < kv_end) & (lane < self.num_boxes):
            slot = token // p.page_size
            row = (token - slot * p.page_size) // self.box_rows
            page = p.mIndices[index_base + slot]
        return page, row

    def lookup(self, p, index_base, block, kv_end, lane):
        """Per box: (page id, box index inside the page), warp-uniform; and how many boxes hold tokens."""
        page, row = self._lookup_lane(p, index_base, block, kv_end, lane)
        uniform = cute.arch.make_warp_uniform
        if self.late:
            where = ((page, row),) * self.num_boxes
        else:
            where = tuple(self._box(page, row, i) for i in range(self.num_boxes))
        boxes = uniform((rows_of_block(block, kv_end) + self.box_rows - 1) // self.box_rows)
        return where, boxes

    def _box(self, page, row, i: int):
        uniform = cute.arch.make_warp_uniform
        return uniform(cute.arch.shuffle_sync(page, i)), uniform(cute.arch.shuffle_sync(row, i))

    @cute.jit
    def load(self, p, s, where, boxes, stage, half, full):
        """Fill half `half` of stage `stage`; `full` points at its first sub-tile's mbarrier."""
        sK = cute.group_modes(cute.flat_divide(s.sK_sub, (self.box_rows, 64)), 0, 2)
        sR = cute.group_modes(cute.flat_divide(s.sR, (self.box_rows, 64)), 0, 2)
        gK = cute.group_modes(cute.local_tile(p.mCkv, (self.box_rows, 64), (None, None, None)), 0, 2)
        gR = cute.group_modes(cute.local_tile(p.mKpe, (self.box_rows, 64), (None, 0, None)), 0, 2)
        tKs, tKg = cpasync.tma_partition(p.tma_ckv, 0, cute.make_layout(1), sK, gK)
        tRs, tRg = cpasync.tma_partition(p.tma_kpe, 0, cute.make_layout(1), sR, gR)
        tx = boxes * (self.box_rows * 128)
        for j in cutlass.range_constexpr(4):
            sub = half * 4 + j
            sync.expect_tx(full + j, tx)
            for i in cutlass.range_constexpr(self.num_boxes):
                page, row = self._box(*where[i], i) if const_expr(self.late) else where[i]
                if i < boxes:
                    self._copy(p.tma_ckv, tKg[None, row, sub, page], tKs[None, i, 0, stage * 8 + sub], full + j)
        if half == 1:
            sync.expect_tx(full + 4, tx)
            for i in cutlass.range_constexpr(self.num_boxes):
                page, row = self._box(*where[i], i) if const_expr(self.late) else where[i]
                if i < boxes:
                    self._copy(p.tma_kpe, tRg[None, row, page], tRs[None, i, 0, stage], full + 4)


class GatherLoader:
    """cp.async of 16 bytes per lane: eight lanes take one 128-byte sub-tile row, so four rows per instruction.

    Warp w takes rows 16 w .. 16 w + 15 of every block; lane l holds (page, row in page) of token 16 w + l % 16. An
    address is made once per row and half and serves the half's sub-tiles through immediate offsets: made per copy, the
    dependent chain cost 250 cycles a copy (one warp per scheduler has nothing to hide it behind). All four warps fill
    the same half because the issue time adds to the time from release to refill. Completion is signalled by
    cp.async.mbarrier.arrive.noinc of all 128 lanes, once per half. The writes are generic-proxy, so the consumers
    fence after their wait, before wgmma reads.
    """

    full_arrivals = 128
    one_barrier_per_half = True

    def __init__(self, frugal: bool):
        self.frugal = frugal

    @cute.jit
    def lookup(self, p, index_base, block, kv_end, w, lane):
        token = block * TILE_N + w * 16 + lane % 16
        page = Int32(0)
        row = Int32(0)
        if token < kv_end:
            slot = token // p.page_size
            row = token - slot * p.page_size
            page = p.mIndices[index_base + slot]
        return page, row

    @cute.jit
    def load(self, p, s, where, block, kv_end, stage: Constexpr, half: Constexpr, full, w, lane):
        rows = rows_of_block(block, kv_end) - w * 16
        chunk = lane % 8
        src = p.mCkv.iterator.toint() + Int64(half * 512 + chunk * 16)
        dst = Int32(s.sK_sub.iterator.toint()) + (stage * 8 + half * 4) * SUB_BYTES + w * 2048
        self._rows(p.mCkv, src, dst, where, rows, lane, 4)
        if const_expr(half == 1):
            src = p.mKpe.iterator.toint() + Int64(chunk * 16)
            dst = Int32(s.sR.iterator.toint()) + stage * SUB_BYTES + w * 2048
            self._rows(p.mKpe, src, dst, where, rows, lane, 1)
        cute.arch.cp_async_mbarrier_arrive_noinc(full)

    @cute.jit
    def _rows(self, cache, src, dst, where, rows, lane, num_sub: Constexpr):
        """16 rows of `num_sub` sub-tiles. Swizzle: the 16-byte chunk index is xored with row % 8."""
        page_stride = Int64(Int32(cache.stride[0]))
        row_stride = Int64(Int32(cache.stride[1]))
        if const_expr(self.frugal):
            for i in cutlass.range(4, unroll=1):
                self._four_rows(src, dst, where, rows, lane, i, page_stride, row_stride, num_sub)
        else:
            for i in cutlass.range_constexpr(4):
                self._four_rows(src, dst, where, rows, lane, i, page_stride, row_stride, num_sub)

    @cute.jit
    def _four_rows(self, src, dst, where, rows, lane, i, page_stride, row_stride, num_sub: Constexpr):
        page_l, row_l = where
        chunk = lane % 8
        sub_row = lane // 8
        row = 4 * i + sub_row
        page = Int64(cute.arch.shuffle_sync(page_l, row))
        page_row = Int64(cute.arch.shuffle_sync(row_l, row))
        if row < rows:
            to = dst + (row * 128 + (chunk ^ (sub_row + 4 * (i % 2))) * 16)
            at = src + (page * page_stride + page_row * row_stride) * 2
            for j in cutlass.range_constexpr(num_sub):
                _cp_async_16(to, at, j * SUB_BYTES, j * 128)


def make_loader(box_rows: int, evict_first: bool, frugal: bool):
    """`frugal`: code of fewer registers, where the producer's 40 are too few (float16; ptxas fits bf16's into them)."""
    return TmaLoader(box_rows, evict_first, frugal) if box_rows else GatherLoader(frugal)
