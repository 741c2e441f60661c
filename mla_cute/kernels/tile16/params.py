"""What the tile16 kernel's roles share: barriers, arguments, shared memory, a consumer thread's registers."""

import dataclasses
from typing import Any

import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from ..lib.ring import MAX_STAGES

NUM_WARPS = 8
NUM_CONSUMERS = 32 * NUM_WARPS
BAR_MOVE, BAR_EPI = 1, 2
MB_P = 2 * MAX_STAGES
MB_TOTAL = MB_P + 2
# P of a tile in mma's A fragments: four steps of 16 tokens, 32 lanes, four words.
P_WORDS = 4 * 32 * 4
# FP8: Q in A fragments: 32 steps of 16 channels, the rope's four, and four that take zeros; a step is 32 lanes of four
# words. The warps keep the first `q_steps` in registers, and P takes their place in shared memory; the others stay
# there, in front of them.
Q_TOTAL_STEPS = 40
STEP_BYTES = 512


@dataclasses.dataclass(frozen=True)
class Params:
    """Everything the device side reads, as one kernel argument. Names as in Params."""

    mQ: cute.Tensor
    mQpe: cute.Tensor
    tma_ckv: Any
    mCkv: cute.Tensor
    tma_kpe: Any
    mKpe: cute.Tensor
    mScales: cute.Tensor
    mIndices: cute.Tensor
    mTable: cute.Tensor
    mO: cute.Tensor
    mLse: cute.Tensor
    mPart: cute.Tensor
    num_heads: Int32
    num_tiles: Int32  # of 16 heads
    page_size: Int32
    ckv_unit: Int32
    ckv_page_units: Int32
    ckv_row_units: Int32
    kpe_unit: Int32
    kpe_page_units: Int32
    kpe_row_units: Int32
    nope_scale_log2: Float32
    rope_scale_log2: Float32
    out_scale: Float32
    ckv_scale_at: Int64  # None: a 16-bit cache
    kpe_scale_at: Int64
    q_scale_at: Int64
    lse_scale: Float32
    lay_sub: cute.ComposedLayout
    lay_r: cute.ComposedLayout


@dataclasses.dataclass(frozen=True)
class Smem:
    """Views of one CTA's shared memory; the addresses are in bytes."""

    mbar: Any
    sK_sub: cute.Tensor
    sR_tma: cute.Tensor
    sScales: cute.Tensor
    k_address: Int32
    r_address: Int32
    q_address: Int32
    p_address: Int32
    scale_address: Int32
    sProduce: cute.Tensor  # (word, producer warp)
    sLoop: cute.Tensor  # (word, consumer warp): items, table row of the first, request, partial row, head 0
    sRow: cute.Tensor  # (row, 2): what a score of Q K^T is worth, of the rope's
    sFlags: cute.Tensor  # (warp, parity)
    sMax: cute.Tensor  # (row, warp); in the epilogue the row sums, then the rows' largest elements
    sBig: cute.Tensor  # (warp,)


@dataclasses.dataclass(frozen=True)
class Fragments:
    """Registers of one consumer thread. It has rows `row` and `row + 8`: of S, tokens 8 w + 2 l4 and the next; of O,
    channels 64 w + 16 c + 4 l4 .. + 3."""

    w: Int32
    lane: Int32
    row: Int32
    l4: Int32
    rQ: cute.Tensor  # A fragments of the first steps, four words of two channels each
    rO: cute.Tensor  # 8 accumulator tiles; channel block c: tiles 2 c (even channels) and 2 c + 1
    rS: cute.Tensor  # scores of the tile at hand, in log2 units: row 0 two tokens, row 1 two tokens
    rNext: cute.Tensor  # of the next tile
    rL: cute.Tensor
    rSums: cute.Tensor
    rRef: cute.Tensor
    rUnit: cute.Tensor
    first: cute.Tensor
