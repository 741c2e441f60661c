"""Row tiles of prefill requests as the planner sees them: costs in closed forms, and the rows of its table."""

import dataclasses

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Uint32

from ...dims import BLOCK, TILE_M
from ..keys import FIRST, KV_LEN
from .common import NUM_THREADS, PlannerBase

PAIR = 2 * BLOCK
SEES_ALL = 1 << 30  # shift of queries without a causal limit

# A request's facts: rows of a tensor (FACTS, requests + 1), with KV_LEN and FIRST. The *_AT are prefix sums, also at
# b = batch.
Q_START, Q_LEN = 0, 1
WORK_AT, EMPTY_AT = 4, 5  # balanced: tiles with work, empty tiles
ITEM_AT, ROW_AT, MERGE_AT, WHOLE_AT = 4, 5, 6, 7  # batch_invariant; the last: tiles of requests that are never cut


@dataclasses.dataclass(frozen=True)
class PrefillPlanParams:
    mQoIndptr: cute.Tensor
    mLengths: cute.Tensor
    mLastLen: cute.Tensor
    mTable: cute.Tensor
    mScratch: cute.Tensor
    batch: Int32
    page_size: Int32
    table_stride: Int32
    num_heads: Int32
    parts: Int32
    min_blocks: Int32
    overhead: Int32
    penalty: Int32
    causal: Int32
    item_row: Int32


@cute.jit
def div(a, b):
    """a // b of a >= 0, b > 0. The signed operator rounds down, which costs more."""
    return Int32(Uint32(a) // Uint32(b))


@cute.jit
def div_up(a, b):
    return div(a + b - 1, b)


class PrefillTiles(PlannerBase):
    """`p` are PrefillPlanParams, `r` the facts of the requests, `b` a request, `m` one of its row tiles."""

    @cute.jit
    def _num_tiles(self, p, r, b):
        return (r[Q_LEN, b] * p.num_heads + TILE_M - 1) // TILE_M

    @cute.jit
    def _kv_hi(self, p, r, b, m):
        """Keys that tile m of request b sees."""
        kv_hi = r[KV_LEN, b]
        if p.causal != 0:
            last_token = cutlass.min(div(TILE_M * m + TILE_M - 1, p.num_heads), r[Q_LEN, b] - 1)
            kv_hi = cutlass.max(kv_hi - r[Q_LEN, b] + last_token + 1, Int32(0))
        return kv_hi

    @cute.jit
    def _pairs(self, p, r, b, m):
        return (self._kv_hi(p, r, b, m) + PAIR - 1) // PAIR

    @cute.jit
    def _first_tile_seeing(self, p, q_len, kv_len, keys):
        """First tile that sees at least `keys` >= 1 keys; the number of tiles when none does.

        Its last token is at least `token`, so it is the tile of that token's first row.
        """
        m = (q_len * p.num_heads + TILE_M - 1) // TILE_M
        if keys <= kv_len:
            m = Int32(0)
            if p.causal != 0:
                token = cutlass.max(q_len - kv_len + keys - 1, Int32(0))
                m = token * p.num_heads // TILE_M
        return m

    @cute.jit
    def _request_of(self, p, at, b, i):
        """The request that index i falls into, by the prefix sums `at`; `b` is that of a smaller index."""
        if i >= at[b + 1]:
            b = self._last_at_or_before(at, p.batch, i)
        return b

    @cute.jit
    def _load_request(self, p, r, b):
        """Keep the facts of request b < batch, and what a conversion of the cache goes by in global memory as well
        (kernels/convert.py). Returns (q_len, kv_len)."""
        q_start = p.mQoIndptr[b]
        q_len = cutlass.max(p.mQoIndptr[b + 1] - q_start, Int32(0))
        kv_len, first = self._request(p, b)
        r[Q_START, b] = q_start
        r[Q_LEN, b] = q_len
        r[KV_LEN, b] = kv_len
        r[FIRST, b] = first
        p.mScratch[KV_LEN, b] = kv_len
        p.mScratch[FIRST, b] = first
        return q_len, kv_len

    # --------------------------------------------------------------- output

    @cute.jit
    def _write_half(self, p, row, half, w0, w1, w2, w3):
        words = cute.make_rmem_tensor((4,), Int32)
        words[0] = w0
        words[1] = w1
        words[2] = w2
        words[3] = w3
        cute.autovec_copy(words, cute.local_tile(p.mTable[row, None], (4,), (half,)))

    @cute.jit
    def _rows(self, p, r, b, m):
        return cutlass.min(r[Q_LEN, b] * p.num_heads - TILE_M * m, Int32(TILE_M))

    @cute.jit
    def _emit_item(self, p, r, index, b, m, piece, s, part_row):
        """Item row `index`: piece s, of `piece` pairs, of tile m of request b."""
        q_start = r[Q_START, b]
        begin = s * piece * PAIR
        end = cutlass.min(begin + piece * PAIR, self._kv_hi(p, r, b, m))
        shift = Int32(SEES_ALL)
        if p.causal != 0:
            shift = r[KV_LEN, b] - r[Q_LEN, b] + 1 - q_start
        row = p.item_row + index
        self._write_half(p, row, 0, q_start * p.num_heads + TILE_M * m, begin, end, r[FIRST, b])
        self._write_half(p, row, 1, part_row, self._rows(p, r, b, m), shift, Int32(0))

    @cute.jit
    def _emit_piece(self, p, r, index, b, m, piece, pieces, part_row, s):
        """Piece s of the tile in each lane of the warp, if it has one. Returns the index after them."""
        vote = cute.arch.vote_ballot_sync(pieces > s)
        if pieces > s:
            mine = index + cute.arch.popc(vote & ((1 << cute.arch.lane_idx()) - 1))
            row = Int32(-1)
            if pieces > 1:
                row = part_row + s * self._rows(p, r, b, m)
            self._emit_item(p, r, mine, b, m, piece, s, row)
        return index + cute.arch.popc(vote)

    @cute.jit
    def _emit_merge(self, p, r, index, b, m, part_row, pieces):
        row = r[Q_START, b] * p.num_heads + TILE_M * m
        self._write_half(p, p.parts + index, 0, row, part_row, pieces, self._rows(p, r, b, m))

    @cute.jit
    def _share(self, n, t):
        """[begin, end) of n tiles, the share of the thread's warp."""
        share = (n + NUM_THREADS - 1) // NUM_THREADS * 32
        begin = t // 32 * share
        return begin, cutlass.min(begin + share, n)
