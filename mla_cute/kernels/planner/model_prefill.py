"""The planner of prefill in plain Python: its algorithm to read, and what the GPU planner must produce, item by item.

`planner/prefill.py` (with tiles.py, balanced.py and invariant.py) does the same on the GPU with closed forms and a
counting sort, and describes its output there. As with model.py, tests compare the two, the tuner asks here, and no
kernel imports this file.

From query and kv lengths to work lists; costs are in blocks of 64 tokens, cuts lie on pairs of them:

1. `tiles_of`: TILE_M rows of a request at a time, a row being a (query token, head) pair. Under the causal mask a tile
   sees the keys up to its last token, so the tiles of a request grow longer towards its end.
2. `ranked`: tiles that see a key, longest first. The sort on the GPU counts, so costs fall into at most COST_CLASSES
   classes; inside one the order is by request, and there from the last tile to the first.
3. Whole rounds of one tile for each part are dealt out uncut, back and forth, so that who has the longest of a round
   gets the shortest of the next.
4. `tail_sizes`: the tail, fewer tiles than parts, is cut so that all parts have something to do: into equal pieces of
   at most a c-th of its longest tile, c = 1 to MAX_CUTS. Of these the cheapest: items of a part times the cost of the
   longest one, and `split_penalty` once anything is cut.
5. The tail's items go to the parts in turn: the first piece of every tile, then the second of all that have one, ...

Example, 132 parts, 16 heads, 4 causal requests of 2048 queries and 8192 keys, the default's item_overhead 4: a request
has 2048 * 16 / 64 = 512 tiles, which see 6148 to 8192 keys, 98 to 128 blocks. 2048 tiles are 15 rounds of 132 and a
tail of 68 tiles, the shortest: 98 blocks each. Uncut they cost 98 + 4 while 64 parts idle; in 5 pieces of at most 20
they are 340 items, so that a part has at most 3 and costs 3 * (20 + 4) + 3.

A plan that is batch-invariant cuts each tile by its own length and its request's number of tiles alone
(`_cut_each_request`).
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ...config import KernelConfig
from ...dims import BLOCK, TILE_M
from ..keys import COST_CLASSES, FIXED_MAX_ITEMS, FIXED_MAX_PIECES, FIXED_MIN_BLOCKS, TAIL_ITEMS_PER_PART

SEES_ALL = 1 << 30  # shift of queries without a causal limit
MAX_CUTS = 64  # candidates, and so pieces of a tail tile


@dataclass(frozen=True)
class Request:
    q_start: int
    q_len: int
    kv_len: int
    first: int  # index of its first entry in kv_indices


@dataclass(frozen=True)
class Tile:
    """Rows TILE_M * m of a request and on, which see its first `kv_hi` keys."""

    request: int
    m: int
    rows: int
    first_row: int
    kv_hi: int

    @property
    def blocks(self) -> int:
        """Its cost: blocks in whole pairs."""
        return 2 * -(-self.kv_hi // (2 * BLOCK))


Item = tuple[int, ...]  # first global row, kv_begin, kv_end, first index, partial row of row 0 or -1, rows, shift


@dataclass
class Plan:
    parts: int
    items: dict[int, Item]  # item row (after the merge entries' rows): the words of the table
    merges: list[tuple[int, int, int, int]]  # first global row, first partial row, pieces, rows
    tiles: list[Tile]
    rounds: int  # normal mode: whole rounds of uncut tiles
    sizes: dict[Tile, int]  # blocks of a piece

    @property
    def counts(self) -> list[int]:
        """Items of each part: those in rows p, p + parts, ..."""
        return [len(range(p, len(self.items), self.parts)) for p in range(self.parts)]

    def items_of(self, part: int) -> list[Item]:
        return [self.items[row] for row in range(part, len(self.items), self.parts)]

    def loads(self, overhead: int) -> list[int]:
        """Cost of each part in blocks."""
        return [
            sum(2 * -(-(item[2] - item[1]) // (2 * BLOCK)) + overhead for item in self.items_of(p))
            for p in range(self.parts)
        ]


def plan(
    requests: Sequence[Request],
    parts: int,
    num_heads: int,
    causal: bool,
    config: KernelConfig,
    batch_invariant: bool = False,
) -> Plan:
    """Items of a prefill step.

    Args:
        requests: in order of their queries.
        parts: work lists, one for each CTA.
        num_heads: query heads.
        causal: whether a query sees the keys up to its own alone, counted from the end of its request.
        config: of which min_blocks, item_overhead and split_penalty count.
        batch_invariant: cut each tile by its own request alone.
    """
    by_request = [tiles_of(request, b, num_heads, causal) for b, request in enumerate(requests)]
    tiles = [tile for group in by_request for tile in group]
    made = Plan(parts, {}, [], tiles, 0, {})

    def item(tile: Tile, piece: int, part_row: int) -> Item:
        request, size = requests[tile.request], made.sizes[tile] * BLOCK
        shift = request.kv_len - request.q_len + 1 - request.q_start if causal else SEES_ALL
        begin = piece * size
        return (tile.first_row, begin, min(begin + size, tile.kv_hi), request.first, part_row, tile.rows, shift)

    if batch_invariant:
        _cut_each_request(made, by_request, item)
    else:
        _balance(made, config, item)
    return made


def tiles_of(request: Request, num: int, num_heads: int, causal: bool) -> list[Tile]:
    """The row tiles of the request with that number."""
    rows = request.q_len * num_heads
    tiles = []
    for m in range(-(-rows // TILE_M)):
        kv_hi = request.kv_len
        if causal:
            last_token = min((TILE_M * m + TILE_M - 1) // num_heads, request.q_len - 1)
            kv_hi = min(max(request.kv_len - request.q_len + last_token + 1, 0), request.kv_len)
        first_row = request.q_start * num_heads + TILE_M * m
        tiles.append(Tile(num, m, min(TILE_M, rows - TILE_M * m), first_row, kv_hi))
    return tiles


def even_up(x: int) -> int:
    """`x` rounded up to whole pairs of blocks."""
    return x + x % 2


# ---------------------------------------------------------------------------------------------------------------------
# balanced


def ranked(tiles: Iterable[Tile]) -> list[Tile]:
    """The tiles with work by cost class, descending, then request, then descending m."""
    work = [(tile.blocks // 2, tile) for tile in tiles if tile.kv_hi]
    shift = 0
    while max((pairs for pairs, _ in work), default=0) >> shift >= COST_CLASSES:
        shift += 1
    work.sort(key=lambda each: (-(each[0] >> shift), each[1].request, -each[1].m))
    return [tile for _, tile in work]


def tail_sizes(tail: Sequence[int], parts: int, config: KernelConfig) -> tuple[int, ...]:
    """Blocks of a piece of each tile of a tail of tiles of that many blocks, all even and above 0."""
    if not tail:
        return ()
    sizes = _tail_cuts(tail, _tail_limit(tail, parts, config))
    return tuple(sizes[n] for n in tail)


def _tail_cuts(tail: Iterable[int], most: int) -> dict[int, int]:
    """Blocks of a piece for tiles of so many blocks, when no piece may exceed `most`."""
    return {n: even_up(-(-n // -(-n // most))) for n in tail}


def _tail_limit(tail: Sequence[int], parts: int, config: KernelConfig) -> int:
    """The most blocks of a piece that cost least; the first of equals."""
    tiles = Counter(tail)
    longest = max(tiles)
    limits = (max(even_up(config.min_blocks), even_up(-(-longest // c))) for c in range(1, MAX_CUTS + 1))
    best = None
    for most in dict.fromkeys(limits):  # equal limits cost the same
        sizes = _tail_cuts(tiles, most)
        items = sum(count * -(-n // sizes[n]) for n, count in tiles.items())
        if items <= TAIL_ITEMS_PER_PART * parts:
            cost = -(-items // parts) * (most + config.item_overhead)
            cost += config.split_penalty if items > len(tail) else 0
            if best is None or cost < best[0]:
                best = cost, most
    assert best is not None, "uncut tiles are fewer than parts"
    return best[1]


def _balance(made: Plan, config: KernelConfig, item: Callable[[Tile, int, int], Item]) -> None:
    order, parts = ranked(made.tiles), made.parts
    made.rounds = len(order) // parts
    uncut = made.rounds * parts
    for rank, tile in enumerate(order[:uncut]):
        k, x = divmod(rank, parts)
        made.sizes[tile] = tile.blocks
        made.items[k * parts + (x if k % 2 == 0 else parts - 1 - x)] = item(tile, 0, -1)
    tail = order[uncut:]
    sizes = tail_sizes([tile.blocks for tile in tail], parts, config)
    made.sizes |= dict(zip(tail, sizes, strict=True))
    pieces = {tile: _pieces(tile, made.sizes[tile]) for tile in tail}
    firsts = _part_rows(tail, pieces)
    made.merges = [(tile.first_row, firsts[tile], pieces[tile], tile.rows) for tile in tail if firsts[tile] >= 0]
    _append(made, _by_piece(tail, pieces), firsts, item)
    made.merges += [(tile.first_row, 0, 0, tile.rows) for tile in made.tiles if not tile.blocks]


# ---------------------------------------------------------------------------------------------------------------------
# batch-invariant


def _cut_each_request(made: Plan, by_request: Sequence[Sequence[Tile]], item: Callable[[Tile, int, int], Item]) -> None:
    """A request's tiles into at most FIXED_MAX_ITEMS items together, a tile into at most FIXED_MAX_PIECES."""
    pieces = {}
    for tiles in by_request:
        most = min(max(FIXED_MAX_ITEMS // max(len(tiles), 1), 1), FIXED_MAX_PIECES)
        for tile in tiles:
            size = max(even_up(-(-tile.blocks // most)), FIXED_MIN_BLOCKS) if most > 1 else tile.blocks
            made.sizes[tile] = size
            pieces[tile] = _pieces(tile, size)
    firsts = _part_rows(made.tiles, pieces)
    for tile in made.tiles:
        if pieces[tile] != 1:
            made.merges.append((tile.first_row, max(firsts[tile], 0), pieces[tile], tile.rows))
    for tiles in by_request:
        _append(made, _by_piece(tiles, pieces), firsts, item)


# ---------------------------------------------------------------------------------------------------------------------
# items of both


def _pieces(tile: Tile, size: int) -> int:
    return -(-tile.blocks // size) if tile.blocks else 0


def _part_rows(tiles: Sequence[Tile], pieces: dict[Tile, int]) -> dict[Tile, int]:
    """The first partial row of each tile, or -1."""
    cut = [tile for tile in tiles if pieces[tile] > 1]
    ends = itertools.accumulate((pieces[tile] * tile.rows for tile in cut), initial=0)
    return dict.fromkeys(tiles, -1) | dict(zip(cut, ends, strict=False))


def _by_piece(tiles: Sequence[Tile], pieces: dict[Tile, int]) -> Iterable[tuple[Tile, int]]:
    """The first piece of every tile, the second of all that have one, and so on."""
    for piece in range(max((pieces[tile] for tile in tiles), default=0)):
        yield from ((tile, piece) for tile in tiles if pieces[tile] > piece)


def _append(
    made: Plan,
    order: Iterable[tuple[Tile, int]],
    firsts: dict[Tile, int],
    item: Callable[[Tile, int, int], Item],
) -> None:
    for tile, piece in order:
        part_row = -1 if firsts[tile] < 0 else firsts[tile] + piece * tile.rows
        made.items[len(made.items)] = item(tile, piece, part_row)
