"""What `mla-cute demo` shows: the shapes, and the facts of the compiled kernels."""

import re
from collections.abc import Callable
from typing import Any

import torch

from ..bench.cases import Case
from ..compile import jit
from ..kernels import registry
from ..testing.cases import CaseSpec

# DeepSeek-V3 has 128 heads: 16 per GPU with tensor parallelism over 8, all 128 with data parallelism.
DEPLOYMENTS = {16: "TP8", 128: "DP"}
GPU_CASES = (
    Case(16, 1, 8192),
    Case(16, 1, 32768),
    Case(16, 16, 8192),
    Case(16, 128, 8192),
    Case(16, 128, 8192, page_size=1),
    Case(128, 1, 8192),
    Case(128, 16, 8192),
    Case(128, 64, 8192),
    Case(128, 64, 8192, page_size=1),
)
CPU_SPECS = (
    CaseSpec(16, 64, torch.bfloat16, (0, 1, 63, 64, 65, 1000)),
    CaseSpec(16, 1, torch.bfloat16, (1, 700), cache_layout="split"),
    CaseSpec(128, 64, torch.bfloat16, (513, 64), q_layout="batch_strided"),
    CaseSpec(128, 16, torch.float16, (100, 3), cache_layout="padded", drift=60.0),
)

KERNEL_COLUMNS = (
    "kernel",
    "of",
    "registers",
    "spill bytes",
    "shared KiB",
    "threads",
    "HGMMA",
    "HMMA",
    "UTMALDG",
    "cp.async",
    "compile s",
)
# What goes first in a narrow terminal.
KERNEL_DROP = ("compile s", "threads", "cp.async", "UTMALDG", "HMMA", "HGMMA", "shared KiB", "of")


def showcase_variants() -> list[tuple[Any, Any, Any]]:
    """bf16 decode (both kernels) for page sizes 64 and 1, its planner, prefill for page size 64: 20 s on two cores."""
    found = registry.variants(dtypes=("bfloat16",), page_sizes=(64, 1), ops=("decode",))
    plain = registry.PlannerKey(lengths="csr", batch_invariant=False)
    prefill = [v for v in registry.variants(("bfloat16",), (64,), ops=("prefill",)) if v[0] is registry.PREFILL]
    return [variant for variant in found if variant[0] is not registry.PLANNER or variant[1] == plain] + prefill


def label(variant: tuple[Any, Any, Any]) -> str:
    """A variant in words: "decode_tile64 bfloat16 64"."""
    kernel, key, _ = variant
    if isinstance(key, registry.DecodeKey | registry.PrefillKey):
        loading = f"TMA boxes of {key.box_rows} rows" if key.box_rows else "cp.async gather"
        return f"{kernel.name} {key.dtype}, {loading}"
    return f"{kernel.name} ({getattr(key, 'lengths', key)})"


def compile_rows(
    variants: list[tuple[Any, Any, Any]], progress: Callable[[int, int, str], None]
) -> tuple[list[tuple[str, ...]], int]:
    """Compile for sm_90a and read the machine code: rows of KERNEL_COLUMNS, and how many kernels spill."""
    rows, spilling = [], 0
    for done, variant in enumerate(variants):
        progress(done, len(variants), f"compiling {label(variant)}")
        info = jit.compile_info(*variant)
        counts = info["instructions"] or {}
        seconds = "cached" if info["cached"] else f"{info['compile_seconds']:.1f}"
        spilling += info["spill_bytes"] > 0
        rows.append(
            (
                label(variant),
                ", ".join(kernel_name(kernel["name"]) for kernel in info["kernels"]),
                str(info["registers"]),
                str(info["spill_bytes"]),
                f"{info['smem_bytes'] / 1024:.1f}",
                str(info["threads"]),
                *(str(counts.get(name, "-")) for name in ("HGMMA", "HMMA", "UTMALDG", "LDGSTS")),
                seconds,
            )
        )
    return rows, spilling


def kernel_name(mangled: str) -> str:
    """The class in a mangled kernel name of the DSL: "..._mla_cutekernelsmergeMerge_object_at_..." -> "Merge"."""
    found = re.search(r"([A-Z][A-Za-z0-9]*)_object_at", mangled)
    return found.group(1) if found else mangled[:24]
