"""The producer warpgroup of the FP8 row-tile and the tile16 kernels: K tiles from the paged cache into swizzled
shared memory, through a ring.

A K tile is 64 tokens: sub-tiles of ckv, 64 x 128 bytes each (four of e4m3, eight of 16 bits; 128-byte swizzle), one
64 x 64 of rope (16-bit: 8 KiB, 128-byte swizzle; e4m3: 4 KiB, 64-byte swizzle) and 64 x {0, 1, 4} float32 scales. The
ring has `num_stages` slots with one full and one empty mbarrier each. Page classes and rows past kv_end: lib/paged.py.
Scales are always gathered, by cp.async of 4 bytes, to [group][token]: a [.., 1] row is no TMA box.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, Int64, Uint8, Uint32, const_expr
from cutlass.cute.nvgpu import cpasync, warpgroup

from ...dims import CKV_DIM, NUM_SCALES
from . import barriers, paged
from .paged import SUB_BYTES, TILE_N, TmaLoader, rows_of_block
from .ptx import cp_async_16, cp_async_small
from .row_map import load_item

# Slots that any ring may have, and its mbarriers, which are the first of a kernel's.
MAX_STAGES = 6
MB_FULL, MB_EMPTY = 0, MAX_STAGES


def smem_layout(kind, dtype, shape: tuple):
    """Host side: swizzled, K-major, rows first."""
    atom = warpgroup.make_smem_layout_atom(kind, dtype)
    return cute.tile_to_shape(atom, shape, order=tuple(range(len(shape))))


@cute.jit
def token_row(p, index_base, token, kv_end):
    """(page, row in the page) of a token; (0, 0) past kv_end, whose page id is not looked up."""
    page = Int32(0)
    row = Int32(0)
    if token < kv_end:
        slot = token // p.page_size
        row = token - slot * p.page_size
        page = p.mIndices[index_base + slot]
    return page, row


@cute.jit
def load_scales(p, s, page, row, at, num_scales: Constexpr, valid, slot):
    """Scales of token `at` of a tile, whose cache row is (page, row), to slot `slot`; zeros where not valid."""
    src = p.mScales.iterator.toint() + (Int64(page) * p.mScales.stride[0] + Int64(row) * p.mScales.stride[1]) * 4
    dst = Int32(s.sScales.iterator.toint()) + (slot * (TILE_N * num_scales) + at) * 4
    for g in cutlass.range_constexpr(num_scales):
        cp_async_small(dst, src, 4, valid, g * TILE_N * 4, g * 4)


class TmaRingLoader(TmaLoader):
    """Lane i looks up box i. Warp w loads a quarter of every tile's ckv sub-tiles; warp 0 also the rope, warp 1 the
    scales."""

    def __init__(self, box_rows: int, evict_first: bool, num_subs: int, rope_row_bytes: int, num_scales: int):
        super().__init__(box_rows, evict_first)
        self.num_subs, self.rope_row_bytes, self.num_scales = num_subs, rope_row_bytes, num_scales
        self.full_arrivals = 4 + (32 if num_scales else 0)

    def look_up(self, p, index_base, block, kv_end, w, lane):
        return self._lookup_lane(p, index_base, block, kv_end, lane)

    @cute.jit
    def fill(self, p, s, page, row, block, kv_end, slot, phase, w, lane):
        """Tile `block` to `slot`; (page, row) is what `look_up` found for it."""
        uniform = cute.arch.make_warp_uniform
        valid_rows = rows_of_block(block, kv_end)
        boxes = uniform((valid_rows + self.box_rows - 1) // self.box_rows)
        full = s.mbar + MB_FULL + slot
        cute.arch.mbarrier_wait(s.mbar + MB_EMPTY + slot, phase)
        if const_expr(self.num_scales > 0):
            if w == 1:
                for i in cutlass.range_constexpr(2):
                    at = i * 32 + lane
                    box = at // self.box_rows
                    own_page = cute.arch.shuffle_sync(page, box)
                    own_row = cute.arch.shuffle_sync(row, box) * self.box_rows + at % self.box_rows
                    valid = Int32(0)
                    if at < valid_rows:
                        valid = Int32(1)
                    load_scales(p, s, own_page, own_row, at, self.num_scales, valid, slot)
                cute.arch.cp_async_mbarrier_arrive_noinc(full)
        box = (self.box_rows, CKV_DIM // self.num_subs)
        sK = cute.group_modes(cute.flat_divide(s.sK_sub, box), 0, 2)
        sR = cute.group_modes(cute.flat_divide(s.sR_tma, (self.box_rows, 64)), 0, 2)
        gK = cute.group_modes(cute.local_tile(p.mCkv, box, (None, None, None)), 0, 2)
        gR = cute.group_modes(cute.local_tile(p.mKpe, (self.box_rows, 64), (None, 0, None)), 0, 2)
        tKs, tKg = cpasync.tma_partition(p.tma_ckv, 0, cute.make_layout(1), sK, gK)
        tRs, tRg = cpasync.tma_partition(p.tma_kpe, 0, cute.make_layout(1), sR, gR)
        own = self.num_subs // 4
        row_bytes = Int32(128 * own)
        if w == 0:
            row_bytes = Int32(128 * own + self.rope_row_bytes)
        barriers.expect_tx(full, boxes * self.box_rows * row_bytes)
        # Not unrolled: ptxas then keeps an address of a descriptor for every copy.
        for i in cutlass.range(boxes, unroll=1):
            box_page = uniform(cute.arch.shuffle_sync(page, i))
            box_row = uniform(cute.arch.shuffle_sync(row, i))
            for k in cutlass.range_constexpr(own):
                to = tKs[None, i, 0, slot * self.num_subs + w * own + k]
                self._copy(p.tma_ckv, tKg[None, box_row, w * own + k, box_page], to, full)
            if w == 0:
                self._copy(p.tma_kpe, tRg[None, box_row, box_page], tRs[None, i, 0, slot], full)


class GatherRingLoader:
    """cp.async of 16 bytes per lane; warp w takes rows 16 w .. 16 w + 15, lane l looks up token 16 w + l % 16.

    One instruction copies an e4m3 ckv row or half a 16-bit one, four 16-bit or eight e4m3 rope rows.
    """

    generic_proxy = True
    full_arrivals = 128

    def __init__(self, num_subs: int, rope_row_bytes: int, num_scales: int):
        self.num_subs, self.rope_row_bytes, self.num_scales = num_subs, rope_row_bytes, num_scales

    def look_up(self, p, index_base, block, kv_end, w, lane):
        return token_row(p, index_base, block * TILE_N + w * 16 + lane % 16, kv_end)

    @cute.jit
    def fill(self, p, s, page, row, block, kv_end, slot, phase, w, lane):
        """As TmaRingLoader's."""
        at = w * 16 + lane % 16
        ckv = page * p.ckv_page_units + row * p.ckv_row_units
        kpe = page * p.kpe_page_units + row * p.kpe_row_units
        num_rows = rows_of_block(block, kv_end) - w * 16
        lanes = self.rope_row_bytes // 16
        rope_rows = 32 // lanes
        sub_row, rope_chunk = lane // lanes, lane % lanes
        cute.arch.mbarrier_wait(s.mbar + MB_EMPTY + slot, phase)
        # Swizzle: the 16-byte chunk index is xored with row % 8.
        chunk = lane % 8
        dst = Int32(s.sK_sub.iterator.toint()) + slot * (self.num_subs * SUB_BYTES) + lane // 8 * SUB_BYTES + w * 2048
        src = p.mCkv.iterator.toint() + Int64(lane * 16)
        for i in cutlass.range_constexpr(16):
            from_row = src + Int64(Uint32(cute.arch.shuffle_sync(ckv, i))) * Int64(Uint32(p.ckv_unit))
            for k in cutlass.range_constexpr(self.num_subs // 4):
                cp_async_16(dst + (chunk ^ (i % 8)) * 16, from_row, num_rows, i, k * 4 * SUB_BYTES + i * 128, k * 512)
        dst = Int32(s.sR_tma.iterator.toint()) + slot * (TILE_N * self.rope_row_bytes) + w * 16 * self.rope_row_bytes
        src = p.mKpe.iterator.toint() + Int64(rope_chunk * 16)
        left = num_rows - sub_row
        for i in cutlass.range_constexpr(16 // rope_rows):
            r = sub_row + i * rope_rows
            mixed = rope_chunk ^ (r % 8) if const_expr(lanes == 8) else rope_chunk ^ (r // 2 % 4)
            own = cute.arch.shuffle_sync(kpe, rope_rows * i + sub_row)
            from_row = src + Int64(Uint32(own)) * Int64(Uint32(p.kpe_unit))
            cp_async_16(dst + r * self.rope_row_bytes + mixed * 16, from_row, left, i * rope_rows, 0, 0)
        if const_expr(self.num_scales > 0):
            if lane < 16:
                valid = Int32(0)
                if lane < num_rows:
                    valid = Int32(1)
                load_scales(p, s, page, row, at, self.num_scales, valid, slot)
        cute.arch.cp_async_mbarrier_arrive_noinc(s.mbar + MB_FULL + slot)


class RingProducer:
    """Methods of Tile64Fp8 and of the tile16 kernels."""

    # Consumers take tiles in pairs.
    in_pairs = True

    def _set_cache(self, box_rows: int, evict_first: bool, kv_format: str) -> None:
        """Facts of the cache, and what loads it; `kv_format` "" is a cache of `self.dtype`."""
        self.kv_format = kv_format
        self.num_scales = NUM_SCALES[kv_format]
        self.rope_fp8 = kv_format == "tensor"
        self.kv_dtype = Uint8 if kv_format else self.dtype
        self.num_subs = 4 if kv_format else 8
        self.box_rows, self.by_tma = box_rows, box_rows > 0
        rope_row_bytes = 64 if self.rope_fp8 else 128
        if self.by_tma:
            self.loader = TmaRingLoader(box_rows, evict_first, self.num_subs, rope_row_bytes, self.num_scales)
        else:
            self.loader = GatherRingLoader(self.num_subs, rope_row_bytes, self.num_scales)

    def _cache_params(self, ckv, kpe) -> dict:
        """Host side: what the loaders read of the caches, as fields of the kernel's parameters."""
        Kind = warpgroup.SmemLayoutAtomKind
        rope_kind, rope_dtype = (Kind.K_SW64, Uint8) if self.rope_fp8 else (Kind.K_SW128, self.dtype)
        tma_ckv, mCkv, tma_kpe, mKpe = None, ckv, None, kpe
        if self.by_tma:
            op = cpasync.CopyBulkTensorTileG2SOp()
            box, rope_box = (self.box_rows, CKV_DIM // self.num_subs), (self.box_rows, 64)
            ckv_view = cute.make_tensor(ckv.iterator, cute.select(ckv.layout, mode=[1, 2, 0]))
            kpe_view = cute.make_tensor(kpe.iterator, cute.select(kpe.layout, mode=[1, 2, 0]))
            tma_ckv, mCkv = cpasync.make_tiled_tma_atom(
                op, ckv_view, smem_layout(Kind.K_SW128, self.kv_dtype, box), box
            )
            tma_kpe, mKpe = cpasync.make_tiled_tma_atom(
                op, kpe_view, smem_layout(rope_kind, rope_dtype, rope_box), rope_box
            )
        ckv_unit, kpe_unit = (paged.row_unit(x.stride[0], x.stride[1]) for x in (ckv, kpe))
        return {
            "tma_ckv": tma_ckv,
            "mCkv": mCkv,
            "tma_kpe": tma_kpe,
            "mKpe": mKpe,
            "page_size": Int32(cute.size(ckv, mode=[1])),
            "ckv_unit": ckv_unit * (self.kv_dtype.width // 8),
            "ckv_page_units": Int32(ckv.stride[0] // ckv_unit),
            "ckv_row_units": Int32(ckv.stride[1] // ckv_unit),
            "kpe_unit": kpe_unit * (rope_dtype.width // 8),
            "kpe_page_units": Int32(kpe.stride[0] // kpe_unit),
            "kpe_row_units": Int32(kpe.stride[1] // kpe_unit),
            "lay_sub": smem_layout(
                Kind.K_SW128, self.kv_dtype, (TILE_N, CKV_DIM // self.num_subs, self.num_subs * self.num_stages)
            ),
        }

    @cute.jit
    def _produce(self, p, s, part, w, lane):
        """Tiles of all items of the part. Where consumers take pairs, an even number per item: the second tile of the
        last pair may hold no token."""
        item = cute.make_rmem_tensor(8, Int32)
        # The loop over items keeps these in words of shared memory that each warp writes and reads for itself.
        s.sProduce[0, w] = self.rows.num_items(p, part)
        # A part's own row holds its first item beside where the others are: one trip to memory less.
        s.sProduce[1, w] = part if const_expr(self.rows.header_is_item) else Int32(0)
        slot = Int32(0)
        phase = Int32(1)
        s.sProduce[5, w] = Int32(0)
        while s.sProduce[5, w] < s.sProduce[0, w]:
            it = s.sProduce[5, w]
            s.sProduce[5, w] = it + 1
            load_item(p.mTable, self.rows.item_row(p, part, s.sProduce[1, w], it), item)
            if const_expr(self.rows.header_is_item):
                if it == 0:
                    s.sProduce[1, w] = item[5]
            s.sProduce[2, w] = item[3]
            s.sProduce[3, w] = item[2]
            block = item[1] // TILE_N
            end = cute.ceil_div(item[2], TILE_N)
            if const_expr(self.in_pairs):
                end = block + (end - block + 1) // 2 * 2
            s.sProduce[4, w] = end
            page, row = self.loader.look_up(p, item[3], block, item[2], w, lane)
            while block < s.sProduce[4, w]:
                kv_end = s.sProduce[3, w]
                # A look-up ahead: its latency would add to the time from a slot's release to its refill.
                next_page, next_row = self.loader.look_up(p, s.sProduce[2, w], block + 1, kv_end, w, lane)
                self.loader.fill(p, s, page, row, block, kv_end, slot, phase, w, lane)
                page = next_page
                row = next_row
                block += 1
                slot += 1
                if slot == self.num_stages:
                    slot = Int32(0)
                    phase ^= 1
