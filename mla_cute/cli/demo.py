"""`mla-cute demo`: the shapes that it shows, the facts of the compiled kernels, the command."""

import re
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer

from .. import gpu as gpu_facts
from ..bench import command, report, runner
from ..bench.cases import Case
from ..compile import jit, sass
from ..extras import install_command
from ..kernels import registry
from ..testing.cases import CaseSpec
from . import bench
from . import check as checking
from .screen import Wide, print_lines, print_prose, progress, say, show_table

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

GPU_COLUMNS = ("H", "B", "L", "page", "us+plan/61", "GB/s", "% read", "TFLOP/s", "% cuBLAS", "rel err")
_GPU_DROP = ("GB/s", "TFLOP/s", "% cuBLAS", "% read")
CPU_COLUMNS = (
    "H", "page", "dtype", "tokens per request", "rel err", "rounding alone", "lse err", "result",
)  # fmt: skip
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


def demo(
    kernels: Annotated[
        int | None, typer.Option(min=0, help="without a Hopper GPU: compile this many kernels at most")
    ] = None,
    wide: Wide = False,
) -> None:
    """Decode DeepSeek-V3 shapes: checked and timed on a Hopper GPU; elsewhere checked on the CPU and compiled."""
    why = gpu_facts.why_not_hopper()
    failed = _demo_cpu(why, kernels, wide) if why else _demo_gpu(wide)
    if failed:
        raise typer.Exit(1)


def _demo_gpu(wide: bool) -> bool:
    gpu = gpu_facts.facts()
    assert gpu is not None
    print_prose(
        f"Running on the GPU: {gpu.name} ({gpu.sm_count} SMs), a Hopper one. Kernels that are not in the cache are "
        "compiled first, each in up to 15 s of a core."
    )
    with progress("timing") as step:
        library = runner.Library.installed()
        record = command.time_cases(list(GPU_CASES), library, ([], {}), gpu, "demo", progress=step)
    rows = []
    for row in record["rows"]:
        rows.append((DEPLOYMENTS[row["case"]["num_heads"]], *bench.cells(row, GPU_COLUMNS, [])))
    columns = ("", *GPU_COLUMNS)
    title = "DeepSeek-V3 decode, bf16: time of one layer's attention"
    options: dict[str, Any] = {"drop": _GPU_DROP, "fold": bench.SHAPE_FOLD, "elsewhere": "`mla-cute bench --out FILE`"}
    show_table(title, columns, rows, wide=wide, **options)
    used = record["ceilings"]["used"]
    print_prose(
        f"Shares are of what this GPU reached in this run: {used['read_gbps']:.0f} GB/s read, "
        f"{used['cublas_bf16_tflops']:.0f} TFLOP/s in cuBLAS bf16. Every case was checked against the float32 "
        "reference. KV cold, planner amortised over 61 layers."
    )
    print_lines([text for text in report.summary(record) if text.startswith(("FAILED", "WRONG", "INCOMPLETE"))])
    return bool(record["failed"]) or not record["complete"]


def _demo_cpu(why: str, limit: int | None, wide: bool) -> bool:
    print_prose(
        f"No kernel runs here: {why}. Instead, (1) the public call on CPU tensors, which run the float32 reference, "
        "judged by an independent float64 computation; (2) the kernels compiled for sm_90a."
    )
    rows, failures, failed = [], [], False
    with progress("decoding on the CPU") as step:
        for done, spec in enumerate(CPU_SPECS):
            step(done, len(CPU_SPECS), str(spec))
            verdicts = list(checking.run_spec(spec, torch.device("cpu")))
            worst = max(
                (verdict for _, verdict in verdicts), key=lambda verdict: (not verdict.ok, verdict.relative_error)
            )
            failed |= not worst.ok
            lengths = ", ".join(map(str, spec.lengths))
            figures = (f"{worst.relative_error:.1e}", f"{worst.dtype_error:.1e}", f"{worst.lse_error:.1e}")
            result = "ok" if worst.ok else "FAILED"
            failures += [] if worst.ok else [f"FAILED {spec}: {worst.failures[0]}"]
            shape = (str(spec.num_heads), str(spec.page_size), str(spec.dtype).removeprefix("torch."), lengths)
            rows.append((*shape, *figures, result))
    options: dict[str, Any] = {"drop": ("rounding alone", "lse err"), "fold": ("tokens per request",)}
    show_table("1. mla_paged_decode on CPU tensors", CPU_COLUMNS, rows, text_columns=4, wide=wide, **options)
    print_lines(failures)
    variants = showcase_variants()[:limit]
    if variants:
        with progress("compiling") as step:
            kernel_rows, spilling = compile_rows(variants, step)
        options = {"drop": KERNEL_DROP, "fold": ("kernel", "of")}
        show_table("2. kernels compiled for sm_90a", KERNEL_COLUMNS, kernel_rows, text_columns=2, wide=wide, **options)
        if sass.find_nvdisasm() is None:
            say(f"instructions are not counted without nvdisasm: {install_command('nvidia-cuda-nvdisasm')}")
        if spilling:
            print_lines([f"FAILED {spilling} kernels spill registers"])
            failed = True
    else:
        say("2. no kernel compiled (--kernels 0)")
    return failed


def showcase_variants() -> list[tuple[Any, Any, Any]]:
    """bf16 decode (both kernels) for page sizes 64 and 1, its planner, prefill for page size 64: 20 s on two cores."""
    found = registry.variants(dtypes=("bfloat16",), page_sizes=(64, 1), ops=("decode",))
    plain = registry.PlannerKey(lengths="csr", batch_invariant=False)
    prefills = registry.variants(("bfloat16",), (64,), registry.KEEPS_KEYS, ("prefill",))
    prefill = [v for v in prefills if v[0] is registry.PREFILL]
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
