"""The planner of kernels/planner/decode.py in plain loops: what the GPU planner must produce, item by item."""

from dataclasses import dataclass

from mla_cute.config import KernelConfig
from mla_cute.dims import BLOCK
from mla_cute.kernels.keys import FIXED_MAX_PIECES, FIXED_MIN_BLOCKS


@dataclass
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


def even_up(x: int) -> int:
    return x + x % 2


def up(x: int, unit: int) -> int:
    return -(-x // unit) * unit


def plan(
    lengths: list[int],
    firsts: list[int],
    parts: int,
    num_heads: int,
    config: KernelConfig,
    batch_invariant: bool = False,
) -> Plan:
    unit = config.cut_unit
    blocks = [up(-(-length // BLOCK), unit) for length in lengths]
    overhead = config.item_overhead
    if batch_invariant:
        sizes = [max(up(-(-n // FIXED_MAX_PIECES), unit), FIXED_MIN_BLOCKS) for n in blocks]
        cuts = [list(range(0, n, size)) + [n] if n else [0] for n, size in zip(blocks, sizes, strict=True)]
        line, begins = 0, []
        for edges in cuts:
            for i in range(len(edges) - 1):
                begins.append(line + i * (edges[1] - edges[0] + overhead))
            line += edges[-1] + overhead * (len(edges) - 1)
        payload = max(-(-line // parts), config.min_blocks)
        starts = [sum(x < k * payload for x in begins) for k in range(parts)] + [len(begins)]
        return _assemble("invariant", lengths, firsts, cuts, starts, num_heads, every_item_has_rows=True)

    line = [0]
    for n in blocks:
        line.append(line[-1] + (n + overhead if n else 0))
    payload = max(-(-line[-1] // parts), config.min_blocks)
    batch = len(lengths)

    def request_at(x: int) -> int:
        return max(b for b in range(batch + 1) if line[b] <= x)

    def whole_cut(k: int) -> int:
        b = request_at(k * payload) if k < parts else batch
        if b < batch and k * payload - line[b] > line[b + 1] - k * payload:
            b += 1
        return b

    def cut(k: int) -> tuple[int, int]:
        b = request_at(k * payload) if k < parts else batch
        if b == batch:
            return batch, 0
        offset = k * payload - line[b] - overhead
        offset = max(offset - offset % unit, 0)
        return (b + 1, 0) if offset >= blocks[b] else (b, offset)

    whole = [whole_cut(k) for k in range(parts + 1)]
    whole_cost = max(line[whole[k + 1]] - line[whole[k]] for k in range(parts))
    line_cost = payload + overhead + config.split_penalty
    limit = None
    if sum(n > 0 for n in blocks) <= parts:
        limit = max(config.min_blocks, up(-(-sum(blocks) // parts), unit))
        while sum(-(-n // limit) for n in blocks) > parts:
            limit += unit
    pieces_cost = limit + overhead + config.split_penalty if limit else None
    use_pieces = pieces_cost is not None and pieces_cost <= line_cost
    if whole_cost <= (pieces_cost if use_pieces else line_cost):
        bounds = [(b, 0) for b in whole]
    elif use_pieces:
        sizes = [up(-(-n // -(-n // limit)), unit) if n else unit for n in blocks]
        cuts = [list(range(0, n, size)) + [n] if n else [0] for n, size in zip(blocks, sizes, strict=True)]
        total = sum(len(edges) - 1 for edges in cuts)
        starts = [min(k, total) for k in range(parts + 1)]
        return _assemble("pieces", lengths, firsts, cuts, starts, num_heads, every_item_has_rows=True)
    else:
        bounds = [cut(k) for k in range(parts + 1)]
    cuts = []
    for b, n in enumerate(blocks):
        inside = sorted({off for r, off in bounds if r == b and off > 0})
        cuts.append([0, *inside, n] if n else [0])
    places = [(b, edges[i]) for b, edges in enumerate(cuts) for i in range(len(edges) - 1)]
    starts = [sum(place < bound for place in places) for bound in bounds]
    how = "whole" if whole_cost <= (pieces_cost if use_pieces else line_cost) else "line"
    return _assemble(how, lengths, firsts, cuts, starts, num_heads, every_item_has_rows=False)


def _assemble(
    how: str,
    lengths: list[int],
    firsts: list[int],
    cuts: list[list[int]],
    starts: list[int],
    num_heads: int,
    every_item_has_rows: bool,
) -> Plan:
    """Items from the edges of each request's pieces. Partial rows are numbered over all items, or split ones alone."""
    items, splits, slot = [], [], 0
    for b, edges in enumerate(cuts):
        count = len(edges) - 1
        splits.append((slot * num_heads, count))
        for s in range(count):
            row = (slot + s) * num_heads if count > 1 else -1
            items.append((b, edges[s] * BLOCK, min(edges[s + 1] * BLOCK, lengths[b]), firsts[b], row))
        slot += count if count > 1 or every_item_has_rows else 0
    return Plan(how, items, starts, splits)
