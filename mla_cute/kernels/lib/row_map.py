"""Which query rows a row tile holds, and what of its item follows from that: where decode and prefill differ.

HeadRows     decode: the tile of CTA i of a part holds heads 64 i .. 64 i + 63 of the item's request, one token; every
             row sees the same keys.
PackedRows   prefill: the item names 64 consecutive (token, head) rows of one request, row = token * H + head; under a
             causal mask each token sees its own keys.

Arguments of the methods, of which only what a main kernel has anyway is read:
    params       its `Params`: `num_heads`, and `mTable`, `num_parts`, `item_row0` to find items
    smem         its `Smem`: `sItem`, (slot, word) of the items at hand
    regs         its `Fragments`: `S`, the (row, column) view of this thread's scores, whose rows are `row` and
                 `row` + 8 of the tile; `lane`
    slot         the item's in `sItem`
    head0        the first head of a decode tile, 64 i; PackedRows does not read it
"""

import abc

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from ...dims import TILE_M
from . import softmax
from .paged import TILE_N


class Word:
    """The words of an item: a row of the plan's table (planner/decode.py, planner/prefill.py), in `sItem` too."""

    REQUEST = 0  # decode
    ROW0 = 0  # prefill: the tile's first (token, head) row
    KV_BEGIN = 1
    KV_END = 2
    FIRST_INDEX = 3  # where in kv_indices the request's pages begin
    PARTIAL_ROW = 4  # the first that the item writes, or -1: it writes the output
    NUM_ROWS = 5  # prefill
    SHIFT = 6  # prefill: query token T, counted over all requests, sees the keys below T + SHIFT
    # Of a part's row; decode's is also the part's first item.
    PREFILL_NUM_ITEMS = 1
    DECODE_FIRST_ROW = 5  # table row of the first item
    DECODE_NUM_ITEMS = 6


def load_item(table, index, item) -> None:
    """One 8-word row of the plan to registers, as two 16-byte loads."""
    for i in range(2):
        cute.autovec_copy(cute.local_tile(table, (1, 4), (index, i))[0, None], cute.local_tile(item, (4,), (i,)))


class RowMap(abc.ABC):
    """The interface of HeadRows and PackedRows; the module's docstring says what the arguments are."""

    item_words: int  # how many words of an item the consumers read: 0 .. item_words - 1
    header_is_item: bool  # a part's table row holds its first item, beside where the others are

    # ------------------------------------------------------------------ host

    @abc.abstractmethod
    def q_view(self, q):
        """Queries (tokens, H, D) as (row, column, batch), of which TMA takes 64 x 64 boxes."""

    @abc.abstractmethod
    def num_tiles(self, num_heads):
        """CTAs that run a part, each with a row tile of its own."""

    # -------------------------------------------------- which items, producer

    @abc.abstractmethod
    def num_items(self, params, part):
        """Items of a part."""

    @abc.abstractmethod
    def item_row(self, params, part, first_row, it):
        """Table row of item `it` of a part; `first_row`: word DECODE_FIRST_ROW of the part's row, if header_is_item."""

    @abc.abstractmethod
    def q_at(self, item, head0):
        """(row, batch) of the tile in `q_view`; `item`: the item's words in registers."""

    # ------------------------------------------------------- which keys, rows

    @abc.abstractmethod
    def gap(self, params, smem, slot):
        """How many of the keys before kv_end the tile's first row does not see: the last ones.

        Under a causal mask a token sees no key that comes after it, so the end of an item's keys is hidden from the
        tile's earlier tokens, most of it from the first one. What lies `gap` or more keys before kv_end every row sees.
        0: all rows see all keys.
        """

    @abc.abstractmethod
    def mask(self, params, smem, regs, slot, valid, gap) -> None:
        """-inf in what a row of S does not see.

        Args:
            valid: kv_end less the K tile's first token; less than 64, or negative, where the tile goes past kv_end.
            gap: of the tile, from `gap`.
        """

    def is_partial(self, smem, slot):
        """The item is a piece of its tile: it writes partial rows, not the output."""
        return smem.sItem[slot, Word.PARTIAL_ROW] >= 0

    @abc.abstractmethod
    def num_rows(self, params, smem, slot, head0):
        """Rows of the tile that exist, 1 .. 64: the first ones, and only they are stored."""

    @abc.abstractmethod
    def part_row(self, smem, slot, head0):
        """Partial row of the tile's row 0, if it is partial."""

    @abc.abstractmethod
    def token_and_head(self, params, smem, slot, head0, row):
        """Where row `row` of the tile lies in the output."""


class HeadRows(RowMap):
    item_words = 5
    header_is_item = True

    def q_view(self, q):
        # Rows past H are out of bounds for TMA and arrive as zeros.
        return cute.make_tensor(q.iterator, cute.select(q.layout, mode=[1, 2, 0]))

    def num_tiles(self, num_heads):
        return cute.ceil_div(num_heads, TILE_M)

    def num_items(self, params, part):
        return params.mTable[part, Word.DECODE_NUM_ITEMS]

    def item_row(self, params, part, first_row, it):
        return first_row + it

    def q_at(self, item, head0):
        return head0, item[Word.REQUEST]

    def gap(self, params, smem, slot):
        return Int32(0)

    def mask(self, params, smem, regs, slot, valid, gap) -> None:
        softmax.mask_columns(regs.S, 8, valid, regs.lane)

    def num_rows(self, params, smem, slot, head0):
        return cutlass.min(params.num_heads - head0, Int32(TILE_M))

    def part_row(self, smem, slot, head0):
        return smem.sItem[slot, Word.PARTIAL_ROW] + head0

    def token_and_head(self, params, smem, slot, head0, row):
        return smem.sItem[slot, Word.REQUEST], head0 + row


class PackedRows(RowMap):
    item_words = 7
    header_is_item = False

    def q_view(self, q):
        # (token * H + head, column, 1). Rows past the request are its neighbours': they are computed and not stored.
        rows = cute.size(q, mode=[0]) * cute.size(q, mode=[1])
        width = cute.size(q, mode=[2])
        return cute.make_tensor(q.iterator, cute.make_layout((rows, width, 1), stride=(q.stride[1], 1, TILE_M)))

    def num_tiles(self, num_heads):
        return Int32(1)

    def num_items(self, params, part):
        return params.mTable[part, Word.PREFILL_NUM_ITEMS]

    def item_row(self, params, part, first_row, it):
        # The part is the CTA, which is asked for again: kept, it would be one register too many.
        part, _, _ = cute.arch.block_idx()
        return params.item_row0 + it * params.num_parts + part

    def q_at(self, item, head0):
        return item[Word.ROW0], Int32(0)

    def _gap_of(self, params, smem, slot, row):
        """How many keys before kv_end row `row` of the tile does not see."""
        # Token T does not see keys T + SHIFT .. KV_END - 1.
        after = smem.sItem[slot, Word.KV_END] - smem.sItem[slot, Word.SHIFT]
        token = (smem.sItem[slot, Word.ROW0] + row) // params.num_heads
        return cutlass.max(after - token, Int32(0))

    def gap(self, params, smem, slot):
        return cute.arch.make_warp_uniform(self._gap_of(params, smem, slot, Int32(0)))

    @cute.jit
    def mask(self, params, smem, regs, slot, valid, gap):
        # Both rows' own gaps are made here, where they are needed: kept for the whole item they spill.
        if valid - gap < TILE_N:
            own = (self._gap_of(params, smem, slot, regs.row), self._gap_of(params, smem, slot, regs.row + 8))
            for n in cutlass.range_constexpr(TILE_N // 4):
                col = (n // 2) * 8 + (regs.lane % 4) * 2 + n % 2
                for r in cutlass.range_constexpr(2):
                    regs.S[r, n] = regs.S[r, n] if col < valid - own[r] else -Float32.inf

    def num_rows(self, params, smem, slot, head0):
        return smem.sItem[slot, Word.NUM_ROWS]

    def part_row(self, smem, slot, head0):
        return smem.sItem[slot, Word.PARTIAL_ROW]

    def token_and_head(self, params, smem, slot, head0, row):
        global_row = smem.sItem[slot, Word.ROW0] + row
        token = global_row // params.num_heads
        return token, global_row - token * params.num_heads


def output_address(params, token, head):
    """Address of element 0 of an output row, of 16-bit elements."""
    mO = params.mO
    return mO.iterator.toint() + (Int64(token) * mO.stride[0] + Int64(head) * mO.stride[1]) * 2
