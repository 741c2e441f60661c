"""Which main kernel a call runs."""

from __future__ import annotations

from .config import KernelConfig
from .jit import KernelRef
from .kernels.registry import DECODE, DECODE_FEW_FP8, DECODE_FP8, FEW_ROWS, PREFILL, PREFILL_FP8


def why_unfit(op: str, num_heads: int, config: KernelConfig) -> str | None:
    """None, or why an FP8 call of `op` with `num_heads` heads cannot run under `config`, which is feasible."""
    if op == "decode" and config.fp8_kernel == "few_rows" and num_heads > FEW_ROWS:
        return f"fp8_kernel 'few_rows' runs at most {FEW_ROWS} heads, the call has {num_heads}"
    return None


def step_of(op: str, kv_format: str, num_heads: int, config: KernelConfig) -> KernelRef:
    """The main kernel of a call; `kv_format` is "" for a 16-bit cache.

    Raises ValueError when the configuration's FP8 kernel cannot run the call.
    """
    if not kv_format:
        return DECODE if op == "decode" else PREFILL
    if reason := why_unfit(op, num_heads, config):
        raise ValueError(f"config: {reason}")
    if op == "prefill":
        return PREFILL_FP8
    return DECODE_FEW_FP8 if num_heads <= FEW_ROWS and config.fp8_kernel != "rows" else DECODE_FP8
