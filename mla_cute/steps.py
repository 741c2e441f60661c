"""Which kernels a call runs, under which keys, and what of the planner's sizes follows from that."""

from __future__ import annotations

import functools

from .config import FEW_ROWS, KernelConfig, LaunchConfig
from .kernels.registry import (
    DECODE,
    DECODE_FEW,
    DECODE_FEW_FP8,
    DECODE_FP8,
    MAX_PARTS,
    PLANNER,
    PREFILL,
    PREFILL_FP8,
    PREFILL_PLANNER,
    TILE_M,
    DecodeKey,
    Fp8Key,
    KernelRef,
    PlannerKey,
    PrefillKey,
    PrefillPlannerKey,
    box_rows_of,
)

# What `jit.get` takes: kernel, static key, launch configuration.
Variant = tuple[KernelRef, object, LaunchConfig]


def step_of(op: str, kv_format: str, num_heads: int, config: KernelConfig) -> KernelRef:
    """The main kernel of a call; `kv_format` is "" for a 16-bit cache."""
    if op == "prefill":
        return PREFILL_FP8 if kv_format else PREFILL
    if has_few_rows(kv_format, num_heads, config):
        return DECODE_FEW_FP8 if kv_format else DECODE_FEW
    return DECODE_FP8 if kv_format else DECODE


def has_few_rows(kv_format: str, num_heads: int, config: KernelConfig) -> bool:
    """Whether a decode step's main kernel is the few-rows kernel of its kind of cache."""
    kernel = config.fp8_kernel if kv_format else config.kernel
    return kernel == "few_rows" or (kernel == "auto" and num_heads <= FEW_ROWS)


@functools.lru_cache(maxsize=4096)  # a call without a plan asks every time
def step_variant(
    op: str, kv_format: str, q_fp8: bool, num_heads: int, page_size: int, dtype: str, config: KernelConfig
) -> Variant:
    """The step of a call: main kernel and merge. `dtype` is that of its output, "bfloat16" or "float16"."""
    box_rows = box_rows_of(page_size)
    key: object
    if kv_format:
        key = Fp8Key(dtype, box_rows, kv_format, q_fp8)
    else:
        key = (DecodeKey if op == "decode" else PrefillKey)(dtype, box_rows)
    return step_of(op, kv_format, num_heads, config), key, config.launch()


def planner_variant(op: str, lengths: str, config: KernelConfig) -> Variant:
    """The planner for one of `registry.LENGTHS`, of plans that are not batch-invariant."""
    if op == "decode":
        return PLANNER, PlannerKey(lengths, False), config.planner_launch()
    return PREFILL_PLANNER, PrefillPlannerKey(lengths, False), config.planner_launch()


def decode_parts(kv_format: str, num_heads: int, config: KernelConfig, num_sms: int) -> int:
    """Work lists of a decode plan: a CTA for each list and row tile, no more CTAs than SMs."""
    rows = FEW_ROWS if has_few_rows(kv_format, num_heads, config) else TILE_M
    return max(1, min(MAX_PARTS, num_sms // -(-num_heads // rows)))


def prefill_min_blocks(config: KernelConfig) -> int:
    """`min_blocks` in whole pairs: its planner counts in pairs and would round an odd number down."""
    return config.min_blocks + config.min_blocks % 2
