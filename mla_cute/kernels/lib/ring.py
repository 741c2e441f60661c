"""The ring of slots in shared memory through which tile64_fp8 and tile16 get their K tiles: the producer's side.

A K tile is 64 tokens: sub-tiles of ckv, 64 x 128 bytes each (four of e4m3, eight of 16 bits; 128-byte swizzle), one
64 x 64 of rope (16-bit: 8 KiB, 128-byte swizzle; e4m3: 4 KiB, 64-byte swizzle) and 64 x {0, 1, 4} float32 scales. The
ring has `num_stages` slots with one full and one empty mbarrier each. lib/paged.py tells the page classes and what is
done about rows past kv_end. Scales are always gathered, by cp.async of 4 bytes, to [group][token], tokens in the order
of `scale_place`: a [.., 1] row is no TMA box. They are zeros where a row holds no token.

That is of heads of 512 + 64. 256 channels are half as many sub-tiles. The rope's rows stay as long with 32 channels:
TMA fills them up with zeros, the gather leaves what is behind as it was; without a rope there is no tile of it.

In arguments, `params` has what `RingParams` lists and `smem` what `RingSmem` does, `warp` is 0..3 among the producer
warps, `block` counts 64-token blocks of the request, and `index_base` is where the request's page ids begin.
"""

from typing import Any, Protocol

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, Int64, Numeric, Uint8, Uint32, const_expr
from cutlass.cute.nvgpu import cpasync, warpgroup

from ...dims import NUM_SCALES, HeadDims
from . import barriers, paged
from .paged import SUB_BYTES, TILE_N, TmaLoader, chosen_token, row_of, rows_of_block, tell_chosen
from .ptx import cp_async_16, cp_async_16_of_bits, cp_async_small, row_address
from .row_map import RowMap, Word, load_item

# A kernel has room for mbarriers of so many slots; the longest ring, tile16's over FP8 caches, has five.
MAX_STAGES = 6

# Words of a producer warp in RingSmem.sProduce.
NUM_ITEMS, FIRST_ROW, INDEX_BASE, KV_END, END_BLOCK, NEXT_ITEM = range(6)


class RingMbarriers(barriers.Mbarriers):
    """A kernel's mbarriers where the ring's come first: full and empty of every slot, then the kernel's own.

    There is room for MAX_STAGES slots in every kernel, so `full` and `empty` are the same in all of them.

    Args:
        num_stages: slots of the ring.
        full_arrivals: how many complete a slot's full mbarrier, the loader's `full_arrivals`.
        empty_arrivals: how many complete its empty one, one for each consumer warp that reads the tile.
        own: the kernel's own, `name=(how many, arrivals that complete one)`.
    """

    full = 0
    empty = MAX_STAGES

    def __init__(self, num_stages: int, full_arrivals: int, empty_arrivals: int, **own: tuple[int, int]):
        super().__init__(full=(MAX_STAGES, full_arrivals), empty=(MAX_STAGES, empty_arrivals), **own)
        self._num_stages, self._own = num_stages, own
        self._arrivals = full_arrivals, empty_arrivals

    def init(self, mbar: Any, full_arrivals: Any = None) -> None:
        """Initialise them, by one thread, slot by slot; those of slots that the ring lacks stay unused.

        `mbar`: pointer to the first; `full_arrivals`: in the place of what was said at first, where it is known at run
        time alone.
        """
        of_full, of_empty = self._arrivals
        if full_arrivals is not None:
            of_full = full_arrivals
        for slot in range(self._num_stages):
            for first, arrivals in ((self.full, of_full), (self.empty, of_empty)):
                cute.arch.mbarrier_init(mbar + first + slot, arrivals)
        for name, (length, arrivals) in self._own.items():
            for i in range(length):
                cute.arch.mbarrier_init(mbar + getattr(self, name) + i, arrivals)


class RingParams(Protocol):
    """What this file reads of a kernel's `Params`. All but the first three are made by `RingProducer._cache_params`."""

    mScales: cute.Tensor  # (pages, page_size, num_scales) float32; not read where there are none
    mIndices: cute.Tensor  # page ids
    mTable: cute.Tensor  # the plan
    tma_ckv: Any  # TMA atoms, None in the gather
    tma_kpe: Any
    mCkv: cute.Tensor  # by TMA (page_size, 512, pages), else (pages, page_size, 512)
    mKpe: cute.Tensor
    page_size: Int32
    # In the gather, row r of page i begins `i * ckv_page_units + r * ckv_row_units` times `ckv_unit` bytes from the
    # cache's first: counted so, a row's offset fits 32 bits.
    ckv_unit: Int32
    ckv_page_units: Int32
    ckv_row_units: Int32
    kpe_unit: Int32
    kpe_page_units: Int32
    kpe_row_units: Int32
    lay_sub: cute.ComposedLayout  # of sK_sub: (64, 128 bytes, num_subs * num_stages)


class RingSmem(Protocol):
    """What this file reads and writes of a kernel's `Smem`."""

    mbar: Any  # pointer to the first of `RingMbarriers`
    sK_sub: cute.Tensor  # ckv of all slots under `lay_sub`
    sR_tma: cute.Tensor  # rope of all slots, (64, 64, num_stages), e4m3 as bytes
    sScales: cute.Tensor  # (64, num_scales, num_stages) float32, tokens in the order of `scale_place`
    sProduce: cute.Tensor  # (8, 4) Int32: NUM_ITEMS and so on of each producer warp
    sChosen: Any  # sparse: (producer warp, slot) Int32, which of its 16 rows hold tokens


def smem_layout(kind: Any, dtype: type[Numeric], shape: tuple) -> cute.ComposedLayout:
    """Host side: swizzled, K-major, rows first."""
    atom = warpgroup.make_smem_layout_atom(kind, dtype)
    return cute.tile_to_shape(atom, shape, order=tuple(range(len(shape))))


@cute.jit
def token_row(params: RingParams, index_base, token, kv_end):
    """(page, row in the page) of a token; (0, 0) past kv_end, whose page id is not looked up."""
    page = Int32(0)
    row = Int32(0)
    if token < kv_end:
        slot = token // params.page_size
        row = token - slot * params.page_size
        page = params.mIndices[index_base + slot]
    return page, row


def scale_place(token):
    """Where the scale of a tile's token lies among the 64 of a group. A thread of a warp has tokens 8 j + 2 l4 and the
    next of every eight as an accumulator's columns, l4 being lane % 4: those of j = 2 c and 2 c + 1 lie together, from
    16 c + 4 l4 on, so that it reads them by one load of 16 bytes."""
    return (token & 0x31) | ((token & 6) << 1) | ((token >> 2) & 2)


@cute.jit
def load_scales(params: RingParams, smem: RingSmem, page, row, at, num_scales: Constexpr, valid, slot):
    """Scales of token `at` of a tile, whose cache row is (page, row), to slot `slot`; zeros where not valid."""
    src = row_address(params.mScales, page, row)
    dst = Int32(smem.sScales.iterator.toint()) + (slot * (TILE_N * num_scales) + scale_place(at)) * 4
    for g in cutlass.range_constexpr(num_scales):
        cp_async_small(dst, src, 4, valid, g * TILE_N * 4, g * 4)


class TmaRingLoader(TmaLoader):
    """Lane i looks up box i. Each warp loads a quarter of every tile's ckv sub-tiles; warp 0 also loads the rope, and
    warp 1 the scales.

    Args:
        box_rows: the rows that one TMA copy takes, 8 to 64.
        num_subs: ckv sub-tiles of a K tile.
        rope_row_bytes: bytes of a row of the rope tile.
        num_scales: scales of a token, 0, 1 or 4.
    """

    def __init__(
        self, box_rows: int, evict_first: bool, dims: HeadDims, num_subs: int, rope_row_bytes: int, num_scales: int
    ):
        super().__init__(box_rows, evict_first, dims)
        self.num_subs, self.rope_row_bytes, self.num_scales = num_subs, rope_row_bytes, num_scales
        self.full_arrivals = 4 + (32 if num_scales else 0)

    def look_up(self, params: RingParams, index_base, block, kv_end, warp, lane):
        return self._lookup_lane(params, index_base, block, kv_end, lane)

    @cute.jit
    def fill(self, params: RingParams, smem: RingSmem, page, row, block, kv_end, slot, phase, warp, lane):
        """Start the copies of tile `block` to `slot` once its empty mbarrier has completed `phase`; they complete its
        full one. (page, row) is what `look_up` found for the tile."""
        uniform = cute.arch.make_warp_uniform
        valid_rows = rows_of_block(block, kv_end)
        boxes = uniform((valid_rows + self.box_rows - 1) // self.box_rows)
        full = smem.mbar + RingMbarriers.full + slot
        cute.arch.mbarrier_wait(smem.mbar + RingMbarriers.empty + slot, phase)
        if const_expr(self.num_scales > 0):
            if warp == 1:
                for i in cutlass.range_constexpr(2):
                    at = i * 32 + lane
                    box = at // self.box_rows
                    own_page = cute.arch.shuffle_sync(page, box)
                    own_row = cute.arch.shuffle_sync(row, box) * self.box_rows + at % self.box_rows
                    valid = Int32(0)
                    if at < valid_rows:
                        valid = Int32(1)
                    load_scales(params, smem, own_page, own_row, at, self.num_scales, valid, slot)
                cute.arch.cp_async_mbarrier_arrive_noinc(full)
        box = (self.box_rows, self.dims.ckv // self.num_subs)
        has_rope = self.dims.kpe > 0
        sK = cute.group_modes(cute.flat_divide(smem.sK_sub, box), 0, 2)
        gK = cute.group_modes(cute.local_tile(params.mCkv, box, (None, None, None)), 0, 2)
        tKs, tKg = cpasync.tma_partition(params.tma_ckv, 0, cute.make_layout(1), sK, gK)
        tRs, tRg = None, None
        if const_expr(has_rope):
            sR = cute.group_modes(cute.flat_divide(smem.sR_tma, (self.box_rows, 64)), 0, 2)
            gR = cute.group_modes(cute.local_tile(params.mKpe, (self.box_rows, 64), (None, 0, None)), 0, 2)
            tRs, tRg = cpasync.tma_partition(params.tma_kpe, 0, cute.make_layout(1), sR, gR)
        # Of two sub-tiles two of the warps have one each.
        own = max(1, self.num_subs // 4)
        row_bytes = Int32(128 * own)
        if const_expr(self.num_subs < 4):
            if warp >= self.num_subs:
                row_bytes = Int32(0)
        if const_expr(has_rope):
            if warp == 0:
                row_bytes = Int32(128 * own + self.rope_row_bytes)
        barriers.expect_tx(full, boxes * self.box_rows * row_bytes)
        # The loop is not unrolled: ptxas would keep an address of a descriptor for every copy.
        for i in cutlass.range(boxes, unroll=1):
            box_page = uniform(cute.arch.shuffle_sync(page, i))
            box_row = uniform(cute.arch.shuffle_sync(row, i))
            for k in cutlass.range_constexpr(own):
                sub = warp * own + k
                if const_expr(self.num_subs < 4):
                    if sub < self.num_subs:
                        to = tKs[None, i, 0, slot * self.num_subs + sub]
                        self._copy(params.tma_ckv, tKg[None, box_row, sub, box_page], to, full)
                else:
                    to = tKs[None, i, 0, slot * self.num_subs + sub]
                    self._copy(params.tma_ckv, tKg[None, box_row, sub, box_page], to, full)
            if const_expr(has_rope):
                if warp == 0:
                    self._copy(params.tma_kpe, tRg[None, box_row, box_page], tRs[None, i, 0, slot], full)


class GatherRingLoader:
    """cp.async of 16 bytes per lane; warp w takes rows 16 w .. 16 w + 15, lane l looks up token 16 w + l % 16.

    One instruction copies an e4m3 ckv row or half a 16-bit one, four 16-bit or eight e4m3 rope rows; of 256 channels
    two e4m3 rows, 8 apart, or a 16-bit one.
    """

    # cp.async writes by the generic proxy: consumers fence after their wait, before wgmma reads.
    generic_proxy = True
    sparse = False
    full_arrivals = 128
    copy = staticmethod(cp_async_16)

    def __init__(self, dims: HeadDims, num_subs: int, rope_row_bytes: int, num_scales: int):
        self.dims, self.num_subs, self.rope_row_bytes, self.num_scales = dims, num_subs, rope_row_bytes, num_scales

    def look_up(self, params: RingParams, index_base, block, kv_end, warp, lane):
        return token_row(params, index_base, block * TILE_N + warp * 16 + lane % 16, kv_end)

    def row(self, params: RingParams, page, row):
        """(page, row in the page), from what `look_up` found."""
        return page, row

    def held(self, page, block, kv_end, warp):
        """Which of the warp's 16 rows hold tokens, in the form that `copy` takes: how many."""
        return rows_of_block(block, kv_end) - warp * 16

    def held_from(self, held, row):
        """The same, counted from row `row`."""
        return held - row

    def holds(self, held, row):
        """Whether row `row` does."""
        return row < held

    def any_page(self, page):
        """A page to read from whether or not the row holds a token."""
        return page

    def tell(self, smem: RingSmem, slot, warp, lane, held) -> None:
        """Tell the consumers what they cannot know: here nothing, they mask by the item's end."""

    @cute.jit
    def fill(self, params: RingParams, smem: RingSmem, page, row, block, kv_end, slot, phase, warp, lane):
        """As `TmaRingLoader.fill`, but one lane's share of the copies."""
        at = warp * 16 + lane % 16
        page, row = self.row(params, page, row)
        held = self.held(page, block, kv_end, warp)
        page = self.any_page(page)
        ckv = page * params.ckv_page_units + row * params.ckv_row_units
        kpe = page * params.kpe_page_units + row * params.kpe_row_units
        cute.arch.mbarrier_wait(smem.mbar + RingMbarriers.empty + slot, phase)
        # The swizzle xors the 16-byte chunk index with row % 8; in 64-byte rows, with row / 2 % 4.
        chunk = lane % 8
        dst = (
            Int32(smem.sK_sub.iterator.toint())
            + slot * (self.num_subs * SUB_BYTES)
            + lane // 8 * SUB_BYTES
            + warp * 2048
        )
        src = params.mCkv.iterator.toint() + Int64(lane * 16)
        if const_expr(self.num_subs < 4):
            # Lanes 16 .. 31 have row i + 8, in the first lanes' sub-tiles.
            upper = lane // 16 * 8
            dst = dst - upper * (SUB_BYTES // 4) + upper * 128
            src = params.mCkv.iterator.toint() + Int64(lane % 16 * 16)
            from_upper = self.held_from(held, upper)
            for i in cutlass.range_constexpr(8):
                own_row = cute.arch.shuffle_sync(ckv, upper + i)
                from_row = src + Int64(Uint32(own_row)) * Int64(Uint32(params.ckv_unit))
                self.copy(dst + (chunk ^ i) * 16, from_row, from_upper, i, i * 128, 0)
        else:
            for i in cutlass.range_constexpr(16):
                from_row = src + Int64(Uint32(cute.arch.shuffle_sync(ckv, i))) * Int64(Uint32(params.ckv_unit))
                for k in cutlass.range_constexpr(self.num_subs // 4):
                    self.copy(dst + (chunk ^ (i % 8)) * 16, from_row, held, i, k * 4 * SUB_BYTES + i * 128, k * 512)
        if const_expr(self.dims.kpe > 0):
            self._fill_rope(params, smem, kpe, held, slot, warp, lane)
        if const_expr(self.num_scales > 0):
            if lane < 16:
                valid = Int32(0)
                if self.holds(held, lane):
                    valid = Int32(1)
                load_scales(params, smem, page, row, at, self.num_scales, valid, slot)
        self.tell(smem, slot, warp, lane, held)
        cute.arch.cp_async_mbarrier_arrive_noinc(smem.mbar + RingMbarriers.full + slot)

    @cute.jit
    def _fill_rope(self, params: RingParams, smem: RingSmem, kpe, held, slot, warp, lane):
        """`kpe`: where the row of token lane % 16 of the warp lies, in units."""
        lanes = self.rope_row_bytes * self.dims.kpe // 64 // 16  # that have something to copy of a row
        rope_rows = 32 // lanes
        sub_row, rope_chunk = lane // lanes, lane % lanes
        dst = (
            Int32(smem.sR_tma.iterator.toint())
            + slot * (TILE_N * self.rope_row_bytes)
            + warp * 16 * self.rope_row_bytes
        )
        src = params.mKpe.iterator.toint() + Int64(rope_chunk * 16)
        left = self.held_from(held, sub_row)
        for i in cutlass.range_constexpr(16 // rope_rows):
            r = sub_row + i * rope_rows
            mixed = rope_chunk ^ (r % 8) if const_expr(self.rope_row_bytes == 128) else rope_chunk ^ (r // 2 % 4)
            own = cute.arch.shuffle_sync(kpe, rope_rows * i + sub_row)
            from_row = src + Int64(Uint32(own)) * Int64(Uint32(params.kpe_unit))
            self.copy(dst + r * self.rope_row_bytes + mixed * 16, from_row, left, i * rope_rows, 0, 0)


class SparseRingLoader(GatherRingLoader):
    """The gather of single tokens; lib/paged.py's SparseLoader says what mIndices holds then. Each warp tells
    `sChosen` which of its rows hold tokens."""

    sparse = True
    full_arrivals = 128 + 4
    copy = staticmethod(cp_async_16_of_bits)

    def look_up(self, params: RingParams, index_base, block, kv_end, warp, lane):
        """What the list says, and nothing that follows from it: a tile ahead, a producer does not wait for it."""
        return chosen_token(params, index_base, block * TILE_N + warp * 16 + lane % 16, kv_end), Int32(0)

    def row(self, params: RingParams, page, row):
        return row_of(params, page)

    def held(self, page, block, kv_end, warp):
        return cute.arch.vote_ballot_sync(page >= 0)

    def held_from(self, held, row):
        return held >> row

    def holds(self, held, row):
        return ((held >> row) & 1) != 0

    def any_page(self, page):
        return cutlass.max(page, Int32(0))

    def tell(self, smem: RingSmem, slot, warp, lane, held) -> None:
        tell_chosen(smem, slot, warp, lane, held, smem.mbar + RingMbarriers.full + slot)


class RingProducer:
    """The producer role, and what both roles know of the cache: a base of the classes of tile64_fp8 and tile16.

    A kernel that has it as a base
    * sets `dtype`, `dims`, `rows` and `num_stages` in its __init__ and calls `_set_cache` there, once the first two are
      set;
    * takes what `_cache_params` returns into its Params, which has what `RingParams` lists;
    * has a Smem with what `RingSmem` lists, and initialises `RingMbarriers` in it;
    * calls `_produce` on its four producer warps. The consumers wait for a slot's full mbarrier, tile i of the stream
      of all tiles in slot i % num_stages, and arrive at its empty one when they have read it.
    """

    # Set by the kernel.
    dtype: type[Numeric]  # of the output, and of the parts of the cache that are not e4m3
    dims: HeadDims
    rows: RowMap  # which query rows a row tile holds
    num_stages: int  # slots of the ring
    in_pairs = True  # an item's tiles are filled up to an even number: consumers take them in pairs

    # Set by `_set_cache`.
    kv_format: str  # "tensor", "token", "group" (dims.KV_FORMATS), or "" for a 16-bit cache
    num_scales: int  # scales of a token in the cache
    rope_fp8: bool  # the rope is e4m3, as ckv is, and not `dtype`
    kv_dtype: type[Numeric]  # of ckv in memory; e4m3 as bytes
    num_subs: int  # ckv sub-tiles of a K tile, 128 bytes of a token each
    box_rows: int  # rows of a TMA copy, 0 in the gather
    by_tma: bool
    loader: TmaRingLoader | GatherRingLoader

    def _set_cache(self, box_rows: int, evict_first: bool, kv_format: str, sparse: bool) -> None:
        """Set the facts of the cache and what loads it. A cache of format "" is of `self.dtype`."""
        self.kv_format = kv_format
        self.num_scales = NUM_SCALES[kv_format]
        self.rope_fp8 = kv_format == "tensor"
        self.kv_dtype = Uint8 if kv_format else self.dtype
        self.num_subs = self.dims.ckv * self.kv_dtype.width // (8 * 128)
        self.box_rows, self.by_tma = box_rows, box_rows > 0
        rope_row_bytes = 64 if self.rope_fp8 else 128
        if self.by_tma:
            self.loader = TmaRingLoader(
                box_rows, evict_first, self.dims, self.num_subs, rope_row_bytes, self.num_scales
            )
        else:
            loader = SparseRingLoader if sparse else GatherRingLoader
            self.loader = loader(self.dims, self.num_subs, rope_row_bytes, self.num_scales)

    def _cache_params(self, ckv: cute.Tensor, kpe: cute.Tensor) -> dict[str, Any]:
        """Host side: what the loaders read of the caches, as fields of the kernel's Params (see `RingParams`).

        Args:
            ckv: (pages, page_size, 512), e4m3 as bytes.
            kpe: (pages, page_size, 64), likewise.
        """
        Kind = warpgroup.SmemLayoutAtomKind
        rope_kind, rope_dtype = (Kind.K_SW64, Uint8) if self.rope_fp8 else (Kind.K_SW128, self.dtype)
        tma_ckv, mCkv, tma_kpe, mKpe = None, ckv, None, kpe
        if self.by_tma:
            op = cpasync.CopyBulkTensorTileG2SOp()
            box, rope_box = (self.box_rows, self.dims.ckv // self.num_subs), (self.box_rows, 64)
            ckv_view = cute.make_tensor(ckv.iterator, cute.select(ckv.layout, mode=[1, 2, 0]))
            tma_ckv, mCkv = cpasync.make_tiled_tma_atom(
                op, ckv_view, smem_layout(Kind.K_SW128, self.kv_dtype, box), box
            )
            if const_expr(self.dims.kpe > 0):
                kpe_view = cute.make_tensor(kpe.iterator, cute.select(kpe.layout, mode=[1, 2, 0]))
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
                Kind.K_SW128, self.kv_dtype, (TILE_N, self.dims.ckv // self.num_subs, self.num_subs * self.num_stages)
            ),
        }

    @cute.jit
    def _produce(self, params: RingParams, smem: RingSmem, part, warp, lane):
        """Load the tiles of all items of `part`, one after the other. With `in_pairs` the last tile of an item may hold
        no token."""
        item = cute.make_rmem_tensor(8, Int32)
        # The loop over items keeps these in words of shared memory that each warp writes and reads for itself.
        smem.sProduce[NUM_ITEMS, warp] = self.rows.num_items(params, part)
        # A decode part's own row holds its first item beside where the others are, which saves a trip to memory.
        smem.sProduce[FIRST_ROW, warp] = part if const_expr(self.rows.header_is_item) else Int32(0)
        slot = Int32(0)
        phase = Int32(1)
        smem.sProduce[NEXT_ITEM, warp] = Int32(0)
        while smem.sProduce[NEXT_ITEM, warp] < smem.sProduce[NUM_ITEMS, warp]:
            it = smem.sProduce[NEXT_ITEM, warp]
            smem.sProduce[NEXT_ITEM, warp] = it + 1
            load_item(params.mTable, self.rows.item_row(params, part, smem.sProduce[FIRST_ROW, warp], it), item)
            if const_expr(self.rows.header_is_item):
                if it == 0:
                    smem.sProduce[FIRST_ROW, warp] = item[Word.DECODE_FIRST_ROW]
            smem.sProduce[INDEX_BASE, warp] = item[Word.FIRST_INDEX]
            smem.sProduce[KV_END, warp] = item[Word.KV_END]
            block = item[Word.KV_BEGIN] // TILE_N
            end = cute.ceil_div(item[Word.KV_END], TILE_N)
            if const_expr(self.in_pairs):
                end = block + (end - block + 1) // 2 * 2
            smem.sProduce[END_BLOCK, warp] = end
            page, row = self.loader.look_up(params, item[Word.FIRST_INDEX], block, item[Word.KV_END], warp, lane)
            while block < smem.sProduce[END_BLOCK, warp]:
                kv_end = smem.sProduce[KV_END, warp]
                # The look-up is a tile ahead: its latency would add to the time from a slot's release to its refill.
                next_page, next_row = self.loader.look_up(
                    params, smem.sProduce[INDEX_BASE, warp], block + 1, kv_end, warp, lane
                )
                self.loader.fill(params, smem, page, row, block, kv_end, slot, phase, warp, lane)
                page = next_page
                row = next_row
                block += 1
                slot += 1
                if slot == self.num_stages:
                    slot = Int32(0)
                    phase ^= 1
