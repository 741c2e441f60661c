"""The order in which the scales of a tile's tokens lie in shared memory (lib/ring.py)."""

from mla_cute.kernels.lib.paged import TILE_N
from mla_cute.kernels.lib.ring import scale_place


def test_every_token_has_a_place_of_its_own():
    assert sorted(map(scale_place, range(TILE_N))) == list(range(TILE_N))


def test_what_a_thread_reads_by_one_load_are_its_columns_of_an_accumulator():
    """Of every eight tokens lane l has 2 (l % 4) and the next; four places are those of sixteen tokens."""
    for l4 in range(4):
        for c in range(TILE_N // 16):
            columns = [16 * c + 8 * j + 2 * l4 + i for j in range(2) for i in range(2)]
            first = 16 * c + 4 * l4
            assert [scale_place(token) for token in columns] == list(range(first, first + 4))


def test_a_warp_of_tile16_finds_its_pair():
    """Consumer warp w has tokens 8 w .. 8 w + 7; tiles_fp8.py adds 4 l4 to the place of the first."""
    for w in range(8):
        for l4 in range(4):
            pair = [scale_place(8 * w + 2 * l4 + i) for i in range(2)]
            assert pair == [scale_place(8 * w) + 4 * l4, scale_place(8 * w) + 4 * l4 + 1]
