"""The typer application. Each command prints a table or two and exits with 0, 1 (something is wrong) or 2 (usage)."""

import argparse
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

import torch
import typer

from .. import gpu as gpu_facts
from ..bench import outputs, publish, report, runner
from ..bench.__main__ import dtypes, find_peers, given, kernel_config, numbers, select_cases
from ..bench.cases import PRESETS, TOKEN_BYTES, Case, PrefillCase
from ..bench.timing import CudaTimer
from ..tuning.command import parse_budget
from . import check as checking
from . import check_fp8 as checking_fp8
from . import demo as showing
from . import dev as developing
from . import export_solution as exporting
from . import info as facts
from . import sanitize as sanitizing
from . import soak as soaking
from . import tune as tuning
from .screen import console, progress, say, show_table, usage_error
from .watchdog import Watchdog, check_seconds

T = TypeVar("T")

app = typer.Typer(
    help="Multi-head Latent Attention kernels for Hopper GPUs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(tuning.app, name="tune")
app.add_typer(developing.app, name="dev")
app.command("export-solution")(exporting.export_solution)

# The columns of the bench that fit a terminal; the record holds all of them.
_BENCH_COLUMNS = (
    "H", "B", "L", "page", "dtype", "us", "plan", "us+plan/61", "chained",
    "GB/s", "% read", "TFLOP/s", "% cuBLAS", "x public", "rel err",
)  # fmt: skip
# What goes first in a narrow terminal. The shape, us and rel err, which holds the verdict, stay.
_BENCH_DROP = ("chained", "plan", "GB/s", "TFLOP/s", "% cuBLAS", "% read", "x public")
_SHAPE_FOLD = ("B", "L", "dtype")
_DEMO_COLUMNS = ("H", "B", "L", "page", "us+plan/61", "GB/s", "% read", "TFLOP/s", "% cuBLAS", "rel err")
_DEMO_DROP = ("GB/s", "TFLOP/s", "% cuBLAS", "% read")
# Cases multiply a seed, and torch's seeds have 64 bits.
_LARGEST_SEED = 2**40
_DEMO_CPU_COLUMNS = (
    "H", "page", "dtype", "tokens per request", "rel err", "rounding alone", "lse err", "result",
)  # fmt: skip


def _parsed(parse: Callable[[str], T], option: str, text: str | None) -> T | None:
    try:
        return parse(text) if text is not None else None
    except (argparse.ArgumentTypeError, ValueError) as error:
        usage_error(f"{option}: {error}")


def _check_output(option: str, path: pathlib.Path | None) -> None:
    try:
        if path is not None:
            outputs.check_file(path)
    except OSError as error:
        usage_error(f"{option}: {error}")


def _cells(row: dict[str, Any], columns: tuple[str, ...], peers: list[str]) -> tuple[str, ...]:
    by_name = dict(zip(report.columns(peers), report.cells(row, peers), strict=True))
    if "error" in row and "us" not in columns:
        by_name["us+plan/61"] = by_name["us"]
    return tuple(by_name[name] for name in (*columns, *peers))


def _print_lines(lines: list[str]) -> None:
    for text in lines:
        wrong = text.lstrip().startswith(("FAILED", "WRONG", "MISSED", "INCOMPLETE"))
        say(text, style="red" if wrong else None)


def _print_prose(text: str) -> None:
    """Folded at words."""
    console().print(text, markup=False, highlight=False)


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="print JSON, for a bug report")] = False) -> None:
    """Show GPU, versions, kernel cache, tuned files and the environment variables that matter."""
    found = facts.collect()
    if as_json:
        print(json.dumps(found, indent=1))
        return
    gpu, cache = found["gpu"], found["cache"]
    rows = []
    if gpu is not None:
        rows += [
            ("GPU", f"{gpu['name']}, compute capability {gpu['capability'][0]}.{gpu['capability'][1]}"),
            ("SMs, memory", f"{gpu['sm_count']}, {gpu['memory_bytes'] / 2**30:.1f} GiB"),
            ("driver", str(gpu["driver"])),
            ("clocks, at most", f"SM {gpu['max_sm_mhz']} MHz, memory {gpu['max_memory_mhz']} MHz"),
        ]
    rows.append(("kernels run here", "yes" if found["kernels_run_here"] else f"no: {found['why_not']}"))
    rows += [(name, version or "not installed") for name, version in found["versions"].items() if name != "cuda"]
    rows.append(("CUDA of torch", found["versions"]["cuda"] or "none"))
    if found["git"] is not None:
        rows.append(("commit", found["git"]["commit"] + (" with changes" if found["git"]["dirty"] else "")))
    where = cache["directory"] or "none"
    rows.append(("kernel cache", f"{where}: {cache['why']}" if "why" in cache else where))
    rows.append(("cached kernels", f"{cache['entries']}, {cache['bytes'] / 2**20:.1f} MiB"))
    rows.append(("tuned files", "\n".join(found["tuned"]) or "none, the default configuration is used"))
    show_table("mla-cute", ("", ""), rows, text_columns=2, fold=("",))
    variables = [(name, value if value is not None else "(not set)") for name, value in found["environment"].items()]
    show_table("environment", ("variable", "value"), variables, text_columns=2, fold=("value",))


@app.command()
def check(
    quick: Annotated[bool, typer.Option("--quick", help="a seventh of the cases, without long requests")] = False,
    seed: Annotated[int, typer.Option(help="other random numbers, same shapes")] = 0,
    timeout: Annotated[float, typer.Option(help="seconds one case may take on the GPU before it counts as hung")] = 180,
    fp8: Annotated[bool, typer.Option("--fp8", help="accuracy with FP8 caches instead, of kernel and format")] = False,
    as_json: Annotated[pathlib.Path | None, typer.Option("--json", help="with --fp8: write the record as JSON")] = None,
    soak: Annotated[str | None, typer.Option(help="random calls instead, for as long as this says: 5m")] = None,
    soak_seed: Annotated[int | None, typer.Option(help="one case of --soak again, by the seed it printed")] = None,
    sanitize: Annotated[
        bool, typer.Option("--sanitize", help="each kernel under compute-sanitizer instead, small inputs")
    ] = False,
    tool: Annotated[str, typer.Option(help=f"with --sanitize: {', '.join(sanitizing.TOOLS)}")] = "memcheck",
) -> None:
    """Run the correctness sweep: on the GPU if it is a Hopper one, else the CPU path. Exit status 1 on a failure."""
    kinds = {"--fp8": fp8, "--soak": soak is not None, "--soak-seed": soak_seed is not None, "--sanitize": sanitize}
    if not -_LARGEST_SEED <= seed <= _LARGEST_SEED:
        usage_error(f"--seed: expected at most {_LARGEST_SEED} either way, got {seed}")
    if soak_seed is not None and not -_LARGEST_SEED <= soak_seed <= _LARGEST_SEED:
        usage_error(f"--soak-seed: expected at most {_LARGEST_SEED} either way, got {soak_seed}")
    if tool not in sanitizing.TOOLS:
        usage_error(f"--tool: expected one of {', '.join(sanitizing.TOOLS)}, got {tool!r}")
    try:
        check_seconds(timeout)
    except ValueError as error:
        usage_error(f"--timeout: {error}")
    if len(asked := [name for name, is_asked in kinds.items() if is_asked]) > 1:
        usage_error(f"{' and '.join(asked)}: each is a check of its own")
    if asked and asked != ["--fp8"] and (quick or as_json is not None):
        usage_error(f"{'--quick' if quick else '--json'}: not an option of {asked[0]}")
    if sanitize:
        _sanitize(tool)
        return
    if soak is not None or soak_seed is not None:
        _soak(soak, soak_seed, seed, timeout)
        return
    if fp8:
        if quick:
            usage_error("--quick: the FP8 check has one size")
        _check_fp8(seed, timeout, as_json)
        return
    if as_json is not None:
        usage_error("--json: only the FP8 check writes a record, add --fp8")
    why = gpu_facts.why_not_hopper()
    device = torch.device("cpu") if why else torch.device("cuda", torch.cuda.current_device())
    if why:
        _print_prose(
            f"Checking the CPU path ({why}): what runs is the float32 reference, judged by an independent "
            "float64 computation; the kernels are not checked."
        )
    else:
        _print_prose(f"Checking the kernels on {torch.cuda.get_device_name(device)} against the float32 reference.")
    specs = checking.specs(quick, seed, on_gpu=not why)
    groups: dict[tuple[int, torch.dtype], checking.Group] = {}
    failures = []
    with progress("checking") as step, Watchdog(timeout, enabled=device.type == "cuda") as watchdog:
        for done, spec in enumerate(specs):
            step(done, len(specs), str(spec))
            watchdog.feed(str(spec))
            group = groups.setdefault((spec.page_size, spec.dtype), checking.Group(spec.page_size, spec.dtype))
            group.cases += 1
            for what, verdict in checking.run_spec(spec, device):
                group.verdicts.append(verdict)
                failures += [f"FAILED {spec}, {what}: {failure}" for failure in verdict.failures]
    rows = [group.cells() for group in groups.values()]
    title = f"{len(specs)} cases, seed {seed}, on {device.type}"
    show_table(title, checking.COLUMNS, rows, text_columns=2, drop=checking.DROP)
    _print_lines(failures[:20])
    if len(failures) > 20:
        say(f"... and {len(failures) - 20} more")
    if failures:
        raise typer.Exit(1)
    say("all correct")


def _soak(duration: str | None, soak_seed: int | None, seed: int, timeout: float) -> None:
    seconds = _parsed(parse_budget, "--soak", duration)
    if seconds is None:
        status = soaking.run(soak_seed or 0, cases=1, timeout=timeout, say=_print_line)
    else:
        status = soaking.run(seed or soaking.random_seed(), seconds=seconds, timeout=timeout, say=_print_line)
    if status:
        raise typer.Exit(status)


def _sanitize(tool: str) -> None:
    if (why := gpu_facts.why_not_hopper()) is not None:
        usage_error(f"nothing to sanitize: {why}")
    try:
        rows, status = sanitizing.run(tool=tool, say=_print_line)
    except (sanitizing.MissingTool, ValueError) as error:
        usage_error(error)
    options: dict[str, Any] = {"drop": ("kernel",), "fold": ("result",)}
    show_table(f"kernels under {tool}", sanitizing.COLUMNS, rows, text_columns=3, **options)
    if status:
        raise typer.Exit(status)


def _print_line(text: str) -> None:
    _print_lines([text])


def _check_fp8(seed: int, timeout: float, path: pathlib.Path | None) -> None:
    _check_output("--json", path)
    why = gpu_facts.why_not_hopper()
    device = torch.device("cpu") if why else torch.device("cuda", torch.cuda.current_device())
    if why:
        _print_prose(
            f"FP8 caches on the CPU ({why}): what runs is the float32 reference. Its own error is the rounding of the "
            "output; that of the formats is what it would be on a GPU, the kernels' aside."
        )
    else:
        _print_prose(f"FP8 caches on {torch.cuda.get_device_name(device)} against the float32 reference.")
    found, total = [], len(checking_fp8.specs())
    with progress("checking") as step, Watchdog(timeout, enabled=device.type == "cuda") as watchdog:
        watchdog.feed("the first case")
        for spec, row in checking_fp8.rows(device, seed):
            found.append(row)
            step(len(found), total, str(spec))
            watchdog.feed(f"the case after {spec}")
    title = "error of the kernel (on the dequantised cache) and of kernel and format (on the data before)"
    cells, drop = [checking_fp8.cells(row) for row in found], checking_fp8.DROP
    show_table(
        title,
        checking_fp8.COLUMNS,
        cells,
        text_columns=3,
        drop=drop,
        fold=("data",),
        elsewhere="the record (--json FILE)",
    )
    record = checking_fp8.record(found, device, seed, why)
    if path is not None:
        runner.write_json(path, record)
        say(f"record: {path}")
    _print_lines(
        [
            f"FAILED {spec}: {failure}"
            for spec, row in zip(checking_fp8.specs(), found, strict=True)
            for failure in row["failures"]
        ]
    )
    if record["failed"]:
        raise typer.Exit(1)
    say("all correct")


@app.command()
def demo(
    kernels: Annotated[
        int | None, typer.Option(min=0, help="without a Hopper GPU: compile this many kernels at most")
    ] = None,
) -> None:
    """Decode DeepSeek-V3 shapes: checked and timed on a Hopper GPU; elsewhere checked on the CPU and compiled."""
    why = gpu_facts.why_not_hopper()
    failed = _demo_cpu(why, kernels) if why else _demo_gpu()
    if failed:
        raise typer.Exit(1)


def _demo_gpu() -> bool:
    gpu = gpu_facts.facts()
    assert gpu is not None
    _print_prose(
        f"Running on the GPU: {gpu.name} ({gpu.sm_count} SMs), a Hopper one. Kernels that are not in the cache are "
        "compiled first, about 10 s each."
    )
    record = _run_bench(list(showing.GPU_CASES), runner.Library.installed(), ([], {}), gpu, "demo")
    rows = []
    for row in record["rows"]:
        rows.append((showing.DEPLOYMENTS[row["case"]["num_heads"]], *_cells(row, _DEMO_COLUMNS, [])))
    columns = ("", *_DEMO_COLUMNS)
    title = "DeepSeek-V3 decode, bf16: time of one layer's attention"
    show_table(title, columns, rows, drop=_DEMO_DROP, fold=_SHAPE_FOLD, elsewhere="`mla-cute bench --out FILE`")
    used = record["ceilings"]["used"]
    _print_prose(
        f"Shares are of what this GPU reached in this run: {used['read_gbps']:.0f} GB/s read, "
        f"{used['cublas_bf16_tflops']:.0f} TFLOP/s in cuBLAS bf16. Every case was checked against the float32 "
        "reference. KV cold, planner amortised over 61 layers."
    )
    _print_lines([text for text in report.summary(record) if text.startswith(("FAILED", "WRONG", "INCOMPLETE"))])
    return bool(record["failed"]) or not record["complete"]


def _demo_cpu(why: str, limit: int | None) -> bool:
    _print_prose(
        f"No kernel runs here: {why}. Instead, (1) the public call on CPU tensors, which run the float32 reference, "
        "judged by an independent float64 computation; (2) the kernels compiled for sm_90a."
    )
    rows, failures, failed = [], [], False
    with progress("decoding on the CPU") as step:
        for done, spec in enumerate(showing.CPU_SPECS):
            step(done, len(showing.CPU_SPECS), str(spec))
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
    show_table("1. mla_paged_decode on CPU tensors", _DEMO_CPU_COLUMNS, rows, text_columns=4, **options)
    _print_lines(failures)
    variants = showing.showcase_variants()[:limit]
    if variants:
        with progress("compiling") as step:
            kernel_rows, spilling = showing.compile_rows(variants, step)
        options = {"drop": showing.KERNEL_DROP, "fold": ("kernel", "of")}
        show_table("2. kernels compiled for sm_90a", showing.KERNEL_COLUMNS, kernel_rows, text_columns=2, **options)
        if spilling:
            _print_lines([f"FAILED {spilling} kernels spill registers"])
            failed = True
    else:
        say("2. no kernel compiled (--kernels 0)")
    return failed


@app.command()
def bench(
    presets: Annotated[
        list[str] | None, typer.Argument(help=f"{', '.join(PRESETS)}; quick when nothing is chosen")
    ] = None,
    heads: Annotated[str | None, typer.Option(help="grid: numbers of heads, as 16,128")] = None,
    batch: Annotated[str | None, typer.Option(help="grid: batch sizes")] = None,
    kv_len: Annotated[str | None, typer.Option(help="grid: tokens per request")] = None,
    page_size: Annotated[str | None, typer.Option(help="grid, or instead of the preset's page sizes")] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16; grid, or instead of the preset's")] = None,
    layout: Annotated[str, typer.Option(help="separate caches, or one fused 576-wide buffer")] = "separate",
    kv_format: Annotated[str | None, typer.Option(help="FP8 cache: tensor, token or group")] = None,
    q_fp8: Annotated[bool, typer.Option("--q-fp8", help="e4m3 queries, with --kv-format")] = False,
    config: Annotated[str | None, typer.Option(help="KernelConfig as JSON, instead of the default")] = None,
    batch_invariant: Annotated[bool, typer.Option("--batch-invariant", help="time the batch-invariant mode")] = False,
    no_peers: Annotated[bool, typer.Option("--no-peers", help="leave FlashInfer and FlashMLA out")] = False,
    out: Annotated[pathlib.Path | None, typer.Option(help="write the record as JSON")] = None,
    compare: Annotated[
        tuple[pathlib.Path, pathlib.Path] | None,
        typer.Option(metavar="A B", help="print the ratio per cell of two records"),
    ] = None,
    report_dir: Annotated[
        pathlib.Path | None,
        typer.Option("--report", metavar="DIR", help="write report.html, report.md and PNGs (needs matplotlib)"),
    ] = None,
    record_files: Annotated[
        list[pathlib.Path] | None,
        typer.Option("--record", metavar="FILE", help="report this record instead of a run; may be repeated"),
    ] = None,
    baseline: Annotated[
        pathlib.Path | None, typer.Option(metavar="FILE", help="record that the report compares with")
    ] = None,
) -> None:
    """Time a grid of decode shapes, or presets, with the ceilings of this GPU and installed peers in the same run."""
    options: dict[str, Any] = {"heads": heads, "batch": batch, "kv_len": kv_len, "page_size": page_size, "dtype": dtype}
    options |= {"layout": layout != "separate", "kv_format": kv_format, "q_fp8": q_fp8, "config": config}
    options |= {"batch_invariant": batch_invariant, "no_peers": no_peers, "out": out, "compare": compare}
    try:
        request = publish.Request.of(report_dir, record_files or [], baseline, given(presets or [], **options))
    except (ImportError, OSError, ValueError) as error:
        usage_error(error)
    if request is not None and request.records:
        try:
            print(request.write())
        except OSError as error:
            usage_error(f"--report: {error}")
        return
    if compare is not None:
        _compare(*compare)
        return
    grid = (
        _parsed(numbers, "--heads", heads),
        _parsed(numbers, "--batch", batch),
        _parsed(numbers, "--kv-len", kv_len),
        _parsed(numbers, "--page-size", page_size),
        _parsed(dtypes, "--dtype", dtype),
    )
    chosen = _parsed(kernel_config, "--config", config)
    try:
        if kv_format is not None and not (kv_format and kv_format in TOKEN_BYTES):
            raise ValueError(f"kv_format: expected one of tensor, token, group, got {kv_format!r}")
        cases = select_cases(presets or [], *grid, layout=layout, kv_format=kv_format, q_fp8=q_fp8)
    except (TypeError, ValueError) as error:
        usage_error(error)
    if (why := gpu_facts.why_not_hopper()) is not None:
        usage_error(f"nothing to time: {why}")
    _check_output("--out", out)
    gpu = gpu_facts.facts()
    assert gpu is not None
    peers = find_peers(not no_peers)
    library = runner.Library.installed(chosen, batch_invariant)
    record = _run_bench(cases, library, peers, gpu, " ".join(presets or []) or None)
    names = [peer.name for peer in peers[0]]
    rows = [_cells(row, _BENCH_COLUMNS, names) for row in record["rows"]]
    title, drop = f"paged MLA on {gpu.name}", (*_BENCH_DROP, *reversed(names), "us+plan/61")
    elsewhere = "the record (--out FILE)"
    show_table(title, (*_BENCH_COLUMNS, *names), rows, text_columns=0, drop=drop, fold=_SHAPE_FOLD, elsewhere=elsewhere)
    _print_lines(report.summary(record))
    try:
        if out is not None:
            runner.write_json(out, record)
            print(f"record: {out}")
        if request is not None:
            print(request.write(record))
    except OSError as error:
        usage_error(error)
    if record["failed"] or not record["complete"]:
        raise typer.Exit(1)


def _run_bench(
    cases: Sequence[Case | PrefillCase],
    library: runner.Library,
    peers: tuple[list[Any], dict[str, Any]],
    gpu: gpu_facts.GpuFacts,
    preset: str | None,
) -> dict[str, Any]:
    with progress("timing") as step:
        return runner.run(cases, timer=CudaTimer(), library=library, peers=peers, gpu=gpu, progress=step, preset=preset)


def _compare(a: pathlib.Path, b: pathlib.Path) -> None:
    try:
        rows, lines = report.compare(report.load(a), report.load(b))
    except (OSError, ValueError) as error:
        usage_error(error)
    drop = ("a chained", "b chained", "a plan", "b plan")
    options: dict[str, Any] = {"drop": drop, "fold": _SHAPE_FOLD, "elsewhere": "one of the records"}
    show_table("a / b", report.COMPARE_COLUMNS, rows, text_columns=0, **options)
    _print_lines(lines)


if __name__ == "__main__":
    sys.exit(app())
