"""The planner of decode in plain Python: its algorithm to read, and what the GPU planner must produce, item by item.

`planner/decode.py` does the same on the GPU with prefix sums and searches, and describes its output there. Tests
compare the two, and the tuner (tuning/space.py) asks here which configurations plan a shape alike. No kernel imports
this file, so that an edit compiles nothing again.

From kv lengths to work lists, in blocks of 64 tokens:

1. `blocks_of`: each request has its length in blocks, rounded up to `cut_unit`.
2. `cut`: three ways to share the blocks among the parts, and the one whose largest part costs least. A part pays
   `item_overhead` for each item that it starts, and `split_penalty` once where requests are cut at all.
     whole    requests lie on a line, each with its overhead in front; each part takes those that begin nearest to its
              share of the line. Nothing is cut.
     pieces   every request is cut into equal pieces, of the smallest size that gives no more pieces than parts: one
              for each part. Impossible with more requests than parts.
     line     each part takes exactly its share of the line, and whatever request a boundary falls into is cut there.
   Ties go to whole, then to pieces.
3. `plan`: the items of the pieces, in order of requests; which of them each part runs; partial rows for requests of
   several pieces, which the merge kernel adds up.

Example, 132 parts and the default of 16 heads (cut_unit 1, min_blocks 1, item_overhead 4, split_penalty 3):
    1 request of 8192 tokens      128 blocks. Whole costs 128 + 4; pieces of one block 1 + 4 + 3: pieces, 128 items.
    128 requests of 8192          Each is a part's share, give or take: whole, at 132 blocks. Pieces cost 3 more.
    100 requests of 8192          Whole and pieces leave 32 parts idle at 132 and 135 blocks. The line's share is
                                  ceil(100 * 132 / 132) = 100 blocks, 107 with overhead and penalty: line.

A plan that is batch-invariant cuts each request by its own length alone (`_invariant_sizes`), so that its arithmetic
is the same whatever else is in the batch.
"""

import dataclasses
import itertools
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence

from ...config import KernelConfig
from ...dims import BLOCK
from ..keys import FIXED_MAX_PIECES, FIXED_MIN_BLOCKS

Bound = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Cuts:
    """What the items of a batch follow from, beside lengths and heads: two that are equal give equal items.

    how      "whole", "pieces" or "line"; how a cut was found does not count when cuts are compared
    bounds   whole and line: (request, block in it) where each part begins, and where the last one ends; else ()
    sizes    pieces: blocks of a piece of each request, `cut_unit` for an empty one; else ()
    """

    how: str = dataclasses.field(compare=False)
    bounds: tuple[Bound, ...] = ()
    sizes: tuple[int, ...] = ()


@dataclasses.dataclass
class Plan:
    how: str  # "whole", "pieces", "line" or "invariant"
    items: list[tuple[int, int, int, int, int]]  # request, kv_begin, kv_end, first index, partial row or -1
    starts: list[int]  # part k runs items[starts[k] : starts[k + 1]]
    splits: list[tuple[int, int]]  # first partial row, number of pieces

    @property
    def loads(self) -> list[int]:
        """64-token blocks of each part."""
        blocks = [-(-(end - begin) // BLOCK) for _, begin, end, _, _ in self.items]
        return [sum(blocks[lo:hi]) for lo, hi in zip(self.starts, self.starts[1:], strict=False)]


def plan(
    lengths: Sequence[int],
    firsts: Sequence[int],
    parts: int,
    num_heads: int,
    config: KernelConfig,
    batch_invariant: bool = False,
) -> Plan:
    """Items of a decode step.

    Args:
        lengths: tokens of each request, >= 0.
        firsts: index of each request's first entry in the page list (or in the flattened block table).
        parts: work lists, `registry.decode_parts`.
        num_heads: query heads, and so partial rows of a piece.
        config: of which cut_unit, min_blocks, item_overhead and split_penalty count.
        batch_invariant: cut each request by its own length alone.
    """
    blocks = blocks_of(lengths, config.cut_unit)
    if batch_invariant:
        edges = _equal_pieces(blocks, _invariant_sizes(blocks, config.cut_unit))
        starts = _share_pieces(edges, parts, config)
        return _assemble("invariant", lengths, firsts, edges, starts, num_heads, every_item_has_rows=True)
    cuts = cut(blocks, parts, config)
    if cuts.how == "pieces":
        edges = _equal_pieces(blocks, cuts.sizes)
        total = sum(len(at) - 1 for at in edges)
        starts = [min(k, total) for k in range(parts + 1)]
        return _assemble(cuts.how, lengths, firsts, edges, starts, num_heads, every_item_has_rows=True)
    edges = []
    for b, n in enumerate(blocks):
        inside = sorted({offset for request, offset in cuts.bounds if request == b and offset > 0})
        edges.append([0, *inside, n] if n else [0])
    places = [(b, at[i]) for b, at in enumerate(edges) for i in range(len(at) - 1)]
    starts = [sum(place < bound for place in places) for bound in cuts.bounds]
    return _assemble(cuts.how, lengths, firsts, edges, starts, num_heads, every_item_has_rows=False)


def up(x: int, unit: int) -> int:
    """`x` rounded up to a multiple of `unit`."""
    return -(-x // unit) * unit


def blocks_of(lengths: Sequence[int], unit: int) -> list[int]:
    """Blocks of each request, rounded up to `unit`."""
    return [up(-(-length // BLOCK), unit) for length in lengths]


# ---------------------------------------------------------------------------------------------------------------------
# where requests are cut


def cut(blocks: Sequence[int], parts: int, config: KernelConfig) -> Cuts:
    """The cheapest of the three ways, for requests of that many blocks (multiples of cut_unit)."""
    line = _Line(blocks, parts, config)
    bounds = [line.whole_bound(k) for k in range(parts + 1)]
    whole_cost = max(line.at[b] - line.at[a] for a, b in itertools.pairwise(bounds))
    limit = _smallest_limit(blocks, parts, config)
    use_pieces = 0 < limit <= line.payload
    cut_cost = (limit if use_pieces else line.payload) + config.item_overhead + config.split_penalty
    if whole_cost <= cut_cost:
        return Cuts("whole", bounds=tuple((b, 0) for b in bounds))
    if use_pieces:
        sizes = {n: up(-(-n // -(-n // limit)), config.cut_unit) if n else config.cut_unit for n in set(blocks)}
        return Cuts("pieces", sizes=tuple(sizes[n] for n in blocks))
    return Cuts("line", bounds=tuple(line.bound(k) for k in range(parts + 1)))


class _Line:
    """Requests laid end to end, each its blocks behind its overhead; an empty one takes no room.

    at[b] is where request b begins, at[batch] where the last one ends; `payload` is the share of a part.
    """

    def __init__(self, blocks: Sequence[int], parts: int, config: KernelConfig) -> None:
        self.blocks = blocks
        self.parts = parts
        self.unit = config.cut_unit
        self.overhead = config.item_overhead
        self.at = list(itertools.accumulate((n + self.overhead if n else 0 for n in blocks), initial=0))
        self.payload = max(-(-self.at[-1] // parts), config.min_blocks)

    def _request_at(self, k: int) -> int:
        """The request in which part k's share begins, the last of those that begin there."""
        return bisect_right(self.at, k * self.payload) - 1 if k < self.parts else len(self.blocks)

    def whole_bound(self, k: int) -> int:
        """The first request of part k, when a share's boundary moves to the nearest edge of a request."""
        b, x = self._request_at(k), k * self.payload
        return b + (b < len(self.blocks) and x - self.at[b] > self.at[b + 1] - x)

    def bound(self, k: int) -> Bound:
        """(request, block in it) where part k's share begins exactly, rounded down to cut_unit."""
        b = self._request_at(k)
        if b == len(self.blocks):
            return b, 0
        offset = max(k * self.payload - self.at[b] - self.overhead, 0)
        offset -= offset % self.unit
        return (b + 1, 0) if offset >= self.blocks[b] else (b, offset)


def _smallest_limit(blocks: Sequence[int], parts: int, config: KernelConfig) -> int:
    """The fewest blocks, at least min_blocks, of which pieces are no more than parts; 0 if there are more requests."""
    requests = Counter(n for n in blocks if n)
    if requests.total() > parts:
        return 0
    limit = max(config.min_blocks, up(-(-sum(blocks) // parts), config.cut_unit))
    while sum(count * -(-n // limit) for n, count in requests.items()) > parts:
        limit += config.cut_unit
    return limit


def _invariant_sizes(blocks: Sequence[int], unit: int) -> list[int]:
    """Blocks of a piece when the cut is a function of the request alone: at most FIXED_MAX_PIECES pieces."""
    return [max(up(-(-n // FIXED_MAX_PIECES), unit), FIXED_MIN_BLOCKS) for n in blocks]


# ---------------------------------------------------------------------------------------------------------------------
# items


def _equal_pieces(blocks: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Edges of each request's pieces, in blocks: [0, size, 2 * size, ..., n]; [0] for an empty request."""
    return [list(range(0, n, size)) + [n] if n else [0] for n, size in zip(blocks, sizes, strict=True)]


def _share_pieces(edges: list[list[int]], parts: int, config: KernelConfig) -> list[int]:
    """`Plan.starts` of pieces that are given: each goes to the part in whose share of the line it begins."""
    line, begins = 0, []
    for at in edges:
        for i in range(len(at) - 1):
            begins.append(line + i * (at[1] - at[0] + config.item_overhead))
        line += at[-1] + config.item_overhead * (len(at) - 1)
    payload = max(-(-line // parts), config.min_blocks)
    return [sum(x < k * payload for x in begins) for k in range(parts)] + [len(begins)]


def _assemble(
    how: str,
    lengths: Sequence[int],
    firsts: Sequence[int],
    edges: list[list[int]],
    starts: list[int],
    num_heads: int,
    every_item_has_rows: bool,
) -> Plan:
    """Items from the edges of each request's pieces. Partial rows are numbered over all items, or split ones alone."""
    items, splits, slot = [], [], 0
    for b, at in enumerate(edges):
        count = len(at) - 1
        splits.append((slot * num_heads, count))
        for s in range(count):
            row = (slot + s) * num_heads if count > 1 else -1
            items.append((b, at[s] * BLOCK, min(at[s + 1] * BLOCK, lengths[b]), firsts[b], row))
        slot += count if count > 1 or every_item_has_rows else 0
    return Plan(how, items, starts, splits)
