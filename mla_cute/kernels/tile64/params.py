"""What the row-tile kernel's roles share: barriers, kernel arguments, shared memory, one consumer thread's registers.

All frozen: a mutable object would be carried through every staged branch and loop.
"""

import dataclasses
from typing import Any

import cutlass.cute as cute
from cutlass import Float32, Int32

from ..lib.paged import NUM_SUB

BAR_SCALE0, BAR_SCALE1, BAR_P0, BAR_P1, BAR_INIT, BAR_EPI, BAR_FILL0, BAR_FILL1 = range(1, 9)
MB_FULL, MB_EMPTY = 0, 2 * NUM_SUB
MB_Q_FULL, MB_Q_EMPTY, MB_ROPE_EMPTY, MB_TOTAL = (MB_EMPTY + 4 + i for i in range(4))

# (stage, half) in the order in which a pair's halves are released.
RELEASE_ORDER = ((0, 0), (1, 1), (0, 1), (1, 0))


@dataclasses.dataclass(frozen=True)
class Params:
    """Everything the device side reads, as one kernel argument."""

    mma_qk: cute.TiledMma
    mma_qk_rs: cute.TiledMma
    mma_pv: cute.TiledMma
    mma_pv_rs: cute.TiledMma
    tma_q: cute.CopyAtom
    mQ: cute.Tensor
    tma_qpe: cute.CopyAtom
    mQpe: cute.Tensor
    tma_ckv: Any
    mCkv: cute.Tensor
    tma_kpe: Any
    mKpe: cute.Tensor
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
    scale_log2: Float32
    lse_scale: Float32
    lay_q: cute.ComposedLayout
    lay_k: cute.ComposedLayout
    lay_vt: cute.ComposedLayout
    lay_sub: cute.ComposedLayout
    lay_sub2: cute.ComposedLayout
    lay_sub9: cute.ComposedLayout
    lay_sub16: cute.ComposedLayout


@dataclasses.dataclass(frozen=True)
class Smem:
    """Views of one CTA's shared memory."""

    mbar: Any
    sQ: cute.Tensor
    sQ_sub: cute.Tensor
    sP0: cute.Tensor
    sP1: cute.Tensor
    sK: cute.Tensor
    sK_sub: cute.Tensor
    sVt: cute.Tensor
    sR: cute.Tensor
    sM: cute.Tensor
    sScale0: cute.Tensor
    sScale1: cute.Tensor
    sL: cute.Tensor
    sItem: cute.Tensor
    k_words: cute.Tensor


@dataclasses.dataclass(frozen=True)
class Fragments:
    """Descriptors (t*) and registers (r*) of one consumer thread; S and O are (row, column) views of rS and rO."""

    t: Int32
    lane: Int32
    row: Int32
    tSrQ: cute.Tensor
    tSrK: cute.Tensor
    tSrR: cute.Tensor
    tOrV: cute.Tensor
    tOrP0: cute.Tensor
    tOrP1: cute.Tensor
    rO: cute.Tensor
    rS: cute.Tensor
    rP: cute.Tensor
    rPc: cute.Tensor
    rQr: cute.Tensor
    rL: cute.Tensor
    S: cute.Tensor
    O: cute.Tensor
    ldm: cute.TiledCopy
    stm: cute.TiledCopy
    tQs: cute.Tensor
    tQr: cute.Tensor
    tPr: cute.Tensor
    tPs0: cute.Tensor
    tPs1: cute.Tensor
