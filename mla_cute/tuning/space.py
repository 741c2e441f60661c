"""Candidate configurations of a shape, and which of them plan the same work.

Tuned are the main kernel where there are two (decode, sparse) and with it cut_unit, evict_first, and the three numbers
the planner cuts by (min_blocks, item_overhead, split_penalty). `accuracy` changes results, and what use_pdl saves is
time behind the kernels in front, which the call timed alone does not have: both are left as the default has them.

Planner numbers act through the plan alone, so of those that give a shape the same plan only the first is a candidate.
`plan_signature` decides that on the host, by the planners' models in plain Python (kernels/planner/model.py and
model_prefill.py), which tests hold to the kernels.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Hashable, Iterator

from ..config import KernelConfig, differences, why_infeasible, with_kernel
from ..gpu_speed import H200, GpuSpeed
from ..kernels.keys import MAX_PARTS
from ..kernels.planner import model, model_prefill
from ..kernels.registry import (
    Variant,
    converted_variants,
    converts,
    decode_parts,
    has_few_rows,
    planner_variant,
    step_of,
    step_variant,
    takes_tile16,
)
from ..tuned.select import When, default_for
from .recipes import case_of

MIN_BLOCKS = (1, 2, 4, 8, 16)
ITEM_OVERHEADS = (2, 4, 8)
# In blocks. With 0 the planner cuts whenever that balances the work; with 64, or 4096 tokens per CTA, hardly ever.
# In decode no penalty above the default's is tried on uniform batches: they balance by themselves, so a large penalty
# would look good, but a ragged batch that is not cut waits for its longest request. Ragged ones are timed with all.
SPLIT_PENALTIES = (0, 3, 6, 12, 64)


def candidates(when: When, gpu: GpuSpeed = H200) -> list[KernelConfig]:
    """Feasible configurations worth timing for a shape on a GPU, the default first.

    The planner's numbers are crossed with evict_first; the other main kernel gets the planner's numbers only.
    """
    default = default_for(when, gpu)
    planned = _planned(when, default, gpu)
    found = [
        dataclasses.replace(config, evict_first=evict_first)
        for evict_first in (default.evict_first, not default.evict_first)
        for config in planned
    ]
    if when.decodes:
        kernel = "tile64" if takes_tile16(when.kv_format, when.num_heads, default) else "tile16"
        found += _planned(when, with_kernel(default, when.kv_format, kernel), gpu)
    elif when.kv_format:
        other = dataclasses.replace(default, fp8_kernel="tile64" if _converts(when, default) else "convert")
        if _converts(when, default) != _converts(when, other):
            found += _planned(when, other, gpu)
    return [config for config in dict.fromkeys(found) if why_infeasible(config) is None]


def _planned(when: When, default: KernelConfig, gpu: GpuSpeed) -> list[KernelConfig]:
    """`default` with the planner's numbers varied, one configuration for each plan, itself first."""
    planned: dict[Hashable, KernelConfig] = {}
    for config in (default, *_planner_grid(default)):
        cuts_less = when.decodes and when.lengths == "uniform" and config.split_penalty > default.split_penalty
        if why_infeasible(config) is None and not cuts_less:
            planned.setdefault(plan_signature(when, config, gpu.sm_count), config)
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
    return len(differences(config, default))


def variants_of(when: When, config: KernelConfig, dtype: str) -> list[Variant]:
    """(kernel, key, launch config) of what a call with a plan compiles, from page lists or from lists of tokens."""
    lengths = "seq_lens"
    if when.op != "sparse":
        lengths = "csr_last" if any(n % when.page_size for n in kv_lens(when)) else "csr"
    facts = (when.op, when.kv_format, when.q_fp8, when.num_heads, when.page_size, dtype, config)
    steps = [step_variant(*facts, few_rows=_has_few_rows(when))]
    if _converts(when, config, dtype):
        steps = converted_variants(when.kv_format, when.q_fp8, when.page_size, config)
    return [*steps, planner_variant(when.op, lengths, config)]


def _has_few_rows(when: When) -> bool:
    """The plans of what is timed are told how many query tokens there are."""
    return has_few_rows(when.op, when.num_heads, when.q_len)


def _converts(when: When, config: KernelConfig, dtype: str = "bfloat16") -> bool:
    return converts(when.op, when.kv_format, when.q_fp8, when.num_heads, when.q_len, config, dtype)


# ---------------------------------------------------------------------------------------------------------------------
# plans


@functools.lru_cache(maxsize=64)  # all configurations of a shape have the same
def kv_lens(when: When) -> tuple[int, ...]:
    """Tokens of each request of a shape, or of each list."""
    return tuple(kv_len for _, kv_len in case_of(when, "bfloat16").requests)


def run_key(when: When, config: KernelConfig, num_sms: int) -> Hashable:
    """A value that two configurations share only if this shape runs the same with both."""
    kv_format = "" if _converts(when, config) else when.kv_format
    kernel = step_of(when.op, kv_format, when.num_heads, config, _has_few_rows(when))
    return kernel, config.launch(), plan_signature(when, config, num_sms)


def plan_signature(when: When, config: KernelConfig, num_sms: int) -> Hashable:
    """A value that two configurations share only if they give this shape the same work items."""
    assert when.kv_len is not None
    if when.decodes:
        parts = decode_parts(when.kv_format, when.num_heads, config, num_sms)
        return model.cut(model.blocks_of(kv_lens(when), config.cut_unit), parts, config)
    parts = min(MAX_PARTS, num_sms)
    tail = _prefill_tail(when.num_heads, when.q_len, when.batch, when.kv_len, parts)
    return model_prefill.tail_sizes(tail, parts, config)


@functools.lru_cache(maxsize=64)  # all configurations of a shape have the same, and so have all formats of a cache
def _prefill_tail(num_heads: int, q_len: int, batch: int, kv_len: int, parts: int) -> tuple[int, ...]:
    """Blocks of the tiles left after whole rounds, under the causal mask: all that configurations plan differently."""
    requests = [model_prefill.Request(b * q_len, q_len, kv_len, 0) for b in range(batch)]
    tiles = [tile for b, request in enumerate(requests) for tile in model_prefill.tiles_of(request, b, num_heads, True)]
    order = model_prefill.ranked(tiles)
    return tuple(tile.blocks for tile in order[len(order) // parts * parts :])
