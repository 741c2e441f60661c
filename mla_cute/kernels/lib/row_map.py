"""Which query rows a row tile holds, and what of its item follows from that: where decode and prefill differ.

HeadRows     decode: the tile of CTA i of a part holds heads 64 i .. 64 i + 63 of the item's request, one token; every
             row sees the same keys.
PackedRows   prefill: the item names 64 consecutive (token, head) rows of one request, row = token * H + head; under a
             causal mask each token sees its own keys.

`p`, `s` and `f` are the `Params`, `Smem` and `Fragments` of the main kernel; `slot` is the item's slot in `s.sItem`.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from ...dims import TILE_M
from . import softmax
from .paged import TILE_N


def load_item(table, index, item) -> None:
    """One 8-word row of the plan to registers, as two 16-byte loads."""
    for i in range(2):
        cute.autovec_copy(cute.local_tile(table, (1, 4), (index, i))[0, None], cute.local_tile(item, (4,), (i,)))


class _Rows:
    def is_partial(self, s, slot):
        """The item is a piece of its tile: it writes partial rows, not the output."""
        return s.sItem[slot, 4] >= 0


class HeadRows(_Rows):
    item_words = 5
    # A part's table row holds its first item beside where the others are.
    header_is_item = True

    def q_view(self, q):
        """(row, column, batch): rows past H are out of bounds for TMA and arrive as zeros."""
        return cute.make_tensor(q.iterator, cute.select(q.layout, mode=[1, 2, 0]))

    def num_tiles(self, num_heads):
        return cute.ceil_div(num_heads, TILE_M)

    def item_row(self, p, part, first_row, it):
        """Table row of item `it` of a part."""
        return first_row + it

    def num_items(self, p, part):
        return p.mTable[part, 6]

    def q_at(self, item, head0):
        """(row, batch) of the tile in q_view."""
        return head0, item[0]

    def gap(self, p, s, slot):
        """The most keys before kv_end that a row of the tile does not see."""
        return Int32(0)

    def mask(self, p, s, f, slot, valid, gap) -> None:
        """-inf in what a row of S does not see; `valid`: tokens of this K tile before kv_end."""
        softmax.mask_columns(f.S, 8, valid, f.lane)

    def num_rows(self, p, s, slot, head0):
        return cutlass.min(p.num_heads - head0, Int32(TILE_M))

    def part_row(self, s, slot, head0):
        """Partial row of the tile's row 0, if it is partial."""
        return s.sItem[slot, 4] + head0

    def token_and_head(self, p, s, slot, head0, row):
        return s.sItem[slot, 0], head0 + row


class PackedRows(_Rows):
    item_words = 7
    header_is_item = False

    def q_view(self, q):
        """(token * H + head, column, 1): rows past the request are its neighbours', computed and not stored."""
        rows = cute.size(q, mode=[0]) * cute.size(q, mode=[1])
        width = cute.size(q, mode=[2])
        return cute.make_tensor(q.iterator, cute.make_layout((rows, width, 1), stride=(q.stride[1], 1, TILE_M)))

    def num_tiles(self, num_heads):
        return Int32(1)

    def item_row(self, p, part, first_row, it):
        part, _, _ = cute.arch.block_idx()  # asked for again: kept, it would be one register too many
        return p.item_row0 + it * p.num_parts + part

    def num_items(self, p, part):
        return p.mTable[part, 1]

    def q_at(self, item, head0):
        return item[0], Int32(0)

    def _gap_of(self, p, s, slot, row):
        return cutlass.max(s.sItem[slot, 2] - s.sItem[slot, 6] - (s.sItem[slot, 0] + row) // p.num_heads, Int32(0))

    def gap(self, p, s, slot):
        return cute.arch.make_warp_uniform(self._gap_of(p, s, slot, Int32(0)))

    @cute.jit
    def mask(self, p, s, f, slot, valid, gap):
        # The two rows' own gaps are made here, where they are needed: kept for the whole item they spill.
        if valid - gap < TILE_N:
            own = (self._gap_of(p, s, slot, f.row), self._gap_of(p, s, slot, f.row + 8))
            for n in cutlass.range_constexpr(TILE_N // 4):
                col = (n // 2) * 8 + (f.lane % 4) * 2 + n % 2
                for r in cutlass.range_constexpr(2):
                    f.S[r, n] = f.S[r, n] if col < valid - own[r] else -Float32.inf

    def num_rows(self, p, s, slot, head0):
        return s.sItem[slot, 5]

    def part_row(self, s, slot, head0):
        return s.sItem[slot, 4]

    def token_and_head(self, p, s, slot, head0, row):
        global_row = s.sItem[slot, 0] + row
        token = global_row // p.num_heads
        return token, global_row - token * p.num_heads


def output_address(p, token, head):
    """Of element 0 of an output row."""
    return p.mO.iterator.toint() + (Int64(token) * p.mO.stride[0] + Int64(head) * p.mO.stride[1]) * 2
