"""What the FP8 row-tile kernel's roles share: barriers, arguments, shared memory, a consumer thread's registers.

All frozen: a mutable object would be carried through every staged branch and loop.
"""

import dataclasses
from typing import Any

import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from ..lib.ring import MAX_STAGES

BAR_MAX, BAR_P, BAR_Q, BAR_EPI, BAR_FILL0, BAR_FILL1, BAR_P_FREE0, BAR_P_FREE1 = range(1, 9)
MB_TOTAL = 2 * MAX_STAGES
NUM_CONSUMERS = 256


@dataclasses.dataclass(frozen=True)
class Params:
    """Everything the device side reads, as one kernel argument."""

    mma_nope: cute.TiledMma
    mma_rope: cute.TiledMma
    mma_pv: cute.TiledMma
    mma_p: cute.TiledMma
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
    page_size: Int32
    num_tiles: Int32
    num_parts: Int32
    item_row0: Int32
    ckv_unit: Int32
    ckv_page_units: Int32
    ckv_row_units: Int32
    kpe_unit: Int32
    kpe_page_units: Int32
    kpe_row_units: Int32
    nope_scale_log2: Float32
    rope_scale_log2: Float32
    out_scale: Float32
    ckv_scale_at: Int64  # addresses of scales on the device, 0 where there is none (lib/scalars.py)
    kpe_scale_at: Int64
    q_scale_at: Int64
    lse_scale: Float32
    lay_q: cute.ComposedLayout
    lay_qr: cute.ComposedLayout
    lay_k: cute.ComposedLayout
    lay_sub: cute.ComposedLayout
    lay_r: cute.ComposedLayout
    lay_p: cute.ComposedLayout


@dataclasses.dataclass(frozen=True)
class Smem:
    """Views of one CTA's shared memory."""

    mbar: Any
    sQ: cute.Tensor
    sQr: cute.Tensor
    sP: cute.Tensor
    sK: cute.Tensor
    sK_sub: cute.Tensor  # bytes, for TMA
    sR: cute.Tensor
    sR_tma: cute.Tensor
    sScales: cute.Tensor
    sMax: cute.Tensor
    sMove: cute.Tensor
    sL: cute.Tensor
    sQScale: cute.Tensor
    sAddress: cute.Tensor
    scratch: cute.Tensor  # of the epilogue, in sP
    sItem: cute.Tensor
    sProduce: cute.Tensor  # (word, producer warp)
    sLoop: cute.Tensor  # number of items, table row of the first, head0, part
    sLeaves: cute.Tensor  # of even and odd pairs: 1 + the tile of the last one that needed `_move`
    k_words: cute.Tensor


@dataclasses.dataclass(frozen=True)
class Fragments:
    """Descriptors (t*) and registers (r*) of one consumer thread.

    S is the (row, column) view of rS: rows `row` and `row + 8`, two tokens of every eight. The accumulators rO hold
    O^T: thread (g, l4) of warp w has, in rO[m], channels 64 m + 16 w + 2 g + {0, 1} of its warpgroup's half, and of
    every eight rows the two from 2 l4 on.
    """

    t: Int32
    lane: Int32
    row: Int32
    tSrQ: cute.Tensor
    tSrK: cute.Tensor
    tSrQr: cute.Tensor
    tSrR: cute.Tensor
    tOrP: cute.Tensor
    rO: tuple
    rS: cute.Tensor
    rT: cute.Tensor
    rP: cute.Tensor
    rV: tuple
    rL: cute.Tensor
    rRef: cute.Tensor  # reference maxima of the two rows
    rUnit: cute.Tensor  # what the channel scales in P V are counted in
    S: cute.Tensor
    T: cute.Tensor
    stm: cute.TiledCopy
    tPr: cute.Tensor
    tPs: tuple
