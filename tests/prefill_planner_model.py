"""The planner of kernels/planner/prefill.py in plain loops: what the GPU planner must produce, item by item."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from planner_model import even_up

from mla_cute.config import KernelConfig
from mla_cute.dims import BLOCK, TILE_M
from mla_cute.kernels.keys import COST_CLASSES, FIXED_MAX_ITEMS, FIXED_MAX_PIECES, FIXED_MIN_BLOCKS, TAIL_ITEMS_PER_PART

SEES_ALL = 1 << 30


@dataclass(frozen=True)
class Request:
    q_start: int
    q_len: int
    kv_len: int
    first: int  # index of its first entry in kv_indices


@dataclass(frozen=True)
class Tile:
    request: int
    m: int
    rows: int
    first_row: int
    kv_hi: int

    @property
    def blocks(self) -> int:
        return 2 * -(-self.kv_hi // (2 * BLOCK))


@dataclass
class Plan:
    parts: int
    items: dict[int, tuple[int, ...]]  # item row (after the merge entries' rows): the words of the table
    merges: list[tuple[int, int, int, int]]  # first global row, first partial row, pieces, rows
    tiles: list[Tile]
    rounds: int  # normal mode: whole rounds of uncut tiles
    sizes: dict[Tile, int]  # blocks of a piece

    @property
    def counts(self) -> list[int]:
        """Items of each part: those in rows p, p + parts, ..."""
        return [len(range(p, len(self.items), self.parts)) for p in range(self.parts)]

    def items_of(self, part: int) -> list[tuple[int, ...]]:
        return [self.items[row] for row in range(part, len(self.items), self.parts)]

    def loads(self, overhead: int) -> list[int]:
        """Cost of each part in blocks."""
        return [
            sum(2 * -(-(item[2] - item[1]) // (2 * BLOCK)) + overhead for item in self.items_of(p))
            for p in range(self.parts)
        ]


def tiles_of(request: Request, num: int, num_heads: int, causal: bool) -> list[Tile]:
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


def plan(
    requests: list[Request],
    parts: int,
    num_heads: int,
    causal: bool,
    config: KernelConfig,
    batch_invariant: bool = False,
) -> Plan:
    by_request = [tiles_of(request, b, num_heads, causal) for b, request in enumerate(requests)]
    tiles = [tile for group in by_request for tile in group]
    made = Plan(parts, {}, [], tiles, 0, {})

    def item(tile: Tile, piece: int, part_row: int) -> tuple[int, ...]:
        request, size = requests[tile.request], made.sizes[tile] * BLOCK
        shift = request.kv_len - request.q_len + 1 - request.q_start if causal else SEES_ALL
        begin = piece * size
        return (tile.first_row, begin, min(begin + size, tile.kv_hi), request.first, part_row, tile.rows, shift)

    if batch_invariant:
        _cut_each_request(made, by_request, item)
    else:
        _balance(made, config, item)
    return made


def _pieces(tile: Tile, size: int) -> int:
    return -(-tile.blocks // size) if tile.blocks else 0


def _part_rows(tiles: list[Tile], pieces: dict[Tile, int]) -> dict[Tile, int]:
    """The first partial row of each tile, or -1."""
    cut = [tile for tile in tiles if pieces[tile] > 1]
    ends = itertools.accumulate((pieces[tile] * tile.rows for tile in cut), initial=0)
    return dict.fromkeys(tiles, -1) | dict(zip(cut, ends, strict=False))


def _by_piece(tiles: list[Tile], pieces: dict[Tile, int]) -> Iterator[tuple[Tile, int]]:
    """The first piece of every tile, the second of all that have one, and so on."""
    for piece in range(max((pieces[tile] for tile in tiles), default=0)):
        yield from ((tile, piece) for tile in tiles if pieces[tile] > piece)


def _append(made: Plan, order: Iterator[tuple[Tile, int]], firsts: dict[Tile, int], item) -> None:
    for tile, piece in order:
        part_row = -1 if firsts[tile] < 0 else firsts[tile] + piece * tile.rows
        made.items[len(made.items)] = item(tile, piece, part_row)


def _cut_each_request(made: Plan, by_request: list[list[Tile]], item) -> None:
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


def ranked(tiles: list[Tile]) -> list[Tile]:
    """The tiles with work by cost class, descending, then request, then descending m."""
    work = [tile for tile in tiles if tile.blocks]
    shift = 0
    while max((tile.blocks // 2 for tile in work), default=0) >> shift >= COST_CLASSES:
        shift += 1
    return sorted(work, key=lambda tile: (-(tile.blocks // 2 >> shift), tile.request, -tile.m))


def _tail_cuts(tail: list[Tile], most: int) -> dict[Tile, int]:
    """Blocks of each tile's pieces when none may exceed `most`."""
    return {tile: even_up(-(-tile.blocks // -(-tile.blocks // most))) for tile in tail}


def _tail_limit(tail: list[Tile], parts: int, config: KernelConfig) -> int:
    """The most blocks of a piece that cost least."""
    best = None
    longest = max(tile.blocks for tile in tail)
    for p in range(1, 65):
        most = max(even_up(config.min_blocks), even_up(-(-longest // p)))
        pieces = [_pieces(tile, size) for tile, size in _tail_cuts(tail, most).items()]
        if sum(pieces) <= TAIL_ITEMS_PER_PART * parts:
            cost = -(-sum(pieces) // parts) * (most + config.item_overhead)
            cost += config.split_penalty if max(pieces) > 1 else 0
            if best is None or cost < best[0]:
                best = cost, most
    assert best is not None, "uncut tiles are fewer than parts"
    return best[1]


def _balance(made: Plan, config: KernelConfig, item) -> None:
    order, parts = ranked(made.tiles), made.parts
    made.rounds = len(order) // parts
    uncut = made.rounds * parts
    for rank, tile in enumerate(order[:uncut]):
        k, x = divmod(rank, parts)
        made.sizes[tile] = tile.blocks
        made.items[k * parts + (x if k % 2 == 0 else parts - 1 - x)] = item(tile, 0, -1)
    tail = order[uncut:]
    if tail:
        made.sizes |= _tail_cuts(tail, _tail_limit(tail, parts, config))
        pieces = {tile: _pieces(tile, made.sizes[tile]) for tile in tail}
        firsts = _part_rows(tail, pieces)
        made.merges = [(tile.first_row, firsts[tile], pieces[tile], tile.rows) for tile in tail if firsts[tile] >= 0]
        _append(made, _by_piece(tail, pieces), firsts, item)
    made.merges += [(tile.first_row, 0, 0, tile.rows) for tile in made.tiles if not tile.blocks]
