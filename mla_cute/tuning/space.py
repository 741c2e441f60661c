"""Candidate configurations of a shape, and which of them plan the same work.

Tuned are the main kernel where there are two (decode) and with it cut_unit, evict_first, and the three numbers the
planner cuts by (min_blocks, item_overhead, split_penalty). `accuracy` changes results, and what use_pdl saves is time
behind the kernels in front, which the call timed alone does not have: both are left as the default has them.

Planner numbers act through the plan alone, so of those that give a shape the same plan only the first is a candidate.
`plan_signature` decides that on the host: it follows the kernels' planner/decode.py and balanced.py for a batch of
equal requests, and equal signatures mean equal work items (tests/cpu/test_tune_space.py holds it to the planners'
models).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Hashable, Iterator

from ..config import KernelConfig, why_infeasible, with_kernel
from ..dims import BLOCK, TILE_M
from ..kernels.keys import COST_CLASSES, MAX_PARTS, TAIL_ITEMS_PER_PART
from ..kernels.registry import Variant, decode_parts, planner_variant, prefill_min_blocks, step_variant, takes_tile16
from ..tuned.select import When, default_for

MIN_BLOCKS = (1, 2, 4, 8, 16)
ITEM_OVERHEADS = (2, 4, 8)
# In blocks. With 0 the planner cuts whenever that balances the work; with 64, or 4096 tokens per CTA, hardly ever.
# In decode no penalty above the default's is tried: the batches timed here are uniform and balance by themselves, so a
# large penalty would look good, but a ragged batch that is not cut waits for its longest request.
SPLIT_PENALTIES = (0, 3, 6, 12, 64)
_MAX_CUTS = 64  # as in the planner's balanced.py


def candidates(when: When, num_sms: int = 132) -> list[KernelConfig]:
    """Feasible configurations worth timing for a shape on a GPU of `num_sms` SMs, the default first.

    The planner's numbers are crossed with evict_first; the other main kernel gets the planner's numbers only.
    """
    default = default_for(when, num_sms)
    planned = _planned(when, default, num_sms)
    found = [
        dataclasses.replace(config, evict_first=evict_first)
        for evict_first in (default.evict_first, not default.evict_first)
        for config in planned
    ]
    if when.op == "decode":
        kernel = "tile64" if takes_tile16(when.kv_format, when.num_heads, default) else "tile16"
        found += _planned(when, with_kernel(default, when.kv_format, kernel), num_sms)
    return [config for config in dict.fromkeys(found) if why_infeasible(config) is None]


def _planned(when: When, default: KernelConfig, num_sms: int) -> list[KernelConfig]:
    """`default` with the planner's numbers varied, one configuration for each plan, itself first."""
    planned: dict[Hashable, KernelConfig] = {}
    for config in (default, *_planner_grid(default)):
        cuts_less = when.op == "decode" and config.split_penalty > default.split_penalty
        if why_infeasible(config) is None and not cuts_less:
            planned.setdefault(plan_signature(when, config, num_sms), config)
    return list(planned.values())


def _planner_grid(default: KernelConfig) -> Iterator[KernelConfig]:
    grid = itertools.product(MIN_BLOCKS, ITEM_OVERHEADS, SPLIT_PENALTIES)
    points = [
        dataclasses.replace(default, min_blocks=blocks, item_overhead=overhead, split_penalty=penalty)
        for blocks, overhead, penalty in grid
    ]
    # Of equal plans the configuration that differs least from the default stays.
    yield from sorted(points, key=lambda config: changes(config, default))


def changes(config: KernelConfig, default: KernelConfig) -> int:
    """Fields in which `config` differs from `default`."""
    return sum(getattr(config, f.name) != getattr(default, f.name) for f in dataclasses.fields(default))


def variants_of(when: When, config: KernelConfig, dtype: str) -> list[Variant]:
    """(kernel, key, launch config) of what a call with a plan from page lists compiles."""
    assert when.kv_len is not None
    lengths = "csr_last" if when.kv_len % when.page_size else "csr"
    step = step_variant(when.op, when.kv_format, when.q_fp8, when.num_heads, when.page_size, dtype, config)
    return [step, planner_variant(when.op, lengths, config)]


# ---------------------------------------------------------------------------------------------------------------------
# plans of equal requests


def plan_signature(when: When, config: KernelConfig, num_sms: int) -> Hashable:
    """A value that two configurations share only if they give this shape the same work items."""
    assert when.kv_len is not None
    if when.op == "decode":
        parts = decode_parts(when.kv_format, when.num_heads, config, num_sms)
        return _decode_signature(when.batch, _up(-(-when.kv_len // BLOCK), config.cut_unit), parts, config)
    tail = _prefill_tail(when, min(MAX_PARTS, num_sms))
    return _tail_limit(tail, min(MAX_PARTS, num_sms), config) if tail else None


def _decode_signature(batch: int, blocks: int, parts: int, config: KernelConfig) -> Hashable:
    """Of the three ways to cut (planner/decode.py), the one taken and all that its items depend on."""
    overhead = config.item_overhead
    request = blocks + overhead
    payload = max(-(-batch * request // parts), config.min_blocks)

    def whole_bound(k: int) -> int:
        b, into = divmod(k * payload, request) if k < parts else (batch, 0)
        return min(b + (into > request - into), batch)

    def line_bound(k: int) -> tuple[int, int]:
        b, into = divmod(k * payload, request) if k < parts else (batch, 0)
        if b >= batch:
            return batch, 0
        offset = max(into - overhead, 0)
        offset -= offset % config.cut_unit
        return (b + 1, 0) if offset >= blocks else (b, offset)

    whole = tuple(whole_bound(k) for k in range(parts + 1))
    whole_cost = max(b - a for a, b in itertools.pairwise(whole)) * request
    cut_cost = payload + overhead + config.split_penalty
    limit = 0
    if batch <= parts:
        limit = max(config.min_blocks, _up(-(-batch * blocks // parts), config.cut_unit))
        while batch * -(-blocks // limit) > parts:
            limit += config.cut_unit
    use_pieces = 0 < limit <= payload
    if use_pieces:
        cut_cost = limit + overhead + config.split_penalty
    if whole_cost <= cut_cost:
        return ("cuts", tuple((b, 0) for b in whole))
    if use_pieces:
        return ("pieces", _up(-(-blocks // -(-blocks // limit)), config.cut_unit))
    return ("cuts", tuple(line_bound(k) for k in range(parts + 1)))


def _prefill_tail(when: When, parts: int) -> list[int]:
    """Blocks of the tiles that are left after whole rounds (planner/prefill.py), under the causal mask."""
    assert when.kv_len is not None
    tiles = -(-when.q_len * when.num_heads // TILE_M)
    pairs = []
    for m in range(tiles):
        last_token = min((TILE_M * m + TILE_M - 1) // when.num_heads, when.q_len - 1)
        keys = min(max(when.kv_len - when.q_len + last_token + 1, 0), when.kv_len)
        pairs.append(-(-keys // (2 * BLOCK)))
    pairs = [n for n in pairs if n]
    shift = 0
    while max(pairs, default=0) >> shift >= COST_CLASSES:
        shift += 1
    left = when.batch * len(pairs) % parts
    ranked = sorted(((-(n >> shift), b, -m, n) for b in range(when.batch) for m, n in enumerate(pairs)))
    return [2 * n for *_, n in ranked[len(ranked) - left :]]


def _tail_limit(tail: list[int], parts: int, config: KernelConfig) -> tuple[int, ...]:
    """Blocks of a piece of each tile of the tail."""
    best: tuple[int, tuple[int, ...]] | None = None
    for c in range(1, _MAX_CUTS + 1):
        limit = max(prefill_min_blocks(config), _up(-(-max(tail) // c), 2))
        sizes = tuple(_up(-(-n // -(-n // limit)), 2) for n in tail)
        items = sum(-(-n // size) for n, size in zip(tail, sizes, strict=True))
        if items > TAIL_ITEMS_PER_PART * parts:
            continue
        cost = -(-items // parts) * (limit + config.item_overhead)
        cost += config.split_penalty if items > len(tail) else 0
        if best is None or cost < best[0]:
            best = cost, sizes
    assert best is not None, "uncut, the tiles are fewer than the parts"
    return best[1]


def _up(x: int, unit: int) -> int:
    return -(-x // unit) * unit
