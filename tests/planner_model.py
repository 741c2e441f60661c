"""The planner of kernels/planner.py in plain loops: what the GPU planner must produce, item by item."""

from dataclasses import dataclass

from mla_cute.config import KernelConfig
from mla_cute.kernels.registry import BLOCK, FIXED_MAX_PIECES, FIXED_MIN_BLOCKS


@dataclass
class Plan:
    items: list[tuple[int, int, int, int, int]]  # request, kv_begin, kv_end, first index, partial row or -1
    part_items: list[int]  # part k runs items[part_items[k] : part_items[k + 1]]
    splits: list[tuple[int, int]]  # first partial row, number of pieces


def blocks_of(length: int) -> int:
    return 2 * -(-length // (2 * BLOCK))


def plan(
    lengths: list[int],
    firsts: list[int],
    parts: int,
    num_heads: int,
    config: KernelConfig,
    batch_invariant: bool = False,
) -> Plan:
    return (_fixed if batch_invariant else _balanced)(lengths, firsts, parts, num_heads, config)


def _fixed(lengths: list[int], firsts: list[int], parts: int, num_heads: int, config: KernelConfig) -> Plan:
    items, begins, splits, at = [], [], [], 0
    for b, length in enumerate(lengths):
        blocks = blocks_of(length)
        share = -(-blocks // FIXED_MAX_PIECES)
        size = max(share + share % 2, FIXED_MIN_BLOCKS)
        pieces = -(-blocks // size)
        splits.append((len(items) * num_heads, pieces))
        start = at
        for s in range(pieces):
            row = len(items) * num_heads if pieces > 1 else -1
            items.append((b, s * size * BLOCK, min((s + 1) * size * BLOCK, length), firsts[b], row))
            begins.append(start + s * (size + config.item_overhead))
        at += blocks + pieces * config.item_overhead
    payload = max(-(-at // parts), config.min_blocks)
    part_items = [sum(1 for x in begins if x < k * payload) for k in range(parts)] + [len(items)]
    return Plan(items, part_items, splits)


def _balanced(lengths: list[int], firsts: list[int], parts: int, num_heads: int, config: KernelConfig) -> Plan:
    overhead = config.item_overhead
    line = [0]
    for length in lengths:
        blocks = blocks_of(length)
        line.append(line[-1] + (blocks + overhead if blocks else 0))
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
        if k == parts:
            return batch, 0
        b = request_at(k * payload)
        if b == batch:
            return batch, 0
        offset = k * payload - line[b] - overhead
        offset = max(offset - offset % 2, 0)
        return (b + 1, 0) if offset >= blocks_of(lengths[b]) else (b, offset)

    whole = [whole_cut(k) for k in range(parts + 1)]
    makespan = max(line[whole[k + 1]] - line[whole[k]] for k in range(parts))
    cuts = [(b, 0) for b in whole] if makespan <= payload + overhead + config.split_penalty else list(map(cut, range(parts + 1)))

    pieces = []  # (position on the line of cuts, request, begin block, end block)
    for b, length in enumerate(lengths):
        inside = sorted({off for r, off in cuts if r == b and off > 0})
        edges = [0, *inside, blocks_of(length)]
        pieces.append([(lo, hi) for lo, hi in zip(edges, edges[1:]) if hi > lo])
    items, splits, slot = [], [], 0
    for b, of_request in enumerate(pieces):
        splits.append((slot * num_heads, len(of_request)))
        for s, (lo, hi) in enumerate(of_request):
            row = (slot + s) * num_heads if len(of_request) > 1 else -1
            items.append((b, lo * BLOCK, min(hi * BLOCK, lengths[b]), firsts[b], row))
        slot += len(of_request) if len(of_request) > 1 else 0
    part_items = [sum(1 for i in items if (i[0], i[1] // BLOCK) < c) for c in cuts]
    return Plan(items, part_items, splits)
