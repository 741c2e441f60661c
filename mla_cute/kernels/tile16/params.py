"""What the tile16 kernel's roles share: barriers, arguments, shared memory, a consumer thread's registers.

Units: token and row indices count from the tile's first; scores, references and log-sum-exps are in log2 units.
"""

import dataclasses
from typing import Any

import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32

from ..lib.barriers import NamedBarrier
from ..lib.ring import RingMbarriers

NUM_WARPS = 8  # that consume; the four producer warps of lib/ring.py follow
NUM_CONSUMERS = 32 * NUM_WARPS
# P of a tile in mma's A fragments: four steps of 16 tokens, 32 lanes, four words.
P_WORDS = 4 * 32 * 4


class Bar(NamedBarrier):
    """Both are for all consumers, each of whom arrives and waits."""

    # In `Consumer._raise_references`, two times: the warps' maxima can be read; all of P has been written again.
    REFERENCES = 1, NUM_CONSUMERS
    # At an item's beginning (Q is in shared memory; Q has been read) and end (sMax has been written; has been read).
    ITEM = 2, NUM_CONSUMERS


def make_mbarriers(num_stages: int, full_arrivals: int) -> RingMbarriers:
    """The kernel's mbarriers, each with the arrivals that complete it; schedule.py says who arrives and who waits.

    Args:
        num_stages: slots of the ring.
        full_arrivals: the loader's.
    """
    # `p` by parity. Those of consumers, empty and p, count warps.
    return RingMbarriers(num_stages, full_arrivals, NUM_WARPS, p=(2, NUM_WARPS))


@dataclasses.dataclass(frozen=True)
class Params:
    """Everything the device side reads, as one kernel argument. What StepArgs has is explained there."""

    mQ: cute.Tensor  # (requests, H, 512); bytes where queries are e4m3
    mQpe: cute.Tensor  # (requests, H, 64), likewise
    tma_ckv: Any  # None: the cache is gathered by cp.async
    mCkv: cute.Tensor  # what TMA or the gather copies from, likewise mKpe
    tma_kpe: Any
    mKpe: cute.Tensor
    mScales: cute.Tensor
    mIndices: cute.Tensor  # page ids
    mTable: cute.Tensor  # the plan; planner/decode.py says what the eight words of a row are
    mO: cute.Tensor  # (requests, H, 512)
    mLse: cute.Tensor  # (requests, H)
    mPart: cute.Tensor
    num_heads: Int32
    num_tiles: Int32  # of 16 heads
    page_size: Int32
    # Where a token's row of ckv lies: (page * page_units + row * row_units) units of `unit` bytes; likewise kpe.
    ckv_unit: Int32
    ckv_page_units: Int32
    ckv_row_units: Int32
    kpe_unit: Int32
    kpe_page_units: Int32
    kpe_row_units: Int32
    whole: Int32 | None  # tiles of whole rows: whether they lie so in the cache (lib/whole_rows.py)
    nope_scale_log2: Float32
    rope_scale_log2: Float32
    out_scale: Float32
    ckv_scale_at: Int64  # None: a 16-bit cache
    kpe_scale_at: Int64
    q_scale_at: Int64
    lse_scale: Float32
    sink_at: Int64 | None  # sparse: see step.py
    lay_sub: cute.ComposedLayout  # of all sub-tiles of ckv in the ring
    lay_r: cute.ComposedLayout  # of all rope tiles in the ring


# Words of Smem.sLoop, a copy for each consumer warp.
LOOP_ITEMS = 0  # items of the part
LOOP_TABLE_ROW = 1  # table row of the first item
LOOP_REQUEST = 2  # of the item at hand
LOOP_PART_ROW = 3  # the request's first partial row in the item at hand; negative: the item writes the output
LOOP_HEAD0 = 4  # head of the CTA's row 0
LOOP_WORDS = 5


@dataclasses.dataclass(frozen=True)
class Smem:
    """Views of one CTA's shared memory; the addresses are in bytes."""

    mbar: Any  # pointer to the first of `make_mbarriers`
    # The ring as lib/ring.py fills it: ckv sub-tiles, rope tiles and scales, (token by `scale_place`, group, slot). All
    # None where tiles are whole rows, the last over a 16-bit cache, too.
    sK_sub: Any
    sR_tma: Any
    sScales: Any
    k_address: Int32  # of slot 0's ckv, or of its rows
    r_address: Int32  # of slot 0's rope
    q_address: Int32  # of what of Q stays in shared memory
    p_address: Int32  # of P of both parities; while an item begins, Q passes through here
    scale_address: Int32  # of slot 0's scales
    sProduce: cute.Tensor  # (word, producer warp): lib/ring.py
    sLoop: cute.Tensor  # (word, consumer warp): LOOP_ITEMS and so on
    sRow: cute.Tensor  # (row, 2): what a unit of Q K^T is worth as a score, and one of the rope's; FP8 caches alone
    sFlags: cute.Tensor  # (warp, parity): not 0: what a warp has of the tile asks for other references
    sMax: cute.Tensor  # (row, warp): the warps' row maxima; in the epilogue their row sums, then their largest outputs
    sMaxScale: cute.Tensor  # (warp,): the largest scale of a warp's tokens
    sChosen: Any  # (producer warp, slot): which of its 16 rows hold tokens; None where it is not sparse


@dataclasses.dataclass(frozen=True)
class Fragments:
    """Registers of one consumer thread. It has rows `row` and `row + 8` (r = 0 and 1 below) of S and O: of S its warp's
    tokens 2 l4 and 2 l4 + 1, of O channels that the kind of tile chooses among its warp's 64 (tiles.py)."""

    w: Int32  # consumer warp
    lane: Int32
    row: Int32  # lane // 4
    l4: Int32  # lane % 4
    rQ: cute.Tensor  # A fragments of Q's first `q_steps` steps of 16 channels, four words each
    rO: cute.Tensor  # the sums of P V: [t * 4 + 2 * r + e] is element e of accumulator t's row r
    rS: cute.Tensor  # scores of the tile at hand: [2 * r + i] is row r and token i
    rNext: cute.Tensor  # of the next tile, likewise
    rL: cute.Tensor  # by row: this thread's part of the sum of P over the item's tiles
    rSums: cute.Tensor  # by row: its part of the sum of P in the tile at hand
    rRef: cute.Tensor  # by row: the reference, P = 2^(score - reference)
    # One power of two that a token's scales are counted in, so that P times scale / unit is a float16: rO is what the
    # output is, divided by the unit. It is read only where tokens have scales.
    rUnit: cute.Tensor
    first: cute.Tensor  # not 0: no tile of the item has set references yet


def make_fragments(w, lane, q_steps: int, own_channels: int) -> Fragments:
    """For lane `lane` of consumer warp `w`, with nothing in them. `own_channels`: of O, that a warp has."""

    def registers(n, dtype=Float32):
        return cute.make_rmem_tensor((n,), dtype)

    return Fragments(
        w=w,
        lane=lane,
        row=lane // 4,
        l4=lane % 4,
        rQ=registers(q_steps * 4, Uint32),
        rO=registers(own_channels // 2),
        rS=registers(4),
        rNext=registers(4),
        rL=registers(2),
        rSums=registers(2),
        rRef=registers(2),
        rUnit=registers(1),
        first=registers(1, Int32),
    )
