"""Producers of K tiles from the paged cache into 128-byte-swizzled shared memory.

A K tile is 64 tokens x 576: nine 64 x 64 sub-tiles (eight of ckv, one of kpe), each of 8 KiB with its own full
mbarrier. Four producer warps each own one (stage, half) of a pair of tiles: half 0 is ckv sub-tiles 0..3, half 1
is ckv sub-tiles 4..7 and kpe.

Page sizes fall into classes by box_rows = gcd(page_size, 64), the rows that are contiguous whatever the block:
  box_rows >= 8   TMA boxes of box_rows x 64 (8-row swizzle atoms stay 1024-byte aligned): `TmaLoader`
  box_rows <  8   cp.async of 16 bytes per lane: `GatherLoader`
Neither looks up a page id past the request's end, and neither writes the rows past it: whatever shared memory held
stays there, scores of those rows are masked and their V rows are zeroed by the consumers.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr
from cutlass._mlir.dialects import llvm
from cutlass.cute.nvgpu import cpasync

from . import sync

TILE_N = 64
SUB_ELEMS = 64 * 64
SUB_BYTES = 2 * SUB_ELEMS
NUM_SUB = 9
# createpolicy encoding of L2::evict_first, as the TMA cache-hint operand: every KV byte is read once per step.
EVICT_FIRST = 0x12F0000000000000


def _cp_async_16(smem_addr, gmem_addr) -> None:
    llvm.inline_asm(
        None,
        [smem_addr.ir_value(), gmem_addr.ir_value()],
        "cp.async.cg.shared.global.L2::128B [$0], [$1], 16;",
        "r,l,~{memory}",
        has_side_effects=True,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )


def rows_of_block(block, kv_end):
    """Tokens of a 64-token block that lie before kv_end: 0..64."""
    return cutlass.max(cutlass.min(kv_end - block * TILE_N, Int32(TILE_N)), Int32(0))


class TmaLoader:
    """One TMA box per page part and sub-tile. Lane i of the warp looks up the page of box i."""

    full_arrivals = 1
    needs_proxy_fence = False

    def __init__(self, box_rows: int, evict_first: bool):
        self.box_rows = box_rows
        self.num_boxes = TILE_N // box_rows
        self.evict_first = evict_first

    def _copy(self, atom, src, dst, mbar):
        if self.evict_first:
            cute.copy(atom, src, dst, tma_bar_ptr=mbar, cache_policy=Int64(EVICT_FIRST))
        else:
            cute.copy(atom, src, dst, tma_bar_ptr=mbar)

    @cute.jit
    def lookup(self, p, index_base, block, kv_end, lane):
        """(page id, box index inside the page, -) of this lane's box; issued before the stage is free."""
        token = block * TILE_N
        if const_expr(self.num_boxes > 1):
            token = token + lane * self.box_rows
        page = Int32(0)
        row = Int32(0)
        if (token < kv_end) & (lane < self.num_boxes):
            slot = token // p.page_size
            row = (token - slot * p.page_size) // self.box_rows
            page = p.mIndices[index_base + slot]
        return page, row, Int32(0)

    @cute.jit
    def load(self, p, s, where, block, kv_end, stage, half, full, lane):
        """Fill half `half` of stage `stage`; `full` points at its first sub-tile's mbarrier."""
        page_l, row_l, _ = where
        sK = cute.group_modes(cute.flat_divide(s.sK_sub, (self.box_rows, 64)), 0, 2)
        sR = cute.group_modes(cute.flat_divide(s.sR, (self.box_rows, 64)), 0, 2)
        gK = cute.group_modes(cute.local_tile(p.mCkv, (self.box_rows, 64), (None, None, None)), 0, 2)
        gR = cute.group_modes(cute.local_tile(p.mKpe, (self.box_rows, 64), (None, 0, None)), 0, 2)
        tKs, tKg = cpasync.tma_partition(p.tma_ckv, 0, cute.make_layout(1), sK, gK)
        tRs, tRg = cpasync.tma_partition(p.tma_kpe, 0, cute.make_layout(1), sR, gR)
        rows = rows_of_block(block, kv_end)
        boxes = (rows + self.box_rows - 1) // self.box_rows
        tx = boxes * (self.box_rows * 128)
        for j in cutlass.range_constexpr(4):
            sync.expect_tx(full + j, tx)
            for i in cutlass.range_constexpr(self.num_boxes):
                if i < boxes:
                    page = cute.arch.make_warp_uniform(cute.arch.shuffle_sync(page_l, i))
                    row = cute.arch.make_warp_uniform(cute.arch.shuffle_sync(row_l, i))
                    self._copy(
                        p.tma_ckv,
                        tKg[None, row, half * 4 + j, page],
                        tKs[None, i, 0, stage * 8 + half * 4 + j],
                        full + j,
                    )
        if half == 1:
            sync.expect_tx(full + 4, tx)
            for i in cutlass.range_constexpr(self.num_boxes):
                if i < boxes:
                    page = cute.arch.make_warp_uniform(cute.arch.shuffle_sync(page_l, i))
                    row = cute.arch.make_warp_uniform(cute.arch.shuffle_sync(row_l, i))
                    self._copy(p.tma_kpe, tRg[None, row, page], tRs[None, i, 0, stage], full + 4)


class GatherLoader:
    """cp.async of 16 bytes per lane: eight lanes take one 128-byte sub-tile row, so four rows per instruction.

    Lane l holds the byte offsets of rows l and l + 32 of the block. Completion is signalled by
    cp.async.mbarrier.arrive.noinc of all 32 lanes per sub-tile. The writes are generic-proxy, so the consumers
    fence after their wait, before wgmma reads.
    """

    full_arrivals = 32
    needs_proxy_fence = True

    @cute.jit
    def _row(self, p, index_base, token, kv_end):
        off_k = Int64(0)
        off_r = Int64(0)
        if token < kv_end:
            slot = token // p.page_size
            row = Int64(token - slot * p.page_size)
            page = Int64(p.mIndices[index_base + slot])
            off_k = (page * p.mCkv.stride[0] + row * p.mCkv.stride[1]) * 2
            off_r = (page * p.mKpe.stride[0] + row * p.mKpe.stride[1]) * 2
        return off_k, off_r

    @cute.jit
    def lookup(self, p, index_base, block, kv_end, lane):
        token = block * TILE_N + lane
        k0, r0 = self._row(p, index_base, token, kv_end)
        k1, r1 = self._row(p, index_base, token + 32, kv_end)
        return k0, k1, (r0, r1)

    @cute.jit
    def load(self, p, s, where, block, kv_end, stage, half, full, lane):
        k0, k1, (r0, r1) = where
        chunk = lane % 8
        sub_row = lane // 8
        rows = rows_of_block(block, kv_end)
        src_k = p.mCkv.iterator.toint() + Int64(half * 512 + chunk * 16)
        src_r = p.mKpe.iterator.toint() + Int64(chunk * 16)
        dst_k = Int32(s.sK_sub.iterator.toint()) + (stage * 8 + half * 4) * SUB_BYTES + sub_row * 128
        dst_r = Int32(s.sR.iterator.toint()) + stage * SUB_BYTES + sub_row * 128
        # Swizzle: 16-byte chunk index xor row % 8; rows advance by 4, so two values alternate.
        swz = (((chunk ^ sub_row) * 16), ((chunk ^ (sub_row + 4)) * 16))
        for j in cutlass.range(4, unroll=1):
            self._sub_tile(k0, k1, src_k + j * 128, dst_k + j * SUB_BYTES, swz, sub_row, rows)
            cute.arch.cp_async_mbarrier_arrive_noinc(full + j)
        if half == 1:
            self._sub_tile(r0, r1, src_r, dst_r, swz, sub_row, rows)
            cute.arch.cp_async_mbarrier_arrive_noinc(full + 4)

    @cute.jit
    def _sub_tile(self, off_lo, off_hi, src, dst, swz, sub_row, rows):
        """64 rows of 128 bytes. Not fully unrolled: the compiler would keep 16 shuffled offsets and spill."""
        for h in cutlass.range_constexpr(2):
            for i in cutlass.range(0, 8, 2, unroll=2):
                for k in cutlass.range_constexpr(2):
                    row = 4 * (i + k) + sub_row
                    off = cute.arch.shuffle_sync(off_hi if h else off_lo, row)
                    if h * 32 + row < rows:
                        _cp_async_16(dst + (h * 4096 + (i + k) * 512) + swz[k], src + off)


def make_loader(box_rows: int, evict_first: bool):
    return TmaLoader(box_rows, evict_first) if box_rows else GatherLoader()
