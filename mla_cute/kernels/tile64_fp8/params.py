"""What the roles of the FP8 row-tile kernel share: barriers, what a variant is, arguments, shared memory, registers.

Names follow CuTe: mX lies in global memory, sX in shared memory, rX in registers, tX is a wgmma descriptor, layX a
layout of shared memory. `Params`, `Smem`, `Fragments` and `Pair` are frozen: a mutable object would be carried through
every staged branch and loop.
"""

import dataclasses
from typing import Any

import cutlass.cute as cute
from cutlass import Float8E4M3FN, Float32, Int32, Int64, Numeric, Uint32

from ...dims import TILE_M
from ..keys import Fp8Key, LaunchConfig
from ..lib.barriers import NamedBarrier
from ..lib.dtypes import CUTLASS_DTYPES
from ..lib.ring import RingMbarriers, RingProducer
from ..lib.row_map import RowMap

NUM_CONSUMERS = 256  # threads of the two consumer warpgroups
WARPGROUP = 128  # threads of one

# Items whose record has room in shared memory: consumers fetch the next one's while they work on another.
ITEM_SLOTS = 4

# Words of Smem.sLoop, what the loop over a part's items needs.
LOOP_NUM_ITEMS, LOOP_FIRST_ROW, LOOP_HEAD0, LOOP_PART = range(4)


class Bar(NamedBarrier):
    """id, threads. Comments say who arrives -> who waits."""

    MAX = 1, NUM_CONSUMERS  # both consumers: the row maxima of both tiles are published -> both, to raise references
    P = 2, NUM_CONSUMERS  # both consumers: P of both tiles is in shared memory -> both, to multiply it
    Q = 3, NUM_CONSUMERS  # both consumers: the item's Q is in shared memory -> both
    EPI = 4, NUM_CONSUMERS  # both consumers: the item's record, or its row sums and addresses, are there -> both
    FILL0 = 5, WARPGROUP  # consumer 0: what its threads wrote for one another is there -> consumer 0
    FILL1 = 6, WARPGROUP  # likewise consumer 1
    P_FREE0 = 7, NUM_CONSUMERS  # consumer 1: it has multiplied consumer 0's P -> consumer 0, to write its next one
    P_FREE1 = 8, NUM_CONSUMERS  # likewise consumer 0 -> consumer 1


# By consumer: the ids of these and of the ones behind them.
FILL = Bar.FILL0
P_FREE = Bar.P_FREE0


class Variant(RingProducer):
    """What a static key and a configuration decide, as attributes that the roles read: the base of their classes.

    RingProducer has those of the cache (`kv_format`, `num_scales`, `rope_fp8`, `loader` and others) and `dtype`,
    `rows` and `num_stages`.
    """

    q_fp8: bool  # the queries are e4m3
    rope_dtype: type[Numeric]  # that Q's rope is multiplied in: e4m3 or `dtype`
    tile_rows: int  # query rows of a tile, 64 or 32
    own_rows: int  # of S, that a thread has when the parts of Q are added up: 2 or 1
    q_parts: int  # e4m3 parts whose sum is Q: 1, or a high and a low one for a 16-bit Q unless accuracy is "fast"
    rope_parts: int  # likewise of its rope; 1 where that is multiplied in `dtype`
    q_terms: int  # of q_parts, that are multiplied one after the other; of 32 rows both are multiplied at once
    rope_terms: int
    blocks: int  # of 64 channels of O^T, that a consumer owns
    score_chunks: int  # Q K^T is added up in float32 after each of so many parts of its depth
    ahead: bool  # a pair's Q K^T is started before the P V of the pair in front of it
    early_v: bool  # V's first fragment is made before the wait for the other consumer's P
    other_late: bool  # a consumer waits for the other one's tile behind its own scores, not in front of them
    use_pdl: bool  # the kernel runs under programmatic dependent launch
    regs_consumer: int  # registers of a thread
    regs_producer: int
    mbars: RingMbarriers

    def __init__(self, key: Fp8Key, rows: RowMap, config: LaunchConfig, tile_rows: int = TILE_M):
        self.dtype = CUTLASS_DTYPES[key.dtype]
        self.dims = key.dims
        self.rows = rows
        self.q_fp8 = key.q_fp8
        self._set_cache(key.box_rows, config.evict_first, key.kv_format, key.sparse)
        self.rope_dtype = Float8E4M3FN if self.rope_fp8 else self.dtype
        self.tile_rows, self.own_rows = tile_rows, tile_rows // 32
        # Of 32 rows both parts are multiplied at once, so that one of them would not be faster.
        one_part = config.accuracy == "fast" and tile_rows == TILE_M
        self.q_parts = 1 if self.q_fp8 or one_part else 2
        self.rope_parts = self.q_parts if self.rope_fp8 else 1
        self.q_terms, self.rope_terms = (self.q_parts, self.rope_parts) if tile_rows == TILE_M else (1, 1)
        self.blocks = self.dims.ckv // 128
        # In format "group" each 128 channels have a scale of their own, so that their sums are apart anyway. In others,
        # accuracy "native" leaves all of them to the tensor core, which keeps fewer bits of the sum than float32.
        self.score_chunks = self.dims.ckv // 128 if self.kv_format == "group" or config.accuracy != "native" else 1
        self.num_stages = (4 if self.q_terms == 1 else 3) if self.dims.ckv == 512 else 6
        # Gathers from pages spill 8 bytes at 240 and 24 registers with 256 channels and with 512 + 32. At 232 and 40
        # the latter still do where a Q K^T is in flight behind a pair, so they are left without.
        from_pages = not self.by_tma and not key.sparse
        if from_pages and self.dims == (512, 32) and tile_rows == TILE_M:
            self.num_stages = 3
        # With three slots the next pair's tile may be waiting for the slots that this pair's P V reads.
        self.ahead = self.num_stages >= 4
        # Gathered tiles come late where three slots hold little in advance: lists of 64 and 128 heads take 5 and 4 %
        # less time so. Where TMA loads, or four slots are there, it is 0 to 2 % more (docs/performance.md).
        self.other_late = not self.ahead and not self.by_tma
        # Of lists over format token with e4m3 queries 16 bytes spill so.
        spills = key.sparse and self.kv_format == "token" and self.q_fp8 and tile_rows == TILE_M
        self.early_v = not spills
        self.use_pdl = config.use_pdl
        self.regs_consumer, self.regs_producer = 240, 24
        if from_pages and (self.dims.ckv == 256 or self.dims == (512, 32)):
            self.regs_consumer, self.regs_producer = 232, 40
        if tile_rows < TILE_M:
            # O^T has half as many; lists spill 16 bytes at 24.
            self.regs_consumer, self.regs_producer = 224, 56
        # A slot's empty mbarrier counts consumer warps.
        self.mbars = RingMbarriers(self.num_stages, self.loader.full_arrivals, NUM_CONSUMERS // 32)


@dataclasses.dataclass(frozen=True)
class Params:
    """Everything the device side reads, as one kernel argument. step.py (StepArgs) tells the tensors' shapes,
    lib/ring.py (RingParams) what the producer reads."""

    mma_nope: cute.TiledMma  # S from e4m3 Q and K
    mma_rope: cute.TiledMma  # S from their ropes
    mma_pv: cute.TiledMma  # O^T from V^T in registers and P^T, float16
    mma_p: cute.TiledMma  # runs nowhere: its accumulator's layout is that in which P is stored
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
    num_tiles: Int32  # decode: row tiles of a request, a CTA each per part; prefill: 1
    num_parts: Int32
    item_row0: Int32  # prefill: table row of the first item
    ckv_unit: Int32
    ckv_page_units: Int32
    ckv_row_units: Int32
    kpe_unit: Int32
    kpe_page_units: Int32
    kpe_row_units: Int32
    nope_scale_log2: Float32  # lib/scalars.py has this and the next five
    rope_scale_log2: Float32
    out_scale: Float32
    ckv_scale_at: Int64
    kpe_scale_at: Int64
    q_scale_at: Int64
    lse_scale: Float32  # 1 for base 2, ln 2 for base e
    sink_at: Int64 | None  # sparse: see step.py
    lay_q: cute.ComposedLayout
    lay_qr: cute.ComposedLayout
    lay_k: cute.ComposedLayout
    lay_sub: cute.ComposedLayout
    lay_r: cute.ComposedLayout
    lay_p: cute.ComposedLayout


@dataclasses.dataclass(frozen=True)
class Smem:
    """Views of one CTA's shared memory, of heads of 512 + 64."""

    mbar: Any  # pointer to the first of Variant.mbars
    sQ: cute.Tensor  # (64, 512, q_terms) e4m3
    sQr: cute.Tensor  # (64, 64, rope_terms) of rope_dtype
    sP: cute.Tensor  # (tile_rows, 64, 2) float16: P of both tiles
    sK: cute.Tensor  # (64, 512, num_stages) e4m3: K, and V
    sK_sub: cute.Tensor  # the same as bytes in sub-tiles, for the producer
    sR: cute.Tensor  # (64, 64, num_stages): the rope
    sR_tma: cute.Tensor  # the same, e4m3 as bytes
    sScales: cute.Tensor  # (64, num_scales, num_stages), tokens in the order of lib/ring.py, `scale_place`
    # Format "group": (place, group, tile of the pair), a word for the scales of two tokens in units, as float16.
    sVScales: Any
    sMax: cute.Tensor  # (consumer, row): maxima of its tile; in the epilogue [0, row]: references
    sFactor: cute.Tensor  # (row,): what O is multiplied by where the reference or the unit is raised
    sL: cute.Tensor  # (consumer, row): its tiles' share of the row sums
    sQScale: cute.Tensor  # (2, row): what a score is worth in log2 units, of the latent part and of the rope
    sAddress: cute.Tensor  # (row,): where the row's output or partial row lies
    scratch: cute.Tensor  # (row, warp, consumer), of the epilogue, in sP
    sItem: cute.Tensor  # (ITEM_SLOTS, 8): items as the plan has them
    sProduce: cute.Tensor  # (word, producer warp), see lib/ring.py
    sLoop: cute.Tensor  # LOOP_NUM_ITEMS and so on
    sRaise: cute.Tensor  # of even and odd pairs: 1 + the first tile of the last one that asked to raise references
    sChosen: Any  # (producer warp, slot): which of its 16 rows hold tokens; None where it is not sparse
    k_words: cute.Tensor  # sK in 8-byte words without the swizzle


@dataclasses.dataclass(frozen=True)
class Fragments:
    """Descriptors and registers of one consumer thread.

    S is the (row, column) view of rS: rows `row` and `row + 8`, two tokens of every eight; in tiles of 32 rows both are
    of row `row`, from the high and from the low part of Q, and S[0] becomes their sum. The accumulators rO hold O^T:
    thread (g, l4) of warp w has, in rO[m], channels 64 m + 16 w + 2 g + {0, 1} of its warpgroup's half, and of every
    eight rows the two from 2 l4 on.
    """

    t: Int32  # thread of the warpgroup, 0..127
    lane: Int32
    row: Int32  # the first of this thread's rows of the tile
    tSrQ: cute.Tensor
    tSrK: cute.Tensor
    tSrQr: cute.Tensor
    tSrR: cute.Tensor
    tOrP: cute.Tensor
    rO: tuple  # blocks of 64 channels, four of heads of 512
    rS: cute.Tensor
    rT: cute.Tensor  # a second accumulator of scores: of the next tile, of a part of the depth, or of the rope
    rP: cute.Tensor
    rV: tuple  # two fragments of V: one is multiplied while the other is made
    rL: cute.Tensor  # this thread's share of the sums of its rows
    rRef: cute.Tensor  # their references
    rUnit: cute.Tensor  # the unit: P V counts channel scales as multiples of it, and O is multiplied by it at its end
    S: cute.Tensor  # views (row 0..1, column 0..15) of rS and rT
    T: cute.Tensor
    stm: Any  # of 64 rows, stores P: rP is tPr, its place in sP, of the own tile, is tPs; else all three are None
    tPr: Any
    tPs: Any


@dataclasses.dataclass(frozen=True)
class Pair:
    """The two K tiles at hand; tile 0 is that whose scores consumer 0 makes."""

    tile: Uint32  # the number of tile 0 among all tiles that the CTA runs
    slots: tuple  # of both tiles in the ring
    valid: tuple  # tokens of the item from each tile's first one on; below 64, even below 0, in the last pair only
    item_slot: Int32  # of smem.sItem
