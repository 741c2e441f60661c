"""The options of the bench: `mla-cute bench` and `python -m mla_cute.bench` are both made from this table."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..config import KernelConfig, why_infeasible
from ..option import DTYPE_ALIASES, Option, numbers
from .cases import DTYPES, LAYOUTS, PRESETS, TOKEN_BYTES

FP8_FORMATS = tuple(name for name in TOKEN_BYTES if name)


def dtypes(text: str) -> list[str]:
    """ "bf16,float16" -> ["bfloat16", "float16"]."""
    names = [DTYPE_ALIASES.get(part, part) for part in text.split(",")]
    if unknown := [name for name in names if name not in DTYPES]:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join([*DTYPES, *DTYPE_ALIASES])}, got {unknown[0]!r}")
    return names


def kernel_config(text: str) -> KernelConfig:
    """A KernelConfig as JSON: '{"kernel": "rows"}'."""
    try:
        values = json.loads(text)
    except (RecursionError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"expected a KernelConfig as JSON, got {text!r:.80}: {error}") from None
    if not isinstance(values, dict):
        raise argparse.ArgumentTypeError(f"expected a KernelConfig as a JSON object, got {text!r:.80}")
    try:
        config = KernelConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if (reason := why_infeasible(config)) is not None:
        raise argparse.ArgumentTypeError(reason)
    return config


def seconds(text: str) -> float:
    """0.5 to 60."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.5 <= value <= 60:
        raise argparse.ArgumentTypeError(f"expected 0.5 to 60 seconds, got {text!r:.80}")
    return value


_PRESETS = ", ".join(f"{name} ({len(cases)} cases)" for name, cases in PRESETS.items())

RUN_OPTIONS = (
    Option("presets", f"{_PRESETS}; quick when nothing is chosen", "PRESET", repeatable=True),
    Option("--heads", "decode grid: numbers of heads, as 16,128", "H,..", numbers),
    Option("--batch", "grid: batch sizes", "B,..", numbers),
    Option("--kv-len", "grid: tokens per request", "L,..", numbers),
    Option("--page-size", "grid, or instead of the preset's page sizes", "P,..", numbers),
    Option("--dtype", "bf16, fp16; grid, or instead of the preset's", "T,..", dtypes),
    Option("--layout", "caches apart, or in one buffer of rows; grid, or instead of the preset's", choices=LAYOUTS),
    Option("--kv-format", "FP8 cache; grid, or instead of the preset's caches", choices=FP8_FORMATS),
    Option("--q-fp8", "e4m3 queries, with --kv-format"),
    Option("--config", "KernelConfig to time instead of the default", "JSON", kernel_config),
    Option("--batch-invariant", "time the batch-invariant mode"),
    Option("--sustained", "replay each for so long too: energy, W, clock (needs nvidia-ml-py)", "SECONDS", seconds),
    Option("--no-peers", "leave FlashInfer, FlashMLA, sgl-flash-mla and FlashAttention-3 out"),
    Option("--out", "write the record as JSON", "FILE", Path),
    Option("--compare", "print the ratio per cell of two records", "A B", Path, count=2),
)
REPORT_OPTIONS = (
    Option("--report", "write report.html, report.md and PNGs (needs matplotlib)", "DIR", Path),
    Option("--record", "report this record instead of a run; may be repeated", "FILE", Path, repeatable=True),
    Option("--baseline", "record that the report compares with", "FILE", Path),
)
OPTIONS = (*RUN_OPTIONS, *REPORT_OPTIONS)
