"""The options of tuning: `mla-cute tune` and tune/autotune.py are both made from these tables."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from ..kernels.registry import DTYPES
from ..option import DTYPE_ALIASES, Option, numbers, words
from ..tuned.file import TUNED_OPS
from . import recipes
from .search import POLICIES

_UNITS = {"s": 1, "m": 60, "h": 3600}


def parse_budget(text: str) -> float:
    """Seconds of "90", "90s", "10m", "1.5h"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if found is None or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"expected a time as 90s, 10m or 1.5h, got {text!r}")
    return float(found[1]) * _UNITS[found[2] or "s"]


def parse_dtype(text: str) -> str:
    name = DTYPE_ALIASES.get(text, text)
    if name not in DTYPES:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join([*DTYPE_ALIASES, *DTYPES])}, got {text!r}")
    return name


def parse_formats(text: str) -> list[str]:
    """ "none,tensor" -> ["", "tensor"]; "none" is a 16-bit cache."""
    return ["" if part in ("none", "") else part for part in text.split(",")]


# One table of a recipe: each option is the list of a key.
GRID_OPTIONS = (
    Option("--op", f"grid: {', '.join(TUNED_OPS)}", "OP,..", words),
    Option("--heads", "grid: query heads, as 16,128", "N,..", numbers),
    Option("--batch", "grid: requests; sparse: query tokens", "N,..", numbers),
    Option(
        "--kv-len",
        "grid: tokens per request or list; with --from-log also of calls that did not know it",
        "N,..",
        numbers,
    ),
    Option("--q-len", "grid: query tokens per request, prefill only", "N,..", numbers),
    Option("--lengths", "grid: uniform, ragged (decode; from kv_len / 32 to kv_len)", "L,..", words),
    Option("--page-size", "grid: tokens per page", "N,..", numbers),
    Option("--kv-format", "grid: none, tensor, token, group", "F,..", parse_formats),
    Option("--q-fp8", "grid: e4m3 queries, with FP8 caches"),
)
OPTIONS = (
    Option("--recipe", f"{', '.join(recipes.names())}, or a TOML file", "NAME|FILE", repeatable=True),
    Option("--from-log", "shapes recorded by MLA_CUTE_LOG_SHAPES", "FILE", Path),
    *GRID_OPTIONS,
    Option("--dtype", "bf16 or fp16", "T", parse_dtype, default="bf16"),
    Option("--policy", "what is chosen by: the GPU's time, or that and the host's", choices=POLICIES, default="graph"),
    Option("--budget", "as 10m: ends the run then", "TIME", parse_budget),
    Option("--out", "tuned file; default: this user's for this GPU", "FILE", Path),
    Option("--measurements", "raw data; default: beside the tuned file", "FILE", Path),
    Option("--report", "folder for what was won, Markdown and PNG", "DIR", Path),
    Option("--workers", "compiling processes; default: one per core, at most 16", "N", int),
    Option("--timeout", "seconds of silence after which a candidate is hung", "S", float, default=20.0),
    Option(
        "--diff", "print what B has other than A, two tuned files; 1 where there is something", "A B", Path, count=2
    ),
    Option("--dry-run", "print shapes and candidates, run nothing"),
)
REPORT_OPTIONS = (
    Option("file", "measurements file of an earlier run", "FILE", Path),
    Option("--out", "folder for Markdown and PNG", "DIR", Path),
)
