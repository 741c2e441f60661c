"""Producers of K tiles from the paged cache into 128-byte-swizzled shared memory.

A K tile is 64 tokens x 576: nine 64 x 64 sub-tiles (eight of ckv, one of kpe), each of 8 KiB. Half 0 of a tile is
ckv sub-tiles 0..3, half 1 is ckv sub-tiles 4..7 and kpe. By TMA, each of the four producer warps owns one
(stage, half) of a pair of tiles and every sub-tile has its own full mbarrier; by cp.async, the four warps fill every
half together and it has a full mbarrier per two ckv sub-tiles.

That is of heads of 512 + 64. 256 channels of ckv are four sub-tiles, two in each half. 32 channels of kpe lie in the
first half of the sub-tile's rows, and nobody reads the other half: TMA, whose boxes stay 64 wide, fills it with zeros,
the gather leaves it as it was. Without kpe there is no sub-tile of it.

Page sizes fall into classes by box_rows = gcd(page_size, 64), the rows that are contiguous whatever the block:
  box_rows >= 8   TMA boxes of box_rows x 64 (8-row swizzle atoms stay 1024-byte aligned): `TmaLoader`
  box_rows <  8   cp.async of 16 bytes per lane: `GatherLoader`
  sparse          cp.async as well, of tokens that each query has a list of: `SparseLoader`
None looks up an id past the request's end. TMA leaves the rows past it as they were in shared memory (whole
boxes) or fills them from the page (the last box), cp.async writes zeros: scores of those rows are masked and their V
rows are zeroed by the consumers.

Of `params`, a main kernel's Params, loaders read `page_size`, `mIndices`, `mCkv` and `mKpe`; `tma_ckv` and `tma_kpe` or
the six strides in units (`row_unit`). Of `smem` they read `sK_sub`, (64, 64, ckv sub-tiles stage + sub), and `sR`,
(64, 64, stage).
Arguments that recur:
    index_base   where in mIndices the request's pages (sparse: its tokens) begin
    block        of 64 tokens, counted in the request
    kv_end       tokens of the request from here on are not the item's
    half, full   which half of a stage, and the full mbarrier of its first sub-tile
    w, lane      warp of the four, and lane
"""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, Int64, Uint32, const_expr
from cutlass.cute.nvgpu import cpasync

from ...dims import HeadDims
from . import barriers
from .ptx import cp_async_16, cp_async_16_of_bits

TILE_N = 64  # tokens of a K tile
SUB_ELEMS = 64 * 64
SUB_BYTES = 2 * SUB_ELEMS
# createpolicy's encoding of L2::evict_first, as TMA takes it for a cache hint: every byte of K is read once per step.
EVICT_FIRST = 0x12F0000000000000


@cute.jit
def row_unit(page_stride, row_stride):
    """Host side: the greatest common divisor of two strides, so that a row's offset in such units fits 32 bits."""
    a = Int64(page_stride)
    b = Int64(row_stride)
    while b != 0:
        rest = a % b
        a = b
        b = rest
    return cutlass.max(Int32(a), Int32(1))


def rows_of_block(block, kv_end):
    """Tokens of a 64-token block that lie before kv_end: 0..64."""
    return cutlass.max(cutlass.min(kv_end - block * TILE_N, Int32(TILE_N)), Int32(0))


def num_ckv_subs(dims: HeadDims) -> int:
    """Sub-tiles of 64 16-bit channels of ckv; that of kpe follows them."""
    return dims.ckv // 64


class TmaLoader:
    """One TMA box per page part and sub-tile. Lane i of the warp looks up the page of box i.

    The time from a half's release to the issue of its first box is on the critical path, so everything the boxes need
    is in uniform registers before the wait for the release (`lookup`): 280 of 6100 cycles a pair at 128 heads.
    """

    sparse = False
    full_arrivals = 1  # that complete a full mbarrier, beside the bytes
    generic_proxy = False  # consumers need no fence between their wait and wgmma

    def __init__(self, box_rows: int, evict_first: bool, dims: HeadDims):
        self.box_rows = box_rows
        self.num_boxes = TILE_N // box_rows
        self.evict_first = evict_first
        self.dims = dims
        self.barrier_subs = tuple(range(num_ckv_subs(dims) + 1))  # sub-tiles that have a full mbarrier

    def _copy(self, atom, src, dst, mbar):
        if self.evict_first:
            cute.copy(atom, src, dst, tma_bar_ptr=mbar, cache_policy=Int64(EVICT_FIRST))
        else:
            cute.copy(atom, src, dst, tma_bar_ptr=mbar)

    @cute.jit
    def _lookup_lane(self, params, index_base, block, kv_end, lane):
        token = block * TILE_N
        if const_expr(self.num_boxes > 1):
            token = token + lane * self.box_rows
        page = Int32(0)
        row = Int32(0)
        if (token < kv_end) & (lane < self.num_boxes):
            slot = token // params.page_size
            row = (token - slot * params.page_size) // self.box_rows
            page = params.mIndices[index_base + slot]
        return page, row

    def lookup(self, params, index_base, block, kv_end, lane):
        """Per box: (page id, box index inside the page), warp-uniform; and how many boxes hold tokens."""
        page, row = self._lookup_lane(params, index_base, block, kv_end, lane)
        uniform = cute.arch.make_warp_uniform
        where = tuple(
            (uniform(cute.arch.shuffle_sync(page, i)), uniform(cute.arch.shuffle_sync(row, i)))
            for i in range(self.num_boxes)
        )
        boxes = uniform((rows_of_block(block, kv_end) + self.box_rows - 1) // self.box_rows)
        return where, boxes

    @cute.jit
    def load(self, params, smem, where, boxes, stage, half, full):
        """Fill a half of a stage; `where` and `boxes` are `lookup`'s."""
        num_subs = num_ckv_subs(self.dims)
        of_half = num_subs // 2
        sK = cute.group_modes(cute.flat_divide(smem.sK_sub, (self.box_rows, 64)), 0, 2)
        gK = cute.group_modes(cute.local_tile(params.mCkv, (self.box_rows, 64), (None, None, None)), 0, 2)
        tKs, tKg = cpasync.tma_partition(params.tma_ckv, 0, cute.make_layout(1), sK, gK)
        tx = boxes * (self.box_rows * 128)
        for j in cutlass.range_constexpr(of_half):
            sub = half * of_half + j
            barriers.expect_tx(full + j, tx)
            for i in cutlass.range_constexpr(self.num_boxes):
                page, row = where[i]
                if i < boxes:
                    to = tKs[None, i, 0, stage * num_subs + sub]
                    self._copy(params.tma_ckv, tKg[None, row, sub, page], to, full + j)
        if const_expr(self.dims.kpe > 0):
            if half == 1:
                self._load_rope(params, smem, where, boxes, stage, full + of_half, tx)

    @cute.jit
    def _load_rope(self, params, smem, where, boxes, stage, full, tx):
        sR = cute.group_modes(cute.flat_divide(smem.sR, (self.box_rows, 64)), 0, 2)
        gR = cute.group_modes(cute.local_tile(params.mKpe, (self.box_rows, 64), (None, 0, None)), 0, 2)
        tRs, tRg = cpasync.tma_partition(params.tma_kpe, 0, cute.make_layout(1), sR, gR)
        barriers.expect_tx(full, tx)
        for i in cutlass.range_constexpr(self.num_boxes):
            page, row = where[i]
            if i < boxes:
                self._copy(params.tma_kpe, tRg[None, row, page], tRs[None, i, 0, stage], full)


class GatherLoader:
    """cp.async of 16 bytes per lane: eight lanes take one 128-byte sub-tile row, so four rows per instruction.

    Warp w takes rows 16 w .. 16 w + 15 of every block; lane l looks up token 16 w + l % 16. All four warps fill the
    same half, because the issue time adds to the time from release to refill. What is not a copy is done before the
    wait for a free half (even a shuffle: it would queue behind the copies), and the copies are immediate offsets from
    one address per four rows: addresses made per copy cost 250 cycles a copy, made per four rows between the copies 50,
    now 15 to 40 beside the wgmmas' shared-memory reads. Rows past kv_end are written as zeros without a branch.
    Completion is signalled by cp.async.mbarrier.arrive.noinc of all 128 lanes, once per two ckv sub-tiles (256 bytes
    of a row), the rope with the last. The writes are generic-proxy, so the consumers fence after
    their wait, before wgmma reads.
    """

    sparse = False
    full_arrivals = 128
    generic_proxy = True
    copy = staticmethod(cp_async_16)

    def __init__(self, dims: HeadDims):
        self.dims = dims
        self.barrier_subs = tuple(range(0, num_ckv_subs(dims), 2))  # the rope comes with the last

    @cute.jit
    def lookup(self, params, index_base, block, kv_end, w, lane):
        """Offsets of the ckv and kpe rows of this lane's token, in units of params.ckv_unit and params.kpe_unit."""
        token = block * TILE_N + w * 16 + lane % 16
        ckv = Int32(0)
        kpe = Int32(0)
        if token < kv_end:
            slot = token // params.page_size
            row = token - slot * params.page_size
            page = params.mIndices[index_base + slot]
            ckv = page * params.ckv_page_units + row * params.ckv_row_units
            kpe = page * params.kpe_page_units + row * params.kpe_row_units
        return ckv, kpe

    def rows(self, offset, lane):
        """The offsets of the rows that this lane copies, one in each of the warp's four groups of four, from what
        `lookup` gave each lane."""
        return [cute.arch.shuffle_sync(offset, 4 * i + lane // 8) for i in range(4)]

    def held(self, looked_up, block, kv_end, w):
        """Which of the warp's 16 rows hold tokens, in the form that `copy` takes: how many. `looked_up`: `lookup`'s."""
        return rows_of_block(block, kv_end) - w * 16

    def held_from(self, held, row):
        """The same, counted from row `row`."""
        return held - row

    def load(self, params, smem, ckv_rows, kpe_rows, held, stage, half: int, full, w, lane) -> None:
        """Issue the copies of a half of a stage. `ckv_rows` and `kpe_rows` are `rows`'s, `held` is `held`'s."""
        num_subs = num_ckv_subs(self.dims)
        of_half = num_subs // 2
        chunk, sub_row = lane % 8, lane // 8
        # Swizzle: the 16-byte chunk index is xored with row % 8.
        lane_at = [sub_row * 128 + (chunk ^ (sub_row + 4 * i)) * 16 + w * 2048 for i in range(2)]
        left = self.held_from(held, sub_row)
        # The copies' immediate offsets are constants, so a stage that is none goes into the address.
        at_stage, moved = (stage, 0) if isinstance(stage, int) else (0, stage)
        dst = Int32(smem.sK_sub.iterator.toint()) + moved * (num_subs * SUB_BYTES)
        base = params.mCkv.iterator.toint() + Int64(chunk * 16)
        src = [base + Int64(Uint32(row)) * Int64(Uint32(params.ckv_unit)) for row in ckv_rows]
        for j in range(0, of_half, 2):
            for i in range(4):
                for k in (j, j + 1):
                    at = (at_stage * num_subs + half * of_half + k) * SUB_BYTES + i * 512
                    self.copy(dst + lane_at[i % 2], src[i], left, 4 * i, at, half * (of_half * 128) + k * 128)
            if self.dims.kpe and j + 2 == of_half and half == 1:
                dst = Int32(smem.sR.iterator.toint()) + moved * SUB_BYTES
                base = params.mKpe.iterator.toint() + Int64(chunk * 16)
                to = [dst + lane_at[i % 2] for i in range(4)]
                at = [base + Int64(Uint32(row)) * Int64(Uint32(params.kpe_unit)) for row in kpe_rows]
                self._copy_rope(to, at, left, at_stage * SUB_BYTES, chunk)
            cute.arch.cp_async_mbarrier_arrive_noinc(full + j)

    @cute.jit
    def _copy_rope(self, to, at, left, offset: Constexpr, chunk):
        """Of a rope of 32 channels half of the lanes have nothing to copy."""
        if const_expr(self.dims.kpe == 64):
            for i in cutlass.range_constexpr(4):
                self.copy(to[i], at[i], left, 4 * i, offset + i * 512, 0)
        else:
            if chunk * 8 < self.dims.kpe:
                for i in cutlass.range_constexpr(4):
                    self.copy(to[i], at[i], left, 4 * i, offset + i * 512, 0)


@cute.jit
def chosen_token(params, index_base, token, kv_end):
    """What stands at `token` of a query's list, -1 where nothing does."""
    at = Int32(-1)
    if token < kv_end:
        at = params.mIndices[index_base + token]
    return at


@cute.jit
def row_of(params, at):
    """(page, row in the page) of what `chosen_token` found; page -1 where there is no token."""
    page = Int32(-1)
    row = Int32(0)
    if at >= 0:
        page = at // params.page_size
        row = at - page * params.page_size
    return page, row


@cute.jit
def tell_chosen(smem, stage, w, lane, bits, mbar):
    """Publish which of the 16 rows of warp `w` hold tokens, bit i for row i, and arrive at `mbar` for the warp."""
    if lane == 0:
        smem.sChosen[w, stage] = bits
        cute.arch.mbarrier_arrive(mbar)


class SparseLoader(GatherLoader):
    """The gather where mIndices holds the tokens that a query sees and no pages: positions page * page_size + row, or
    -1 for none, at any place. Rows of none are written as zeros, as those past kv_end. Which they are goes to
    smem.sChosen, (warp, stage), by `tell_chosen`, for the consumers' masks.
    """

    sparse = True
    copy = staticmethod(cp_async_16_of_bits)

    @cute.jit
    def lookup(self, params, index_base, block, kv_end, w, lane):
        """As `GatherLoader.lookup`, and which of the warp's rows hold tokens, bit i for row i."""
        page, row = row_of(params, chosen_token(params, index_base, block * TILE_N + w * 16 + lane % 16, kv_end))
        bits = cute.arch.vote_ballot_sync(page >= 0)
        page = cutlass.max(page, Int32(0))
        ckv = page * params.ckv_page_units + row * params.ckv_row_units
        kpe = page * params.kpe_page_units + row * params.kpe_row_units
        return ckv, kpe, bits

    def held(self, looked_up, block, kv_end, w):
        return looked_up[2]

    def held_from(self, held, row):
        return held >> row


def make_loader(box_rows: int, evict_first: bool, sparse: bool, dims: HeadDims) -> TmaLoader | GatherLoader:
    if sparse:
        return SparseLoader(dims)
    return TmaLoader(box_rows, evict_first, dims) if box_rows else GatherLoader(dims)
