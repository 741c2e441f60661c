"""Which main kernel a call runs, and what of the planner's sizes follows from that."""

from __future__ import annotations

from .config import KernelConfig
from .jit import KernelRef
from .kernels.registry import (
    DECODE,
    DECODE_FEW_FP8,
    DECODE_FP8,
    FEW_ROWS,
    MAX_PARTS,
    PREFILL,
    PREFILL_FP8,
    TILE_M,
)


def step_of(op: str, kv_format: str, num_heads: int, config: KernelConfig) -> KernelRef:
    """The main kernel of a call; `kv_format` is "" for a 16-bit cache."""
    if op == "prefill":
        return PREFILL_FP8 if kv_format else PREFILL
    if not kv_format:
        return DECODE
    few = config.fp8_kernel == "few_rows" or (config.fp8_kernel == "auto" and num_heads <= FEW_ROWS)
    return DECODE_FEW_FP8 if few else DECODE_FP8


def decode_parts(kv_format: str, num_heads: int, config: KernelConfig, num_sms: int) -> int:
    """Work lists of a decode plan: a CTA for each list and row tile, no more CTAs than SMs."""
    few = step_of("decode", kv_format, num_heads, config) is DECODE_FEW_FP8
    return max(1, min(MAX_PARTS, num_sms // -(-num_heads // (FEW_ROWS if few else TILE_M))))
