"""What the row-tile kernel's roles share: barriers, kernel arguments, shared memory, one consumer thread's registers.

Params, Smem and Fragments are frozen: a mutable object would be carried through every staged branch and loop.

Prefixes of names: m a tensor in global memory, s one in shared memory, r registers, t a thread's (or wgmma's) part of a
tensor, lay_ a layout.
"""

import dataclasses
from typing import Any

import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32

from ...dims import HeadDims
from ..lib.barriers import Mbarriers, NamedBarrier
from ..lib.paged import GatherLoader, TmaLoader, num_ckv_subs
from ..lib.row_map import RowMap

WARPGROUP = 128
CONSUMERS = 2 * WARPGROUP
NUM_THREADS = CONSUMERS + WARPGROUP
# Records of items in shared memory: item i in slot i % ITEM_SLOTS. At most three are in use, since the producer writes
# item i while a consumer may still be in the epilogue of item i - 2; the remainder of a power of two is cheaper.
ITEM_SLOTS = 4

# (stage, half) in the order in which the consumers release the halves of a pair.
RELEASE_ORDER = ((0, 0), (1, 1), (0, 1), (1, 0))


class Bar(NamedBarrier):
    """Who arrives -> who waits; where nobody is named before the arrow, everybody does both."""

    FIRST = 1, CONSUMERS  # -> both: row maxima of an item's first pair are in shared memory; P0 may be written
    RAISE = 2, CONSUMERS  # -> both, where references are raised: row maxima are there; P is; it has been multiplied
    P0 = 3, CONSUMERS  # wg 0, P0 is in shared memory -> wg 1
    P0_OF_PLACE_1 = 4, CONSUMERS
    P1 = 5, CONSUMERS  # wg 1, P1 is in shared memory -> wg 0
    P1_OF_PLACE_1 = 6, CONSUMERS
    EPI = 7, CONSUMERS  # -> both: the row sums of an item are in shared memory; nobody multiplies P0 any more
    FILL0 = 8, WARPGROUP  # -> wg 0: its zeros are in the rows of V past kv_end
    FILL1 = 9, WARPGROUP  # -> wg 1: likewise


def make_mbarriers(loader: TmaLoader | GatherLoader, num_stages: int) -> Mbarriers:
    """The kernel's mbarriers, each with what completes it."""
    # [stage]: the four producer warps, each when it has told which of its 16 rows hold tokens.
    of_sparse = {"chosen": (num_stages, 4)} if loader.sparse else {}
    return Mbarriers(
        # [stage][sub-tile]: one arrival with the bytes to expect by TMA, the producer's 128 threads by cp.async.
        full=(num_stages * (num_ckv_subs(loader.dims) + 1), loader.full_arrivals),
        empty=(2 * num_stages, 4),  # [half][stage]: the four warps of wg `half`
        q_full=(1, 4),  # the four producer warps, each with the bytes that it copies
        q_empty=(1, 8),  # the eight consumer warps
        rope_empty=(1, 8),  # the eight consumer warps
        **of_sparse,
    )


class Variant:
    """What the roles' methods read of the kernel object: constants of a compiled variant, set by Tile64.__init__."""

    dtype: Any  # cutlass type of queries, cache and output, of 16 bits
    dims: HeadDims
    num_subs: int  # sub-tiles of ckv in a K tile
    num_stages: int  # K tiles in shared memory: of one pair, or of two
    rows: RowMap  # which query rows a tile holds
    loader: TmaLoader | GatherLoader  # how K tiles come from pages
    box_rows: int  # rows of a TMA box, 0: cp.async
    by_tma: bool
    converted: bool  # the cache was made of an FP8 one, whose scales are in Params
    use_pdl: bool  # programmatic dependent launch
    regs_consumer: int  # registers of a thread
    regs_producer: int
    mbars: Mbarriers

    # A turn is the number of the pair at hand among all that a role has worked on, from `first_turn` on: the parity of
    # its mbarriers' phase follows from it, and above one pair in shared memory which of the two places its tiles have.

    def first_turn(self, parity: int) -> Int32:
        return Int32(parity * (self.num_stages // 2))

    def next_turn(self, turn):
        return turn + 1

    def parity_of(self, turn):
        return turn & 1 if self.num_stages == 2 else (turn >> 1) & 1

    def place_of(self, turn):
        """0 or 1, warp-uniform, for descriptors are made of it; a constant where there is one place."""
        return 0 if self.num_stages == 2 else cute.arch.make_warp_uniform(turn & 1)

    def stage_of(self, place, tile):
        """The stage of tile 0 or 1 of a pair."""
        return place * 2 + tile

    def full(self, smem, stage, sub):
        """The mbarrier of sub-tile `sub` of a stage."""
        return smem.mbar + self.mbars.full + stage * (self.num_subs + 1) + sub

    def empty(self, smem, stage, half):
        """The mbarrier of half `half` of a stage."""
        return smem.mbar + self.mbars.empty + half * self.num_stages + stage


@dataclasses.dataclass(frozen=True)
class Params:
    """Everything the device side reads, as one kernel argument."""

    mma_qk: cute.TiledMma  # 64 x 64, A and B from shared memory
    mma_qk_rs: cute.TiledMma  # the same, A from registers: the rope
    mma_pv: cute.TiledMma  # 64 x 256, A and B from shared memory
    mma_pv_rs: cute.TiledMma  # the same, A from registers: a consumer's own P
    tma_q: cute.CopyAtom
    mQ: cute.Tensor  # (row, 512, batch), see RowMap.q_view
    tma_qpe: Any  # None, likewise mQpe and tma_kpe: there is no rope
    mQpe: cute.Tensor  # (row, 64, batch)
    tma_ckv: Any  # None: the gather, which copies from mCkv and mKpe as the caller gave them
    mCkv: cute.Tensor  # (row in page, 512, page)
    tma_kpe: Any
    mKpe: cute.Tensor  # (row in page, 64, page)
    mIndices: cute.Tensor  # (n,) page ids
    mTable: cute.Tensor  # (rows, 8): the plan
    mO: cute.Tensor  # (tokens, H, 512)
    mLse: cute.Tensor  # (tokens, H)
    mPart: cute.Tensor  # (rows, PART_ROW)
    num_heads: Int32
    page_size: Int32
    num_tiles: Int32  # CTAs of a part
    num_parts: Int32
    item_row0: Int32  # prefill: table row of the first item
    # Strides of the caches for the gather: a unit in bytes, a page and a row in units (paged.row_unit).
    ckv_unit: Int32
    ckv_page_units: Int32
    ckv_row_units: Int32
    kpe_unit: Int32
    kpe_page_units: Int32
    kpe_row_units: Int32
    scale_log2: Float32  # what Q K^T is worth in log2 units, as far as the host knows
    out_scale: Float32 | None  # converted: see step.py; likewise the next two
    ckv_scale_at: Int64 | None
    q_scale_at: Int64 | None
    lse_scale: Float32  # 1 for base 2, ln 2 for base e
    sink_at: Int64 | None  # sparse: see step.py
    lay_q: cute.ComposedLayout  # (64, 512)
    lay_q_sub: cute.ComposedLayout  # the same in sub-tiles: (64, 64, 8)
    lay_k: cute.ComposedLayout  # (64, 512, stage)
    lay_k_sub: cute.ComposedLayout  # the same in sub-tiles: (64, 64, 8 stage + sub)
    lay_vt: cute.ComposedLayout  # (512, 64, stage) of the same bytes
    lay_p: cute.ComposedLayout  # (64, 64), with a place for each pair: (64, 64, place)
    lay_r: cute.ComposedLayout  # (64, 64, stage)


@dataclasses.dataclass(frozen=True)
class Smem:
    """Views of one CTA's shared memory; Params has the layouts for other places and head dimensions."""

    mbar: Any  # pointer to the first mbarrier
    sQ: cute.Tensor  # (64, 512): Q without the rope
    sQ_sub: cute.Tensor  # its sub-tiles: (64, 64, 8)
    sQr: cute.Tensor  # (64, 64): rope of Q, the bytes of P1
    sP0: cute.Tensor  # (64, 64)
    sP1: cute.Tensor  # (64, 64)
    sK: cute.Tensor  # (64, 512, stage)
    sK_sub: cute.Tensor  # its sub-tiles: (64, 64, 8 stage + sub)
    sVt: cute.Tensor  # the same bytes as V^T: (512, 64, stage)
    sR: cute.Tensor  # rope of K: (64, 64, stage)
    sMax: cute.Tensor  # (consumer, row): row maxima of its tile, in log2 units, where references are chosen or raised
    sSum: cute.Tensor  # (row,): wg 1's sums of P in float32, in the epilogue
    sRaise: cute.Tensor  # (consumer,): 1 + the turn of the last pair in which some of its P was out of range
    sL: cute.Tensor  # (2 x 64,) each consumer's sums that O is divided by, in the epilogue
    sItem: cute.Tensor  # (slot, word): lib/row_map.py's Word
    sChosen: Any  # (producer warp, stage): which of its 16 rows hold tokens; None where it is not sparse
    k_words: cute.Tensor  # K as 64-bit words


@dataclasses.dataclass(frozen=True)
class Fragments:
    """Descriptors and registers of one consumer thread."""

    t: Int32  # thread of the warpgroup
    lane: Int32
    row: Int32  # the thread has rows `row` and `row + 8` of S and of O
    tSrQ: cute.Tensor  # descriptors of wgmma operands: Q, K, rope of K, V^T, P0, P1
    tSrK: cute.Tensor
    tSrR: cute.Tensor
    tOrV: cute.Tensor
    tOrP0: cute.Tensor
    tOrP1: cute.Tensor
    rO: cute.Tensor  # this consumer's half of O: 64 x 256 float32
    rS: cute.Tensor  # scores of its K tile: 64 x 64 float32
    rP: cute.Tensor  # P in 16 bits, as operand A
    rPc: cute.Tensor  # the same registers in the order of rS
    rQr: cute.Tensor  # rope of Q, as operand A
    rL: cute.Tensor  # (2,) this thread's part of the row sums of P, as it was in float32: of the log-sum-exp
    rW: cute.Tensor  # (2,) and of P as it was rounded, where that matters (LARGE_P): what O is divided by
    scale_log2: Float32  # what Q K^T is worth in log2 units
    rRef: cute.Tensor  # (2,) references of its rows, in log2 units: P = 2^(score - reference)
    S: cute.Tensor  # rS and rO as (row 0 or 1, column)
    O: cute.Tensor
    ldm: cute.TiledCopy  # ldmatrix of the rope of Q: tQs -> tQr
    tQs: cute.Tensor
    tQr: cute.Tensor
    p_row: Uint32  # where in a tile of P this thread's stmatrix begins, in bytes


def of_place(x, place, rank: int):
    """What of P's tensor or fragment `x`, which without places has `rank` modes, is in a place."""
    return x if cute.rank(x) == rank else x[(*[None] * rank, place)]
